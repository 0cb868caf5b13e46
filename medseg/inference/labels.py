"""From planes of logits on the prepared grid to label values on the grid of the source, at once.

The way back is linear, and what lies between values that are all larger than others is larger, too, rounding included
(medseg.preparation.interpolate). So a cell (the voxels of the source between two neighbours along each axis) whose
corners agree on the winner holds nothing but the winner. In the others a class can win only if its largest corner is
not below the largest of all classes' smallest corners: no more than these classes are interpolated, where they can win.
Margins for rounding make this exact: the labels are those of interpolating every class everywhere.

Source: convexity of linear interpolation; the bound is that of interval arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.inference.points import Axis, Points
from medseg.preparation.interpolate import ROUNDING, Line
from medseg.spec import Spec
from medseg.targets import exclusive

Join = Callable[[Tensor, Tensor], Tensor]
SMALLEST = 1e-37
"""Below this, rounding is no share of a value any more."""
BLOCK = 1 << 22
"""Values that are compared at once: classes are taken in blocks."""
PAIRS = 1 << 20
"""Pairs of a class and a voxel that are interpolated at once where these are scattered."""
SCATTERED = 4
"""How many times the work of a value in a box one takes that is picked out by itself."""


@dataclass(frozen=True)
class Key:
    """What the channels of the logits stand for: a label each (the largest wins), or a region each (painted in order).

    Attributes
    ----------
    values : label value of each channel.
    regions : whether a channel is a region.
    """

    values: tuple[int, ...]
    regions: bool

    @classmethod
    def of(cls, spec: Spec) -> Key:
        """Return the key of a spec."""
        if exclusive(spec):
            return cls((0, *spec.foreground.values()), regions=False)
        return cls(tuple(spec.foreground[region.paint] for region in spec.regions.values()), regions=True)


@dataclass(frozen=True)
class _Reach:
    """Where a class is interpolated: cells [a0, a1) × [b0, b1) and the new voxels in them."""

    channel: int
    coarse: tuple[slice, slice]
    fine: tuple[slice, slice]
    a: _Weights
    b: _Weights


@dataclass(frozen=True)
class _Weights:
    """A part of an axis: indices into the part of the plane that is read, and weights along one dimension."""

    lower: Tensor
    upper: Tensor
    low: Tensor
    high: Tensor
    mixes: bool
    still: bool

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """Interpolate along a dimension as medseg.preparation.interpolate.along does."""
        if self.still:
            return x
        lower = x.index_select(dim, self.lower)
        return lower.mul_(self.low).add_(x.index_select(dim, self.upper).mul_(self.high)) if self.mixes else lower


class _Plane:
    """One plane of logits (K, A, B) and what it takes to compare planes."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @cached_property
    def largest(self) -> float:
        return max(float(self.logits.amax()), -float(self.logits.amin()))

    @cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """Return the class that wins (A, B) int16, the first of equals, and by how much."""
        top = self.logits[0].clone()
        rest = torch.full_like(top, -torch.inf)
        winner = torch.zeros(top.shape, dtype=torch.int16, device=top.device)
        for number, values in enumerate(self.logits[1:], start=1):
            better = values > top
            winner.masked_fill_(better, number)
            rest = torch.maximum(rest, torch.minimum(top, values))
            top = torch.maximum(top, values)
        return winner, top - rest


