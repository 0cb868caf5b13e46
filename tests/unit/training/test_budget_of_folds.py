"""What a killed command has used of a budget is not used twice."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from medseg.training.choose_schedule import choose_schedule
from medseg.training.finish import FINISH_SECONDS
from medseg.training.schedule import ByClock
from medseg.training.state import LoopState


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
    request: Any = SimpleNamespace(budget=1000.0 + FINISH_SECONDS, replay=None)
    began = time.monotonic() - 100
    job: Any = SimpleNamespace(plan=make_plan(make_spec()))
    schedule_of = choose_schedule(job, request, began=began, scoring=0.0, networks_left=left, earlier=earlier)
    schedule = schedule_of(LoopState(seconds=spent))
    assert isinstance(schedule, ByClock)
    assert schedule.whole == pytest.approx(expected, abs=1)
