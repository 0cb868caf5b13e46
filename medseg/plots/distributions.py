"""Plots of a study report: distributions, agreement of volumes, paired differences. All return SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from medseg.plots.style import FAINT, INK, styled, svg


@dataclass(frozen=True)
class Series:
    """Numbers of one label: `values`, or pairs of `reference` and `values`; `marked` points are shown as crosses."""

    name: str
    color: str
    values: Sequence[float]
    reference: Sequence[float] = ()
    marked: Sequence[bool] = ()


def _scatter(axes: Axes, x: ArrayLike, y: ArrayLike, color: str, marked: Sequence[bool]) -> None:
    across, up = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    crossed = np.array(marked, dtype=bool) if len(marked) else np.zeros(across.size, dtype=bool)
    axes.scatter(across[~crossed], up[~crossed], s=14, color=color, alpha=0.65, linewidths=0, zorder=3)
    axes.scatter(across[crossed], up[crossed], s=22, color=color, marker="x", linewidths=1.3, zorder=3)


@styled
def strip_svg(series: Sequence[Series], *, label: str, limits: tuple[float, float] | None = None) -> str:
    """Draw one row per series: every value as a point, over a box of the quartiles with the median.

    Whiskers reach the furthest value within 1.5 interquartile ranges. Points are spread by their order, not at random.
    """
    figure = Figure(figsize=(8, 0.9 + 0.62 * len(series)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(series):
        values = np.asarray(row.values, dtype=float)
        if values.size == 0:
            continue
        box = {"facecolor": "#eef1f4", "edgecolor": FAINT}
        plain = {"color": FAINT}
        axes.boxplot(
            [values],
            positions=[place],
            orientation="horizontal",
            widths=0.56,
            showfliers=False,
            patch_artist=True,
            boxprops=box,
            whiskerprops=plain,
            capprops=plain,
            medianprops={"color": INK, "linewidth": 1.6},
        )
        _scatter(axes, row.values, place + _spread(values.size), row.color, row.marked)
    axes.set_yticks(range(len(series)), [f"{row.name}  (n={len(row.values)})" for row in series])
    axes.set_ylim(len(series) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    if limits is not None:
        margin = 0.02 * (limits[1] - limits[0])
        axes.set_xlim(limits[0] - margin, limits[1] + margin)
    axes.set_xlabel(label)
    return svg(figure)


def _spread(count: int) -> np.ndarray:
    """Return offsets within ±0.2 that look scattered and are the same every time (golden-ratio sequence)."""
    return ((np.arange(count) * 0.6180339887) % 1 - 0.5) * 0.4


@styled
def bland_altman_svg(series: Series, *, unit: str) -> str:
    """Draw value - reference against their mean, with the bias and the 95 % limits of agreement (bias ± 1.96 SD).

    Source: Bland & Altman, Lancet 1986;1:307-310.
    """
    values, reference = np.asarray(series.values, dtype=float), np.asarray(series.reference, dtype=float)
    difference = values - reference
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, (values + reference) / 2, difference, series.color, series.marked)
    axes.axhline(0, color=FAINT, linewidth=0.8)
    bias = float(difference.mean())
    lines = [("bias", bias, "-")]
    if difference.size > 1:
        half = 1.96 * float(difference.std(ddof=1))
        lines += [("+1.96 SD", bias + half, "--"), ("−1.96 SD", bias - half, "--")]
    for name, height, style in lines:
        axes.axhline(height, color=INK, linewidth=1, linestyle=style)
        text = f"{name}\n{height:+.3g}".replace("-", "−")
        axes.annotate(text, (1.02, height), xycoords=("axes fraction", "data"), ha="left", va="center", fontsize=8)
    axes.margins(y=0.15)
    axes.set_xlabel(f"mean of predicted and reference ({unit})")
    axes.set_ylabel(f"predicted − reference ({unit})")
    axes.set_title(series.name, loc="left")
    return svg(figure)


@styled
def agreement_svg(series: Series, *, unit: str) -> str:
    """Draw value against reference with the line of identity; both axes have the same scale."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    both = [*series.values, *series.reference]
    low, high = min(both), max(both)
    margin = 0.06 * (high - low) or 1.0
    ends = (max(0.0, low - margin), high + margin)
    axes.plot(ends, ends, color=FAINT, linewidth=1, linestyle="--", zorder=1)
    _scatter(axes, series.reference, series.values, series.color, series.marked)
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_aspect("equal")
    axes.set_xlabel(f"reference ({unit})")
    axes.set_ylabel(f"predicted ({unit})")
    axes.set_title(series.name, loc="left")
    return svg(figure)


@styled
def differences_svg(
    series: Sequence[Series], intervals: Mapping[str, tuple[float, float, float]], *, label: str
) -> str:
    """Draw paired differences, one row per series, each with its mean and interval (low, mean, high) where known."""
    figure = Figure(figsize=(8, 0.9 + 0.62 * len(series)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    for place, row in enumerate(series):
        _scatter(axes, row.values, place + 0.1 + _spread(len(row.values)) * 0.8, row.color, row.marked)
        if row.name in intervals:
            low, mean, high = intervals[row.name]
            axes.plot([low, high], [place - 0.28] * 2, color=INK, linewidth=2, solid_capstyle="butt", zorder=4)
            axes.plot([mean], [place - 0.28], marker="D", markersize=5, color=INK, zorder=4)
    axes.set_yticks(range(len(series)), [f"{row.name}  (n={len(row.values)})" for row in series])
    axes.set_ylim(len(series) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label)
    return svg(figure)
