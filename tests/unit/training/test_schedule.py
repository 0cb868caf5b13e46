"""Schedules: the rate begins low, is full once, ends at zero, wherever the end is."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.training.schedule import ByClock, ByRecord, BySteps, rate_factor


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(progress=st.floats(0, 1), warmup=st.floats(0, 0.9))
def test_rate_is_a_share_of_the_full_one(progress: float, warmup: float) -> None:
    assert 0 <= rate_factor(progress, warmup) <= 1


def test_rate_by_hand() -> None:
    assert rate_factor(0.05, 0.1) == pytest.approx(0.5)
    assert rate_factor(0.1, 0.1) == pytest.approx(1.0)
    assert rate_factor(0.55, 0.1) == pytest.approx(0.5)
    assert rate_factor(1.0, 0.1) == pytest.approx(0.0)
    assert rate_factor(0.0, 0.0) == 1.0
    assert 0 < rate_factor(0.0, 0.1) <= 1e-3, "the first step teaches a little"


@given(steps=st.integers(1, 300), validations=st.integers(1, 40))
def test_validations_are_spread_evenly_and_the_last_step_is_validated(steps: int, validations: int) -> None:
    schedule = BySteps(steps, validations=validations, warmup=0.05)
    after = [step for step in range(steps) if schedule.validate_after(step)]
    assert len(after) == min(steps, validations)
    assert after[-1] == steps - 1
    gaps = [b - a for a, b in zip([-1, *after], after, strict=False)]
    assert max(gaps) - min(gaps) <= 1
    assert schedule.factor(steps) is None
    assert all(schedule.factor(step) is not None for step in range(steps))


def test_the_clock_decides_when_it_is_over() -> None:
    clock = Clock()
    schedule = ByClock(100, spent=0, validations=4, warmup=0.1, clock=clock)
    assert schedule.factor(0) == pytest.approx(1e-3)
    clock.now += 55
    assert schedule.factor(1) == pytest.approx(0.5)
    assert schedule.progress(1) == pytest.approx(0.55)
    assert schedule.remaining(1, 1.0) == pytest.approx(45)
    clock.now += 45
    assert schedule.factor(2) is None


def test_each_due_validation_happens_once_and_none_piles_up() -> None:
    clock = Clock()
    schedule = ByClock(100, spent=0, validations=4, warmup=0.1, clock=clock)
    due = []
    for second in (10, 24, 26, 30, 80, 81, 82, 99):
        clock.now = 1000.0 + second
        if schedule.validate_after(0):
            due.append(second)
    # 50 and 75 have passed together at 80: one validation for both
    assert due[0] == 26
    assert due[1] == 80
    assert len(due) <= 3


def test_a_resumed_clock_goes_on_where_it_stopped() -> None:
    clock = Clock()
    schedule = ByClock(100, spent=60, validations=4, warmup=0.1, clock=clock)
    assert schedule.progress(7) == pytest.approx(0.6)
    assert not schedule.validate_after(7), "the two that were due before have been done"
    clock.now += 16
    assert schedule.validate_after(8)


@pytest.mark.parametrize("seconds", [-5.0, 0.0])
def test_no_time_at_all_is_one_step(seconds: float) -> None:
    schedule = ByClock(seconds, spent=0, validations=4, warmup=0.1, clock=Clock())
    assert schedule.factor(0) is not None
    assert schedule.factor(1) is None


def test_a_record_is_repeated() -> None:
    schedule = ByRecord([0.1, 0.7, 0.2], [1])
    assert [schedule.factor(step) for step in range(4)] == [0.1, 0.7, 0.2, None]
    assert [schedule.validate_after(step) for step in range(3)] == [False, True, False]
    assert schedule.progress(3) == 1.0
    assert math.isclose(schedule.remaining(1, 0.5), 1.0)
    assert ByRecord([], []).factor(0) is None
