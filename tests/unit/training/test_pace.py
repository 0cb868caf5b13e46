"""Where the time of a step goes, in numbers and words."""

from __future__ import annotations

from medseg.training.pace import Pace


def test_share_of_the_data() -> None:
    pace = Pace(waiting=0.5, augmenting=1.5, stepping=20.0)
    assert pace.data_share == 0.1
    assert str(pace) == "data: 10.0 % of a step (waiting 2.5 %, augmentation 7.5 %)"


def test_before_the_first_step() -> None:
    assert Pace().data_share == 0
    assert str(Pace()) == "data: 0.0 % of a step (waiting 0.0 %, augmentation 0.0 %)"
