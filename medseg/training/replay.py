"""A run repeated step by step: what it follows, what may make it differ, and whether it did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medseg.errors import TrainingError
from medseg.training.loop import Job
from medseg.training.record import differences, environment, environments
from medseg.training.state import LoopState, load_state


def record_of(run: Path, job: Job) -> LoopState:
    """Return the final state of the same fold of another run, which must have had the same plan and data.

    Raises
    ------
    TrainingError : that fold was not finished, or was another job.
    """
    number = job.checkpoint.parent.parent.name
    file = run / "5_folds" / number / "checkpoint" / "state.safetensors"
    if not file.with_name("finished.json").exists():
        raise TrainingError(
            f"--replay {run}: fold {number} of that run has not been finished; there is nothing to repeat"
        )
    return load_state(file, job=job.digest)


def warning(run: Path, device: torch.device) -> str:
    """Say what of the environment is not as it was when `run` was made; empty if nothing is known to differ."""
    rows, now = environments(run), environment(device)
    if not rows:
        return "replay: that run did not note where it was made; its bits may differ from those made here"
    told = [text for row in rows for text in differences(row, now)]
    several = " (more than one environment took part in that run)" if len(rows) > 1 else ""
    return f"replay: the bits may differ{several}: {'; '.join(dict.fromkeys(told))}" if told else ""


def compared(run: Path, jobs: Sequence[Job], states: Sequence[LoopState]) -> dict[str, Any]:
    """Compare the weights that came out with those of the repeated run.

    Returns
    -------
    {"identical": every bit of every fold; "largest_difference": of a weight; "first_step": {fold: the first step, from
    1, whose loss was another, or None}}.
    """
    largest, steps = 0.0, {}
    identical = True
    for job, state in zip(jobs, states, strict=True):
        record = record_of(run, job)
        pairs = [(record.best[key], state.best[key].cpu()) for key in record.best]
        identical &= all(torch.equal(old, new) for old, new in pairs)
        largest = max([largest, *(float((old.double() - new.double()).abs().max()) for old, new in pairs)])
        other = [i for i, (a, b) in enumerate(zip(record.losses, state.losses, strict=False), start=1) if a != b]
        steps[job.checkpoint.parent.parent.name] = other[0] if other else None
    return {"identical": identical, "largest_difference": largest, "first_step": steps}


def told(found: dict[str, Any]) -> str:
    """Say in a line how the repetition came out."""
    if found["identical"]:
        return f"replay: all weights are identical to those of the repeated run ({len(found['first_step'])} network(s))"
    steps = [f"fold {fold} from step {step}" for fold, step in found["first_step"].items() if step is not None]
    return (
        f"replay: the weights DIFFER from those of the repeated run, by {found['largest_difference']:.3g} at most; "
        f"losses differ in {', '.join(steps) or 'no step'}"
    )
