"""Where the planes of one model lie in the source: so that several models are brought back slice by slice together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.inference.points import Axis
from medseg.inference.way_back import Lines, seen, ways_back
from medseg.inference.windows import Layout
from medseg.preparation.interpolate import ROUNDING
from medseg.preparation.steps import Oriented, Shape, Step

Range = tuple[int, int]
Box = tuple[Range, Range]
MARGIN = 1e-4
"""Logits further apart than this are apart as probabilities, too, and in their mean: single precision has 1e-7."""
SMALLEST = 1e-37


def axis_of(steps: tuple[Step, ...], source: int) -> tuple[int, bool]:
    """Return which axis of the prepared grid an axis of the source became, and whether it was turned around."""
    turn = next(step for step in steps if isinstance(step, Oriented))
    target, direction = turn.flips[source]
    return int(target), direction < 0


def source_axis(steps: tuple[Step, ...], axis: int) -> int:
    """Return which axis of the source an axis of the prepared grid was."""
    return next(source for source in range(3) if axis_of(steps, source)[0] == axis)


def shared_axis(grids: Sequence[tuple[tuple[Step, ...], Layout]]) -> int:
    """Return the axis of the source along which models are brought back together: of their own, the cheapest one.

    That is where their slabs take least together, the first of equals.
    """

    def slabs(source: int) -> int:
        total = 0
        for steps, where in grids:
            axis, _ = axis_of(steps, source)
            total += where.deep[axis] * math.prod(where.shape) // where.shape[axis]
        return total

    return min(dict.fromkeys(source_axis(steps, where.axis) for steps, where in grids), key=slabs)


@dataclass(frozen=True)
class Way:
    """From the planes of a model, or a tile of them, to slices of the source, or a part of them.

    Attributes
    ----------
    lines : how the planes' axis, A and B lead to the slices (A', B') that are made.
    tile : the part of A and of B that is needed.
    numbers : (S',) which slice of the source each is that is made.
    place : (voxels of the part of a slice,) int64, which voxel of A' × B' each is; -1: none, it was cropped away.
    backwards : planes come in falling order.
    """

    lines: Lines
    tile: Box
    numbers: NDArray[np.int64]
    place: Tensor
    backwards: bool

    def slices(self, planes: Iterable[Tensor]) -> Iterator[tuple[int, Between, np.float32]]:
        """Yield of each slice of the source: its number, what it lies between, and the weight of the higher plane.

        Parameters
        ----------
        planes : logits (K, A, B) of the tile, in order, falling if `backwards`.
        """
        across, axes = self.lines[0], None
        order = range(across.before - 1, -1, -1) if self.backwards else range(across.before)
        held: Tensor | None = None
        for number, plane in zip(order, planes, strict=True):
            axes = axes or (Axis(self.lines[1], plane.device), Axis(self.lines[2], plane.device))
            if not across.mixes:
                yield from self._at(number, Between(plane, plane, *axes))
            elif self.backwards:
                yield from self._at(number, Between(plane, plane if held is None else held, *axes))
            elif held is not None:
                yield from self._at(number - 1, Between(held, plane, *axes))
            held = plane
        if across.mixes and not self.backwards and held is not None and axes is not None:
            yield from self._at(across.before - 1, Between(held, held, *axes))

    def _at(self, number: int, between: Between) -> Iterator[tuple[int, Between, np.float32]]:
        across = self.lines[0]
        start, stop = (int(at) for at in np.searchsorted(across.lower, (number, number + 1)))
        for at in range(stop - 1, start - 1, -1) if self.backwards else range(start, stop):
            yield int(self.numbers[at]), between, across.weight[at]


def way(shape: Shape, steps: tuple[Step, ...], where: Layout, source: int, part: Box, *, backwards: bool) -> Way | None:
    """Return the way to a part of each slice across an axis of the source; None if all of it was cropped away.

    Parameters
    ----------
    shape : of the source.
    where : its planes' axis is what `source` became.
    part : [first, last) along the two other axes of the source.
    """
    lines = ways_back(steps, where)
    index: list[NDArray[np.int64]] = []
    for axis in range(3):
        line = np.arange(shape[axis]).reshape([-1 if other == axis else 1 for other in range(3)])
        index.append(seen(np.broadcast_to(line, shape), steps, where))
    one, two = (axis for axis in range(3) if axis != source)
    inside = (index[one][0] >= part[0][0]) & (index[one][0] < part[0][1])
    inside &= (index[two][0] >= part[1][0]) & (index[two][0] < part[1][1])
    if not inside.any():
        return None
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    a_range, b_range = (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)
    a, b = lines[1].part(*a_range), lines[2].part(*b_range)
    low_a, low_b = int(lines[1].lower[a_range[0]]), int(lines[2].lower[b_range[0]])
    size = part[1][1] - part[1][0]
    kept = (slice(*a_range), slice(*b_range))
    flat = (index[one][0][kept] - part[0][0]) * size + index[two][0][kept] - part[1][0]
    place = np.full((part[0][1] - part[0][0]) * size, -1, np.int64)
    place[flat.ravel()] = np.arange(flat.size)
    return Way(
        (lines[0], a, b),
        ((low_a, low_a + a.before), (low_b, low_b + b.before)),
        index[source][:, 0, 0].copy(),
        torch.from_numpy(place),
        backwards,
    )


class Between:
    """Two planes of logits (K, A, B), or twice the same, with slices of the source between them."""

    def __init__(self, low: Tensor, high: Tensor, a: Axis, b: Axis) -> None:
        self.low, self.high, self.a, self.b = low, high, a, b
        self._mixed: tuple[np.float32, Tensor] | None = None

    def values(self, weight: np.float32, voxels: Tensor) -> Tensor:
        """Return the logits (K, M) of voxels (M,) of a flattened slice, as medseg.preparation.interpolate has them."""
        plane, width = self._plane(weight), self.b.line.before
        fine_a = voxels.div(self.b.line.after, rounding_mode="floor")
        fine_b = voxels % self.b.line.after
        first = self.a.lower[fine_a] * width + self.b.lower[fine_b]
        right = self.b.upper[fine_b] - self.b.lower[fine_b]

        def row(start: Tensor) -> Tensor:
            here = plane.index_select(1, start)
            return _blend(here, plane.index_select(1, start + right), self.b, fine_b) if self.b.line.mixes else here

        upper = row(first)
        if not self.a.line.mixes:
            return upper
        down = (self.a.upper[fine_a] - self.a.lower[fine_a]) * width
        return _blend(upper, row(first + down), self.a, fine_a)

    def _plane(self, weight: np.float32) -> Tensor:
        if self.high is self.low:
            return self.low.flatten(1)
        if self._mixed is None or self._mixed[0] != weight:
            mixed = self.low * float(np.float32(1) - weight) + self.high * float(weight)
            self._mixed = (weight, mixed.flatten(1))
        return self._mixed[1]

    @cached_property
    def winners(self) -> tuple[Tensor, Tensor]:
        """Return for each voxel of a slice the class that wins (A'·B') int64, and by how much at least: float32.

        Not sure of it where that is not above 0: it is then of one of the corners.
        """
        return self._agreed(_first)

    @cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Return as `winners` does, of regions: a bit for each that is above 0, and how far all are from 0 at least."""
        return self._agreed(_bits)

    def _agreed(self, found: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return what is found in both planes and by how much at least: 0 where they differ."""
        first, least = found(self.low)
        if self.high is not self.low:
            other, gap = found(self.high)
            least = torch.where(first == other, torch.minimum(least, gap), 0.0)
        return self._spread(first, least)

    @cached_property
    def error(self) -> float:
        """By how much rounding may change a difference between two classes, in logits."""
        largest = max(float(plane.abs().amax()) for plane in (self.low, self.high))
        return 2 * ROUNDING * largest + SMALLEST

    def _spread(self, code: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        for axis, dim in ((self.b, 1), (self.a, 0)):
            if axis.line.mixes:
                same = axis.corners(code, dim, torch.eq)
                least = torch.where(same, axis.corners(least, dim, torch.minimum), 0.0)
        rows = [x.index_select(0, self.a.lower).index_select(1, self.b.lower).flatten() for x in (code, least)]
        return rows[0], rows[1]


def _blend(first: Tensor, second: Tensor, axis: Axis, fine: Tensor) -> Tensor:
    weight = axis.weight[fine]
    return first.mul_(1 - weight).add_(second.mul_(weight))


def _first(plane: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class that wins in each voxel of (K, A, B), and by how much."""
    best = largest(plane)
    top = plane.gather(0, best[None])[0]
    rest = torch.full_like(top, -torch.inf)
    for number, values in enumerate(plane):
        rest = torch.where(best == number, rest, torch.maximum(rest, values))
    return best, top - rest


def largest(values: Tensor) -> Tensor:
    """Return which of (K, *S) is the largest, the first of equals: (*S) int64."""
    top = values[0].clone()
    best = torch.zeros(top.shape, dtype=torch.int64, device=top.device)
    for number, row in enumerate(values[1:], start=1):
        best.masked_fill_(row > top, number)
        torch.maximum(top, row, out=top)
    return best


def _bits(plane: Tensor) -> tuple[Tensor, Tensor]:
    """Return which channels of (K, A, B) are above 0, a bit each, and how far the nearest is from 0."""
    bits = torch.zeros(plane.shape[1:], dtype=torch.int64, device=plane.device)
    least = torch.full(plane.shape[1:], torch.inf, device=plane.device)
    for number, values in enumerate(plane):
        bits |= (values > 0).long() << number
        least = torch.minimum(least, values.abs())
    return bits, least
