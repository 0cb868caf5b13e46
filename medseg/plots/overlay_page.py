"""One page of slices with the outlines of a result, for viewers that can show nothing but a picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from medseg.plots.slices import Plane, edge_letters, outline
from medseg.plots.style import Array, styled
from medseg.volume import Volume, reorient

WIDTH, HEIGHT = 1600, 1200
"""Pixels of the page."""
DETAILS = 3
"""Enlarged slices of each direction, beside the one that shows the whole field of view."""
CT_WINDOW = (-160.0, 240.0)
"""Soft tissue: level 40, width 400 HU."""
MARGIN_MM = 15.0
"""What an enlarged picture shows around the labels, at least."""
LEGEND_ROWS = 24
NAME = 24
"""Letters of a name in the legend."""
OBLIQUE = 0.26
"""A direction that leans more than 15 degrees towards another axis gets that letter too."""
_AMBER, _GREY = "#ffc23d", "#b8c0c8"
_HALO = [withStroke(linewidth=2.0, foreground="black")]
_TITLES = {2: "Axial", 1: "Coronal", 0: "Sagittal"}
_ENDS = ("RL", "AP", "SI")

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Structure:
    """A row of the legend.

    Attributes
    ----------
    value : in the mask.
    colour : #rrggbb.
    size : its volume in words.
    """

    value: int
    name: str
    colour: str
    size: str


@styled
def overlay_page(image: Volume, mask: Volume, structures: Sequence[Structure], *, footer: str) -> NDArray[np.uint8]:
    """Return the page (HEIGHT, WIDTH, 3) uint8.

    For each of the three directions nearest to axial, coronal and sagittal: the slice with the largest labelled area
    in the whole field of view, and enlarged slices where the structures are largest; lengths are true to scale. The
    patient's right is on the left of axial and coronal slices, anterior on the left of sagittal ones. Letters name
    the directions; a leaning series has two. Without labels the slices are spread over the volume.

    Parameters
    ----------
    image : (C, I, J, K) in mm, of which the first channel is shown: CT in the soft tissue window, else between the
        1st and the 99.5th percentile.
    mask : (1, I, J, K) label values on the same grid.
    structures : in the order of the legend; those beyond LEGEND_ROWS are counted, but still drawn.
    footer : one line of text. Nothing else that is written comes from outside of the arguments.
    """
    scene = _Scene.of(image, mask, structures)
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="black")
    _header(figure, scene, footer)
    _legend(figure, structures)
    for row, axis in enumerate((2, 1, 0)):
        _row(figure, scene, axis, top=0.945 - row * 0.305)
    canvas: Any = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box; the warning would quote it.
        warnings.filterwarnings("ignore", message="Glyph")
        canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


@dataclass(frozen=True)
class _Scene:
    """What is shown, with axes nearest to RAS.

    Attributes
    ----------
    image, mask : (I, J, K).
    colours : label value -> #rrggbb.
    box : of all labels with a margin; the whole volume where there is none.
    """

    image: Array
    mask: Array
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]
    colours: dict[int, str]
    window: tuple[float, float]
    box: Box

    @classmethod
    def of(cls, image: Volume, mask: Volume, structures: Sequence[Structure]) -> _Scene:
        turned, labels = reorient(image, "RAS"), reorient(mask, "RAS").array[0]
        colours = {row.value: row.colour for row in structures}
        window = CT_WINDOW if image.meta.get("Modality") == "CT" else _percentiles(turned.array[0])
        box = _box(np.isin(labels, list(colours)), turned.spacing)
        return cls(turned.array[0], labels, turned.affine, turned.spacing, colours, window, box)

    @property
    def whole(self) -> Box:
        """The box that leaves nothing out."""
        i, j, k = ((0, n) for n in self.image.shape)
        return i, j, k

    def letters(self, axis: int, sign: int) -> str:
        """Name the end of an axis: "R", or "RA" where it leans."""
        direction = sign * self.affine[:3, axis] / np.linalg.norm(self.affine[:3, axis])
        order = np.argsort(-np.abs(direction))
        near = [n for n in order if abs(direction[n]) > OBLIQUE][:2]
        return "".join(_ENDS[n][0 if direction[n] > 0 else 1] for n in near)

    def place(self, axis: int, index: int) -> str:
        """Name a slice by the distance of its centre from the origin of the patient's coordinates."""
        centre = [(n - 1) / 2 for n in self.image.shape]
        centre[axis] = index
        point = float((self.affine @ [*centre, 1])[axis])
        return f"{_ENDS[axis][0 if point >= 0 else 1]} {abs(point):.1f} mm"


