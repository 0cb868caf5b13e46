"""Interpolation of scattered pairs of a class and a voxel, each by itself: where few classes may win in few cells.

The arithmetic is that of medseg.preparation.interpolate, so the values are too, to the last bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from medseg.preparation.interpolate import Line


class Axis:
    """An axis in a plane, with its line as tensors on the device."""

    def __init__(self, line: Line, device: torch.device) -> None:
        self.line = line
        self.lower, self.upper = (torch.from_numpy(index).to(device) for index in (line.lower, line.upper))
        self.weight = torch.from_numpy(line.weight).to(device)

    def fine(self, first: int, last: int) -> tuple[int, int]:
        """Return which new voxels lie in the cells first to last (exclusive)."""
        edges = np.searchsorted(self.line.lower, (first, last))
        return int(edges[0]), int(edges[1])

    def voxels(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first new voxel in each of these cells, and how many there are."""
        first = torch.searchsorted(self.lower, cells.contiguous())
        return first, torch.searchsorted(self.lower, cells.contiguous(), right=True) - first

    def corners(self, x: Tensor, dim: int, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Join each value with the next one along a dimension, as it stands at the corners of cells."""
        if not self.line.mixes:
            return x
        count = x.shape[dim]
        ahead = torch.cat([x.narrow(dim, 1, count - 1), x.narrow(dim, count - 1, 1)], dim)
        return join(x, ahead)


class Points:
    """The new voxels of pairs (class, cell a, cell b), classes rising: those of a voxel in ranks, voxel by voxel.

    Attributes
    ----------
    voxels : how many different voxels there are.
    places : (voxels,) their indices in a flattened slice.
    channel : (pairs,) class of each pair of a class and a voxel.
    ranks : [start, stop) of the pairs with the first class of each voxel, with the second of those that have one, ...;
        voxels with more classes come first, so that each rank is of the first `stop - start` voxels.
    """

    def __init__(self, a: Axis, b: Axis, found: Tensor, low: Tensor, high: Tensor) -> None:
        table, cells, counts = _by_cell(found, b.line.before)
        rows, columns = (axis.voxels(cells[:, n]) for n, axis in enumerate((a, b)))
        sizes = rows[1] * columns[1]
        of = torch.repeat_interleave(torch.arange(len(cells), device=cells.device), sizes)
        within = torch.arange(len(of), device=of.device) - (sizes.cumsum(0) - sizes)[of]
        fine_a = rows[0][of] + within.div(columns[1][of], rounding_mode="floor")
        fine_b = columns[0][of] + within % columns[1][of]
        ends = sizes.cumsum(0).tolist()
        reached = [ends[int((counts > rank).sum()) - 1] for rank in range(len(table))]
        starts = [0, *itertools.accumulate(reached)]
        self.voxels = len(of)
        self.places = fine_a * b.line.after + fine_b
        self.ranks = list(itertools.pairwise(starts))
        self.channel = torch.cat([table[rank][of[:n]] for rank, n in enumerate(reached)])
        self._read(a, b, low, high, found, (int(found[:, 1].min()), int(found[:, 1].max()) + 1))
        voxel = torch.cat([torch.arange(n, device=of.device) for n in reached])
        self._place(a, b, fine_a[voxel], fine_b[voxel])

    def _read(self, a: Axis, b: Axis, low: Tensor, high: Tensor, found: Tensor, rows: tuple[int, int]) -> None:
        """Keep the part of the two planes that is mixed, and where each pair begins in it."""
        present = torch.unique_consecutive(found[:, 0])
        rows = rows[0], min(rows[1] + a.line.mixes, a.line.before)
        self._low, self._high = (x[present, slice(*rows)].reshape(-1) for x in (low, high))
        self._mixed = high is not low
        self._base = (torch.searchsorted(present, self.channel) * (rows[1] - rows[0]) - rows[0]) * b.line.before

    def _place(self, a: Axis, b: Axis, fine_a: Tensor, fine_b: Tensor) -> None:
        """Keep where the corners of each pair lie, and their weights."""
        self._a, self._b = (None if not axis.line.mixes else axis.weight[f] for axis, f in ((a, fine_a), (b, fine_b)))
        width = b.line.before
        first = self._base + a.lower[fine_a] * width + b.lower[fine_b]
        right = b.upper[fine_b] - b.lower[fine_b]
        down = (a.upper[fine_a] - a.lower[fine_a]) * width
        self._corners = first, first + right, first + down, first + down + right

    def values(self, weight: np.float32) -> Tensor:
        """Return the value of each pair in the slice with this weight of the higher plane; arithmetic as everywhere."""
        plane = self._low
        if self._mixed:
            plane = plane * float(np.float32(1) - weight) + self._high * float(weight)
        here, right, down, across = self._corners
        upper = _mixed(plane, here, right, self._b)
        return upper if self._a is None else _blend(upper, _mixed(plane, down, across, self._b), self._a)


def _mixed(plane: Tensor, first: Tensor, second: Tensor, weight: Tensor | None) -> Tensor:
    return plane[first] if weight is None else _blend(plane[first], plane[second], weight)


def _blend(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    return first.mul_(1 - weight).add_(second.mul_(weight))


def _by_cell(found: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the classes of cells (ranks, cells), the cells (cells, 2), and how many classes each has, falling."""
    cell, order = torch.sort(found[:, 1] * width + found[:, 2], stable=True)
    cells, counts = torch.unique_consecutive(cell, return_counts=True)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(cell), device=cell.device) - torch.repeat_interleave(first, counts)
    sizes = counts
    counts, falling = torch.sort(counts, descending=True, stable=True)
    position = torch.empty_like(falling)
    position[falling] = torch.arange(len(falling), device=falling.device)
    table = cell.new_zeros((int(counts[0]), len(cells)))
    table[rank, torch.repeat_interleave(position, sizes)] = found[order, 0]
    cells = cells[falling]
    return table, torch.stack([cells.div(width, rounding_mode="floor"), cells % width], 1), counts
