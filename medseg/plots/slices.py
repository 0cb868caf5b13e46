"""Slices of images with labels over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from medseg.plots.style import Array, Colours, png, styled


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


@styled
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
    return png(figure)


@styled
def three_planes_png(
    image: Array,
    mask: Array | None,
    spacing: tuple[float, float, float],
    colours: Colours,
    *,
    reference: Array | None = None,
    title: str = "",
    letters: bool = True,
) -> bytes:
    """Return the PNG of the axial, coronal and sagittal plane through the middle of what is labelled.

    Parameters
    ----------
    image, mask, reference : (I, J, K) with axes RAS (see medseg.volume.reorient); one channel.
    spacing : (I, J, K) in mm.
    reference : drawn as a white outline; it also decides where the planes lie, unless it is empty.
    letters : whether directions of the patient stand at the borders.

    The patient's right is on the left of the axial and the coronal plane, anterior on the left of the sagittal one.
    Without labels the planes go through the middle of the volume. A picture, one voxel deep, has one plane.
    """
    where = [labels for labels in (reference, mask) if labels is not None and np.isin(labels, list(colours)).any()]
    centre = _centre(np.isin(where[0], list(colours))) if where else tuple(n // 2 for n in image.shape)
    planes = [Plane(axis, centre[axis]) for axis in (2, 1, 0)]
    planes = [p for p in planes if 1 not in (image.shape[p.row], image.shape[p.column])] or planes
    widths = [image.shape[p.column] * spacing[p.column] for p in planes]
    heights = [image.shape[p.row] * spacing[p.row] for p in planes]
    inches = 2.8
    scale = inches / max(heights)
    figure = Figure(figsize=(sum(widths) * scale + 0.2, inches + 0.3), layout="constrained", facecolor="black")
    grid = figure.subplots(1, len(planes), width_ratios=widths, squeeze=False)
    for axes, plane in zip(grid[0], planes, strict=True):
        labels, outline = (None if volume is None else plane.cut(volume) for volume in (mask, reference))
        distance = (spacing[plane.row], spacing[plane.column])
        _draw_slice(axes, plane.cut(image), labels, outline, colours, distance)
        if letters:
            edge_letters(axes, plane.letters)
    if title:
        figure.suptitle(title, color="white", fontsize=9)
    return png(figure)


@dataclass(frozen=True)
class Plane:
    """One plane of an RAS volume as it is shown: rows and columns both run against their axis.

    Right, anterior and superior are the positive ends of I, J and K; they are shown on the left and at the top.
    """

    axis: int
    index: int

    @property
    def column(self) -> int:
        """The axis from left to right."""
        return 1 if self.axis == 0 else 0

    @property
    def row(self) -> int:
        """The axis from top to bottom."""
        return 1 if self.axis == 2 else 2

    @property
    def letters(self) -> str:
        """Left, right, top and bottom of the picture."""
        return ("RL", "AP", "SI")[self.column] + ("RL", "AP", "SI")[self.row]

    def cut(self, volume: Array) -> Array:
        """Return (rows, columns) of a volume (I, J, K)."""
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
            outline(axes, mask == value, colour, 1.0)
    if reference is not None:
        for value in colours:
            outline(axes, reference == value, "white", 1.1)


def outline(axes: Axes, inside: NDArray[np.bool_], colour: str, width: float) -> None:
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


def edge_letters(axes: Axes, letters: Sequence[str]) -> None:
    """Write the letters for left, right, top and bottom at the borders."""
    middle, low, high = 0.5, 0.02, 0.98
    places = (
        (low, middle, "left", "center"),
        (high, middle, "right", "center"),
        (middle, high, "center", "top"),
        (middle, low, "center", "bottom"),
    )
    style: dict[str, Any] = {"color": "#ffd54f", "fontsize": 8, "fontweight": "bold"}
    style["path_effects"] = [withStroke(linewidth=1.6, foreground="black")]
    for letter, (x, y, across, along) in zip(letters, places, strict=True):
        axes.text(x, y, letter, transform=axes.transAxes, ha=across, va=along, **style)
