"""POSTPROCESS: what is done to a mask after the network, step by step, in mm and mm³.

A row says what a label should become, given where it is; one function puts that into the label map, so that no row can
touch another label: what a label loses becomes background, and it gains only background and the labels that the step
names in `over`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.bundle import PostStep
from medseg.errors import BundleError, ConfigError
from medseg.registry import Registry
from medseg.spec import Spec
from medseg.volume import Volume

Present = NDArray[np.bool_]
Box = tuple[slice, ...]
FULL = np.ones((3, 3, 3), bool)
"""Voxels that share a corner are one object; the background between is then joined by faces only."""
ROUNDING = 1 + 1e-9
"""Of a radius: a voxel exactly this far away is within it, whatever the last digit of the spacing."""


@dataclass(frozen=True)
class Grid:
    """What a row knows of the voxels.

    Attributes
    ----------
    spacing : along I, J, K in mm (pixels for pictures).
    voxel : volume of a voxel in mm³ (pixels).
    slices : the axis across which a reader looks at slices: the one of the largest spacing, of equal ones the one
        nearest to head-foot.
    """

    spacing: tuple[float, float, float]
    voxel: float
    slices: int


@dataclass(frozen=True)
class Operation:
    """How one kind of step changes one object.

    Attributes
    ----------
    title : as a person reads it.
    function : (present (I, J, K) bool, not empty, with a margin of `reach` voxels inside the image), Grid, size ->
        (I, J, K) bool; it does not change what it is given.
    size : what `PostStep.size` means; "" where the step has none (0).
    reach : (size, Grid) -> voxels along each axis by which the object may grow.
    """

    title: str
    function: Callable[[Present, Grid, float], Present]
    size: str = ""
    reach: Callable[[float, Grid], tuple[int, int, int]] = lambda size, grid: (0, 0, 0)


def largest_component(present: Present, grid: Grid, size: float = 0.0) -> Present:
    """Keep the largest connected object (26 neighbours); of equal ones the first in memory order."""
    parts, sizes = _objects(present)
    return np.asarray(parts == 1 + int(sizes.argmax()))


def min_volume(present: Present, grid: Grid, size: float) -> Present:
    """Remove connected objects (26 neighbours) smaller than `size` mm³; one of exactly this size stays."""
    parts, sizes = _objects(present)
    kept = np.concatenate([[False], sizes * grid.voxel * ROUNDING >= size])
    return np.asarray(kept[parts])


def fill_holes(present: Present, grid: Grid, size: float = 0.0) -> Present:
    """Fill cavities that no path over faces joins to the outside; with a `size`, only those up to `size` mm³."""
    return _filled(present, (0, 1, 2), size / grid.voxel)


def fill_slices(present: Present, grid: Grid, size: float = 0.0) -> Present:
    """Fill holes slice by slice, joined over edges within the slice; with a `size`, only those up to `size` mm²."""
    axes = tuple(axis for axis in range(3) if axis != grid.slices)
    return _filled(present, axes, size * grid.spacing[grid.slices] / grid.voxel)


def _filled(present: Present, axes: tuple[int, ...], largest: float) -> Present:
    """Fill what no path along `axes` joins to the border across them; `largest` in voxels, 0 for any."""
    from scipy.ndimage import label

    # Not binary_fill_holes: it erodes from outside, which takes several times longer than to number the background.
    near = np.zeros((3, 3, 3), bool)
    near[1, 1, 1] = True
    for axis in axes:
        np.moveaxis(near, axis, 0)[:, 1, 1] = True
    parts, count = label(~present, structure=near)
    hole = np.ones(count + 1, bool)
    hole[0] = False
    for axis in axes:
        across = np.moveaxis(parts, axis, 0)
        hole[across[0]] = hole[across[-1]] = False
    if largest:
        hole &= np.bincount(parts.ravel(), minlength=count + 1) <= largest * ROUNDING
    return np.asarray(present | hole[parts])


def close(present: Present, grid: Grid, size: float) -> Present:
    """Close gaps with a ball of radius `size` mm, by distances: the ball is round whatever the voxel.

    The image is taken to go on empty beyond its border.
    """
    from scipy.ndimage import distance_transform_edt

    margin = [(n, n) for n in _ball(size, grid)]
    padded = np.pad(present, margin)
    grown = distance_transform_edt(~padded, sampling=grid.spacing) <= size * ROUNDING
    # A frame that is never reached: beyond the padding all is empty.
    shrunk = distance_transform_edt(np.pad(grown, 1), sampling=grid.spacing)[1:-1, 1:-1, 1:-1] > size * ROUNDING
    inner = tuple(slice(a, n - b) for (a, b), n in zip(margin, padded.shape, strict=True))
    return np.asarray(shrunk[inner]) | present


def _ball(size: float, grid: Grid) -> tuple[int, int, int]:
    i, j, k = (int(size * ROUNDING / step) + 1 for step in grid.spacing)
    return i, j, k


def _objects(present: Present) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the number of each voxel's object (0: none) and the voxels of each object, the first being 1."""
    from scipy.ndimage import label

    parts, _ = label(present, structure=FULL)
    return parts, np.bincount(parts.ravel())[1:]


