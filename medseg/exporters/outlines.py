"""Outlines of a mask along the edges of its pixels, and back: exact both ways.

Points are in pixel indices (i, j): a pixel reaches half a pixel beyond its centre, so that no centre ever lies on an
outline and every reader fills the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label

Point = tuple[int, int]
Loop = list[Point]
Points = NDArray[np.float64]


def outlines(mask: NDArray[np.bool_]) -> list[Points]:
    """Return one closed polygon (N, 2) for each 4-connected part of a mask (I, J); an empty mask has none.

    A hole is joined to its outline by a channel of no width (keyhole), so that each polygon alone says what is
    inside, by the even-odd rule and by any other.
    """
    parts, count = label(mask)
    return [_polygon(parts == number) for number in range(1, count + 1)]


def _polygon(part: NDArray[np.bool_]) -> Points:
    loops = _loops(part)
    outer = next(loop for loop in loops if _area(loop) > 0)
    # From left to right: what a hole's channel meets on its way to the left is joined already.
    for hole in sorted((loop for loop in loops if loop is not outer), key=min):
        outer = _join(outer, hole)
    return np.array(_without_straight(outer), np.float64) - 0.5


def _loops(part: NDArray[np.bool_]) -> list[Loop]:
    """Return the boundaries of a part, corner by corner, with the part on the left of the way."""
    padded = np.pad(part, 1)
    ends: dict[Point, list[Point]] = {}
    # neighbour without the part -> the pixel's edge towards it, walked with the pixel on the left
    for step, start, end in (
        ((0, -1), (0, 0), (1, 0)),
        ((1, 0), (1, 0), (1, 1)),
        ((0, 1), (1, 1), (0, 1)),
        ((-1, 0), (0, 1), (0, 0)),
    ):
        beyond = np.roll(padded, (-step[0], -step[1]), axis=(0, 1))
        for i, j in (np.argwhere(padded & ~beyond) - 1).tolist():
            ends.setdefault((i + start[0], j + start[1]), []).append((i + end[0], j + end[1]))
    loops = []
    while ends:
        loop = [next(iter(ends))]
        loop.append(_next(ends, loop[0], (0, 0)))
        while loop[-1] != loop[0] or (loop[-1] in ends and _passes(ends, loop)):
            came = (loop[-1][0] - loop[-2][0], loop[-1][1] - loop[-2][1])
            loop.append(_next(ends, loop[-1], came))
        loops.append(loop[:-1])
    return loops


def _passes(ends: dict[Point, list[Point]], loop: Loop) -> bool:
    """Tell whether a loop goes on through its own start, where two corners of the part touch."""
    here, before = loop[-1], loop[-2]
    left = (here[0] - (here[1] - before[1]), here[1] + (here[0] - before[0]))
    return left in ends[here]


def _next(ends: dict[Point, list[Point]], here: Point, came: Point) -> Point:
    """Take the way on from a corner; where there are two, the left one, which stays with the same pixel."""
    left = (here[0] - came[1], here[1] + came[0])
    ways = ends[here]
    way = left if left in ways else ways[0]
    ways.remove(way)
    if not ways:
        del ends[here]
    return way


def _area(loop: Loop) -> float:
    x, y = np.array(loop, np.float64).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _join(outer: Loop, hole: Loop) -> Loop:
    """Insert a hole into the loop around it, by a channel from the hole's leftmost corner to the left."""
    start = min(hole)
    known = set(outer)
    i = start[0]
    while (i, start[1]) not in known:
        i -= 1
    at, first = outer.index((i, start[1])), hole.index(start)
    around = [*hole[first:], *hole[:first], start]
    return [*outer[: at + 1], *around, *outer[at:]]


def _without_straight(loop: Loop) -> Loop:
    """Leave out the corners at which the way goes straight on."""
    ways = [_way(here, after) for here, after in zip(loop, [*loop[1:], loop[0]], strict=True)]
    kept = [here for here, way, before in zip(loop, ways, [ways[-1], *ways[:-1]], strict=True) if way != before]
    return kept


def _way(here: Point, after: Point) -> Point:
    """Return the direction of a step along an axis: -1, 0 or 1 for each."""
    return ((after[0] > here[0]) - (after[0] < here[0]), (after[1] > here[1]) - (after[1] < here[1]))


def filled(polygons: Iterable[Points], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels (I, J) whose centres lie inside an odd number of windings of closed polygons (N, 2)."""
    flips = np.zeros((shape[0] + 1, shape[1]), np.int64)
    for points in polygons:
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            low, high = sorted((y0, y1))
            rows = np.arange(max(0, int(np.ceil(low))), min(shape[1], int(np.ceil(high))))
            if rows.size:
                across = x0 + (rows - y0) * (x1 - x0) / (y1 - y0)
                np.add.at(flips, (np.clip(np.ceil(across), 0, shape[0]).astype(int), rows), 1)
    return np.asarray(np.cumsum(flips[:-1], axis=0) % 2 == 1)
