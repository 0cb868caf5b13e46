"""Judge what a reader made of a hazard: voxel by voxel and by the places of the corners, in any order of the axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nibabel.orientations as orientations
import numpy as np
from numpy.typing import NDArray

from medseg.phantom.hazards import Hazard
from medseg.volume import Volume, grid_distance

MATCH_MM = 0.01
"""A corner voxel further from its true place than this is a wrong geometry; readers store affines as float32."""


def distance_to(found: Volume, truth: Volume) -> tuple[float, float]:
    """Return the largest error of a value and of a corner voxel's place (mm), the axes turned to those of `truth`.

    Both are infinite for another shape.
    """
    relative = np.linalg.inv(truth.affine) @ found.affine
    flips: NDArray[Any] = np.asarray(orientations.io_orientation(relative))
    if np.isnan(flips).any():
        return np.inf, np.inf
    array = orientations.apply_orientation(found.array[0], flips)
    if array.shape != truth.shape:
        return np.inf, np.inf
    affine = found.affine @ orientations.inv_ornt_aff(flips, found.shape)
    values = float(np.abs(np.asarray(array, np.float64) - truth.array[0]).max())
    return values, grid_distance(truth.shape, affine, truth.affine)


def matches(found: Volume, truth: Volume) -> bool:
    """Tell whether a volume is the truth: values to float32, corners to `MATCH_MM`."""
    values, place = distance_to(found, truth)
    return values <= 1e-6 * float(np.abs(truth.array).max()) and place <= MATCH_MM


def verdict(hazard: Hazard, found: Sequence[Volume]) -> str:
    """Judge what a reader made of a hazard: "exact", a name in `tolerated`, or "wrong" with the figures.

    Exact: each true volume was found, and nothing else but the asides.
    """
    truths = hazard.truth()
    if truths and len(truths) <= len(found) <= len(truths) + hazard.asides:
        if all(any(matches(volume, truth) for volume in found) for truth in truths):
            return "exact"
        for name, other in hazard.tolerated:
            if len(found) == 1 and matches(found[0], other()):
                return name
    return f"wrong: {_how_wrong(found, truths)}"


def _how_wrong(found: Sequence[Volume], truths: Sequence[Volume]) -> str:
    sizes = " and ".join("x".join(map(str, volume.shape)) for volume in found[:3])
    if not truths or not found:
        return f"{len(found)} volumes of {sizes}"
    values, place = min((distance_to(found[0], truth) for truth in truths), key=lambda errors: (errors[1], errors[0]))
    if np.isinf(place):
        return f"{len(found)} of {len(truths)} volumes, {sizes}, {found[0].spacing[2]:.3f} mm apart"
    return f"{len(found)} of {len(truths)} volumes, values off by {values:.4g}, places by {place:.2f} mm"