def _percentiles(image: Array) -> tuple[float, float]:
    finite = image[np.isfinite(image)].astype(np.float64)
    low, high = np.percentile(finite, (1, 99.5)) if finite.size else (0.0, 1.0)
    if high <= low and finite.size:
        low, high = finite.min(), finite.max()
    return float(low), float(high if high > low else low + 1)


def _box(inside: NDArray[np.bool_], spacing: tuple[float, float, float]) -> Box:
    """Return start and stop along each axis."""
    if not inside.any():
        i, j, k = ((0, n) for n in inside.shape)
        return i, j, k
    ends = []
    for axis in range(3):
        found = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        length = (found[-1] + 1 - found[0]) * spacing[axis]
        more = int(np.ceil(max(MARGIN_MM, 0.15 * length) / spacing[axis]))
        ends.append((max(0, int(found[0]) - more), min(inside.shape[axis], int(found[-1]) + 1 + more)))
    i, j, k = ends
    return i, j, k


def largest_slice(inside: NDArray[np.bool_], axis: int) -> int:
    """Return the slice with the most marked voxels, the middle one without any."""
    areas = inside.sum(axis=tuple(a for a in range(3) if a != axis))
    return int(areas.argmax()) if areas.any() else inside.shape[axis] // 2


def telling_slices(mask: Array, values: Sequence[int], axis: int, count: int) -> list[int]:
    """Return up to `count` slices in order: where the largest structures are largest, then evenly spread ones."""
    inside = np.isin(mask, values)
    sizes = {value: int(np.count_nonzero(mask == value)) for value in values}
    found = sorted((v for v in values if sizes[v]), key=lambda v: -sizes[v])
    chosen = dict.fromkeys(largest_slice(mask == value, axis) for value in found[:count])
    filled = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
    extent = filled if filled.size else np.arange(mask.shape[axis])
    steps = (np.arange(count) + 0.5) / count
    spread = dict.fromkeys(int(extent[int(step * extent.size)]) for step in steps)
    # A slice next to one that is shown already tells little.
    far = [k for k in spread if all(abs(k - other) * 2 * count > extent.size for other in chosen)]
    return sorted([*chosen, *far, *(k for k in spread if k not in chosen and k not in far)][:count])


def _header(figure: Figure, scene: _Scene, footer: str) -> None:
    figure.text(0.01, 0.985, "RESEARCH USE ONLY", color=_AMBER, fontsize=17, fontweight="bold", va="top")
    figure.text(0.2, 0.981, "made by software, not reviewed by a person", color=_GREY, fontsize=11, va="top")
    low, high = scene.window
    figure.text(
        0.79, 0.981, f"W {high - low:.4g}  L {(high + low) / 2:.4g}", color=_GREY, fontsize=11, va="top", ha="right"
    )
    figure.text(0.01, 0.010, footer, color=_GREY, fontsize=10, va="bottom")


def _legend(figure: Figure, structures: Sequence[Structure]) -> None:
    axes = figure.add_axes((0.81, 0.04, 0.18, 0.91))
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(LEGEND_ROWS + 1, 0))
    for row, structure in enumerate(structures[:LEGEND_ROWS]):
        name = structure.name if len(structure.name) <= NAME else f"{structure.name[: NAME - 1]}…"
        axes.add_patch(Rectangle((0, row + 0.25), 0.07, 0.36, color=structure.colour))
        axes.text(0.1, row + 0.43, name, color="white", fontsize=11, va="center")
        axes.text(0.1, row + 0.80, structure.size, color=_GREY, fontsize=9.5, va="center")
    if (rest := len(structures) - LEGEND_ROWS) > 0:
        axes.text(0.1, LEGEND_ROWS + 0.5, f"and {rest} more", color=_GREY, fontsize=11, va="center")


