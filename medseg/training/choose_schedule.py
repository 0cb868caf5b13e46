"""Which schedule a network is trained by: as recorded (replay), by the clock (budget) or by steps."""

from __future__ import annotations

import time
from collections.abc import Callable

from medseg.training.loop import Job
from medseg.training.replay import record_of
from medseg.training.request import Request
from medseg.training.reserve import Reserve
from medseg.training.schedule import ByClock, ByRecord, BySteps, Schedule
from medseg.training.state import LoopState


def choose_schedule(
    job: Job,
    request: Request,
    *,
    began: float,
    reserve: Reserve,
    networks_left: int,
    earlier: float,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[LoopState], Schedule]:
    """Return state -> Schedule.

    Parameters
    ----------
    began : time of the clock from which a budget counts.
    reserve : what is kept of a budget for the end: all networks are scored then, so those still to be trained leave
        the time for it together.
    networks_left : still to be trained, this one included.
    earlier : seconds that earlier processes of this run spent on networks that are finished.
    """
    plan = job.plan

    def choose(state: LoopState) -> Schedule:
        if request.replay is not None:
            record = record_of(request.replay, job)
            return ByRecord(record.factors, [row["step"] - 1 for row in record.validations])
        if request.budget is None:
            return BySteps(plan.steps, validations=plan.validations, warmup=plan.warmup)
        # what a resumed command used before it was killed counts as if it had been spent now
        elapsed = clock() - began + earlier
        remaining = request.budget - elapsed - state.seconds
        return ByClock(
            max(0.0, remaining) / networks_left + state.seconds,
            spent=state.seconds,
            validations=plan.validations,
            warmup=plan.warmup,
            validation=reserve.validation(job),
            finishing=reserve.finishing / networks_left,
            slowness=reserve.slowness,
            clock=clock,
        )

    return choose
