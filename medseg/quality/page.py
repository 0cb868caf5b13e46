"""The estimate against the truth, for people: 7_report/quality.csv, quality.json and quality.html."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg.files import write_json, write_text
from medseg.html import render
from medseg.quality.fit import Fitted, Judged
from medseg.quality.summary import summarise


def write_quality(folder: Path, fitted: Fitted, *, seed: int = 0) -> dict[str, Any]:
    """Write the table, the summary and the page; returns the summary."""
    labels = list(fitted.model.labels)
    summary = summarise(fitted, seed=seed)
    write_text(folder / "quality.csv", quality_csv(fitted.judged, labels))
    write_json(folder / "quality.json", summary)
    rows = sorted(fitted.judged, key=lambda row: (not row.flagged, row.case))
    values = {"summary": summary, "labels": labels, "rows": rows, "pictures": _pictures(fitted)}
    write_text(folder / "quality.html", render("quality.html", **values))
    return summary


def quality_csv(rows: Sequence[Judged], labels: Sequence[str]) -> str:
    """Return a row a case: real and expected Dice of each label, and whether and why it would be flagged."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    kinds = ("dice", "expected", "volume_only")
    names = [f"{label}_{kind}" for label in labels for kind in kinds]
    writer.writerow(["case", "flagged", "low_expected_dice", "unlike_the_training", "label_missing", *names])
    for row in rows:
        cells = [getattr(row, kind).get(label) for label in labels for kind in kinds]
        shown = ["" if cell is None else f"{cell:.4f}" for cell in cells]
        words = ("no", "yes")
        writer.writerow([row.case, words[row.flagged], words[row.low], row.far, " ".join(row.missing), *shown])
    return text.getvalue()


def _pictures(fitted: Fitted) -> dict[str, str]:
    """Return label -> expected against real Dice as SVG; flagged cases are crosses."""
    from medseg.plots import Series, agreement_svg, colours_for

    found = {}
    colours = colours_for(range(1, len(fitted.model.labels) + 1))
    for number, label in enumerate(fitted.model.labels, start=1):
        rows = [row for row in fitted.judged if label in row.expected and label in row.dice]
        if rows:
            real, told = [row.dice[label] for row in rows], [row.expected[label] for row in rows]
            series = Series(label, colours[number], told, real, [row.flagged for row in rows])
            found[label] = agreement_svg(series, unit="Dice")
    return found