def _row(figure: Figure, scene: _Scene, axis: int, *, top: float) -> None:
    """Draw the overview and the details of one direction."""
    width, height = 0.79 / (DETAILS + 1), 0.285
    values = list(scene.colours)
    overview = largest_slice(np.isin(scene.mask, values), axis)
    if scene.box == scene.whole:
        cells = [(index, scene.whole) for index in telling_slices(scene.mask, values, axis, DETAILS + 1)]
    else:
        slices = telling_slices(scene.mask, values, axis, DETAILS)
        cells = [(overview, scene.whole), *((index, scene.box) for index in slices)]
    for column, (index, box) in enumerate(cells):
        axes = figure.add_axes((0.005 + column * width, top - height, width - 0.008, height), facecolor="black")
        _cell(axes, scene, Plane(axis, index), box)
        title = f"{_TITLES[axis]}  {scene.place(axis, index)}"
        axes.set_title(title, color=_GREY, fontsize=10, loc="left", pad=3)
        if box != scene.box:
            _frame(axes, scene, Plane(axis, index))


def _cell(axes: Axes, scene: _Scene, plane: Plane, box: Box) -> None:
    """Draw one slice inside a box, with letters and a scale."""
    cut = tuple(slice(*ends) for ends in box)
    local = Plane(plane.axis, 0)
    at = tuple(slice(plane.index, plane.index + 1) if a == plane.axis else cut[a] for a in range(3))
    image, mask = local.cut(scene.image[at]), local.cut(scene.mask[at])
    low, high = scene.window
    grey = np.nan_to_num(np.clip((image.astype(np.float64) - low) / (high - low), 0, 1))
    down, across = scene.spacing[plane.row], scene.spacing[plane.column]
    axes.set_axis_off()
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, aspect=down / across, interpolation="bilinear")
    axes.set_anchor("NW")
    for value in np.unique(mask):
        if int(value) in scene.colours:
            outline(axes, mask == value, scene.colours[int(value)], 1.3)
    ends = [scene.letters(a, sign) for a in (plane.column, plane.row) for sign in (1, -1)]
    edge_letters(axes, ends)
    _scale(axes, image.shape, down, across)


def _frame(axes: Axes, scene: _Scene, plane: Plane) -> None:
    """Mark in the overview what the details enlarge."""
    (left, right), (low, high) = scene.box[plane.column], scene.box[plane.row]
    # Rows and columns of a picture run against their axes.
    corner = (scene.image.shape[plane.column] - right - 0.5, scene.image.shape[plane.row] - high - 0.5)
    style: dict[str, Any] = {
        "fill": False,
        "edgecolor": "white",
        "linewidth": 0.8,
        "linestyle": (0, (4, 3)),
        "alpha": 0.7,
    }
    axes.add_patch(Rectangle(corner, right - left, high - low, **style))


def _scale(axes: Axes, shape: tuple[int, ...], down: float, across: float) -> None:
    """Draw a bar of a round length at the lower left."""
    width = shape[1] * across
    length = max(n * 10.0**e for e in range(-3, 4) for n in (1, 2, 5) if n * 10.0**e <= max(width / 3, 2e-3))
    x, y = 0.04 * shape[1] - 0.5, shape[0] * 0.955 - 0.5
    axes.plot(
        [x, x + length / across], [y, y], color="white", linewidth=2.0, scalex=False, scaley=False, path_effects=_HALO
    )
    axes.annotate(
        f"{length:g} mm", (x, y), (0, 4), textcoords="offset points", color="white", fontsize=8, path_effects=_HALO
    )
