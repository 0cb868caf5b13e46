"""A budget is that of the whole command: what the end needs is kept, and what a killed command has used counts."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medseg.display import Display
from medseg.training import run
from medseg.training.choose_schedule import choose_schedule
from medseg.training.request import Request
from medseg.training.reserve import FIXED_SECONDS, JUDGING_SECONDS, Rehearsal, Reserve, reserve_of, told
from medseg.training.schedule import LEAST_SHARE, ByClock
from medseg.training.state import LoopState


class Clock:
    """A clock that only moves when work is done."""

    def __init__(self) -> None:
        self.now = 500.0

    def __call__(self) -> float:
        return self.now


def job_of(make_spec: Any, make_plan: Any, *, cases: int = 1, voxels: tuple[int, int, int] = (10, 10, 10)) -> Any:
    def cache(case: str) -> dict[str, Any]:
        return {"image": np.broadcast_to(np.float32(0), (1, *voxels))}

    return SimpleNamespace(plan=make_plan(make_spec()), validation=[f"c{n}" for n in range(cases)], cache=cache)


@pytest.mark.parametrize(
    ("left", "earlier", "spent", "expected"),
    [
        (1, 0.0, 0.0, 900.0),
        (1, 300.0, 0.0, 600.0),  # a fold that an earlier process finished
        (2, 300.0, 0.0, 300.0),  # the rest is shared by the folds to come
        (1, 0.0, 200.0, 900.0),  # this fold's own earlier time is part of its share
        (2, 300.0, 200.0, 400.0),
    ],
)
def test_the_share_of_a_fold(
    make_spec: Any, make_plan: Any, left: int, earlier: float, spent: float, expected: float
) -> None:
    request: Any = SimpleNamespace(budget=1000.0, replay=None)
    clock = Clock()
    schedule_of = choose_schedule(
        job_of(make_spec, make_plan),
        request,
        began=clock.now - 100,
        reserve=Reserve(),
        networks_left=left,
        earlier=earlier,
        clock=clock,
    )
    schedule = schedule_of(LoopState(seconds=spent))
    assert isinstance(schedule, ByClock)
    assert schedule.whole == pytest.approx(expected)


def test_what_an_earlier_process_spent_on_a_fold_is_not_there_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first fold was taken up after 300 s of an earlier process, and ends at once."""
    told: list[float] = []
    monkeypatch.setattr(run, "measure_reserve", lambda *_: Reserve())
    monkeypatch.setattr(run, "Watch", lambda *_: SimpleNamespace(ended=lambda state: state))
    monkeypatch.setattr(run, "fit", lambda *_, **__: LoopState(seconds=300.0))
    monkeypatch.setattr(run, "choose_schedule", lambda *_, earlier, **__: told.append(earlier))
    jobs: Any = [
        SimpleNamespace(checkpoint=tmp_path / str(fold) / "checkpoint" / "state", validation=[]) for fold in range(2)
    ]
    request = Request(budget=1000.0)
    work = run._Work(Any, (), tmp_path, request, "", time.monotonic(), Display(None), torch.device("cpu"))  # type: ignore[arg-type]
    work.fit_all(jobs, Any)  # type: ignore[arg-type]
    assert told == [0.0, pytest.approx(300.0, abs=5.0)]


class Machine:
    """Does the work of a training on a clock; `slowness` says how busy other programs keep it at a time."""

    def __init__(self, clock: Clock, slowness: Any) -> None:
        self.clock, self.slowness = clock, slowness

    def works(self, seconds: float) -> float:
        took = seconds * self.slowness(self.clock.now)
        self.clock.now += took
        return float(took)


STEP, VALIDATION, SCORING = 0.4, 0.05, 0.3
"""Seconds of work of a step, of a case in a validation, and of a case at the end."""


def command(make_spec: Any, make_plan: Any, *, budget: float, folds: int, cases: int, slowness: Any) -> float:
    """Return how long a whole command takes on a machine, from its start to its end."""
    clock = Clock()
    machine, began = Machine(clock, slowness), clock.now
    machine.works(9.0)  # imports, reading, preparing
    job = job_of(make_spec, make_plan, cases=cases)
    measured = Rehearsal(3000, machine.works(3 * VALIDATION), machine.works(3 * SCORING), busy=slowness(clock.now))
    reserve = reserve_of(measured, voxels=folds * cases * 1000, cases=folds * cases)
    request: Any = SimpleNamespace(budget=budget, replay=None)
    for number in range(folds):
        state = LoopState()
        schedule = choose_schedule(
            job, request, began=began, reserve=reserve, networks_left=folds - number, earlier=0.0, clock=clock
        )(state)
        step = 0
        while schedule.factor(step) is not None:
            machine.works(STEP)
            step += 1
            if schedule.validate_after(step):
                schedule.validated(machine.works(cases * VALIDATION))
        schedule.validated(machine.works(cases * VALIDATION))  # of the last weights
        assert step > 20
    machine.works(folds * cases * (SCORING + JUDGING_SECONDS) + FIXED_SECONDS)
    return clock.now - began