POSTPROCESS: Registry[Operation] = Registry(
    "post-processing steps",
    {
        "largest_component": Operation("keep the largest object", largest_component),
        "min_volume": Operation("remove objects below a volume", min_volume, size="mm³"),
        "fill_holes": Operation("fill cavities", fill_holes, size="mm³ at most (0: any)"),
        "fill_slices": Operation("fill holes in slices", fill_slices, size="mm² at most (0: any)"),
        "close": Operation("close gaps", close, size="mm", reach=_ball),
    },
)


def require_steps(steps: Sequence[PostStep], spec: Spec) -> None:
    """Raise BundleError where a step is of an unknown kind, or names a label that the spec does not have."""
    for step in steps:
        try:
            row = POSTPROCESS[step.kind]
        except ConfigError as error:
            raise BundleError(f"post-processing of the model: {error}; a newer medseg may know it") from error
        if strange := sorted({*step.labels, *step.over} - set(spec.foreground)):
            raise BundleError(
                f"post-processing of the model: {step.kind} is for {', '.join(strange)}, the model has the labels "
                f"{', '.join(spec.foreground)}"
            )
        if step.size and not row.size:
            raise BundleError(f"post-processing of the model: {step.kind} has no size, {step.size:g} is given")


def postprocess(mask: Volume, steps: Sequence[PostStep], spec: Spec) -> Volume:
    """Apply steps in their order to a label map.

    Parameters
    ----------
    mask : (1, I, J, K) label values of `spec`; it is not changed. On a sheared grid, distances of "close" are those of
        the upright grid of the same spacing.

    Returns
    -------
    Volume
        The same dtype and grid; the very same object where there is no step. A label that is absent stays absent.
    """
    if not steps:
        return mask
    array = mask.array[0].copy()
    grid = grid_of(mask)
    boxes = _boxes(array, spec)
    for step in steps:
        found = [boxes[name] for name in step.labels if name in boxes]
        if not found:
            continue
        row = POSTPROCESS[step.kind]
        box = _joined(found, row.reach(step.size, grid), array.shape)
        _change(array[box], step, row, grid, spec)
        boxes |= {name: box for name in step.labels if name in boxes}
    return mask.with_array(array[None])


def grid_of(volume: Volume) -> Grid:
    """Return what the rows need to know of a volume's voxels."""
    spacing = volume.spacing
    head_foot = np.abs(volume.affine[2, :3]) / spacing
    widest = [n for n in range(3) if spacing[n] >= max(spacing) * (1 - 1e-3)]
    return Grid(spacing, volume.voxel_volume, max(widest, key=lambda n: (head_foot[n], n)))


def _change(part: NDArray[np.generic], step: PostStep, row: Operation, grid: Grid, spec: Spec) -> None:
    """Apply a step in place; several labels are one object, and what it gains goes to the nearest of them."""
    values = [spec.foreground[name] for name in step.labels]
    present = np.isin(part, values)
    if not present.any():
        return
    wanted = row.function(present, grid, step.size)
    free = np.isin(part, [0, *(spec.foreground[name] for name in step.over)])
    gained = wanted & ~present & free
    if gained.any():
        part[gained] = values[0] if len(values) == 1 else _nearest(part, present, gained, grid)
    part[present & ~wanted] = 0


def _nearest(part: NDArray[np.generic], present: Present, gained: Present, grid: Grid) -> NDArray[np.generic]:
    """Return the label of the voxel of `present` that is nearest to each voxel of `gained`."""
    from scipy.ndimage import distance_transform_edt

    places = distance_transform_edt(~present, sampling=grid.spacing, return_distances=False, return_indices=True)
    return np.asarray(part[tuple(places[:, gained])])


def _boxes(array: NDArray[np.integer], spec: Spec) -> dict[str, Box]:
    """Return label -> the part of the array that holds it, for the labels that are there."""
    from scipy.ndimage import find_objects

    found = find_objects(array)
    return {
        name: found[value - 1] for name, value in spec.foreground.items() if value <= len(found) and found[value - 1]
    }


def _joined(boxes: Sequence[Box], reach: tuple[int, int, int], shape: tuple[int, ...]) -> Box:
    """Return the box around boxes, larger by `reach` but within the array."""
    edges = itertools.starmap(
        lambda axis, more: (
            max(0, min(box[axis].start for box in boxes) - more),
            min(shape[axis], max(box[axis].stop for box in boxes) + more),
        ),
        enumerate(reach),
    )
    return tuple(slice(start, stop) for start, stop in edges)
