"""What a label is like in one mask: volume, extent, objects, surface, form and place."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from medseg.spec import Spec
from medseg.volume import Volume, reorient

Shapes = dict[str, dict[str, float]]
Floats = NDArray[np.float64]


def label_shapes(mask: Volume, spec: Spec) -> Shapes:
    """Return label -> numbers, for the labels that are there.

    Lengths in mm (pixels for pictures) along the patient's axes R, A, S; volumes, extents and ratios as logarithms.
    Place is that in the image from 0 to 1, and (of several labels) relative to all labels together.

    Parameters
    ----------
    mask : (1, I, J, K) label values of the spec.
    """
    from scipy.ndimage import find_objects

    turned = reorient(mask, "RAS")
    array = turned.array[0]
    boxes = find_objects(array)
    found, centres = {}, {}
    for label, value in spec.foreground.items():
        box = boxes[value - 1] if value <= len(boxes) else None
        if box is not None:
            found[label], centres[label] = _shape(array[box] == value, box, turned)
    if len(spec.foreground) > 1:
        middle = np.mean(list(centres.values()), axis=0) if centres else np.zeros(3)
        for label, centre in centres.items():
            found[label] |= {f"offset {axis}": float(d) / 10 for axis, d in zip("RAS", centre - middle, strict=True)}
    return found


def _shape(part: NDArray[np.bool_], box: tuple[slice, ...], grid: Volume) -> tuple[dict[str, float], Floats]:
    """Return the numbers of one label, and its centre in mm from the first voxel."""
    from scipy.ndimage import label as number_objects

    spacing = np.array(grid.spacing)
    count = int(np.count_nonzero(part))
    volume = count * float(spacing.prod())
    start = np.array([edge.start for edge in box])
    middle, spread = _moments(part)
    centre = middle + start
    spread = spread * np.outer(spacing, spacing) + np.diag(spacing**2 / 12)
    axes = np.sqrt(np.linalg.eigvalsh(spread))
    slopes = spread / np.sqrt(np.outer(spread.diagonal(), spread.diagonal()))
    objects = number_objects(part, structure=np.ones((3, 3, 3), bool))[1]
    surface = _surface(part, spacing)
    extent = np.array(part.shape) * spacing
    numbers = {
        "volume": math.log(volume),
        "objects": math.log(objects),
        "surface": math.log(surface / volume ** (2 / 3)),
        "elongation": math.log(axes[2] / axes[1]),
        "flatness": math.log(axes[1] / axes[0]),
        "at the border of the image": _at_border(part, box, grid) / count ** (2 / 3),
    }
    for n, axis in enumerate("RAS"):
        numbers[f"extent {axis}"] = math.log(extent[n])
        numbers[f"place {axis}"] = float((centre[n] + 0.5) / grid.shape[n])
        numbers[f"slant {axis}"] = float(slopes[n, (n + 1) % 3])
    return numbers, centre * spacing


def _moments(part: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return the mean (3,) and the covariances (3, 3) of the indices of a part's voxels.

    From its shadows along each axis: a list of its voxels would take fifty times the memory of the mask.
    """
    lines = [np.arange(size) - (size - 1) / 2 for size in part.shape]
    shadows = {axis: np.count_nonzero(part, axis=axis).astype(np.float64) for axis in range(3)}
    counts = [shadows[2].sum(1), shadows[2].sum(0), shadows[0].sum(0)]
    whole = counts[0].sum()
    means = np.array([float(line @ row) / whole for line, row in zip(lines, counts, strict=True)])
    away = [line - mean for line, mean in zip(lines, means, strict=True)]
    spread = np.diag([float(line**2 @ row) / whole for line, row in zip(away, counts, strict=True)])
    for hidden, (first, second) in enumerate(((1, 2), (0, 2), (0, 1))):
        shared = float(away[first] @ shadows[hidden] @ away[second]) / whole
        spread[first, second] = spread[second, first] = shared
    return means + [(size - 1) / 2 for size in part.shape], spread


def _surface(part: NDArray[np.bool_], spacing: Floats) -> float:
    """Return the area of all faces between the part and what is not the part, in mm²."""
    padded = np.pad(part, 1)
    total = 0.0
    for axis in range(3):
        faces = np.count_nonzero(np.diff(padded.view(np.int8), axis=axis))
        total += faces * float(spacing.prod() / spacing[axis])
    return total


def _at_border(part: NDArray[np.bool_], box: tuple[slice, ...], grid: Volume) -> int:
    """Return how many voxels lie in the outermost layers of the image (axes of one voxel have none)."""
    total = 0
    for axis, (edge, size) in enumerate(zip(box, grid.shape, strict=True)):
        if size > 1:
            total += int(np.count_nonzero(part.take(0, axis))) if edge.start == 0 else 0
            total += int(np.count_nonzero(part.take(-1, axis))) if edge.stop == size else 0
    return total
