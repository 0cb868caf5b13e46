"""The path from a case on disk to a patch, in one visible MONAI Compose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
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
from medseg.preparation.warp import Region
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


def read_regions(path: Compose, wanted: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Region]:
    """Return what `after_cache` gives for each (seed of the path, opened arrays and "foreground" and "margin").

    Where nothing but `SamplePatch` follows the cache, it is asked directly: what MONAI does around a transform (a
    dictionary of MetaTensors) takes longer than reading a patch of a small image. The regions are the same.
    """
    following = path.transforms[_cache_position(path) + 1 :]
    sample = following[0] if len(following) == 1 and isinstance(following[0], SamplePatch) else None
    pick = after_cache(path)
    regions = []
    for seed, data in wanted:
        _set_seed(path, seed)
        if sample is not None:
            image, mask, centre = sample.read(data)
            regions.append(Region(torch.from_numpy(image), torch.from_numpy(mask), centre))
        else:
            found = pick(data)
            regions.append(Region(found["image"].as_tensor(), found["mask"].as_tensor(), found["centre"]))
    return regions


def _set_seed(path: Compose, seed: int) -> None:
    """Do what ``path.set_random_state(seed)`` does, with the generator that it has: making one asks the system."""
    if "R" in vars(path):
        path.R.seed(seed)
        path.set_random_state(state=path.R)
    else:
        path.set_random_state(seed=seed)


def _cache_position(path: Compose) -> int:
    return next(i for i, step in enumerate(path.transforms) if isinstance(step, CaseCache))
