"""Resampling as nnU-Net v2 does it (nnunetv2.preprocessing.resampling.default_resampling), for its models.

Spline interpolation is linear in the voxels and separable, so along each axis it is a matrix: that of
scipy.ndimage.zoom(mode="nearest", grid_mode=True), which skimage.transform.resize uses. The matrices are multiplied in
single precision, the axis that shrinks most first, which takes a fraction of the time and memory of scipy's spline in
double precision, and agrees with it to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from medseg.planning.plan import Interpolation
from medseg.preparation.interpolate import nearest_slices

ANISOTROPIC = 3.0
"""A spacing over this many times another is resampled apart (nnU-Net's ANISO_THRESHOLD)."""
LABELS = Interpolation(order=1, order_z=0)
"""How the masks that are learnt from are resampled (nnU-Net's resampling_fn_seg)."""
AT_ONCE = 1 << 20
"""Voxels of a mask that are resampled at once: 32 bytes each."""
NOTHING = 1e-20
"""A smaller share of a voxel counts as none. A spline reaches over the whole axis, a quarter as strong each voxel
further: in single precision many shares would be denormal numbers, with which processors multiply many times slower."""


def header_spacing(affine: NDArray[Any]) -> list[float]:
    """Return the spacing as its header most likely says it.

    nnU-Net reads it from the header, here it is the length of a column of an affine that was rounded: 0.9999999 for 1
    would decide a ratio of three, or a size that is half way between two, the other way. Seven digits, then single
    precision, are what NIfTI headers hold.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return [float(np.float32(f"{length:.7g}")) for length in lengths]


def coarse_axis(rule: Interpolation, before: Sequence[float], after: Sequence[float]) -> int | None:
    """Return the axis that is resampled apart from the other two: the one coarse axis of `before`, else of `after`."""
    if rule.separate is False:
        return None
    candidates = [before] if rule.separate else [s for s in (before, after) if max(s) / min(s) > ANISOTROPIC]
    if not candidates:
        return None
    spacing = candidates[0]
    axes = [axis for axis in range(3) if spacing[axis] == max(spacing)]
    return axes[0] if len(axes) == 1 else None


@lru_cache(maxsize=16)
def spline_matrix(before: int, after: int, order: int) -> NDArray[np.float64]:
    """Return the matrix (after, before) of a resampling along one axis."""
    zoomed = ndimage.zoom(np.eye(before), (after / before, 1.0), order=order, mode="nearest", grid_mode=True)
    return np.where(np.abs(zoomed) < NOTHING, 0.0, zoomed)


def resize(x: Tensor, size: Sequence[int], rule: Interpolation, coarse: int | None) -> Tensor:
    """Resample (C, I, J, K) to `size`; like scikit-image, never beyond the range of a channel (of a slice).

    With a coarse axis each slice is resampled by itself, then the slices along that axis by `order_z`.
    """
    if tuple(x.shape[1:]) == tuple(size):
        return x
    first = [axis for axis in range(3) if axis != coarse and x.shape[axis + 1] != size[axis]]
    within = tuple(axis + 1 for axis in range(3) if axis != coarse)
    low, high = x.amin(within, keepdim=True), x.amax(within, keepdim=True)
    for axis in sorted(first, key=lambda a: size[a] / x.shape[a + 1]):
        x = spline_along(x, axis + 1, size[axis], rule.order)
    if first:  # else nothing has changed, and `x` is the caller's
        torch.minimum(x, high, out=x)
        torch.maximum(x, low, out=x)
    if coarse is not None:
        x = spline_along(x, coarse + 1, size[coarse], rule.order_z)
    return x.contiguous()


def spline_along(x: Tensor, dim: int, size: int, order: int) -> Tensor:
    """Resample a tensor along one dimension; of order 0 by the nearest slice."""
    if x.shape[dim] == size:
        return x
    if order == 0:
        return x.index_select(dim, torch.from_numpy(nearest_slices(x.shape[dim], size)))
    matrix = torch.from_numpy(spline_matrix(x.shape[dim], size, order)).to(x)
    before, after = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    # As products of matrices, so that no axis has to be moved (and the image copied) for it.
    blocks = x.reshape(before, x.shape[dim], after)
    result = (blocks[..., 0] @ matrix.T)[..., None] if after == 1 else matrix @ blocks
    return result.reshape(*x.shape[:dim], size, *x.shape[dim + 1 :])


def resize_labels(mask: NDArray[Any], size: Sequence[int], rule: Interpolation, coarse: int | None) -> NDArray[Any]:
    """Resample a label map (I, J, K): a voxel gets the last label with at least half of it, background else.

    Along a coarse axis the nearest slice is taken, whatever the order there. Shares of exactly one half are common, and
    the last digit decides: so they are scipy's own, not those of `spline_matrix`.
    """
    if mask.shape == tuple(size):
        return mask
    if coarse is None:
        return _most(mask, size, rule.order)
    plane = [n for axis, n in enumerate(size) if axis != coarse]
    slices = [_most(part, plane, rule.order) for part in np.moveaxis(mask, coarse, 0)]
    places = nearest_slices(mask.shape[coarse], size[coarse])
    return np.ascontiguousarray(np.moveaxis(np.stack(slices)[places], 0, coarse))


def _most(mask: NDArray[Any], size: Sequence[int], order: int) -> NDArray[Any]:
    result = np.zeros(size, mask.dtype)
    labels = np.unique(mask)
    for label in labels[1:] if labels[0] == 0 else labels:  # background is there already
        # A byte a voxel goes in; what comes out is in double precision, as if that had gone in.
        here = (mask == label).view(np.uint8)
        for place, share in _shares(here, size, order):
            result[place][share >= 0.5] = label
    return result


def _shares(
    here: NDArray[np.uint8], size: Sequence[int], order: int
) -> Iterator[tuple[tuple[slice, ...], NDArray[np.float64]]]:
    """Yield, part by part, where there is anything of a label, and how much: as ndimage.zoom has it, to the last bit.

    Splines of a higher order reach over the whole axis: of them there is one part, the whole.
    """
    if order > 1:
        zoom = [after / before for before, after in zip(here.shape, size, strict=True)]
        share = ndimage.zoom(here, zoom, order=order, mode="nearest", grid_mode=True, output=np.float64)
        yield tuple(slice(None) for _ in size), share
        return
    places, edges = [], []
    for axis, (before, after) in enumerate(zip(here.shape, size, strict=True)):
        place = (np.arange(after) + 0.5) * (before / after) - 0.5
        filled = np.flatnonzero(here.any(tuple(other for other in range(here.ndim) if other != axis)))
        # Values between two voxels are theirs, those beyond the first and the last are those of the edge.
        first, last = np.searchsorted(place.clip(0, before - 1), (filled[0] - 1, filled[-1] + 1), side="left")
        places.append(place)
        edges.append((int(first), int(last)))
    rest = edges[1:]
    step = max(1, AT_ONCE // max(1, math.prod(last - first for first, last in rest)))
    for start in range(*edges[0], step) if all(first < last for first, last in edges) else ():
        part = tuple(slice(*edge) for edge in ((start, min(start + step, edges[0][1])), *rest))
        lines = [place[edge] for place, edge in zip(places, part, strict=True)]
        grid = np.stack(np.meshgrid(*lines, indexing="ij", copy=False))
        share = ndimage.map_coordinates(here, grid, order=order, mode="nearest", output=np.float64)
        yield part, share
