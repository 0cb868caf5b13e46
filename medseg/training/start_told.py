"""What a fine-tuning tells of the model that it begins with: in the log, and in the bundle that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medseg.cases import image_digest
from medseg.display import Display
from medseg.errors import TrainingError
from medseg.spec import Dataset
from medseg.training.loop import Job
from medseg.training.start import DIGITS


def seen_by(job: Job) -> tuple[str, ...]:
    """Return by what digests the network of a job will know the images it has learnt from, also before.

    Nothing where the model that it began with does not know its own: half an answer would look like a whole one.
    """
    before: frozenset[str] = frozenset() if job.start is None else job.start.seen
    if job.start is not None and not before:
        return ()
    return tuple(sorted(before | {job.images[case.id] for case in job.train if case.id in job.images}))


def validation_seen(job: Job) -> list[str] | None:
    """Return the validation cases that the network had learnt from before it began; None where it does not know."""
    if job.start is None or not job.start.seen:
        return None if job.start is not None else []
    return [case.id for case in job.validation if job.images.get(case.id) in job.start.seen]


def basis_of(jobs: Sequence[Job]) -> str:
    """Say what the validation cases of a training are: cases that a network knew before are not out of its fold."""
    what = "out-of-fold cases" if len(jobs) > 1 else "validation cases of a single split"
    seen = [validation_seen(job) for job in jobs]
    known = len({case for found in seen for case in found or ()})
    if known:
        return f"{what.removeprefix('out-of-fold ')}, of which the model knew {known} before"
    return f"{what.removeprefix('out-of-fold ')}, which the model may have known before" if None in seen else what


def start_facts(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return what the bundle says about its beginning, nothing for random weights."""
    start = jobs[0].plan.start
    if start is None:
        return {}
    facts = start.model_dump(mode="json")
    facts["networks"] = [job.start.file for job in jobs if job.start is not None]
    seen = [validation_seen(job) for job in jobs]
    facts["validation_cases_seen_before"] = [None if cases is None else len(cases) for cases in seen]
    return {"start": facts}


def say_start(jobs: Sequence[Job], dataset: Dataset, display: Display) -> None:
    """Say what is kept of the model and whether the Dice of validation and test cases can be believed."""
    start = jobs[0].plan.start
    if start is None:
        return
    rows = {"kept": start.kept, "new, with random weights": start.new, "left out": start.left_out}
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in rows.items() if names)
    display.say(f"fine-tuning the model {start.model[:12]} ({told})")
    seen = [validation_seen(job) for job in jobs]
    if any(cases is None for cases in seen):
        display.say(
            "the model does not tell which cases it learnt from: if validation cases are among them, their Dice is "
            "too good; judge by test cases that it cannot know"
        )
    cases = sorted({case for found in seen for case in found or ()})
    total = sum(len(job.validation) for job in jobs)
    if cases:
        more = f" and {len(cases) - 3} more" if len(cases) > 3 else ""
        display.say(
            f"{len(cases)} of {total} validation cases ({', '.join(cases[:3])}{more}) are among those that the model "
            "learnt from: their Dice is too good; judge by test cases that it cannot know"
        )
    if known := test_seen(jobs, dataset):
        display.say(
            f"{len(known)} test case(s) ({', '.join(known[:3])}) are among those that the model learnt from: they are "
            "no test of what comes of it; hold out others"
        )


def test_seen(jobs: Sequence[Job], dataset: Dataset) -> list[str]:
    """Return the test cases whose images any network had learnt from before it began, as far as it tells.

    Images that are not there (yet) are passed over: a training does not need them.

    Raises
    ------
    TrainingError : an image is there and cannot be read.
    """
    seen = frozenset[str]().union(*(job.start.seen for job in jobs if job.start is not None))
    if not seen:
        return []
    known = []
    for case in dataset.select("test"):
        if not all(path.exists() for path in case.images):
            continue
        try:
            known += [case.id] if image_digest(case)[:DIGITS] in seen else []
        except OSError as error:
            raise TrainingError(
                f"test case {case.id}: an image cannot be read ({error.strerror}); medseg check lists all"
            ) from error
    return known
