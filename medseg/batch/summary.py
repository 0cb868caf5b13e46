"""Tables over all studies of a folder: OUT/summary.csv, and in OUT/journal/summary.html what differs between runs."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from medseg.batch.ledger import Entry, Ledger
from medseg.batch.locks import alone
from medseg.files import write_text
from medseg.spec import Spec

REVIEW = {None: "", True: "yes", False: "no"}
PAGE = Path("journal") / "summary.html"


def write_summary(out: Path, spec: Spec) -> None:
    """Write the tables; of two runs that end at once the later one sees all studies.

    The page holds times and memory, which no two runs share; so it lies with the journal, apart from what is the same
    however often a run was interrupted.
    """
    from medseg.html import render

    with alone(out, "tables"):
        ledger = Ledger(out)
        entries = [entry for entry in map(ledger.read, ledger.studies()) if entry is not None]
        write_text(out / "summary.csv", summary_csv(spec, entries))
        unit = "mL" if spec.unit == "mm" else "pixels"
        counts = Counter(entry.state for entry in entries)
        reasons = Counter((entry.state, entry.code) for entry in entries if entry.code).most_common()
        rows = [(entry, ledger.facts(entry.id)) for entry in entries]
        values: dict[str, object] = {"rows": rows, "labels": list(spec.foreground), "unit": unit, "counts": counts}
        values["reasons"] = reasons
        values["recipes"] = Counter(entry.model_digest for entry in entries if entry.state == "done").most_common()
        values["to_review"] = sum(entry.review is True for entry in entries)
        values["judged"] = any(entry.review is not None for entry in entries)
        write_text(out / PAGE, render("batch.html", model=spec.name, **values))


def summary_csv(spec: Spec, entries: Sequence[Entry]) -> str:
    """Return a table of studies: id, state, code, message, notes, model_digest and the volume of each label.

    The digest is that of the ledger: of the model (`model_hash` in predictions.json) and the options that change its
    answer. Where the model estimates quality, also the Dice to expect of each label, whether a person should look, and
    why.
    """
    unit = "ml" if spec.unit == "mm" else "pixels"
    judged = any(entry.review is not None for entry in entries)
    names = [*(f"{name}_{unit}" for name in spec.foreground)]
    if judged:
        names += [*(f"{name}_expected_dice" for name in spec.foreground), "review", "review_reasons"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*("id", "state", "code", "message", "notes", "model_digest"), *names])
    for entry in entries:
        row: list[object] = [entry.volumes_ml.get(name, "") for name in spec.foreground]
        if judged:
            row += [entry.expected_dice.get(name, "") for name in spec.foreground]
            row += [REVIEW[entry.review], "; ".join(entry.review_reasons)]
        facts = entry.id, entry.state, entry.code, entry.message, " ".join(entry.notes), entry.model_digest
        writer.writerow([*facts, *row])
    return text.getvalue()
