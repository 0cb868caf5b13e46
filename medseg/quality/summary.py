"""How good the estimate is, on cases that it was not fitted on: correlation, and who finds the worst cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.quality.fit import REVIEW_SHARE, Fitted, Judged
from medseg.quality.model import tidy

WORST_SHARE = 0.1
RESAMPLES = 1000
Floats = NDArray[np.float64]


def summarise(fitted: Fitted, *, seed: int = 0) -> dict[str, Any]:
    """Return the summary as it stands in 7_report/quality.json; every figure with the number of its cases."""
    rows, model = fitted.judged, fitted.model
    typical = {label: row.typical for label, row in model.labels.items() if row.typical is not None}
    labels = {label: _label(rows, label, seed) for label in typical}
    whole = [row for row in rows if row.expected and set(row.expected) & set(row.dice) & set(typical)]
    real = np.array([_mean_deviation(row.dice, row.expected, typical) for row in whole])
    told = np.array([_mean_deviation(row.expected, row.dice, typical) for row in whole])
    volume = np.array([_mean_deviation(row.volume_only, row.dice, typical) for row in whole])
    return {
        "cases": model.cases,
        "patients": model.patients,
        "folds": model.folds,
        "mirror": model.mirror,
        "labels": labels,
        "case_mean": correlations(told, real, [row.patient for row in whole], seed),
        "case_mean_volume_only": correlations(volume, real, [row.patient for row in whole], seed),
        "worst": worst_found(real, told),
        "worst_volume_only": worst_found(real, volume),
        "worst_by_flag": _worst_by_flag(real, whole),
        "flagged": {
            "cases": sum(row.flagged for row in rows),
            "low_expected_dice": sum(row.low for row in rows),
            "unlike_the_training": sum(bool(row.far) for row in rows),
            "label_missing": sum(bool(row.missing) for row in rows),
        },
    }


def _mean_deviation(dice: Mapping[str, float], beside: Mapping[str, float], typical: Mapping[str, float]) -> float:
    """Return the mean over labels that both have of Dice less what is typical of the label."""
    both = [dice[label] - typical[label] for label in dice if label in beside and label in typical]
    return math.fsum(both) / len(both)


def _label(rows: Sequence[Judged], label: str, seed: int) -> dict[str, Any]:
    both = [row for row in rows if label in row.expected and label in row.dice]
    real = np.array([row.dice[label] for row in both])
    told, volume = (np.array([row[label] for row in one]) for one in _columns(both))
    patients = [row.patient for row in both]
    error = float(np.abs(told - real).mean()) if both else 0.0
    return {
        **correlations(told, real, patients, seed),
        "mean_absolute_error": tidy(error),
        "volume_only": correlations(volume, real, patients, seed),
    }


def _columns(rows: Sequence[Judged]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    return [row.expected for row in rows], [row.volume_only for row in rows]


def correlations(told: Floats, real: Floats, patients: Sequence[str], seed: int) -> dict[str, Any]:
    """Return Pearson's and Spearman's correlation with n and the 95 % interval of a bootstrap over patients.

    None where there is none to be had: fewer than three cases, or one side does not vary.
    """
    found: dict[str, Any] = {"n": len(real)}
    members = [np.flatnonzero(np.array(patients) == one) for one in sorted(set(patients))]
    for name, measure in (("pearson", pearson), ("spearman", spearman)):
        value = measure(told, real)
        found[name] = None if value is None else tidy(value)
        found[f"{name}_ci95"] = None if value is None else _interval(measure, told, real, members, seed)
    return found


def _interval(
    measure: Callable[[Floats, Floats], float | None],
    told: Floats,
    real: Floats,
    members: Sequence[NDArray[np.int64]],
    seed: int,
) -> list[float] | None:
    rng = np.random.default_rng((seed, 11))
    values = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([members[n] for n in rng.integers(len(members), size=len(members))])
        value = measure(told[drawn], real[drawn])
        if value is not None:
            values.append(value)
    if len(values) < RESAMPLES // 2:
        return None
    return [tidy(float(edge)) for edge in np.percentile(values, (2.5, 97.5))]


def pearson(first: Floats, second: Floats) -> float | None:
    """Return Pearson's correlation; None for fewer than three values or where one side does not vary."""
    if len(first) < 3 or np.ptp(first) < 1e-12 or np.ptp(second) < 1e-12:
        return None
    return float(np.clip(np.corrcoef(first, second)[0, 1], -1, 1))


def spearman(first: Floats, second: Floats) -> float | None:
    """Return Pearson's correlation of the ranks; equal values share the mean of theirs."""
    from scipy.stats import rankdata

    return pearson(np.asarray(rankdata(first)), np.asarray(rankdata(second)))


def worst_found(real: Floats, told: Floats) -> dict[str, Any] | None:
    """Return how many of the worst tenth by real Dice are among the fifth with the lowest expected Dice.

    With n: how many the tenth is (at least one), and the fifth. None for no case.
    """
    if not len(real):
        return None
    worst, chosen = (max(1, round(share * len(real))) for share in (WORST_SHARE, REVIEW_SHARE))
    bad = set(np.argsort(real, kind="stable")[:worst].tolist())
    looked_at = set(np.argsort(told, kind="stable")[:chosen].tolist())
    found = len(bad & looked_at)
    return {"worst": worst, "looked_at": chosen, "found": found, "share": tidy(found / worst)}


def _worst_by_flag(real: Floats, rows: Sequence[Judged]) -> dict[str, Any] | None:
    """Return the same for the flag as it is used, with what is unlike the training cases."""
    if not rows:
        return None
    worst = max(1, round(WORST_SHARE * len(real)))
    bad = np.argsort(real, kind="stable")[:worst]
    found = sum(rows[int(i)].flagged for i in bad)
    looked_at = sum(row.flagged for row in rows)
    return {"worst": worst, "looked_at": looked_at, "found": found, "share": tidy(found / worst)}
