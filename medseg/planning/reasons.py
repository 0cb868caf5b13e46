"""Why the values of a plan are what they are, in words for people."""

from __future__ import annotations

import math
from dataclasses import dataclass

from medseg.planning.budget import duration
from medseg.planning.plan import Plan


@dataclass(frozen=True)
class Chosen:
    """What the planner knew when it chose.

    Attributes
    ----------
    width : name of the chosen width, and `widths` : all of them, the narrowest first.
    seconds : of a training step.
    predict : seconds of a prediction of a median case with mirroring.
    training : seconds expected for the loop; None for a run by steps.
    voxels : of all cases at the planned spacing.
    """

    width: str
    widths: list[str]
    seconds: float
    predict: float
    training: float | None
    voxels: float


def reasons_of(plan: Plan, chosen: Chosen) -> dict[str, str]:
    """Return plan key -> reason, for what does not follow from the data alone."""
    device = "" if plan.measured is None else f" ({plan.measured.device})"
    return {
        "dataset": "Name in the spec.",
        "normalisation": "CT holds Hounsfield units: clipped and scaled by the dataset's foreground. "
        "Other images have no common scale: each by its own mean and deviation.",
        "network": _network(plan, chosen),
        "loss": "Dice for the overlap that is scored, cross-entropy for gradients everywhere.",
        "foreground_share": "At least this share of a batch holds a label, so that small ones are seen.",
        "optimizer": "Reaches in tens of passes what plain gradient descent needs hundreds for.",
        "learning_rate": "Full rate; it rises over the warm-up and falls to zero at the end. 2e-3 learnt less in 300 "
        "steps than this in 200 (one seed, docs/decisions/0003).",
        "weight_decay": "AdamW's usual value.",
        "warmup": "Share of the training; without it the first steps of AdamW are too large.",
        "averaging": "The weights that predict are a running average over about 3 % of the steps.",
        "precision": f"The fastest measured on this machine{device}.",
        "steps": _steps(plan, chosen),
        "validations": "Ten, or one in a quarter of an hour, to see a curve and to keep the best; fewer where they "
        "would take over 15 % of the time.",
        "overlap": "Of neighbouring windows; half a window is what nnU-Net uses.",
        "test_mirroring": f"Predicting a median case with mirroring is expected to take {chosen.predict:.1f} s here.",
        "seed": "Asked for, or 0: the same seed makes the same choices.",
        "budget_seconds": "Asked for: wall time of the whole command (null for a run by steps).",
        "measured": "Step times of each candidate on this machine, in seconds.",
        "fingerprint": "What the dataset is; the plan follows from it.",
    }


def _network(plan: Plan, chosen: Chosen) -> str:
    stages = "Axes are halved while they are long and fine enough."
    if chosen.training is None:
        return f"Width {chosen.width!r}, the narrowest: a run by steps has no time that would ask for another. {stages}"
    why = "the widest there is" if chosen.width == chosen.widths[-1] else "a wider one would not get the steps it needs"
    return f"Width {chosen.width!r}: {chosen.seconds:.3f} s a step, {plan.steps} steps; {why}. {stages}"


def _steps(plan: Plan, chosen: Chosen) -> str:
    seen = plan.steps * plan.batch_size * math.prod(plan.patch_size) / chosen.voxels
    passes = f"every voxel of the dataset is seen about {seen:.2g} times"
    if chosen.training is None or plan.budget_seconds is None:
        return f"Asked for; {passes}."
    return (
        f"Expected: of {duration(plan.budget_seconds)}, about {duration(chosen.training)} are left for the training of "
        f"a network, at {chosen.seconds:.3f} s a step (measured); {passes}. The clock decides: where other programs "
        "slow the machine down, fewer are done and the rate still ends at zero."
    )
