"""Metrics against hand-computed values, SimpleITK and MONAI; every policy for empty masks."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import SimpleITK

from medseg.errors import ConfigError
from medseg.evaluation.metrics import METRICS, Measurement, Metric, Pair, measure, measure_failed

FULL, EMPTY = np.ones((2, 3, 4), bool), np.zeros((2, 3, 4), bool)
ALL = [metric for _, metric in METRICS.items()]


def test_known_answers() -> None:
    predicted = np.array([[[1, 1, 1, 0]]], bool)
    present = np.array([[[0, 1, 1, 1]]], bool)
    pair = Pair(predicted, present, 0.5)
    found = {name: metric.function(pair) for name, metric in METRICS.items()}
    expected = {"dice": 4 / 6, "volume_predicted": 1.5, "volume_reference": 1.5, "volume_difference": 0.0}
    assert found == pytest.approx(expected)
    assert METRICS["volume_difference"].function(Pair(FULL, EMPTY, 0.5)) == 12.0
    assert METRICS["volume_difference"].function(Pair(EMPTY, FULL, 0.5)) == -12.0


def test_dice_agrees_with_simpleitk_and_monai(rng: np.random.Generator) -> None:
    import torch
    from monai.metrics import DiceMetric

    for share in (0.02, 0.3, 0.9):
        predicted, present = rng.random((2, 9, 8, 7)) < share
        ours = METRICS["dice"].function(Pair(predicted, present, 1.0))
        overlap = SimpleITK.LabelOverlapMeasuresImageFilter()
        overlap.Execute(*(SimpleITK.GetImageFromArray(mask.astype(np.uint8)) for mask in (present, predicted)))
        assert ours == pytest.approx(overlap.GetDiceCoefficient(), abs=1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            monai = DiceMetric()(*(torch.tensor(mask[None, None]).float() for mask in (predicted, present)))
        assert ours == pytest.approx(float(monai), abs=1e-6)


def test_dice_is_symmetric_bounded_and_one_only_for_equals(rng: np.random.Generator) -> None:
    dice = METRICS["dice"].function
    for _ in range(50):
        first, second = rng.random((2, 4, 4, 4)) < rng.random()
        if first.any() or second.any():
            value = dice(Pair(first, second, 1.0))
            assert value == dice(Pair(second, first, 1.0))
            assert 0 <= value <= 1
            assert (value == 1) == np.array_equal(first, second)
    assert math.isnan(dice(Pair(EMPTY, EMPTY, 1.0)))


@pytest.mark.parametrize(
    ("predicted", "present", "expected"),
    [
        (EMPTY, EMPTY, Measurement(None, "excluded", "BOTH_EMPTY")),
        (FULL, EMPTY, Measurement(0.0, "used", "REFERENCE_EMPTY")),
        (EMPTY, FULL, Measurement(0.0, "used", "PREDICTION_EMPTY")),
        (FULL, FULL, Measurement(1.0, "used")),
    ],
)
def test_dice_of_empty_masks(predicted: np.ndarray, present: np.ndarray, expected: Measurement) -> None:
    assert measure(METRICS["dice"], Pair(predicted, present, 1.0)) == expected


def test_missing_prediction() -> None:
    found = {name: measure_failed(metric, FULL, 0.5, "TRUNCATED") for name, metric in METRICS.items()}
    assert found["dice"] == Measurement(0.0, "imputed", "TRUNCATED")
    assert found["volume_predicted"] == Measurement(None, "excluded", "TRUNCATED")
    assert found["volume_reference"] == Measurement(12.0, "used")
    assert found["volume_difference"] == Measurement(None, "excluded", "TRUNCATED")
    # Nothing was owed where the reference is empty too.
    assert measure_failed(METRICS["dice"], EMPTY, 0.5, "TRUNCATED") == Measurement(None, "excluded", "TRUNCATED")


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.id)
def test_every_row_keeps_the_contract(metric: Metric, rng: np.random.Generator) -> None:
    """Whatever the masks: a finite value, or none and a reason; a faultless prediction has the best value."""
    some = rng.random((2, 3, 4)) < 0.5
    for predicted in (EMPTY, some, FULL):
        for present in (EMPTY, some, FULL):
            found = measure(metric, Pair(predicted, present, 0.5))
            assert (found.value is None) == (found.status == "excluded")
            assert found.value is None or math.isfinite(found.value)
            assert found.value is not None or found.reason
    if metric.best is not None:
        assert measure(metric, Pair(some, some, 0.5)).value == metric.best
    assert METRICS[metric.id] is metric
    assert measure_failed(metric, some, 0.5, "X").status in ("used", "imputed", "excluded")


def test_unknown_metric_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"'dise'.*did you mean 'dice'"):
        METRICS["dise"]
