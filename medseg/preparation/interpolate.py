"""Linear interpolation on the way back to the grid of the source, one axis after the other.

Every value is two products and a sum, rounded one by one: it does not depend on how much of a volume is computed at
once, so that what is made piece by piece (medseg.inference.stream) equals what is made in one go, to the last bit. And
each of these operations is monotone: between values that are all larger than others, so is what lies between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

ROUNDING = 2e-6
"""Three interpolations move two values apart by less than this share of the largest (twice 9 roundings of 2^-24)."""


@dataclass(frozen=True)
class Line:
    """Where the new voxels of one axis lie between the old ones.

    Attributes
    ----------
    before : size of the axis that is read.
    lower, upper : (after,) int64, the two neighbours of each new voxel; they are one where nothing is mixed.
    weight : (after,) float32, share of the upper one.
    """

    before: int
    lower: NDArray[np.int64]
    upper: NDArray[np.int64]
    weight: NDArray[np.float32]

    @property
    def after(self) -> int:
        """Size of the axis that is made."""
        return len(self.lower)

    @property
    def mixes(self) -> bool:
        """Whether any new voxel lies between two old ones."""
        return bool((self.lower != self.upper).any())

    @property
    def still(self) -> bool:
        """Whether every voxel stays as it is."""
        return self.after == self.before and not self.mixes and bool((self.lower == np.arange(self.before)).all())

    def part(self, first: int, last: int) -> Line:
        """Return new voxels first to last (exclusive), of an axis that is read from the first neighbour on."""
        lower, upper = self.lower[first:last], self.upper[first:last]
        start, stop = int(lower[0]), int(upper[-1]) + 1
        return Line(stop - start, lower - start, upper - start, self.weight[first:last])


def linear_line(before: int, after: int) -> Line:
    """Return linear interpolation over the same extent: centres at half steps, constant beyond the outer ones."""
    if before == after:
        return _chosen(before, np.arange(before))
    return placed_line(before, (np.arange(after) + 0.5) * (before / after) - 0.5)


def placed_line(before: int, places: NDArray[np.floating[Any]]) -> Line:
    """Return linear interpolation at `places`, in voxels of an axis of size `before`; constant beyond its ends."""
    places = np.maximum(places, 0.0)
    lower = np.minimum(places.astype(np.int64), before - 1)
    upper = np.minimum(lower + 1, before - 1)
    weight = np.where(upper > lower, places - lower, 0.0).astype(np.float32)
    return Line(before, lower, upper, weight)


def nearest_line(before: int, after: int) -> Line:
    """Return for each new voxel the old one that is nearest (see `nearest_slices`)."""
    return _chosen(before, nearest_slices(before, after))


def _chosen(before: int, index: NDArray[np.int64]) -> Line:
    return Line(before, index, index, np.zeros(len(index), np.float32))


def nearest_slices(before: int, after: int) -> NDArray[np.int64]:
    """Return which of `before` slices each of `after` over the same extent is nearest to; half way goes up.

    By scipy.ndimage.map_coordinates, as in nnU-Net: the last digit decides what is half way.
    """
    places = before / after * (np.arange(after) + 0.5) - 0.5
    slices = ndimage.map_coordinates(np.arange(before, dtype=np.float64), [places], order=0, mode="nearest")
    return np.asarray(slices, dtype=np.int64)


def order_of(axis: int) -> tuple[int, int, int]:
    """Return the order in which axes are interpolated where planes across `axis` come one after the other."""
    first, second = (other for other in range(3) if other != axis)
    return axis, second, first


def interpolate(x: Tensor, lines: Sequence[Line], *, axis: int = 0) -> Tensor:
    """Interpolate (K, I, J, L) along its three spatial axes, in the order of `order_of(axis)`."""
    for one in order_of(axis):
        x = along(x, one + 1, lines[one])
    return x


def along(x: Tensor, dim: int, line: Line) -> Tensor:
    """Interpolate a tensor along one dimension; the very same tensor where nothing changes."""
    if line.still:
        return x
    lower = x.index_select(dim, torch.from_numpy(line.lower).to(x.device))
    if not line.mixes:
        return lower
    shape = [1] * x.ndim
    shape[dim] = -1
    weight = torch.from_numpy(line.weight).to(x.device).reshape(shape)
    upper = x.index_select(dim, torch.from_numpy(line.upper).to(x.device))
    return lower.mul_(1 - weight).add_(upper.mul_(weight))
