"""What is kept of a budget for the end of a training: measured on a few cases before the first step.

What follows the loops is rehearsed on these cases as it will be done: an untrained network predicts them, with the
mirroring of the finished model, and their true masks stand in for what a trained one would find, because what comes
after the prediction (post-processing tried, voxels drawn, distances measured) takes as long as its objects are many.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medseg.bundle import Bundle
from medseg.display import clock
from medseg.evaluation.evaluate import dataset_reference, evaluate_against
from medseg.exporters.nifti import write_nifti
from medseg.inference.predict import Model
from medseg.parallel import world
from medseg.spec import Case, Dataset
from medseg.studies import read_study
from medseg.training.choose_steps import StepTrial
from medseg.training.finish import Scored, make_info, noted_prediction
from medseg.training.loop import Job, Learner
from medseg.training.schedule import LEAST_SHARE
from medseg.training.state import LoopState
from medseg.training.temperature import VoxelSample

FIXED_SECONDS = 8.0
"""Bundle, tables, pictures, fits and registry: 5 to 8 s of work on two cores."""
JUDGING_SECONDS = 0.02
"""Of work that fitting the quality estimate takes for each case."""
MOST_BUSY = 5.0
"""A machine shared by more than this is not a matter of planning."""
CASES = 3
SHARE = 0.02
"""Of the budget: once the rehearsal has taken this, no further case is tried."""


@dataclass(frozen=True)
class Reserve:
    """Seconds expected on this machine, as busy as it was when they were measured.

    Attributes
    ----------
    validation_voxel : of a validation, for a prepared voxel.
    finishing : of everything that follows the loops, for all networks together.
    slowness : how many times longer than expected the validations took since, in the order in which they were made;
        the schedules of all networks add to it.
    """

    validation_voxel: float = 0.0
    finishing: float = 0.0
    slowness: list[float] = field(default_factory=lambda: [1.0])

    def validation(self, job: Job) -> float:
        """Return the seconds of one validation of a network; its processes share the cases."""
        return self.validation_voxel * _voxels(job, job.validation) / world().size


@dataclass(frozen=True)
class Rehearsal:
    """What was measured.

    Attributes
    ----------
    voxels : prepared voxels of the cases that were tried.
    validating, scoring : seconds that they took.
    busy : how much longer work takes than on a machine of which nobody else wants anything, at least 1.
    """

    voxels: int
    validating: float
    scoring: float
    busy: float


def measure_reserve(jobs: Sequence[Job], budget: float) -> Reserve:
    """Rehearse the end on cases of the first network and return what all of them will need.

    The prepared cases must be there.
    """
    found = _rehearse(jobs[0], longest=SHARE * budget)
    cases = sum(len(job.validation) for job in jobs)
    return reserve_of(found, voxels=sum(_voxels(job, job.validation) for job in jobs), cases=cases)


def reserve_of(found: Rehearsal, *, voxels: int, cases: int) -> Reserve:
    """Return what `cases` with so many prepared voxels need where the rehearsed ones needed what was found."""
    fixed = found.busy * (FIXED_SECONDS + JUDGING_SECONDS * cases)
    return Reserve(found.validating / found.voxels, found.scoring / found.voxels * voxels + fixed)


def told(reserve: Reserve, left: float, *, cases: int) -> str:
    """Say in a line what is kept of the `left` seconds of a budget for the end, and where it cannot be kept."""
    needed = f"scoring {cases} validation case(s) and writing are expected to take {clock(reserve.finishing)}"
    if reserve.finishing <= (1 - LEAST_SHARE) * left:
        return f"{needed} of the budget"
    whole = max(0.0, left) * LEAST_SHARE + reserve.finishing
    return (
        f"{needed}, and {clock(max(0.0, left))} of the budget are left: it will be exceeded, this command goes on for "
        f"about {clock(whole)}; give a larger --budget, or fewer --folds"
    )


def _voxels(job: Job, cases: Sequence[Case]) -> int:
    return sum(math.prod(job.cache(case)["image"].shape[1:]) for case in cases)


def _typical(job: Job) -> list[Case]:
    """Return up to CASES validation cases, those nearest to the usual size first."""
    sizes = {case.id: _voxels(job, [case]) for case in job.validation}
    usual = float(np.median(list(sizes.values())))
    return sorted(job.validation, key=lambda case: abs(sizes[case.id] - usual))[:CASES]


def _rehearse(job: Job, *, longest: float) -> Rehearsal:
    """Validate and score a few cases; the first of them in any case, others while `longest` seconds are not over."""
    learner, cases = Learner(job), _typical(job)
    place = job.checkpoint.parent.parent / "rehearsal"
    shutil.rmtree(place, ignore_errors=True)  # of a process that was killed in it
    learner.case_dice(cases[0])  # the first call of a network compiles kernels
    info = make_info([job], [LoopState()], "", None)
    model = Model(Bundle(place, info), [learner.average], job.device)
    began, own = time.monotonic(), time.thread_time()
    tried: list[Case] = []
    validating = 0.0
    sample = VoxelSample(job.spec, cases=len(job.validation), seed=job.plan.seed)
    scored = Scored(StepTrial(job.spec, job.plan.fingerprint), sample)
    try:
        for case in cases:
            if tried and time.monotonic() - began > longest:
                break
            start = time.monotonic()
            learner.case_dice(case)
            validating += time.monotonic() - start
            _score(model, case, place, scored)
            tried.append(case)
        evaluate_against(dataset_reference(Dataset(job.spec, tuple(tried)), tried, "validation"), place, out=place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    seconds, worked = time.monotonic() - began, time.thread_time() - own
    busy = min(MOST_BUSY, max(1.0, seconds / max(worked, 1e-3))) if job.device.type == "cpu" else 1.0
    return Rehearsal(_voxels(job, tried), validating, seconds - validating, busy)


def _score(model: Model, case: Case, place: Path, scored: Scored) -> None:
    """Do with one case what the end does, as if the network had found exactly what is there."""
    spec = model.bundle.info.spec
    study = read_study(spec, case)
    assert study.mask is not None, "cases without a mask do not learn"
    notes, at, _ = noted_prediction(model, study.image, place)
    labels = np.where(study.mask.array == (-1 if spec.ignore is None else spec.ignore), 0, study.mask.array)
    found = study.mask.with_array(labels)
    file = place / f"{case.id}.nii.gz"
    write_nifti(file, found)
    scored.add(case, file, notes, at, found, study.mask, hurry=False)
