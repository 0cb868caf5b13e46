"""The per-case table: one row per case, label and metric, its summary, and both on disk.

Everything that a report says is computed from cases.csv; numbers are written so that they are read back bit for bit.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from medseg.errors import ConfigError
from medseg.evaluation.metrics import EMPTY_REASONS
from medseg.files import file_digest, write_json, write_text

CASES, SUMMARY_CSV, SUMMARY_JSON = "cases.csv", "summary.csv", "summary.json"
MEAN = "mean of labels"
"""Label of the summary row that averages the labels' means (regions, which overlap them, left out)."""

Status = Literal["used", "excluded", "imputed"]


@dataclass(frozen=True)
class Row:
    """One value; `value` is None exactly where `status` is "excluded"."""

    case: str
    patient: str
    label: str
    metric: str
    unit: str
    value: float | None
    status: Status
    reason: str


@dataclass(frozen=True)
class SummaryRow:
    """One label × metric over all cases.

    Attributes
    ----------
    n_total : cases that were to be scored: n_used + n_imputed + n_excluded.
    n_used : values that were measured.
    n_imputed : values that stand for a missing prediction; they count in the statistics.
    mean ... max : of the used and the imputed values; None where there are none. `sd` has n - 1 in its denominator and
        needs two values, quartiles are linearly interpolated.

    In the row MEAN the counts are sums over labels, `mean` is the mean of the labels' means, the rest is None.
    """

    label: str
    metric: str
    unit: str
    n_total: int
    n_used: int
    n_imputed: int
    mean: float | None = None
    sd: float | None = None
    median: float | None = None
    q1: float | None = None
    q3: float | None = None
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True)
class Target:
    """What is scored: a label, or a region that is the union of several; `values` are its mask values."""

    name: str
    values: tuple[int, ...]
    color: str
    region: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Predictions scored against a reference.

    Attributes
    ----------
    targets : labels and regions, in the order of the spec.
    rows : ordered by case, target, metric.
    summary : ordered by metric, target; the mean of the labels last.
    provenance : what was scored against what (names, digests, versions; no paths).
    not_scored : ids of predictions that no reference case was compared with.
    """

    targets: tuple[Target, ...]
    rows: tuple[Row, ...]
    summary: tuple[SummaryRow, ...]
    provenance: Mapping[str, str]
    not_scored: tuple[str, ...] = ()

    @property
    def mean_dice(self) -> float | None:
        """Mean over labels of the mean Dice over cases; None where no label has a value."""
        return next((row.mean for row in self.summary if (row.metric, row.label) == ("dice", MEAN)), None)

    @property
    def cases(self) -> tuple[str, ...]:
        """Ids of the cases that were to be scored."""
        return tuple(dict.fromkeys(row.case for row in self.rows))

    @property
    def failed(self) -> dict[str, str]:
        """Case id -> reason, for the cases without a usable prediction."""
        return {row.case: row.reason for row in self.rows if row.reason not in EMPTY_REASONS}

    def values(self, metric: str, label: str) -> dict[str, float]:
        """Return case id -> value of one metric and label, imputed values included."""
        chosen = (row for row in self.rows if row.metric == metric and row.label == label)
        return {row.case: row.value for row in chosen if row.value is not None}


def make_evaluation(
    targets: Sequence[Target], rows: Iterable[Row], provenance: Mapping[str, str], *, not_scored: Iterable[str] = ()
) -> Evaluation:
    """Summarise rows."""
    kept = tuple(rows)
    return Evaluation(tuple(targets), kept, summarise(kept, targets), dict(provenance), tuple(not_scored))


def summarise(rows: Sequence[Row], targets: Sequence[Target]) -> tuple[SummaryRow, ...]:
    """Return one summary row per metric × target, and one per metric for the mean of the labels."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.metric, row.label), []).append(row)
    summary: list[SummaryRow] = []
    for metric in dict.fromkeys(row.metric for row in rows):
        per_target = {t.name: _summary_row(groups[metric, t.name]) for t in targets if (metric, t.name) in groups}
        summary += per_target.values()
        summary.append(_mean_row([per_target[t.name] for t in targets if t.name in per_target and not t.region]))
    return tuple(summary)


