"""Bring a tilted or unevenly spaced stack of slices to an upright grid of even steps, and masks back to its slices.

Nothing is guessed: every slice lies where its own position says. The grid keeps the directions and the spacing of the
slices' pixels; its planes are parallel to them. The gantry's lean is undone by moving each slice within its plane;
where no slice lies on a plane, its two neighbours are blended by their distance.

Other programs do the same: dcm2niix writes such images as _Tilt and _Eq (FILENAMING.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.readers.allowances import CORRECTABLE, NOTES, Allowance
from medseg.readers.dicom_geometry import LPS_TO_RAS, Stack, faults, tolerance
from medseg.readers.dicom_refusals import refuse
from medseg.volume import Affine

MAX_TILT_DEGREES = 31.0
"""CT gantries tilt by 30 degrees at most; positions that say more are not believed."""
MAX_GAP = 3.0
"""Widest gap that is bridged, in usual (median) gaps: two missing slices side by side."""
MIN_SHARED = 0.5
"""Neighbouring slices must share at least this part of their field in each direction."""
FIGURES = ("TiltDegrees", "SliceGaps", "SliceStep")
"""What is said of a corrected series in its meta data: how it lay, and the step between its planes now."""
LEAST_WEIGHT = 0.5
"""A voxel has a value where at least the nearer of its two slices is."""
FINEST_SHARE = 0.25
"""The step is the finest gap that this part of the gaps has, or a finer one."""


@dataclass(frozen=True)
class Upright:
    """An upright, even grid over a stack, and where its slices meet it.

    Attributes
    ----------
    shape : (I, J, K); I and J are larger than a slice where the stack leans.
    affine : (4, 4) orthogonal, index -> mm in RAS+.
    below : (K,) the slice at or below each plane.
    share : (K,) weight of the slice above it, 0 where a slice lies on the plane.
    corners : (N, 2) the pixel of the grid that is nearest to the first pixel of each slice.
    parts : (N, 2) how far the slice lies beyond that pixel, -0.5 to 0.5 pixels.
    planes : (N,) the plane that is nearest to each slice.
    notes : TILT_CORRECTED, SPACING_REGULARISED: what was wrong.
    figures : the same in numbers, as text.
    """

    shape: tuple[int, int, int]
    affine: Affine
    below: NDArray[np.intp]
    share: NDArray[np.float64]
    corners: NDArray[np.intp]
    parts: NDArray[np.float64]
    planes: NDArray[np.intp]
    notes: tuple[str, ...]
    figures: dict[str, str]


def upright_grid(stack: Stack, allow: Collection[Allowance]) -> Upright | None:
    """Return the grid that a stack is brought to; None for a stack that is a grid as it is.

    Step between planes: the finest gap that a quarter of the gaps has (a single seam or stray slice does not refine
    the whole stack), stretched so that the first and the last plane are the first and the last slice: nothing is
    invented beyond them. A slice within the tolerance of a regular series counts as lying on its plane.

    Raises
    ------
    GeometryError : GANTRY_TILT, MISSING_SLICES or IRREGULAR_SPACING where that is not allowed; TILT_TOO_STEEP,
        GAP_TOO_WIDE or SLICES_ASIDE where it is, but goes too far.
    """
    found = faults(stack)
    for code, text in found.items():
        if CORRECTABLE[code] not in allow:
            raise refuse(code, text)
    if not found:
        return None
    _check_limits(stack)
    needed = {CORRECTABLE[code] for code in found}
    depth = stack.offsets[:, 2]
    gaps = np.diff(depth)
    usual = float(np.quantile(gaps, FINEST_SHARE, method="nearest"))
    count = len(gaps) if "irregular" not in needed else max(1, round(float(depth[-1]) / usual))
    step = float(depth[-1]) / count
    below, share = _between(depth, np.arange(count + 1) * step, tolerance(step))
    aside = stack.offsets[:, :2]
    if float(np.linalg.norm(aside, axis=1).max()) <= tolerance(step):
        aside = np.zeros_like(aside)
    pixels = aside / stack.spacing
    corners = np.floor(pixels + 0.5)
    low = corners.min(axis=0)
    columns, rows = (int(n) for n in stack.size + corners.max(axis=0) - low)
    return Upright(
        shape=(columns, rows, count + 1),
        affine=_affine(stack, low, step),
        below=below,
        share=share,
        corners=(corners - low).astype(np.intp),
        parts=pixels - corners,
        planes=np.rint(depth / step).astype(np.intp),
        notes=tuple(note for note, allowance in NOTES.items() if allowance in needed),
        figures=_figures(stack, step, needed),
    )


def _check_limits(stack: Stack) -> None:
    """Refuse what nobody can correct with a good conscience."""
    if stack.tilt > MAX_TILT_DEGREES:
        raise refuse(
            "TILT_TOO_STEEP", f"the stack leans {stack.tilt:.1f} degrees, up to {MAX_TILT_DEGREES:g} are corrected"
        )
    gaps = np.diff(stack.offsets[:, 2])
    widest, median = float(gaps.max()), float(np.median(gaps))
    if widest > MAX_GAP * median + tolerance(median):
        raise refuse(
            "GAP_TOO_WIDE",
            f"a gap of {widest:.2f} mm between slices that usually lie {median:.2f} mm apart; "
            f"up to {MAX_GAP:g} usual gaps are bridged",
        )
    jumps = np.abs(np.diff(stack.offsets[:, :2], axis=0)) / stack.spacing
    shared = 1 - float((jumps / stack.size).max())
    if shared < MIN_SHARED:
        raise refuse(
            "SLICES_ASIDE",
            f"two neighbouring slices share only {max(0.0, shared):.0%} of their field, at least {MIN_SHARED:.0%} are "
            "needed",
        )


def _between(
    depth: NDArray[np.float64], planes: NDArray[np.floating[Any]], near: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return for each plane the slice at or below it and the weight of the next one."""
    nearest = np.abs(depth[:, None] - planes).argmin(axis=0)
    on = np.abs(depth[nearest] - planes) <= near
    under = np.clip(np.searchsorted(depth, planes, side="right") - 1, 0, len(depth) - 2)
    share = (planes - depth[under]) / (depth[under + 1] - depth[under])
    return np.where(on, nearest, under), np.where(on, 0.0, share)