@pytest.mark.parametrize(
    ("budget", "folds", "cases", "slow"),
    [(120, 1, 16, 1), (120, 1, 16, 2.5), (840, 5, 40, 1), (840, 5, 40, 2.5), (3600, 5, 40, 2.5), (300, 2, 100, 1)],
)
def test_a_command_ends_within_three_percent_of_its_budget_on_an_evenly_busy_machine(
    make_spec: Any, make_plan: Any, budget: float, folds: int, cases: int, slow: float
) -> None:
    taken = command(make_spec, make_plan, budget=budget, folds=folds, cases=cases, slowness=lambda now: slow)
    assert 0.97 * budget <= taken <= 1.03 * budget


def test_what_one_network_has_seen_of_the_machine_the_next_ones_know(make_spec: Any, make_plan: Any) -> None:
    """One validation a network only, at its end: without the memory of the one before, each would start from 1."""
    clock, reserve = Clock(), Reserve(0.001, 100.0)
    request: Any = SimpleNamespace(budget=1000.0, replay=None)
    job = job_of(make_spec, make_plan)
    seconds = []
    for _ in range(2):
        schedule: Any = choose_schedule(
            job, request, began=clock.now, reserve=reserve, networks_left=1, earlier=0.0, clock=clock
        )(LoopState())
        seconds.append(schedule.seconds)
        for _ in range(3):
            schedule.validated(3.0)
    assert seconds == [pytest.approx(1000 - (1 + 100)), pytest.approx(1000 - 3 * (1 + 100))]


def test_a_machine_that_gets_busy_takes_time_from_the_steps_and_not_from_the_end(
    make_spec: Any, make_plan: Any
) -> None:
    taken = command(make_spec, make_plan, budget=840, folds=5, cases=40, slowness=lambda now: 1.0 if now < 800 else 2.0)
    assert taken <= 1.05 * 840


def test_the_scoring_of_networks_that_are_trained_already_is_kept_from_those_to_come(
    make_spec: Any, make_plan: Any
) -> None:
    clock = Clock()
    request: Any = SimpleNamespace(budget=1000.0, replay=None)
    job = job_of(make_spec, make_plan)
    seconds = []
    reserve = Reserve(0.0, 300.0)
    for left, began in ((5, clock.now), (1, clock.now - 400)):
        schedule: Any = choose_schedule(
            job,
            request,
            began=began,
            reserve=reserve,
            networks_left=left,
            earlier=0.0,
            clock=clock,
        )(LoopState())
        seconds.append(schedule.seconds)
    assert seconds == [pytest.approx((1000 - 300) / 5), pytest.approx(1000 - 400 - 300)]


def test_what_is_kept_grows_with_cases_and_with_what_else_runs() -> None:
    quiet = reserve_of(Rehearsal(1000, 0.1, 2.0, busy=1.0), voxels=20_000, cases=20)
    assert quiet.finishing == pytest.approx(40 + FIXED_SECONDS + 20 * JUDGING_SECONDS)
    busy = reserve_of(Rehearsal(1000, 0.1, 2.0, busy=2.0), voxels=20_000, cases=20)
    assert busy.finishing - quiet.finishing == pytest.approx(FIXED_SECONDS + 20 * JUDGING_SECONDS)


def test_a_budget_that_cannot_be_kept_is_said_and_the_steps_get_their_least_share(
    make_spec: Any, make_plan: Any
) -> None:
    reserve = Reserve(0.0, 290.0)
    assert "exceeded" not in told(reserve, 600.0, cases=3)
    words = told(reserve, 300.0, cases=3)
    assert "it will be exceeded" in words
    assert "5:50" in words, "60 s of steps and 290 s of scoring"
    clock = Clock()
    request: Any = SimpleNamespace(budget=300.0, replay=None)
    schedule: Any = choose_schedule(
        job_of(make_spec, make_plan),
        request,
        began=clock.now,
        reserve=reserve,
        networks_left=1,
        earlier=0.0,
        clock=clock,
    )(LoopState())
    assert schedule.seconds == pytest.approx(LEAST_SHARE * 300)
