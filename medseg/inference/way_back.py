"""The way from the prepared grid back to the grid of the source, as a view of the array that is to be filled."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.inference.windows import Layout
from medseg.preparation.interpolate import Line, linear_line
from medseg.preparation.steps import Cropped, Oriented, Resampled, Step, lines_back

Lines = tuple[Line, Line, Line]


def first(axis: int) -> tuple[int, int, int]:
    """Return the order of axes with this one in front of the others."""
    one, other = (rest for rest in range(3) if rest != axis)
    return axis, one, other


def ways_back(steps: tuple[Step, ...], where: Layout) -> Lines:
    """Return how the planes' axis and the two others of the prepared grid lead to those before it was resampled.

    Raises
    ------
    ValueError : the image was resampled before another step, or twice.
    """
    if any(isinstance(step, Resampled) for step in steps[:-1]):
        raise ValueError("an image is resampled last")
    shape = where.shape
    same = (linear_line(shape[0], shape[0]), linear_line(shape[1], shape[1]), linear_line(shape[2], shape[2]))
    lines = lines_back(steps[-1], shape) if steps and isinstance(steps[-1], Resampled) else same
    i, j, k = (lines[axis] for axis in first(where.axis))
    return i, j, k


def seen(array: NDArray[Any], steps: tuple[Step, ...], where: Layout) -> NDArray[Any]:
    """Return a view (S', A', B') of an array (I, J, K) of the source as it stood before it was resampled.

    What lies outside of the view was cropped away.
    """
    view = array
    for step in steps:
        if isinstance(step, Cropped):
            view = view[step.box]
        elif isinstance(step, Oriented):
            view = _turned(view, step)
    return np.transpose(view, first(where.axis))


def _turned(array: NDArray[Any], step: Oriented) -> NDArray[Any]:
    order = [0] * 3
    for axis, (target, _) in enumerate(step.flips):
        order[int(target)] = axis
    flips = tuple(slice(None, None, -1 if direction < 0 else None) for _, direction in step.flips)
    return array[flips].transpose(order)
