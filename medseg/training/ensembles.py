"""Which of several configurations, or which ensemble of them, is worth having: a rule, fixed before any number is seen.

1. The best single one is that with the highest mean Dice (the faster of equals).
2. From pairs up to all of them: the ensemble with the highest mean Dice of its size takes the place of what was chosen
   so far if its gain is at least MARGIN and beyond noise: the interval of the mean paired difference between the two
   lies above 0. It comes from a bootstrap over patients, at a level of 95 % for all ensembles together, so that many of
   them do not make luck (Bonferroni: 1 - 0.05 / number of ensembles).
3. Fewer than MIN_PATIENTS patients never justify an ensemble.

Dice is that of out-of-fold cases as `medseg evaluate` counts it: mean over labels of the mean over cases. The Dice of
what is chosen is a little too good, because the same cases chose it. `repeated` says how much: the rule is applied
without each fold in turn, and what it chooses is scored on that fold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from medseg.evaluation.compare import LabelComparison, bootstrap_mean, compare
from medseg.evaluation.table import Evaluation, make_evaluation

MARGIN = 0.002
"""Gains below this are not worth a second model; the same as for post-processing."""
MIN_PATIENTS = 6
"""Of five patients that all gain, one in sixteen such fives would by chance alone: no ground for an interval."""
RESAMPLES, SEED = 10_000, 20_260_101
ERROR = 0.05


@dataclass(frozen=True)
class Candidate:
    """One configuration, or several whose probabilities are averaged.

    Attributes
    ----------
    names : of the configurations.
    evaluation : Dice of each label of each out-of-fold case.
    networks : how many predict together.
    seconds : a prediction by one network of each configuration took, on average.
    """

    names: tuple[str, ...]
    evaluation: Evaluation
    networks: int
    seconds: float

    @property
    def name(self) -> str:
        """Return "a + b", as people read it."""
        return " + ".join(self.names)

    @property
    def dice(self) -> float:
        """Mean Dice; -1 where no label has a value, so that anything is better."""
        found = self.evaluation.mean_dice
        return -1.0 if found is None else found


@dataclass(frozen=True)
class Choice:
    """What the rule took, and why.

    Attributes
    ----------
    best : the best single configuration; `chosen`: what is taken.
    level : of the intervals.
    """

    candidates: tuple[Candidate, ...]
    best: Candidate
    chosen: Candidate
    level: float

    @cached_property
    def gains(self) -> dict[str, LabelComparison]:
        """Name -> difference to the best single configuration, of every other candidate."""
        others = [row for row in self.candidates if row is not self.best]
        return {row.name: difference(row, self.best, self.level) for row in others}


@dataclass(frozen=True)
class Repeated:
    """The rule, applied without each fold in turn.

    Attributes
    ----------
    dice : mean Dice of what was chosen without the cases, on these cases; None where no label has a value.
    counts : name of what was chosen -> in how many folds.
    """

    dice: float | None
    counts: Mapping[str, int]


def choose(candidates: Sequence[Candidate]) -> Choice:
    """Apply the rule of this module to candidates of the same cases and labels.

    Raises
    ------
    ConfigError : DIFFERENT_CASES, DIFFERENT_LABELS; by what is compared, so also by `gains`.
    ValueError : there is no single configuration.
    """
    ensembles = [candidate for candidate in candidates if len(candidate.names) > 1]
    level = 1 - ERROR / max(1, len(ensembles))
    best = _highest([candidate for candidate in candidates if len(candidate.names) == 1])
    chosen = best
    for size in sorted({len(candidate.names) for candidate in ensembles}):
        rival = _highest([candidate for candidate in ensembles if len(candidate.names) == size])
        if _beyond_noise(rival, chosen, level):
            chosen = rival
    return Choice(tuple(candidates), best, chosen, level)


def difference(new: Candidate, old: Candidate, level: float) -> LabelComparison:
    """Return the paired difference of two candidates: of each case the mean over labels."""
    told = compare(new.evaluation, old.evaluation, resamples=1)
    values: dict[str, list[float]] = {}
    for (case, _), value in told.differences.items():
        values.setdefault(case, []).append(value)
    if not values:
        return told.overall
    patients = {row.case: row.patient for row in new.evaluation.rows}
    means = np.array([np.mean(found) for found in values.values()])
    owners = [patients[case] for case in values]
    interval = bootstrap_mean(means, owners, resamples=RESAMPLES, seed=SEED, level=level)
    low, high = interval or (None, None)
    return replace(told.overall, ci_low=low, ci_high=high)


def repeat(candidates: Sequence[Candidate], folds: Mapping[str, int]) -> Repeated | None:
    """Apply the rule without each fold and score on it what was chosen; None for a single fold.

    `folds` : case -> its fold.
    """
    numbers = sorted(set(folds.values()))
    if len(numbers) < 2:
        return None
    rows, counts = [], Counter[str]()
    for number in numbers:
        others = {case for case, fold in folds.items() if fold != number}
        picked = choose([_restricted(candidate, others) for candidate in candidates]).chosen.name
        counts[picked] += 1
        whole = next(candidate for candidate in candidates if candidate.name == picked)
        rows += [row for row in whole.evaluation.rows if row.case not in others]
    return Repeated(make_evaluation(candidates[0].evaluation.targets, rows, {}).mean_dice, dict(counts))


def _highest(candidates: Sequence[Candidate]) -> Candidate:
    return max(candidates, key=lambda candidate: (round(candidate.dice, 9), -candidate.seconds))


def _beyond_noise(rival: Candidate, chosen: Candidate, level: float) -> bool:
    if len({row.patient for row in rival.evaluation.rows}) < MIN_PATIENTS:
        return False
    gain = difference(rival, chosen, level)
    return (gain.mean_difference or 0.0) >= MARGIN and (gain.ci_low or 0.0) > 0


def _restricted(candidate: Candidate, cases: Iterable[str]) -> Candidate:
    kept = set(cases)
    told = candidate.evaluation
    part = make_evaluation(told.targets, [row for row in told.rows if row.case in kept], {})
    return Candidate(candidate.names, part, candidate.networks, candidate.seconds)
