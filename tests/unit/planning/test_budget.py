"""What a budget leaves: nothing, too little (said with what would be enough), or a training of sensible shape."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.duration import seconds as parsed
from medseg.errors import PlanError
from medseg.planning.budget import (
    GOOD_STEPS,
    LEAST_STEPS,
    MOST_VALIDATIONS,
    RESERVED_SECONDS,
    VALIDATIONS,
    duration,
    enough,
    learning_seconds,
    refuse_small_budget,
    validations,
)

HIPPOCAMPUS = {"case_seconds": 0.15, "cases": 200}


@given(budget=st.floats(1, 1e7), folds=st.integers(1, 10))
def test_something_is_always_kept_for_the_rest(budget: float, folds: int) -> None:
    assert 0 <= learning_seconds(budget, folds) * folds <= max(0, budget - RESERVED_SECONDS) + 1e-9


def test_usual_budgets_by_hand() -> None:
    assert learning_seconds(600, 1) == 540
    assert learning_seconds(1800, 5) == 324
    assert learning_seconds(60, 1) == 50
    assert learning_seconds(8, 1) == 0


@given(step=st.floats(1e-3, 100), folds=st.integers(1, 10), steps=st.sampled_from([LEAST_STEPS, GOOD_STEPS]))
def test_what_is_called_enough_is_enough(step: float, folds: int, steps: int) -> None:
    told = parsed(duration(enough(step, steps, folds)))
    assert learning_seconds(told, folds) >= steps * step * (1 - 1e-6)
    refuse_small_budget(told * (1 + 1e-6), folds, step)


def test_a_budget_that_teaches_nothing_names_one_that_does() -> None:
    words = (
        r"--budget 2m leaves 108 s to learn, 10 steps of 10 s on this machine: too few .* At least 50 steps need "
        r"--budget 10m, a first useful model \(300 steps\) --budget 56m"
    )
    with pytest.raises(PlanError, match=words) as caught:
        refuse_small_budget(120, 1, 10.0)
    assert caught.value.code == "BUDGET_TOO_SMALL"
    for told in re.findall(r"--budget (\w+)", str(caught.value))[1:]:
        refuse_small_budget(parsed(told), 1, 10.0)
    with pytest.raises(PlanError, match=r"leaves 22 s for each of 5 networks to learn"):
        refuse_small_budget(120, 5, 1.0)


def test_before_any_step_time_is_known_only_hopeless_budgets_are_refused() -> None:
    with pytest.raises(PlanError, match=r"--budget 9s: starting and finishing take about 10 s of it"):
        refuse_small_budget(9, 1, 0.0)
    refuse_small_budget(11, 1, 0.0)


def test_validations_follow_the_length() -> None:
    assert validations(None, 1e9, 10**6) == VALIDATIONS
    for budget in (600, 1800):
        assert validations(learning_seconds(budget, 1), **HIPPOCAMPUS) == VALIDATIONS
    assert validations(learning_seconds(120, 1), **HIPPOCAMPUS) == 5
    assert validations(20, 10.0, 200) == 2
    assert validations(0.9 * 86400, **HIPPOCAMPUS) == 87, "one in a quarter of an hour"
    assert validations(0.9 * 7 * 86400, **HIPPOCAMPUS) == MOST_VALIDATIONS


@given(seconds=st.floats(0.01, 3e6), case=st.floats(1e-3, 1e3), cases=st.integers(1, 10**5))
def test_validations_take_a_small_share_or_are_the_least(seconds: float, case: float, cases: int) -> None:
    count = validations(seconds, case, cases)
    assert 2 <= count <= MOST_VALIDATIONS
    assert count == 2 or count * case * max(1, min(20, round(cases / 10))) <= 0.15 * seconds * (1 + 1e-9)


@given(seconds=st.floats(0.1, 1e7))
def test_a_duration_is_one_that_the_option_takes_and_no_shorter(seconds: float) -> None:
    told = parsed(duration(seconds))
    assert seconds - 1e-3 <= told <= 1.7 * seconds + 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1s"), (45, "45s"), (90, "90s"), (120, "2m"), (121, "3m"), (5400, "90m"), (2 * 86400, "2d")],
)
def test_durations_by_hand(seconds: float, words: str) -> None:
    assert duration(seconds) == words
