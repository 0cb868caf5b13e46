"""Losses tell whether a training goes well: what is refused, what is only pointed out, and what neither is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.errors import TrainingError
from medseg.planning.plan import Plan
from medseg.training.health import (
    WINDOW,
    flat,
    learnt_nothing,
    refuse_explosion,
    refuse_what_is_no_number,
    sound,
)

Make = Callable[..., Any]
GOOD = [2.0 * 0.98**n + 0.3 for n in range(400)]


@pytest.fixture
def plan(make_spec: Make, make_plan: Make) -> Plan:
    made: Plan = make_plan(make_spec(), precision="bf16", learning_rate=5e-3)
    return made


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_named_with_what_helps(plan: Plan, bad: float) -> None:
    refuse_what_is_no_number(plan, 3, 1.5, 9.0)
    words = r"the loss is .* at step 3: .*--set precision=fp32, or --set learning_rate=0\.001"
    with pytest.raises(TrainingError, match=words) as caught:
        refuse_what_is_no_number(plan, 3, bad, 1.0)
    assert caught.value.code == "LOSS_NOT_FINITE"
    with pytest.raises(TrainingError, match=r"the gradient of the loss \(1\.5\) is .* at step 3"):
        refuse_what_is_no_number(plan, 3, 1.5, bad)


def test_in_single_precision_only_the_rate_is_left_to_lower(plan: Plan) -> None:
    with pytest.raises(TrainingError) as caught:
        refuse_what_is_no_number(plan.model_copy(update={"precision": "fp32"}), 3, math.nan, 1.0)
    assert "precision" not in str(caught.value)


def test_a_loss_that_explodes_is_noticed_and_no_checkpoint_is_written_meanwhile(plan: Plan) -> None:
    rising = [*GOOD[:100], *(GOOD[100] * 1.3**n for n in range(60))]
    refused = next(n for n in range(1, len(rising)) if explodes(plan, rising[:n]))
    bad = next(n for n in range(1, len(rising)) if not sound(rising[:n]))
    assert 100 < bad <= refused < len(rising) - 10
    with pytest.raises(TrainingError, match=r"rose from 1.96 to .* \(step \d+\).*--set precision=fp32") as caught:
        refuse_explosion(plan, rising)
    assert caught.value.code == "DIVERGED"


def explodes(plan: Plan, losses: list[float]) -> bool:
    try:
        refuse_explosion(plan, losses)
    except TrainingError:
        return True
    return False


@given(seed=st.integers(0, 1000), noise=st.floats(0, 1), scale=st.floats(0.01, 20), offset=st.floats(-1, 1))
def test_noise_and_scale_alone_are_no_disease(
    make_spec: Make, make_plan: Make, seed: int, noise: float, scale: float, offset: float
) -> None:
    rng = np.random.default_rng(seed)
    losses = [scale * (offset + value * (1 + noise * rng.uniform(-1, 1))) for value in GOOD]
    plan = make_plan(make_spec())
    for length in range(1, 400, 13):
        refuse_explosion(plan, losses[:length])
        assert sound(losses[:length])
    assert flat(losses, 1.0) is None


def test_a_single_bad_batch_is_no_disease(plan: Plan) -> None:
    spiked = [*GOOD[:200], 50.0, *GOOD[200:]]
    assert not sound(spiked[:201])
    for length in range(1, len(spiked)):
        refuse_explosion(plan, spiked[:length])
    assert sound(spiked)


def test_a_loss_that_stays_is_pointed_out_in_time_and_not_before() -> None:
    rng = np.random.default_rng(0)
    stays = (1.5 + rng.normal(0, 0.01, 400)).tolist()
    assert flat(stays[:199], 1.0) is None
    assert flat(stays, 0.2) is None
    assert "has not fallen since the start (1.5, now 1.5 after 400 steps)" in str(flat(stays, 0.4))
    assert flat(GOOD, 0.9) is None
    assert flat([*GOOD[:200], *GOOD[:200][::-1]], 1.0) is not None, "back where it began"


def test_a_model_that_has_learnt_nothing_is_called_so() -> None:
    assert "has learnt nothing" in str(learnt_nothing(0.0, scored=True))
    assert learnt_nothing(0.5, scored=True) is None
    assert learnt_nothing(0.0, scored=False) is None, "no validation case holds a label"


def test_few_losses_say_nothing(plan: Plan) -> None:
    for length in range(2 * WINDOW):
        refuse_explosion(plan, [1e6 * n for n in range(length)])
        assert flat([1.0] * length, 1.0) is None
