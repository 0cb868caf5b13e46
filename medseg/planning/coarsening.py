"""Whether a budget is better spent on coarser voxels (docs/decisions/0011).

Coarser voxels show a network more of the body at once and let it see all of it more often; they cost detail, and for
thin structures everything. So they are made coarser only where the first is needed and the second is not lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from medseg.planning.fingerprint import Fingerprint
from medseg.planning.planner import Draft
from medseg.spec import Spec

ENOUGH_PASSES = 10
"""How often every training voxel should be seen; where a budget reaches that, the spacing is never touched."""
MIN_THICKNESS = 3.0
"""Voxels that the thinnest label must measure across afterwards, by its volume and surface."""
MAX_FACTOR = 4.0
WORTH = 1.05
"""Smaller factors change nothing but the numbers."""


@dataclass(frozen=True)
class Coarsening:
    """A factor on the spacing, 1 for none, and why, in words that follow a colon."""

    factor: float
    reason: str


def coarsening(
    spec: Spec, fingerprint: Fingerprint, sketch: Draft, step_seconds: float, training_seconds: float | None
) -> Coarsening:
    """Decide how much coarser than the data's own the planned spacing is; a pure function.

    Parameters
    ----------
    sketch : the draft at full resolution.
    step_seconds : of the fastest candidate.
    training_seconds : what the loop will have; None for a run by steps, which keeps the spacing.
    """
    if training_seconds is None:
        return Coarsening(1.0, "a run by steps keeps the resolution of the data")
    if spec.spacing is not None:
        return Coarsening(1.0, "it is set in the dataset spec")
    if spec.unit == "pixel" or sketch.dimensions == 2:
        what = "pictures" if spec.unit == "pixel" else "slices"
        return Coarsening(1.0, f"{what} keep their resolution whatever the budget: thin structures would vanish")
    passes = seen_passes(sketch, step_seconds, training_seconds)
    if passes >= ENOUGH_PASSES:
        return Coarsening(1.0, f"the budget sees every voxel {passes:.0f} times")
    few = f"the budget sees every voxel {passes:.2g} times only"
    field = _mean_side(sketch)
    largest = max((diameter(ml) for ml in fingerprint.label_ml.values()), default=0.0)
    if field >= largest:
        return Coarsening(
            1.0, f"{few}, but a patch of about {field:.3g} mm holds the largest label ({largest:.3g} mm) as it is"
        )
    thin = min(fingerprint.label_thickness.values(), default=0.0)
    detail = thin / MIN_THICKNESS / min(sketch.spacing)
    factor = min((ENOUGH_PASSES / passes) ** (1 / 3), largest / field, detail, MAX_FACTOR)
    if factor <= WORTH:
        return Coarsening(1.0, f"{few}, but coarser voxels would lose the thinnest label (about {thin:.3g} mm across)")
    return Coarsening(
        factor,
        f"{few}, and a patch of about {field:.3g} mm would see a part of the largest label ({largest:.3g} mm) only; "
        f"the thinnest label (about {thin:.3g} mm across) still measures {thin / factor / min(sketch.spacing):.2g} "
        "voxels. Set `spacing` in the dataset spec to keep another one",
    )


def seen_passes(sketch: Draft, step_seconds: float, training_seconds: float) -> float:
    """Return how often a training of this length sees every voxel of the dataset."""
    return training_seconds / step_seconds * sketch.batch_size * math.prod(sketch.patch_size) / sketch.voxels


def diameter(ml: float) -> float:
    """Return the diameter in mm of a ball of so many mL."""
    return float((6000 * ml / math.pi) ** (1 / 3))


def _mean_side(sketch: Draft) -> float:
    """Return the side in mm of a cube as large as a patch."""
    return float(math.prod(n * s for n, s in zip(sketch.patch_size, sketch.spacing, strict=True)) ** (1 / 3))
