"""The fit: known answers, nothing that varies, few cases, patients kept together."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from medseg.quality.apply import Quality, at_most, estimate
from medseg.quality.clouds import distance, fit_cloud, left_out, strangest
from medseg.quality.fit import MIN_CASES, REVIEW_SHARE, Observed, fit_quality
from medseg.quality.image import GRID, ImageSigns
from medseg.quality.model import QualityModel
from medseg.quality.page import quality_csv, write_quality
from medseg.quality.ridge import expected_dice, fit_ridge
from medseg.quality.signs import Signs
from medseg.quality.summary import correlations, pearson, spearman, summarise, worst_found

SHAPE = ("volume", "objects", "surface")


def signs(rng: np.random.Generator, hidden: dict[str, float], *, odd: float = 0.0, noise: float = 0.05) -> Signs:
    """Signs of a case whose labels have the hidden logit of Dice; `odd` moves its image away."""
    layout = np.linspace(-1, 1, GRID**3) + 0.1 * rng.standard_normal(GRID**3)
    image = ImageSigns({"noise R": odd + 0.1 * rng.standard_normal(), "grey p50": rng.normal()}, layout)
    passes = {k: {"confidence": v + noise * rng.standard_normal(), "edge": rng.random()} for k, v in hidden.items()}
    shapes = {k: dict(zip(SHAPE, (rng.normal(8, 0.3), 0.0, rng.normal(2, 0.1)), strict=True)) for k in hidden}
    return Signs(image, passes, {}, shapes)


def cohort(count: int, *, seed: int = 0, noise: float = 0.05, labels: tuple[str, ...] = ("a", "b")) -> list[Observed]:
    rng = np.random.default_rng(seed)
    cases = []
    for n in range(count):
        hidden = {label: rng.normal(2.0, 0.8) for label in labels}
        seen = signs(rng, hidden, noise=noise)
        truth = {label: {**row, "volume": row["volume"] + 0.05} for label, row in seen.shapes.items()}
        dice = {label: 1 / (1 + math.exp(-value)) for label, value in hidden.items()}
        cases.append(Observed(f"c{n}", f"p{n}", seen, truth, dice))
    return cases


def test_a_sign_that_knows_the_dice_gives_a_correlation_near_one() -> None:
    fitted = fit_quality(cohort(60), ["a", "b"], folds=5, mirror=True)
    assert fitted is not None
    summary = summarise(fitted)
    assert summary["case_mean"]["spearman"] > 0.95
    assert summary["labels"]["a"]["pearson"] > 0.95
    assert summary["labels"]["a"]["pearson_ci95"][0] > 0.9
    assert summary["labels"]["a"]["mean_absolute_error"] < 0.03
    assert summary["worst"] == {"worst": 6, "looked_at": 12, "found": 6, "share": 1.0}
    assert abs(summary["case_mean_volume_only"]["spearman"]) < 0.5, "the volume knows nothing here"


def test_signs_that_know_nothing_give_no_correlation() -> None:
    cases = cohort(100, noise=50.0)
    summary = summarise(fit_quality(cases, ["a", "b"], folds=5, mirror=True))  # type: ignore[arg-type]
    assert abs(summary["case_mean"]["spearman"] or 0.0) < 0.35, "cross-fitted, not fitted"


def test_a_fifth_of_the_cases_is_flagged_the_strange_among_them() -> None:
    fitted = fit_quality(cohort(100), ["a", "b"], folds=5, mirror=True)
    assert fitted is not None
    far = sum(bool(row.far) for row in fitted.judged)
    assert 1 <= far <= 3
    assert sum(row.flagged for row in fitted.judged) == round(REVIEW_SHARE * 100)
    strange = {row.case for row in fitted.judged if row.far}
    low = sorted(row.expected["a"] + row.expected["b"] for row in fitted.judged if row.low and row.case not in strange)
    others = [row.expected["a"] + row.expected["b"] for row in fitted.judged if not row.flagged]
    assert low[-1] <= min(others), "the lowest of the others"


def test_many_with_a_missing_label_do_not_use_up_every_flag() -> None:
    cases = cohort(40)
    for case in cases[:12]:
        del case.signs.shapes["b"], case.signs.passes["b"]
        case.dice["b"] = 0.0
    fitted = fit_quality(cases, ["a", "b"], folds=5, mirror=True)
    assert fitted is not None
    assert all(row.missing == ("b",) and row.flagged for row in fitted.judged[:12])
    assert sum(row.flagged and not row.far for row in fitted.judged[12:]) == 1, "the lowest of the others is flagged"


def test_new_cases_are_estimated_and_odd_ones_flagged_with_the_reason() -> None:
    fitted = fit_quality(cohort(80), ["a", "b"], folds=5, mirror=True)
    assert fitted is not None
    rng = np.random.default_rng(9)
    good = [estimate(fitted.model, signs(rng, {"a": 2.5, "b": 2.5})) for _ in range(40)]
    assert np.mean([row.review for row in good]) < 0.2
    assert good[0].dice["a"] == pytest.approx(0.92, abs=0.03)
    bad = estimate(fitted.model, signs(rng, {"a": -0.5, "b": 2.0}))
    assert bad.review
    assert any(reason.startswith("low expected Dice: a 0.") for reason in bad.reasons)
    odd = estimate(fitted.model, signs(rng, {"a": 2.5, "b": 2.5}, odd=4.0))
    assert odd.review
    assert any("the image" in reason and "noise R" in reason for reason in odd.reasons)


def test_a_label_that_every_case_had_and_that_is_missing_is_flagged() -> None:
    fitted = fit_quality(cohort(40), ["a", "b"], folds=5, mirror=True)
    assert fitted is not None
    found = estimate(fitted.model, signs(np.random.default_rng(1), {"a": 3.0}))
    assert found.review
    assert found.dice["b"] == 0
    assert "b is missing, and every training case has it" in found.reasons


def test_a_label_that_some_cases_lack_is_not_missed() -> None:
    cases = [
        case
        if n % 3
        else Observed(
            case.case,
            case.patient,
            Signs(case.signs.image, {"a": case.signs.passes["a"]}, {}, {"a": case.signs.shapes["a"]}),
            {"a": case.reference["a"]},
            {"a": case.dice["a"]},
        )
        for n, case in enumerate(cohort(60))
    ]
    fitted = fit_quality(cases, ["a", "b"], folds=5, mirror=True)
    assert fitted is not None
    assert not fitted.model.labels["b"].always
    found = estimate(fitted.model, signs(np.random.default_rng(1), {"a": 3.0}))
    assert "b" not in found.dice
    assert not any("missing" in reason for reason in found.reasons)


def test_networks_that_disagree_bound_the_expectation() -> None:
    fitted = fit_quality(cohort(40), ["a", "b"], folds=5, mirror=True)
    assert fitted is not None
    one = signs(np.random.default_rng(1), {"a": 3.0, "b": 3.0})
    free = estimate(fitted.model, one)
    found = estimate(fitted.model, Signs(one.image, one.passes, {"a": 0.3, "b": 0.99}, one.shapes))
    assert found.dice == {**free.dice, "a": round(at_most(0.3), 4)}
    assert "the networks disagree about a: Dice 0.30 between two masks" in found.reasons


def test_networks_that_share_as_much_as_is_typical_change_nothing() -> None:
    """Two masks with errors of their own share less than each with the truth: that is no reason to look."""
    fitted = fit_quality(cohort(40), ["a", "b"], folds=5, mirror=True)
    assert fitted is not None
    one = signs(np.random.default_rng(1), {"a": 2.0, "b": 2.0})
    typical = {label: row.typical for label, row in fitted.model.labels.items()}
    between = {label: value - 0.05 for label, value in typical.items() if value is not None}
    found = estimate(fitted.model, Signs(one.image, one.passes, between, one.shapes))
    assert found == estimate(fitted.model, one)


def test_no_truth_is_nearer_to_both_masks_than_the_bound(rng: np.random.Generator) -> None:
    def dice(first: np.ndarray, second: np.ndarray) -> float:
        return float(2 * (first & second).sum() / (first.sum() + second.sum()))

    for _ in range(300):
        first, second, truth = rng.random((3, 12)) < rng.uniform(0.1, 0.9, (3, 1))
        first[0] = second[1] = truth[2] = True
        similar = [d / (2 - d) for d in (dice(first, truth), dice(second, truth))]
        best = at_most(dice(first, second))
        assert np.mean(similar) <= best / (2 - best) + 1e-9
    assert at_most(1.0) == 1
    assert at_most(0.0) == pytest.approx(2 / 3)


def test_an_estimate_on_signs_of_before_is_not_used() -> None:
    fitted = fit_quality(cohort(20), ["a", "b"], folds=5, mirror=True)
    assert fitted is not None
    assert not fitted.model.outdated
    told = json.loads(fitted.model.model_dump_json())
    told["labels"]["a"]["ridge"]["names"][1] = "mirrors"
    assert QualityModel.model_validate(told).outdated


def test_nothing_that_varies_gives_numbers_and_no_correlation() -> None:
    cases = cohort(30)
    same = [Observed(f"c{n}", f"p{n}", cases[0].signs, cases[0].reference, {"a": 0.9, "b": 0.8}) for n in range(30)]
    fitted = fit_quality(same, ["a", "b"], folds=5, mirror=True)
    assert fitted is not None
    summary = summarise(fitted)
    assert summary["case_mean"]["spearman"] is None
    assert not any(row.low for row in fitted.judged), "of equal ones all or none"
    json.dumps(summary, allow_nan=False)
    found = estimate(fitted.model, cases[0].signs)
    assert found.dice == pytest.approx({"a": 0.9, "b": 0.8}, abs=0.01)


def test_too_few_cases_give_no_estimate() -> None:
    assert fit_quality(cohort(MIN_CASES - 1), ["a", "b"], folds=5, mirror=True) is None
    assert fit_quality(cohort(MIN_CASES), ["a", "b"], folds=5, mirror=True) is not None


def test_a_label_with_few_cases_has_no_expected_dice() -> None:
    fitted = fit_quality(cohort(20), ["a", "b", "never"], folds=5, mirror=True)
    assert fitted is not None
    assert fitted.model.labels["never"].ridge is None
    assert "never" not in estimate(fitted.model, cohort(1)[0].signs).dice


def test_cases_of_one_patient_are_left_out_together() -> None:
    rng = np.random.default_rng(3)
    rows = [{"x": float(rng.normal())} for _ in range(20)]
    twin = {"x": 30.0}
    together = left_out([*rows, twin, twin], [*range(20), 20, 20], [*rows, twin, twin])
    apart = left_out([*rows, twin, twin], list(range(22)), [*rows, twin, twin])
    assert together[-1] > 2 * apart[-1]


def test_the_model_survives_json_and_estimates_the_same() -> None:
    fitted = fit_quality(cohort(40), ["a", "b"], folds=5, mirror=False)
    assert fitted is not None
    again = QualityModel.model_validate_json(fitted.model.model_dump_json())
    one = signs(np.random.default_rng(5), {"a": 1.0, "b": 2.0})
    assert again == fitted.model
    assert estimate(again, one) == estimate(fitted.model, one)
    assert isinstance(estimate(again, one), Quality)


def test_tables_and_page_name_cases_and_hold_no_nan(tmp_path: Any) -> None:
    fitted = fit_quality(cohort(20), ["a", "b"], folds=1, mirror=False)
    assert fitted is not None
    write_quality(tmp_path, fitted)
    assert "nan" not in (tmp_path / "quality.csv").read_text().lower()
    assert len((tmp_path / "quality.csv").read_text().splitlines()) == 21
    page = (tmp_path / "quality.html").read_text()
    assert "single split" in page
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write_quality(tmp_path, fitted)
    assert first == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert quality_csv(fitted.judged, ["a", "b"]).startswith("case,flagged,")


def test_the_cloud_knows_combinations_that_no_range_shows() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(300)
    cloud = fit_cloud([{"x": float(b), "y": float(b + 0.1 * rng.standard_normal())} for b in base])
    assert distance(cloud, {"x": 1.5, "y": -1.5}) > 3 * distance(cloud, {"x": 1.5, "y": 1.5})
    assert strangest(cloud, {"x": 9.0, "y": 0.0}) == ("x", True)


def test_the_ridge_finds_a_line_and_does_not_follow_it_for_ever() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(200)
    ridge = fit_ridge([{"x": float(v), "dull": 1.0} for v in x], [1 / (1 + math.exp(-(1 + v))) for v in x])
    assert expected_dice(ridge, {"x": 0.5, "dull": 1.0}) == pytest.approx(1 / (1 + math.exp(-1.5)), abs=0.01)
    assert expected_dice(ridge, {"x": 1e9, "dull": 1e9}) <= 1


def test_correlations_are_those_of_scipy() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 50).astype(float), rng.standard_normal(50)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert correlations(x[:2], y[:2], ["a", "b"], 0)["pearson"] is None


def test_the_share_of_the_worst_counts_cases() -> None:
    real = np.arange(20.0)
    assert worst_found(real, real) == {"worst": 2, "looked_at": 4, "found": 2, "share": 1.0}
    assert worst_found(real, -real) == {"worst": 2, "looked_at": 4, "found": 0, "share": 0.0}
    assert worst_found(real[:0], real[:0]) is None