class _Painter:
    """Paints the slices of the source between two planes."""

    def __init__(self, lines: tuple[Line, Line, Line], key: Key, dtype: torch.dtype, device: torch.device) -> None:
        self.across = lines[0]
        self.a, self.b = (Axis(line, device) for line in lines[1:])
        self.mixes = any(line.mixes for line in lines)
        self.key, self.dtype = key, dtype
        self.values = torch.tensor(key.values, dtype=dtype, device=device)

    def paint(self, low: _Plane, high: _Plane, weights: NDArray[np.float32]) -> list[Tensor]:
        """Return the label values (A', B') of the slices with these weights of the higher plane."""
        return self._regions(low, high, weights) if self.key.regions else self._classes(low, high, weights)

    def _classes(self, low: _Plane, high: _Plane, weights: NDArray[np.float32]) -> list[Tensor]:
        winner, gap = low.order
        base = self._spread(self.values[winner.long()])
        if not self.mixes:
            return [base] * len(weights)
        error = ROUNDING * max(low.largest, high.largest) + SMALLEST
        sure = gap > error
        if high is not low:
            other, other_gap = high.order
            sure &= (other_gap > error) & (other == winner)
        for axis, dim in ((self.b, 1), (self.a, 0)):
            if axis.line.mixes:
                sure = axis.corners(sure, dim, torch.logical_and) & axis.corners(winner, dim, torch.eq)
        return (
            [base] * len(weights)
            if bool(sure.all())
            else self._contested(low.logits, high.logits, weights, base, ~sure, error)
        )

    def _contested(
        self, low: Tensor, high: Tensor, weights: NDArray[np.float32], base: Tensor, cells: Tensor, error: float
    ) -> list[Tensor]:
        """Interpolate the classes that may win in `cells` (A, B), there; the others are as in `base`."""
        count = max(1, BLOCK // cells.numel())
        blocks = [slice(at, at + count) for at in range(0, len(low), count)]
        floor = torch.full(cells.shape, -torch.inf, device=cells.device)
        for block in blocks:
            floor = torch.maximum(floor, self._corners(low[block], high[block], torch.minimum).amax(0))
        floor -= error

        def possible(block: slice) -> Tensor:
            return (self._corners(low[block], high[block], torch.maximum) >= floor) & cells

        boxes, pairs = [], 0
        for block in blocks:
            where = possible(block)
            pairs += int(where.sum())
            rows, columns = where.any(2).cpu().numpy(), where.any(1).cpu().numpy()
            boxes += [(block.start + n, rows[n], columns[n]) for n in range(len(where)) if rows[n].any()]
        reaches = [self._reach(*box) for box in boxes]
        if SCATTERED * pairs * base.numel() / cells.numel() > sum(base[reach.fine].numel() for reach in reaches):
            return self._dense(low, high, weights, base, cells, reaches)
        found = torch.cat(
            [possible(block).nonzero() + torch.tensor([block.start, 0, 0]).to(low.device) for block in blocks]
        )
        return self._sparse(low, high, weights, base, found)

    def _dense(
        self,
        low: Tensor,
        high: Tensor,
        weights: NDArray[np.float32],
        base: Tensor,
        cells: Tensor,
        reaches: list[_Reach],
    ) -> list[Tensor]:
        """Interpolate classes in boxes around the cells in which they may win."""
        inside, result = self._spread(cells), []
        best = torch.empty(base.shape, device=base.device)
        for weight in weights:
            labels = base.clone()
            best.fill_(-torch.inf)
            for reach in reaches:
                values = _values(low, high, reach, weight)
                here = best[reach.fine]
                labels[reach.fine].masked_fill_(values > here, self.key.values[reach.channel])
                torch.maximum(here, values, out=here)
            result.append(torch.where(inside, labels, base))
        return result

    def _sparse(
        self, low: Tensor, high: Tensor, weights: NDArray[np.float32], base: Tensor, found: Tensor
    ) -> list[Tensor]:
        """Interpolate only the pairs (class, cell a, cell b) that were found, class by class of each cell."""
        result = [base.clone() for _ in weights]
        for part in self._bands(found):
            points = Points(self.a, self.b, part, low, high)
            best = torch.empty(points.voxels, device=base.device)
            labels = torch.empty(points.voxels, dtype=self.dtype, device=base.device)
            values_of = self.values[points.channel]
            for number, weight in enumerate(weights):
                values = points.values(weight)
                best.fill_(-torch.inf)
                for start, stop in points.ranks:
                    mine, here = values[start:stop], best[: stop - start]
                    torch.where(mine > here, values_of[start:stop], labels[: stop - start], out=labels[: stop - start])
                    torch.maximum(here, mine, out=here)
                result[number].view(-1)[points.places] = labels
        return result

    def _bands(self, found: Tensor) -> list[Tensor]:
        """Return the pairs in bands of rows, no more than about PAIRS of new voxels in each."""
        fine = self.a.line.after * self.b.line.after / (self.a.line.before * self.b.line.before)
        count = max(1, min(self.a.line.before, math.ceil(len(found) * fine / PAIRS)))
        edges = [round(self.a.line.before * n / count) for n in range(count + 1)]
        parts = [found[(found[:, 1] >= start) & (found[:, 1] < stop)] for start, stop in itertools.pairwise(edges)]
        return [part for part in parts if len(part)]

    def _corners(self, low: Tensor, high: Tensor, join: Join) -> Tensor:
        both = low if high is low else join(low, high)
        return self.a.corners(self.b.corners(both, 2, join), 1, join)

    def _reach(self, channel: int, rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> _Reach:
        """Return the box around the cells that are marked in rows (A) and columns (B)."""
        a, b = (_part(axis, marks) for axis, marks in ((self.a, rows), (self.b, columns)))
        return _Reach(channel, (a[0], b[0]), (a[1], b[1]), _weights(self.a, *a, -1), _weights(self.b, *b, 1))

    def _regions(self, low: _Plane, high: _Plane, weights: NDArray[np.float32]) -> list[Tensor]:
        size = (self.a.line.after, self.b.line.after)
        result = [torch.zeros(size, dtype=self.dtype, device=self.values.device) for _ in weights]
        for channel, value in enumerate(self.key.values):
            first, second = low.logits[channel, None], high.logits[channel, None]
            least = SMALLEST if self.mixes else 0.0
            yes = self._corners(first > least, second > least, torch.logical_and)[0]
            no = self._corners(first <= 0, second <= 0, torch.logical_and)[0]
            base = self._spread(yes)
            unsure = (~(yes | no)).nonzero()
            found = torch.cat([torch.full_like(unsure[:, :1], channel), unsure], 1)
            inside = [base.clone() for _ in weights]
            for part in self._bands(found):
                points = Points(self.a, self.b, part, low.logits, high.logits)
                for number, weight in enumerate(weights):
                    inside[number].view(-1)[points.places] = points.values(weight) > 0
            for labels, painted in zip(result, inside, strict=True):
                labels.masked_fill_(painted, value)
        return result

    def _spread(self, cells: Tensor) -> Tensor:
        """Give the new voxels (A', B') what stands in their cells (A, B)."""
        rows = cells if self.a.line.still else cells.index_select(0, self.a.lower)
        return rows if self.b.line.still else rows.index_select(1, self.b.lower)


def _part(axis: Axis, marks: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Return the part of the plane that is read for the marked cells, and the new voxels in them."""
    first, last = int(marks.argmax()), len(marks) - int(marks[::-1].argmax())
    start, stop = axis.fine(first, last)
    return slice(first, min(last + axis.line.mixes, axis.line.before)), slice(start, stop)


def _weights(axis: Axis, coarse: slice, fine: slice, columns: int) -> _Weights:
    lower, upper = axis.lower[fine] - coarse.start, axis.upper[fine] - coarse.start
    high = axis.weight[fine].reshape((-1, 1) if columns < 0 else (1, -1))
    return _Weights(lower, upper, 1 - high, high, axis.line.mixes, axis.line.still)


def _values(low: Tensor, high: Tensor, reach: _Reach, weight: np.float32) -> Tensor:
    """Interpolate one class in its box: across the planes, along B, along A (`order_of`)."""
    values = low[reach.channel][reach.coarse]
    if high is not low:
        share = float(weight)
        values = values * float(np.float32(1) - weight) + high[reach.channel][reach.coarse] * share
    return reach.a.apply(reach.b.apply(values, 1), 0)


def paint(planes: Iterable[Tensor], lines: tuple[Line, Line, Line], key: Key, out: NDArray[np.generic]) -> None:
    """Write label values into `out` (S', A', B'), a view of any strides, slice by slice as planes come.

    Parameters
    ----------
    planes : logits (K, A, B) of every plane, in order.
    lines : how the planes' axis, A and B lead to those of `out`.
    """
    across, kind = lines[0], torch.from_numpy(np.empty(0, out.dtype)).dtype
    painter: _Painter | None = None
    held: _Plane | None = None

    def between(number: int, low: _Plane, high: _Plane) -> None:
        start, stop = (int(at) for at in np.searchsorted(across.lower, (number, number + 1)))
        if start < stop and painter is not None:
            slices = painter.paint(low, high, across.weight[start:stop])
            for at, labels in enumerate(slices, start):
                out[at] = labels.cpu().numpy()

    number = -1
    for number, logits in enumerate(planes):
        plane = _Plane(logits)
        painter = painter or _Painter(lines, key, kind, logits.device)
        if not across.mixes:
            between(number, plane, plane)
        elif held is not None:
            between(number - 1, held, plane)
        held = plane
    if across.mixes and held is not None:
        between(number, held, held)
