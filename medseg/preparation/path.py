"""The path from a case on disk to a patch, in one visible MONAI Compose."""

from __future__ import annotations

from typing import Any

from monai.transforms import Compose, Transform

from medseg.errors import PlanError
from medseg.planning.plan import Plan
from medseg.preparation.cache import CaseCache
from medseg.preparation.preprocess import (
    CropToContent,
    LoadStudy,
    NormaliseIntensity,
    Orient,
    Resample,
    ResampleSplines,
)
from medseg.preparation.sampling import SamplePatch
from medseg.spec import Spec


def geometry_and_intensity(plan: Plan) -> list[Transform]:
    """Return the steps that training and prediction share.

    Raises
    ------
    PlanError : the plan is that of a MONAI bundle, by which `medseg.preparation.prepare` prepares: nothing is trained.
    """
    if plan.monai is not None:
        raise PlanError("this is the plan of a MONAI bundle: it predicts, and does not say how to train")
    normalise = NormaliseIntensity(tuple(plan.normalisation.values()))
    if plan.nnunet is not None:
        target = (*plan.spacing[:2], None if plan.dimensions == 2 else plan.spacing[2])
        return [Orient(plan.orientation), CropToContent(), normalise, ResampleSplines(target, plan.nnunet)]
    return [Orient(plan.orientation), CropToContent(), Resample(plan.spacing), normalise]


def prediction_path(plan: Plan) -> Compose:
    """{"image": MetaTensor (C, I, J, K)} -> prepared image and the "steps" that lead back."""
    return Compose(geometry_and_intensity(plan))


def training_path(spec: Spec, plan: Plan, cache: CaseCache) -> Compose:
    """Case -> region of an image and a mask, ready to be augmented on the training device.

    Everything up to the cache is deterministic and runs once a case; what follows runs for every patch.
    """
    return Compose(
        [
            LoadStudy(spec),
            *geometry_and_intensity(plan),
            cache,
            SamplePatch(plan.patch_size),
        ]
    )


def up_to_cache(path: Compose) -> Any:
    """Return the deterministic part of a training path: Case -> opened arrays."""
    end = _cache_position(path) + 1
    return lambda case: path(case, end=end)


def after_cache(path: Compose) -> Any:
    """Return the random part of a training path: opened arrays and "foreground" (and "margin") -> region."""
    start = _cache_position(path) + 1
    return lambda data: path(data, start=start)


def _cache_position(path: Compose) -> int:
    return next(i for i, step in enumerate(path.transforms) if isinstance(step, CaseCache))
