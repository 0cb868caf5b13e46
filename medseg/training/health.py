"""Whether a training goes well, judged by its losses alone; pure functions.

A loss that is no number, or that explodes, ends a training while the last good checkpoint is still there. One that
stays where it began is only pointed out: some data are slow to learn, and the person decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from medseg.errors import TrainingError
from medseg.planning.plan import Plan

WINDOW = 20
"""Losses that are averaged: a single bad batch is no disease."""
EXPLODED = 3.0
"""Times the size of the first losses (at least of 1) above them."""
FLAT_SHARE, FLAT_STEPS = 0.3, 200
"""Of the training, and steps, after which a loss that stays at its start is pointed out."""
FLAT = 0.97
"""A loss above this share of its start has not moved."""
LEARNT_NOTHING = 0.02
"""Validation Dice up to which a network is said to have learnt nothing."""


def refuse_what_is_no_number(plan: Plan, step: int, loss: float, gradient: float) -> None:
    """Raise TrainingError (LOSS_NOT_FINITE) where a loss, or the norm of its gradient, is NaN or inf."""
    if math.isfinite(loss) and math.isfinite(gradient):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient of the loss ({loss:.3g}) is {gradient}"
    raise TrainingError(
        f"{what} at step {step}: the training diverged. The last checkpoint is kept, and the same command would come "
        f"to the same end; train in another --out with {_advice(plan)}",
        code="LOSS_NOT_FINITE",
    )


def refuse_explosion(plan: Plan, losses: Sequence[float]) -> None:
    """Raise TrainingError (DIVERGED) where the mean of the last WINDOW losses is far above that of the first ones."""
    if len(losses) < 2 * WINDOW:
        return
    recent = sum(losses[-WINDOW:]) / WINDOW
    if recent > _limit(losses):
        raise TrainingError(
            f"the loss rose from {_start(losses):.3g} to {recent:.3g} (step {len(losses)}): the training diverged. The "
            "last checkpoint from before is kept, and the same command would come to the same end; train in another "
            f"--out with {_advice(plan)}",
            code="DIVERGED",
        )


def sound(losses: Sequence[float]) -> bool:
    """Tell whether the state is worth a checkpoint: none of the last losses is on its way out."""
    return len(losses) <= WINDOW or max(losses[-3:]) <= _limit(losses)


def flat(losses: Sequence[float], progress: float) -> str | None:
    """Return what to say of a loss that has stayed where it began for so long that it should not; else None."""
    if len(losses) < max(FLAT_STEPS, 3 * WINDOW) or progress < FLAT_SHARE:
        return None
    start, recent = _start(losses), sum(losses[-WINDOW:]) / WINDOW
    if recent < start - (1 - FLAT) * max(abs(start), 1e-3):
        return None
    return (
        f"the loss has not fallen since the start ({start:.3g}, now {recent:.3g} after {len(losses)} steps): nothing "
        "is being learnt. Look at the images and masks (medseg check), then try another learning_rate (--set), more "
        "time, or another loss"
    )


def learnt_nothing(best_dice: float, scored: bool) -> str | None:
    """Return what to say where the best validation Dice of the whole training is next to nothing; else None."""
    if not scored or best_dice > LEARNT_NOTHING:
        return None
    return (
        f"the best validation Dice is {best_dice:.3f}: this network has learnt nothing that could be used. Look at the "
        "images and masks (medseg check); then give more time, or another learning_rate (--set)"
    )


def _start(losses: Sequence[float]) -> float:
    return sum(losses[:WINDOW]) / WINDOW


def _limit(losses: Sequence[float]) -> float:
    return _start(losses) + EXPLODED * max(abs(_start(losses)), 1.0)


def _advice(plan: Plan) -> str:
    lower = f"--set learning_rate={plan.learning_rate / 5:.1g}"
    return f"--set precision=fp32, or {lower}" if plan.precision == "bf16" else lower