def _summary_row(rows: Sequence[Row]) -> SummaryRow:
    first = rows[0]
    used, imputed = (sum(row.status == status for row in rows) for status in ("used", "imputed"))
    summary = SummaryRow(first.label, first.metric, first.unit, len(rows), used, imputed)
    values = np.array([row.value for row in rows if row.value is not None], dtype=np.float64)
    if values.size == 0:
        return summary
    q1, median, q3 = (float(quartile) for quartile in np.percentile(values, (25, 50, 75)))
    spread = float(values.std(ddof=1)) if values.size > 1 else None
    ends = (float(values.min()), float(values.max()))
    return replace(summary, mean=float(values.mean()), sd=spread, median=median, q1=q1, q3=q3, min=ends[0], max=ends[1])


def _mean_row(rows: Sequence[SummaryRow]) -> SummaryRow:
    total, used, imputed = (sum(getattr(row, name) for row in rows) for name in ("n_total", "n_used", "n_imputed"))
    means = [row.mean for row in rows if row.mean is not None]
    mean = float(np.mean(means)) if means else None
    return SummaryRow(MEAN, rows[0].metric, rows[0].unit, total, used, imputed, mean=mean)


def write_evaluation(evaluation: Evaluation, out: Path) -> None:
    """Write cases.csv, summary.csv and summary.json into `out`: the same bytes for the same evaluation."""
    write_text(out / CASES, _csv_text(Row, evaluation.rows))
    write_text(out / SUMMARY_CSV, _csv_text(SummaryRow, evaluation.summary))
    write_json(
        out / SUMMARY_JSON,
        {
            "cases_sha256": file_digest(out / CASES),
            "failed": evaluation.failed,
            "mean_dice": evaluation.mean_dice,
            "metrics": sorted({row.metric for row in evaluation.rows}),
            "not_scored": list(evaluation.not_scored),
            "provenance": dict(evaluation.provenance),
            "summary": [asdict(row) for row in evaluation.summary],
            "targets": [asdict(target) for target in evaluation.targets],
        },
    )


def load_evaluation(folder: Path) -> Evaluation:
    """Read what `write_evaluation` wrote; the summary is computed anew from the rows.

    Raises
    ------
    ConfigError : NOT_AN_EVALUATION, or CHANGED_TABLE where cases.csv is not the one that the summary was made from.
    """
    try:
        told = json.loads((folder / SUMMARY_JSON).read_text(encoding="utf-8"))
        text = (folder / CASES).read_text(encoding="utf-8")
        targets = [Target(**{**row, "values": tuple(row["values"])}) for row in told["targets"]]
        rows = [_row(cells) for cells in csv.DictReader(io.StringIO(text))]
        provenance, expected = told["provenance"], told["cases_sha256"]
        not_scored = [str(case) for case in told.get("not_scored", ())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder}: this is no folder that `medseg evaluate --out` wrote ({type(error).__name__}: {error})",
            code="NOT_AN_EVALUATION",
        ) from error
    if file_digest(folder / CASES) != expected:
        raise ConfigError(
            f"{folder / CASES}: the table was changed after its summary was made; run `medseg evaluate` again",
            code="CHANGED_TABLE",
        )
    return make_evaluation(targets, rows, provenance, not_scored=not_scored)


def _csv_text(kind: type[Row] | type[SummaryRow], rows: Sequence[Row | SummaryRow]) -> str:
    names = [field.name for field in fields(kind)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    # csv writes None as an empty cell and a float by its repr, which reads back as the same float.
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return buffer.getvalue()


def _row(cells: Mapping[str, Any]) -> Row:
    status = cells["status"]
    if status not in ("used", "excluded", "imputed"):
        raise ValueError(f"status {status!r} is not used, excluded or imputed")
    value = float(cells["value"]) if cells["value"] else None
    return Row(**{**cells, "value": value, "status": cast(Status, status)})
