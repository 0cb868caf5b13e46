"""Training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medseg.files import write_atomically
from medseg.plots.style import FAINT, INK, PALETTE, Array, png, styled


@styled
def curves_png(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss and learning rate, and the validation Dice of each label, against the step; write a PNG.

    Parameters
    ----------
    rows : in any order: training rows with keys step, loss, lr (and seconds), validation rows with keys step and
        dice ({label: value}). A row may be both. Values that are not finite leave a gap.
    path : the PNG, written atomically.
    """
    training = [row for row in rows if row.get("loss") is not None]
    validation = [row for row in rows if row.get("dice")]
    figure = Figure(figsize=(8, 6 if validation else 3.4), layout="constrained")
    axes = figure.subplots(2 if validation else 1, 1, sharex=True, squeeze=False)[:, 0]
    _loss_panel(axes[0], training)
    if validation:
        _dice_panel(axes[1], validation)
    axes[-1].set_xlabel("step")
    seconds = max((float(row["seconds"]) for row in rows if row.get("seconds") is not None), default=None)
    if seconds is not None:
        figure.suptitle(f"{seconds / 60:.1f} minutes", x=0.99, ha="right", fontsize=9, color=INK)
    _write(path, png(figure))


def _write(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write)


def _loss_panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    step = [row["step"] for row in rows]
    loss = np.array([row["loss"] for row in rows], dtype=float)
    axes.plot(step, loss, color=FAINT, linewidth=0.8, marker="." if len(rows) < 3 else None)
    smooth = _running_mean(loss, max(1, len(loss) // 25))
    axes.plot(step, smooth, color=PALETTE[1], linewidth=1.8, label="loss")
    axes.set_ylabel("loss")
    if any(row.get("lr") is not None for row in rows):
        rate = axes.twinx()
        rate.grid(visible=False)
        rate.plot(
            step,
            [np.nan if row.get("lr") is None else row["lr"] for row in rows],
            color=PALETTE[0],
            linewidth=1,
            linestyle="--",
        )
        rate.set_ylabel("learning rate", color=PALETTE[0])
        rate.spines["right"].set_visible(True)


def _running_mean(values: Array, width: int) -> Array:
    """Return the mean of the last `width` values at each place, of those that are finite."""
    finite = np.isfinite(values)
    total = np.cumsum(np.concatenate([[0.0], np.where(finite, values, 0)]))
    count = np.cumsum(np.concatenate([[0], finite]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    found = count[end] - count[start]
    return np.asarray(np.where(found > 0, (total[end] - total[start]) / np.maximum(found, 1), np.nan))


def _dice_panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    labels = list(dict.fromkeys(label for row in rows for label in row["dice"]))
    for number, label in enumerate(labels):
        points = [(row["step"], row["dice"][label]) for row in rows if row["dice"].get(label) is not None]
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=PALETTE[number % len(PALETTE)],
            marker="o",
            markersize=3,
            linewidth=1.4,
            label=label,
        )
    axes.set_ylim(0, 1)
    axes.set_ylabel("validation Dice")
    axes.legend(loc="lower right", ncols=2 if len(labels) > 4 else 1)
