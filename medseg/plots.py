"""Every picture that medseg draws: the one door to matplotlib.

Pictures come back as bytes (PNG) or text (SVG), the same bytes for the same input and library versions: no dates, no
random ids, no global figure state. Planes are shown as a radiologist reads them: the patient's right on the left.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray

from medseg.files import write_atomically

Array = NDArray[Any]
Colours = Mapping[int, str]
"""Label value -> #rrggbb."""

PALETTE = ("#e6550d", "#1f78b4", "#2ca25f", "#c51b8a", "#e6ab02", "#5e4fa2", "#17becf", "#a6761d", "#8c564b", "#66a61e")
INK = "#22303c"
FAINT = "#9aa5b1"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "medseg",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e8ec",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
}

P = ParamSpec("P")
R = TypeVar("R")


def _styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw with our style, untouched by the user's matplotlibrc."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return wrapper


def colours_for(values: Iterable[int], given: Mapping[int, str | None] | None = None) -> dict[int, str]:
    """Return a colour for every label value except 0: the one given, else the next of the palette."""
    chosen = {} if given is None else given
    foreground = [value for value in values if value != 0]
    return {v: chosen.get(v) or PALETTE[n % len(PALETTE)] for n, v in enumerate(foreground)}


def _png(figure: Figure, *, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


# --- training curves ---------------------------------------------------------------------------------------------


@_styled
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
    _write(path, _png(figure))


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


# --- slices ------------------------------------------------------------------------------------------------------


def slice_rgb(image2d: Array, mask2d: Array | None, colours: Colours, *, opacity: float = 0.4) -> NDArray[np.uint8]:
    """Return a picture (rows, columns, 3) uint8 of a slice, its labels painted over it.

    Parameters
    ----------
    image2d : (rows, columns), first row at the top; shown between its 1st and 99.5th percentile.
    mask2d : (rows, columns) label values, or None; values without a colour are not painted.
    """
    grey = (_window(image2d)[..., None] * np.ones(3)).astype(np.float64)
    if mask2d is not None:
        for value, colour in colours.items():
            inside = mask2d == value
            grey[inside] = (1 - opacity) * grey[inside] + opacity * np.array(to_rgba(colour)[:3])
    return np.rint(grey * 255).astype(np.uint8)


@_styled
def overlay_png(
    image2d: Array,
    mask2d: Array | None,
    colours: Colours,
    *,
    reference2d: Array | None = None,
    spacing: tuple[float, float] = (1.0, 1.0),
    inches: float = 3.0,
) -> bytes:
    """Return the PNG of a slice: labels painted and outlined, the reference as a white outline.

    Parameters
    ----------
    image2d, mask2d, reference2d : (rows, columns), first row at the top.
    colours : label value -> #rrggbb.
    spacing : (row, column) distance, so that the picture has the right aspect.
    inches : length of the longer side at 110 dots per inch.
    """
    height, width = image2d.shape[0] * spacing[0], image2d.shape[1] * spacing[1]
    scale = inches / max(height, width)
    figure = Figure(figsize=(max(width * scale, 0.2), max(height * scale, 0.2)))
    axes = figure.add_axes((0, 0, 1, 1))
    _draw_slice(axes, image2d, mask2d, reference2d, colours, spacing)
    return _png(figure)


@_styled
def three_planes_png(
    image: Array,
    mask: Array | None,
    spacing: tuple[float, float, float],
    colours: Colours,
    *,
    reference: Array | None = None,
    title: str = "",
) -> bytes:
    """Return the PNG of the axial, coronal and sagittal plane through the middle of what is labelled.

    Parameters
    ----------
    image, mask, reference : (I, J, K) with axes RAS (see medseg.volume.reorient); one channel.
    spacing : (I, J, K) in mm.
    reference : drawn as a white outline; it also decides where the planes lie, unless it is empty.

    The patient's right is on the left of the axial and the coronal plane, anterior on the left of the sagittal one.
    Without labels the planes go through the middle of the volume.
    """
    where = [labels for labels in (reference, mask) if labels is not None and np.isin(labels, list(colours)).any()]
    centre = _centre(np.isin(where[0], list(colours))) if where else tuple(n // 2 for n in image.shape)
    planes = [_Plane(axis, centre[axis]) for axis in (2, 1, 0)]
    widths = [image.shape[p.column] * spacing[p.column] for p in planes]
    heights = [image.shape[p.row] * spacing[p.row] for p in planes]
    inches = 2.8
    scale = inches / max(heights)
    figure = Figure(figsize=(sum(widths) * scale + 0.2, inches + 0.3), layout="constrained", facecolor="black")
    grid = figure.subplots(1, 3, width_ratios=widths)
    for axes, plane in zip(grid, planes, strict=True):
        labels, outline = (None if volume is None else plane.cut(volume) for volume in (mask, reference))
        distance = (spacing[plane.row], spacing[plane.column])
        _draw_slice(axes, plane.cut(image), labels, outline, colours, distance)
        _letters(axes, plane.letters)
    if title:
        figure.suptitle(title, color="white", fontsize=9)
    return _png(figure)


@dataclass(frozen=True)
class _Plane:
    """One plane of an RAS volume as it is shown: rows and columns both run against their axis.

    Right, anterior and superior are the positive ends of I, J and K; they are shown on the left and at the top.
    """

    axis: int
    index: int

    @property
    def column(self) -> int:
        return 1 if self.axis == 0 else 0

    @property
    def row(self) -> int:
        return 1 if self.axis == 2 else 2

    @property
    def letters(self) -> str:
        """Left, right, top and bottom of the picture."""
        return ("RL", "AP", "SI")[self.column] + ("RL", "AP", "SI")[self.row]

    def cut(self, volume: Array) -> Array:
        return np.asarray(volume.take(self.index, axis=self.axis).T[::-1, ::-1])


def _centre(inside: NDArray[np.bool_]) -> tuple[int, ...]:
    """Return for each axis the labelled slice that is nearest to the centre of mass."""
    found = np.nonzero(inside)
    return tuple(int(c[np.argmin(np.abs(c - c.mean()))]) for c in found)


def _window(image: Array) -> NDArray[np.float64]:
    """Scale to 0..1 between the 1st and the 99.5th percentile of the finite values."""
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (1, 99.5)) if finite.size else (0.0, 0.0)
    if high <= low:
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return np.clip(np.nan_to_num(scaled), 0, 1)


def _draw_slice(
    axes: Axes,
    image: Array,
    mask: Array | None,
    reference: Array | None,
    colours: Colours,
    spacing: tuple[float, float],
) -> None:
    axes.set_axis_off()
    aspect = spacing[0] / spacing[1]
    axes.imshow(slice_rgb(image, mask, colours), aspect=aspect, interpolation="nearest")
    if mask is not None:
        for value, colour in colours.items():
            _outline(axes, mask == value, colour, 1.0)
    if reference is not None:
        for value in colours:
            _outline(axes, reference == value, "white", 1.1)


def _outline(axes: Axes, inside: NDArray[np.bool_], colour: str, width: float) -> None:
    """Draw the border along the edges of the voxels, so that no smoothing hides a wrong voxel."""
    padded = np.pad(inside, 1)
    rows, columns = np.nonzero(padded[1:, :] != padded[:-1, :])
    across = [((c - 1.5, r - 0.5), (c - 0.5, r - 0.5)) for r, c in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(padded[:, 1:] != padded[:, :-1])
    down = [((c - 0.5, r - 1.5), (c - 0.5, r - 0.5)) for r, c in zip(rows, columns, strict=True)]
    if segments := across + down:
        x = np.array([(a[0], b[0], np.nan) for a, b in segments]).ravel()
        y = np.array([(a[1], b[1], np.nan) for a, b in segments]).ravel()
        axes.plot(x, y, color=colour, linewidth=width, solid_capstyle="round", scalex=False, scaley=False)


def _letters(axes: Axes, letters: str) -> None:
    """Write the letters for left, right, top and bottom at the borders."""
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"))
    places += ((0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))
    style: dict[str, Any] = {"color": "#ffd54f", "fontsize": 8, "fontweight": "bold"}
    for letter, (x, y, across, along) in zip(letters, places, strict=True):
        axes.text(x, y, letter, transform=axes.transAxes, ha=across, va=along, **style)
