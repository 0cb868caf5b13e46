"""The rule: known evaluations, known verdicts."""

from __future__ import annotations

from typing import Any

import pytest

from medseg.errors import ConfigError
from medseg.evaluation.compare import compare
from medseg.evaluation.table import Evaluation, Row, Target, make_evaluation
from medseg.retraining.rule import Check, judge, judge_first
from medseg.retraining.settings import Rule

TARGETS = (Target("ball", (1,), "#ff0000"), Target("box", (2,), "#00ff00"))


def scores(ball: list[float], box: list[float], failed: int = 0) -> Evaluation:
    rows = []
    for number, values in enumerate(zip(ball, box, strict=True)):
        reason = "PREDICTION_MISSING" if number < failed else ""
        for target, value in zip(TARGETS, values, strict=True):
            case = f"c{number}"
            rows.append(Row(case, case, target.name, "dice", "", value, "imputed" if reason else "used", reason))
    return make_evaluation(TARGETS, rows, {})


def rule(**values: Any) -> Rule:
    return Rule.model_validate({"max_drop": 0.2, "floor": 0.5, **values})


def failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.name for check in checks if not check.passed]


OLD = scores([0.80, 0.82, 0.84, 0.86], [0.70, 0.72, 0.74, 0.76])
BETTER = scores([0.85, 0.86, 0.90, 0.91], [0.75, 0.78, 0.78, 0.80])
ALIKE = scores([0.81, 0.81, 0.85, 0.85], [0.69, 0.73, 0.73, 0.77])
WORSE = scores([0.75, 0.76, 0.80, 0.80], [0.65, 0.66, 0.70, 0.70])
ONE_FELL = scores([0.99, 0.99, 0.99, 0.60], [0.99, 0.99, 0.99, 0.99])


def test_proven_better() -> None:
    wanted = rule(min_improvement=0.0)
    assert failed(judge(wanted, compare(BETTER, OLD))) == []
    assert failed(judge(wanted, compare(ALIKE, OLD))) == ["mean of labels, lower bound of the gain"]
    assert failed(judge(wanted, compare(OLD, OLD))) == ["mean of labels, lower bound of the gain"]
    assert failed(judge(wanted, compare(WORSE, OLD))) == ["mean of labels, lower bound of the gain"]
    assert failed(judge(rule(min_improvement=0.2), compare(BETTER, OLD))) != []


def test_proven_not_worse_label_by_label() -> None:
    assert failed(judge(rule(margins=0.02), compare(ALIKE, OLD))) == []
    assert failed(judge(rule(margins=0.02), compare(OLD, OLD))) == []
    mixed = scores([0.95] * 4, [0.65, 0.66, 0.70, 0.70])
    assert failed(judge(rule(margins=0.02), compare(mixed, OLD))) == ["box, lower bound of the gain"]
    assert failed(judge(rule(margins={"ball": 0.02}), compare(mixed, OLD))) == []


def test_one_case_may_not_pay_for_the_others() -> None:
    found = judge(rule(margins={"box": 0.01}), compare(ONE_FELL, OLD))
    assert failed(found) == ["largest drop in one case"]
    assert found[-2].value == pytest.approx(0.26)


def test_more_failures_are_never_better() -> None:
    new = scores([0.0, 0.99, 0.99, 0.99], [0.0, 0.99, 0.99, 0.99], failed=1)
    assert "failed cases" in failed(judge(rule(margins=0.5, max_drop=1), compare(new, OLD)))
    assert "failed cases" not in failed(judge(rule(margins=0.5, max_drop=1), compare(new, new)))


def test_what_cannot_be_measured_is_not_proven() -> None:
    one = scores([0.8], [0.7]), scores([0.7], [0.6])
    found = judge(rule(min_improvement=0.0), compare(*one))
    assert found[0].value is None
    assert failed(found) == [found[0].name]
    assert "not measurable" in found[0].describe()


@pytest.mark.parametrize(("floor", "passed"), [(0.78, True), (0.79, False)])
def test_the_first_model_needs_its_floor(floor: float, passed: bool) -> None:
    assert [check.passed for check in judge_first(rule(margins=0.1, floor=floor), OLD)] == [passed]


def test_an_unknown_label_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ball'"):
        judge(rule(margins={"bal": 0.1}), compare(ALIKE, OLD))
