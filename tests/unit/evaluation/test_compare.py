"""compare(): known differences, the interval against a loop and against theory, false alarms, failures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from medseg.errors import ConfigError
from medseg.evaluation.compare import bootstrap_mean, compare
from medseg.evaluation.table import Evaluation, Row, Target, make_evaluation

TARGETS = (
    Target("one", (1,), "#ff0000"),
    Target("two", (2,), "#00ff00"),
    Target("all", (1, 2), "#0000ff", region=True),
)
Scores = Mapping[str, Mapping[str, float | str]]
"""Case -> label -> Dice, or the reason why there is none (a failed case's is imputed)."""


def evaluation(scores: Scores, patients: Mapping[str, str] | None = None) -> Evaluation:
    rows = []
    for case, labels in scores.items():
        for label, told in labels.items():
            value, status, reason = (told, "used", "") if not isinstance(told, str) else (None, "excluded", told)
            if reason == "PREDICTION_MISSING":
                value, status = 0.0, "imputed"
            patient = case if patients is None else patients[case]
            rows.append(Row(case, patient, label, "dice", "", value, status, reason))  # type: ignore[arg-type]
    found = {row.label for row in rows}
    return make_evaluation([target for target in TARGETS if target.name in found], rows, {})


def test_known_answers() -> None:
    old = evaluation({c: {"one": 0.5, "two": 0.8} for c in "abcd"})
    new = evaluation(
        {
            "a": {"one": 0.7, "two": 0.8},
            "b": {"one": 0.5, "two": 0.4},
            "c": {"one": 0.6, "two": 0.9},
            "d": {"one": "PREDICTION_MISSING", "two": "PREDICTION_MISSING"},
        }
    )
    found = compare(new, old)
    one, two, mean = found.labels
    assert (one.wins, one.ties, one.losses, one.n_pairs, one.n_unpaired) == (2, 1, 1, 4, 0)
    assert one.mean_difference == pytest.approx((0.2 + 0 + 0.1 - 0.5) / 4)
    assert one.median_difference == pytest.approx(0.05)
    assert (one.mean_new, one.mean_old) == pytest.approx((0.45, 0.5))
    assert (two.worst_drop, two.worst_case) == (pytest.approx(0.8), "d")
    assert mean is found.overall
    assert mean.mean_difference == pytest.approx((0.1 - 0.2 + 0.1 - 0.65) / 4)
    assert (found.n_cases, found.n_patients, found.n_failed_new, found.n_failed_old) == (4, 4, 1, 0)
    assert found.differences["c", "two"] == pytest.approx(0.1)


def test_the_reverse_comparison_is_the_mirror_image(rng: np.random.Generator) -> None:
    first, second = ({f"{n}": {"one": v} for n, v in enumerate(rng.random(30))} for _ in range(2))
    forth, back = compare(evaluation(first), evaluation(second)), compare(evaluation(second), evaluation(first))
    one, mirrored = forth.overall, back.overall
    assert one.ci_low is not None
    assert (one.mean_difference, one.ci_low) == pytest.approx((-mirrored.mean_difference, -mirrored.ci_high))  # type: ignore[operator]
    assert (one.wins, one.losses) == (mirrored.losses, mirrored.wins)


def test_equal_evaluations_tie_everywhere() -> None:
    same = evaluation({c: {"one": 0.3, "two": 0.4, "all": 0.5} for c in "abc"})
    for row in compare(same, same).labels:
        assert (row.wins, row.ties, row.losses, row.worst_drop, row.worst_case) == (0, 3, 0, 0.0, "")
        assert (row.ci_low, row.ci_high) == (0.0, 0.0)


def test_a_new_false_alarm_is_a_loss() -> None:
    old = evaluation({"a": {"one": "BOTH_EMPTY"}, "b": {"one": 0.5}, "c": {"one": "BOTH_EMPTY"}})
    new = evaluation({"a": {"one": 0.0}, "b": {"one": 0.5}, "c": {"one": "BOTH_EMPTY"}})
    row = compare(new, old).labels[0]
    assert (row.n_pairs, row.losses, row.ties, row.worst_drop, row.worst_case) == (2, 1, 1, 1.0, "a")
    assert compare(old, new).labels[0].wins == 1


def test_regions_stay_out_of_the_mean() -> None:
    old = evaluation({c: {"one": 0.5, "all": 0.5} for c in "ab"})
    new = evaluation({c: {"one": 0.5, "all": 0.9} for c in "ab"})
    found = compare(new, old)
    assert [row.label for row in found.labels] == ["one", "all", "mean of labels"]
    assert found.overall.mean_difference == 0


def test_the_bootstrap_draws_patients_not_cases(rng: np.random.Generator) -> None:
    """Four equal cases per patient carry the news of one: the interval is that of the patients' means."""
    patients = [f"p{n // 4}" for n in range(80)]
    per_patient = rng.normal(0.02, 0.1, 20)
    low, high = bootstrap_mean(np.repeat(per_patient, 4), patients, resamples=4000, seed=1) or (0, 0)
    half = 1.96 * per_patient.std() / np.sqrt(20)
    assert (low, high) == pytest.approx((per_patient.mean() - half, per_patient.mean() + half), abs=0.15 * half)
    naive = bootstrap_mean(np.repeat(per_patient, 4), [str(n) for n in range(80)], resamples=4000, seed=1) or (0, 0)
    assert (high - low) == pytest.approx(2 * (naive[1] - naive[0]), rel=0.1)


def test_the_bootstrap_equals_a_plain_loop() -> None:
    values, patients = np.array([0.1, 0.2, -0.3, 0.4, 0.0]), ["a", "b", "b", "c", "c"]
    draws = np.random.default_rng(7).integers(3, size=(200, 3))
    by_patient = {"a": values[:1], "b": values[1:3], "c": values[3:]}
    means = [np.concatenate([by_patient["abc"[n]] for n in draw]).mean() for draw in draws]
    expected = tuple(np.percentile(means, (2.5, 97.5)))
    assert bootstrap_mean(values, patients, resamples=200, seed=7) == pytest.approx(expected)
    assert bootstrap_mean(values, ["a"] * 5, resamples=200, seed=7) is None


def test_different_cases_or_labels_are_refused() -> None:
    first, second = evaluation({"a": {"one": 1.0}}), evaluation({"b": {"one": 1.0}})
    with pytest.raises(ConfigError) as caught:
        compare(first, second)
    assert caught.value.code == "DIFFERENT_CASES"
    with pytest.raises(ConfigError) as caught:
        compare(first, evaluation({"a": {"two": 1.0}}))
    assert caught.value.code == "DIFFERENT_LABELS"
    with pytest.raises(ConfigError, match="cannot be compared"):
        compare(first, first, metric="volume_predicted")
