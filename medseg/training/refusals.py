"""What cannot be learnt from, said before time is spent on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from medseg.display import Display
from medseg.errors import SpecError, TrainingError
from medseg.joined import JoinedCase, dataset_of
from medseg.planning.budget import refuse_small_budget
from medseg.planning.fingerprint import Fingerprint
from medseg.spec import Case
from medseg.training.folds import make_folds, repeats, the_fold
from medseg.training.request import Request

if TYPE_CHECKING:
    from medseg.training.loop import Job  # brings MONAI, whose import takes longer than making a plan


def refuse_too_few(cases: Sequence[Case], request: Request) -> None:
    """Raise where there are too few patients, or too little time, before anything is read.

    Raises
    ------
    SpecError : no training case has a mask.
    TrainingError : too few patients for the folds that are asked for (TOO_FEW_PATIENTS), or no such fold.
    PlanError : the budget leaves no time at all to learn (BUDGET_TOO_SMALL).
    """
    if not cases:
        raise SpecError(
            "there is no case to learn from: no case outside of the test split has a mask; medseg check lists them"
        )
    if request.budget:
        refuse_small_budget(request.budget, 1, 0.0)
    folds = make_folds(cases, folds=request.folds, seed=request.seed)
    if request.fold is not None:
        the_fold(folds, request.fold)


def refuse_empty_training(jobs: Sequence[Job]) -> None:
    """Raise TrainingError (NO_FOREGROUND) where none of the cases that a network learns from holds a label.

    The prepared cases are asked, so that labels which vanished on the planned grid are noticed too.
    """
    for number, job in enumerate(jobs):
        if not any(len(job.cache(case)["locations"]) for case in job.train):
            fold = f" of fold {number}" if len(jobs) > 1 else ""
            raise TrainingError(
                f"none of the {len(job.train)} cases{fold} to learn from holds a label on the planned grid "
                f"({', '.join(job.spec.foreground)}; spacing {job.plan.spacing}): nothing can be learnt. Add cases "
                "that hold labels, use another --seed or --folds so that they are not all held out, or a finer spacing",
                code="NO_FOREGROUND",
            )


def say_absent_labels(display: Display, fingerprint: Fingerprint) -> None:
    """Say which labels no training case holds."""
    absent = [label for label, cases in fingerprint.label_cases.items() if not cases]
    if absent:
        display.say(f"no training case holds {', '.join(absent)}: the model cannot learn what it has never seen")


def say_datasets(display: Display, cases: Sequence[Case], *, without_mask: int) -> None:
    """Say what is known of each of several datasets (nothing of one), and how many cases are left out."""
    times = repeats(cases)
    for own in {case.own.name: case.own for case in cases if isinstance(case, JoinedCase)}.values():
        count = sum(dataset_of(case) == own.name for case in cases)
        more = f", each drawn {times[own.name]} times in a pass" if times[own.name] > 1 else ""
        display.say(f"{own.name}: {count} training case(s) that annotate {', '.join(own.foreground)}{more}")
    if without_mask:
        display.say(f"{without_mask} training case(s) have no mask and are left out")
