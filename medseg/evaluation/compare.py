"""Paired comparison of two evaluations of the same cases: where the new model is better and where it is worse.

The unit is the patient: cases of one patient are not independent, so the bootstrap draws patients (field notes 1.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.errors import ConfigError
from medseg.evaluation.metrics import METRICS, Metric
from medseg.evaluation.table import MEAN, Evaluation

TIE = 1e-6
"""Two values that differ by less are a tie."""


@dataclass(frozen=True)
class LabelComparison:
    """New minus old for one label over all pairs; in the row MEAN each case's value is its mean over labels.

    Attributes
    ----------
    n_pairs : cases that have a value in both; n_unpaired: cases that have one in only one of the two.
    mean_difference, median_difference : of new - old; None without pairs.
    ci_low, ci_high : 95 % percentile interval of the mean difference, from a bootstrap over patients; None with fewer
        than two patients.
    worst_drop : how much the case that lost most got worse (0 where none did), and `worst_case` its id.
    wins, ties, losses : cases in which new is better, equal (to 1e-6), worse.
    """

    label: str
    n_pairs: int
    n_unpaired: int
    mean_new: float | None = None
    mean_old: float | None = None
    mean_difference: float | None = None
    median_difference: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    worst_drop: float = 0.0
    worst_case: str = ""
    wins: int = 0
    ties: int = 0
    losses: int = 0


@dataclass(frozen=True)
class Comparison:
    """Two evaluations side by side.

    Attributes
    ----------
    metric : what is compared.
    labels : one row per target, then the row MEAN of the labels without regions.
    differences : (case, label) -> new - old, of every pair.
    n_cases, n_patients : over which the comparison runs.
    n_failed_new, n_failed_old : cases without a usable prediction.
    resamples, seed : of the bootstrap; the same give the same interval.
    """

    metric: str
    labels: tuple[LabelComparison, ...]
    differences: Mapping[tuple[str, str], float]
    n_cases: int
    n_patients: int
    n_failed_new: int
    n_failed_old: int
    resamples: int
    seed: int

    @property
    def overall(self) -> LabelComparison:
        """The row of the mean over labels."""
        return self.labels[-1]


def compare(
    new: Evaluation, old: Evaluation, *, metric: str = "dice", resamples: int = 2000, seed: int = 20240229
) -> Comparison:
    """Compare two evaluations case by case.

    Where a reference has no voxel of a label, a right empty prediction has no value; here it counts as a faultless one
    when the other prediction raised a false alarm, so that a new false alarm is seen as the loss that it is.

    Raises
    ------
    ConfigError : DIFFERENT_CASES, DIFFERENT_LABELS; or the metric has no better and worse.
    """
    row = METRICS[metric]
    if row.better not in ("higher", "lower"):
        raise ConfigError(f"{metric} cannot be compared: it is neither better higher nor better lower")
    _require_same(new, old)
    patients = {r.case: r.patient for r in new.rows}
    rows, differences, labels = [], {}, [target.name for target in new.targets if not target.region]
    paired = {}
    for target in new.targets:
        pairs, unpaired = _pairs(new, old, row, target.name)
        paired[target.name] = pairs
        differences.update({(case, target.name): a - b for case, (a, b) in pairs.items()})
        rows.append(_compare_pairs(target.name, pairs, unpaired, row, patients, resamples, seed))
    mean = _mean_pairs([paired[label] for label in labels])
    rows.append(_compare_pairs(MEAN, mean, len(new.cases) - len(mean), row, patients, resamples, seed))
    return Comparison(
        metric=metric,
        labels=tuple(rows),
        differences=differences,
        n_cases=len(new.cases),
        n_patients=len(set(patients.values())),
        n_failed_new=len(new.failed),
        n_failed_old=len(old.failed),
        resamples=resamples,
        seed=seed,
    )


def _require_same(new: Evaluation, old: Evaluation) -> None:
    if odd := sorted(set(new.cases) ^ set(old.cases)):
        where = "new" if odd[0] in new.cases else "old"
        raise ConfigError(
            f"{len(odd)} case(s) stand in only one of the two evaluations, for example {odd[0]} (only {where}); "
            "evaluate both models on the same cases",
            code="DIFFERENT_CASES",
        )
    names = [tuple((t.name, t.values) for t in evaluation.targets) for evaluation in (new, old)]
    if names[0] != names[1]:
        raise ConfigError(
            f"the evaluations have different labels: {', '.join(t.name for t in new.targets)} and "
            f"{', '.join(t.name for t in old.targets)}",
            code="DIFFERENT_LABELS",
        )


Pairs = dict[str, tuple[float, float]]
"""Case -> (new, old)."""


def _pairs(new: Evaluation, old: Evaluation, metric: Metric, label: str) -> tuple[Pairs, int]:
    """Return the cases with a value in both, and how many have one in only one of the two."""
    first, second = (_values_or_best(evaluation, metric, label) for evaluation in (new, old))
    # Both rightly empty: there is nothing to compare.
    measured = {*new.values(metric.id, label), *old.values(metric.id, label)}
    both = [case for case in new.cases if case in first and case in second and case in measured]
    return {case: (first[case], second[case]) for case in both}, len(measured) - len(both)


def _values_or_best(evaluation: Evaluation, metric: Metric, label: str) -> dict[str, float]:
    found = evaluation.values(metric.id, label)
    if metric.best is not None:
        for row in evaluation.rows:
            if (row.metric, row.label, row.reason) == (metric.id, label, "BOTH_EMPTY"):
                found[row.case] = metric.best
    return found


def _mean_pairs(labels: Sequence[Pairs]) -> Pairs:
    """Return each case's mean over the labels that are paired in it."""
    cases = dict.fromkeys(case for pairs in labels for case in pairs)
    return {
        case: (
            float(np.mean([pairs[case][0] for pairs in labels if case in pairs])),
            float(np.mean([pairs[case][1] for pairs in labels if case in pairs])),
        )
        for case in cases
    }