def _affine(stack: Stack, low: NDArray[np.float64], step: float) -> Affine:
    affine = np.eye(4)
    ways = stack.axes * np.array([*stack.spacing, step])[:, None]
    affine[:3, :3] = LPS_TO_RAS @ ways.T
    affine[:3, 3] = LPS_TO_RAS @ (stack.positions[0] + low @ ways[:2])
    return affine


def _figures(stack: Stack, step: float, needed: Collection[Allowance]) -> dict[str, str]:
    gaps = np.diff(stack.offsets[:, 2])
    texts = {
        "tilt": {"TiltDegrees": f"{stack.tilt:.2f}"},
        "irregular": {"SliceGaps": f"{gaps.min():.3f} to {gaps.max():.3f} mm", "SliceStep": f"{step:.3f} mm"},
    }
    return {key: text for allowance, row in texts.items() if allowance in needed for key, text in row.items()}


def to_upright(slices: NDArray[np.float32], grid: Upright, *, fill: float) -> NDArray[np.float32]:
    """Resample slices (1, I, J, N) to the grid, linearly; `fill` where no slice is, or only the farther of two.

    The input is overwritten. Linear within the slices (their half outermost pixels take the value of the pixel) and
    between them; a slice on a plane, not moved by a part of a pixel, keeps its values bit for bit.
    """
    for n, (along, down) in enumerate(grid.parts):
        slices[0, :, :, n] = _moved(_moved(slices[0, :, :, n], along), down, axis=1)
    size = (slices.shape[1], slices.shape[2])
    array = np.full((1, grid.shape[2], grid.shape[1], grid.shape[0]), fill, np.float32).transpose(0, 3, 2, 1)
    for k in range(grid.shape[2]):
        total = np.zeros(grid.shape[:2])
        for n, part, block in _parts(grid, k, size):
            total[block] += np.multiply(part, slices[0, :, :, n], dtype=np.float64)
        weight = _weight(grid, k, size)
        inside = weight >= LEAST_WEIGHT
        array[0, :, :, k][inside] = total[inside] / weight[inside]
    return array


def covered(grid: Upright, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return (I, J, K): where `to_upright` finds a value in the slices, which have `size` (columns, rows)."""
    return np.stack([_weight(grid, k, size) >= LEAST_WEIGHT for k in range(grid.shape[2])], axis=-1)


def _weight(grid: Upright, k: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return what the slices that are there contribute to a plane: 1 where both neighbours (or the one on it) are."""
    weight = np.zeros(grid.shape[:2])
    for _, part, block in _parts(grid, k, size):
        weight[block] += part
    return weight


def _parts(grid: Upright, k: int, size: tuple[int, int]) -> Iterator[tuple[int, float, tuple[slice, slice]]]:
    """Return of each slice that a plane is made of its weight and the part of the plane that it covers."""
    for n, part in ((grid.below[k], 1 - grid.share[k]), (grid.below[k] + 1, grid.share[k])):
        if part:
            i, j = (int(corner) for corner in grid.corners[n])
            yield int(n), float(part), (slice(i, i + size[0]), slice(j, j + size[1]))


def _moved(plane: NDArray[np.float32], part: float, axis: int = 0) -> NDArray[np.float32]:
    """Return a slice moved by a part of a pixel towards growing indices; what comes in repeats its edge."""
    if part == 0:
        return plane
    neighbour = np.roll(plane, 1 if part > 0 else -1, axis=axis)
    edge = 0 if part > 0 else -1
    np.moveaxis(neighbour, axis, 0)[edge] = np.moveaxis(plane, axis, 0)[edge]
    return np.asarray((1 - abs(part)) * plane + abs(part) * neighbour, dtype=np.float32)


def to_slices(array: NDArray[Any], grid: Upright, size: tuple[int, int]) -> NDArray[Any]:
    """Bring (C, I, J, K) on the grid back to the slices, (C, columns, rows, N): each voxel takes the nearest one's."""
    columns, rows = size
    slices = np.zeros((len(array), columns, rows, len(grid.planes)), array.dtype)
    for n, (k, (i, j)) in enumerate(zip(grid.planes, grid.corners, strict=True)):
        slices[..., n] = array[:, i : i + columns, j : j + rows, k]
    return slices
