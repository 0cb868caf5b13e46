"""The study report: one offline HTML page, made from the per-case table and nothing else but the pictures.

The same table gives the same page byte for byte: there is no date in it, and every number is computed from cases.csv.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg import plots
from medseg.evaluation.compare import Comparison, compare
from medseg.evaluation.metrics import METRICS
from medseg.evaluation.table import MEAN, Evaluation, SummaryRow, Target, load_evaluation
from medseg.files import file_digest, write_text
from medseg.html import render

REPORT = "report.html"
WORST = 6
"""How many of the worst cases are listed and shown."""


@dataclass(frozen=True)
class CaseLine:
    """One case in a list: its mean Dice over labels, the Dice of each label, and its picture."""

    case: str
    mean: float
    dice: tuple[float | None, ...]
    picture: bytes | None = None


@dataclass(frozen=True)
class Detection:
    """How often a label was there and was found: counts of cases with a prediction."""

    label: str
    found: int
    missed: int
    false_alarm: int
    both_empty: int


@dataclass(frozen=True)
class Agreement:
    """Volumes of one label: bias and limits of agreement of predicted - reference, and both plots."""

    label: str
    unit: str
    n: int
    bias: float
    low: float | None
    high: float | None
    scatter: str
    bland_altman: str


def report(
    evaluation_dir: Path,
    *,
    out: Path,
    against: Path | None = None,
    picture: Callable[[str], bytes] | None = None,
    title: str = "Segmentation study report",
) -> Path:
    """Write OUT/report.html and return its path.

    Parameters
    ----------
    evaluation_dir : what `evaluate` wrote.
    out : folder of the page.
    against : another evaluation of the same cases; the page then compares them case by case.
    picture : case id -> PNG, for the worst cases and a typical one (see medseg.evaluation.pictures.case_pictures);
        without it the page has no pictures of cases.
    title : of the page.

    Raises
    ------
    ConfigError : NOT_AN_EVALUATION, CHANGED_TABLE; DIFFERENT_CASES or DIFFERENT_LABELS with `against`.
    """
    evaluation = load_evaluation(evaluation_dir)
    other = None if against is None else load_evaluation(against)
    comparison = None if other is None else compare(evaluation, other)
    lines = case_lines(evaluation)
    typical = [] if picture is None else lines[len(lines) // 2 : len(lines) // 2 + 1]
    page = render(
        "report.html",
        title=title,
        evaluation=evaluation,
        table_hash=file_digest(evaluation_dir / "cases.csv"),
        n_patients=len({row.patient for row in evaluation.rows}),
        labels=[target for target in evaluation.targets if not target.region],
        colours={target.name: target.color for target in evaluation.targets},
        mean_label=MEAN,
        dice_rows=_summary(evaluation, "dice"),
        distribution=_strip(evaluation),
        detections=[_detection(evaluation, target) for target in evaluation.targets],
        agreements=[a for target in evaluation.targets if (a := _agreement(evaluation, target)) is not None],
        worst=[_with_picture(line, picture) for line in lines[:WORST]],
        typical=[_with_picture(line, picture) for line in typical],
        lines=sorted(lines, key=lambda line: line.case),
        comparison=comparison,
        differences=None if comparison is None else _differences(comparison, evaluation),
        against=other,
        metrics=[METRICS[name] for name in dict.fromkeys(row.metric for row in evaluation.rows)],
    )
    path = out / REPORT
    write_text(path, page)
    return path


def case_lines(evaluation: Evaluation) -> list[CaseLine]:
    """Return the cases that have a prediction and a Dice, worst mean Dice first."""
    labels = [target.name for target in evaluation.targets if not target.region]
    columns = [evaluation.values("dice", label) for label in labels]
    lines = []
    for case in evaluation.cases:
        scores = tuple(column.get(case) for column in columns)
        known = [score for score in scores if score is not None]
        if known and case not in evaluation.failed:
            lines.append(CaseLine(case, float(np.mean(known)), scores))
    return sorted(lines, key=lambda line: (line.mean, line.case))


def _with_picture(line: CaseLine, picture: Callable[[str], bytes] | None) -> CaseLine:
    return line if picture is None else CaseLine(line.case, line.mean, line.dice, picture(line.case))


def _summary(evaluation: Evaluation, metric: str) -> list[SummaryRow]:
    return [row for row in evaluation.summary if row.metric == metric]


def _strip(evaluation: Evaluation) -> str:
    """Draw the Dice of every case, labels first; imputed values are crosses."""
    series = []
    for target in evaluation.targets:
        rows = [r for r in evaluation.rows if (r.metric, r.label) == ("dice", target.name) and r.value is not None]
        values = [row.value for row in rows if row.value is not None]
        marked = [row.status == "imputed" for row in rows]
        series.append(plots.Series(target.name, target.color, values, marked=marked))
    return plots.strip_svg(series, label="Dice (crosses: no prediction, counted as 0)", limits=(0.0, 1.0))


def _detection(evaluation: Evaluation, target: Target) -> Detection:
    rows = [row for row in evaluation.rows if (row.metric, row.label) == ("dice", target.name)]
    count = Counter(row.reason for row in rows if row.case not in evaluation.failed)
    return Detection(target.name, count[""], count["PREDICTION_EMPTY"], count["REFERENCE_EMPTY"], count["BOTH_EMPTY"])


def _agreement(evaluation: Evaluation, target: Target) -> Agreement | None:
    """Compare volumes over the cases where at least one mask holds the label; None where there is no such case."""
    predicted = evaluation.values("volume_predicted", target.name)
    reference = evaluation.values("volume_reference", target.name)
    cases = [case for case in predicted if predicted[case] > 0 or reference[case] > 0]
    if not cases:
        return None
    unit = next(row.unit for row in evaluation.rows if row.metric == "volume_predicted")
    values, truth = [predicted[case] for case in cases], [reference[case] for case in cases]
    difference = np.subtract(values, truth)
    bias = float(difference.mean())
    half = 1.96 * float(difference.std(ddof=1)) if len(cases) > 1 else None
    series = plots.Series(target.name, target.color, values, reference=truth)
    return Agreement(
        label=target.name,
        unit=unit,
        n=len(cases),
        bias=bias,
        low=None if half is None else bias - half,
        high=None if half is None else bias + half,
        scatter=plots.agreement_svg(series, unit=unit),
        bland_altman=plots.bland_altman_svg(series, unit=unit),
    )


def _differences(comparison: Comparison, evaluation: Evaluation) -> str:
    """Draw the paired differences of every label, with the mean and its interval."""
    series = [
        plots.Series(target.name, target.color, _of_label(comparison, target.name)) for target in evaluation.targets
    ]
    intervals = {
        row.label: (row.ci_low, row.mean_difference, row.ci_high)
        for row in comparison.labels
        if row.ci_low is not None and row.ci_high is not None and row.mean_difference is not None
    }
    return plots.differences_svg(
        series, intervals, label="difference in Dice, this − other (right: this one is better)"
    )


def _of_label(comparison: Comparison, label: str) -> Sequence[float]:
    return [value for (_, name), value in comparison.differences.items() if name == label]