def _compare_pairs(
    label: str,
    pairs: Pairs,
    unpaired: int,
    metric: Metric,
    patients: Mapping[str, str],
    resamples: int,
    seed: int,
) -> LabelComparison:
    if not pairs:
        return LabelComparison(label, 0, unpaired)
    cases = list(pairs)
    values = np.array([pairs[case] for case in cases])
    difference = values[:, 0] - values[:, 1]
    gain = difference if metric.better == "higher" else -difference
    worst = int(np.argmin(gain))
    interval = bootstrap_mean(difference, [patients[case] for case in cases], resamples=resamples, seed=seed)
    return LabelComparison(
        label=label,
        n_pairs=len(cases),
        n_unpaired=unpaired,
        mean_new=float(values[:, 0].mean()),
        mean_old=float(values[:, 1].mean()),
        mean_difference=float(difference.mean()),
        median_difference=float(np.median(difference)),
        ci_low=None if interval is None else interval[0],
        ci_high=None if interval is None else interval[1],
        worst_drop=max(0.0, -float(gain[worst])),
        worst_case=cases[worst] if gain[worst] < -TIE else "",
        wins=int((gain > TIE).sum()),
        ties=int((np.abs(gain) <= TIE).sum()),
        losses=int((gain < -TIE).sum()),
    )


def bootstrap_mean(
    values: NDArray[np.float64], patients: Sequence[str], *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of the mean of `values` (n,), resampling patients with all their cases.

    None with fewer than two patients: one patient tells nothing about others. Deterministic for a seed.
    """
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < 2:
        return None
    total = np.bincount(owner, weights=values)
    count = np.bincount(owner)
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = total[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    low, high = np.percentile(means, (50 * (1 - level), 50 * (1 + level)))
    return float(low), float(high)
