"""How a tick ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from medseg.retraining.decisions import Decision
from medseg.retraining.rule import Check

Outcome = Literal["promoted", "not_promoted", "no_new_data", "would_train"]
EXIT_CODES: Mapping[Outcome, int] = {"promoted": 0, "not_promoted": 10, "no_new_data": 20, "would_train": 0}
_SENTENCES: Mapping[Outcome, str] = {
    "promoted": "version {version} is the champion now (it was {former})",
    "not_promoted": "version {version} was trained and not promoted; champion: {former}",
    "no_new_data": "nothing to do: {reason}",
    "would_train": "would train: {reason}",
}


@dataclass(frozen=True)
class RetrainResult:
    """How a tick ended.

    Attributes
    ----------
    outcome : promoted, not_promoted, no_new_data; would_train with --dry-run.
    model : name in the registry.
    version : of the challenger that was trained.
    former : version that was the champion before, None where there was none.
    reason : why there is nothing to do, or what would be done.
    checks : the conditions of the rule with what was found.
    comparison : per label, challenger against champion (fields of medseg.evaluation.compare.LabelComparison without
        the case); empty for the first model.
    digests : of dataset, gate, config, rule and models.
    decision : SHA-256 of the line in the decision log.
    report : page that compares both case by case.
    """

    outcome: Outcome
    model: str
    version: int | None = None
    former: int | None = None
    reason: str = ""
    checks: tuple[Check, ...] = ()
    comparison: tuple[Mapping[str, Any], ...] = ()
    digests: Mapping[str, str | None] | None = None
    decision: str | None = None
    report: Path | None = None

    @property
    def exit_code(self) -> int:
        """Of the command: 0 promoted, 10 trained but not promoted, 20 no new data."""
        return EXIT_CODES[self.outcome]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            **asdict(self),
            "exit_code": self.exit_code,
            "report": None if self.report is None else str(self.report),
        }

    def describe(self) -> str:
        """Return some lines for the terminal."""
        former = "none" if self.former is None else f"version {self.former}"
        lines = [
            f"{self.model}: " + _SENTENCES[self.outcome].format(version=self.version, former=former, reason=self.reason)
        ]
        lines += [f"  {check.describe()}" for check in self.checks]
        for row in self.comparison:
            if row["mean_new"] is not None:
                lines.append(
                    f"  {row['label']}: Dice {row['mean_old']:.4f} -> {row['mean_new']:.4f} ({row['n_pairs']} cases)"
                )
        if self.report is not None:
            lines.append(f"Page: {self.report}")
        return "\n".join(lines)


def result_of(decision: Decision, report: Path | None) -> RetrainResult:
    """Return the result that a decision about a tick stands for."""
    told = decision.content
    return RetrainResult(
        outcome=told["outcome"],
        model=told["model"],
        version=told["versions"]["challenger"],
        former=told["versions"]["champion"],
        checks=tuple(Check(**row) for row in told["checks"]),
        comparison=tuple(told["comparison"]),
        digests=told["digests"],
        decision=decision.sha256,
        report=report if report is not None and report.exists() else None,
    )
