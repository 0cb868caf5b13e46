"""The declared rule applied to numbers: pure functions, so that a decision can be checked from its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medseg.errors import ConfigError
from medseg.evaluation.compare import Comparison
from medseg.evaluation.table import Evaluation
from medseg.registry import did_you_mean
from medseg.retraining.settings import Rule


@dataclass(frozen=True)
class Check:
    """One condition: what was found, the limit that was declared, and whether it holds.

    `value` is None where nothing could be measured; the condition then does not hold.
    """

    name: str
    value: float | None
    limit: float
    passed: bool

    def describe(self) -> str:
        """Return one line for people."""
        found = "not measurable" if self.value is None else f"{self.value:+.4f}"
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {found} (limit {self.limit:+.4f})"


def judge(rule: Rule, comparison: Comparison) -> tuple[Check, ...]:
    """Return the conditions for a challenger, compared as new with the champion as old."""
    checks = []
    if rule.min_improvement is not None:
        bound = comparison.overall.ci_low
        checks.append(_above("mean of labels, lower bound of the gain", bound, rule.min_improvement))
    margins = margin_of_each(rule, [row.label for row in comparison.labels[:-1]])
    rows = {row.label: row for row in comparison.labels[:-1]}
    for label, margin in margins.items():
        checks.append(_above(f"{label}, lower bound of the gain", rows[label].ci_low, -margin))
    drop = max(row.worst_drop for row in comparison.labels)
    checks.append(_at_most("largest drop in one case", drop, rule.max_drop))
    checks.append(_at_most("failed cases", float(comparison.n_failed_new), float(comparison.n_failed_old)))
    return tuple(checks)


def judge_first(rule: Rule, evaluation: Evaluation) -> tuple[Check, ...]:
    """Return the condition for a model that has no champion to be compared with."""
    mean = evaluation.mean_dice
    return (Check("mean of labels", mean, rule.floor, mean is not None and mean >= rule.floor),)


def margin_of_each(rule: Rule, labels: list[str]) -> Mapping[str, float]:
    """Return label -> margin; raise ConfigError for a label that is not there."""
    if rule.margins is None:
        return {}
    if isinstance(rule.margins, float):
        return dict.fromkeys(labels, rule.margins)
    for label in rule.margins:
        if label not in labels:
            raise ConfigError(
                f"rule.margins: {label!r} is no label of the gate{did_you_mean(label, labels)}; labels: "
                f"{', '.join(labels)}"
            )
    return rule.margins


def _above(name: str, value: float | None, limit: float) -> Check:
    return Check(name, value, limit, value is not None and value > limit)


def _at_most(name: str, value: float, limit: float) -> Check:
    return Check(name, value, limit, value <= limit)
