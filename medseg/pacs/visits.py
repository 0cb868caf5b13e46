"""What an earlier run made of a study of an archive, so that a repeated one need not fetch it again."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from medseg.batch.ledger import Entry, Ledger
from medseg.cases import study_id
from medseg.exporters import EXPORTERS
from medseg.files import write_json, write_text
from medseg.pacs.archive import RemoteStudy
from medseg.readers.allowances import Allowance


def remember(out: Path, study: RemoteStudy, entries: Sequence[Entry]) -> None:
    """Keep which instances the entries were made from, and which UIDs the ids stand for (for the user only)."""
    rows = dict.fromkeys((study.id, study_id(study.uid)), (study.uid, ""))
    keep_linkage(out, rows | {series.case: (study.uid, series.uid) for series in study.series})
    write_json(_record(out, study), {"content": study.content, "entries": [entry.id for entry in entries]})
    (out / "ledger" / f"{study.id}.json").unlink(missing_ok=True)  # why it could not be done before


def settled(
    out: Path, study: RemoteStudy, *, recipe: str, formats: Sequence[str], allow: Collection[Allowance] = ()
) -> list[Entry]:
    """Return the entries of a study that was done before from the same instances; none where anything is amiss.

    Parameters
    ----------
    recipe, formats : what the results must have been made by, and in.
    allow : what may be corrected now.
    """
    try:
        record = json.loads(_record(out, study).read_text(encoding="utf-8"))
        content, cases = record["content"], [str(case) for case in record["entries"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if content != study.content:
        return []
    ledger, entries = Ledger(out), []
    for case in cases:
        before = ledger.read(case)
        names = tuple(f"{case}{EXPORTERS[name].suffix}" for name in formats)
        entry = before and ledger.settled(
            case, input_digest=before.input_digest, model_digest=recipe, outputs=names, allow=allow
        )
        if not entry:
            return []
        entries.append(entry)
    return entries


def _record(out: Path, study: RemoteStudy) -> Path:
    return out / "journal" / f"{study.id}.json"


def keep_linkage(out: Path, rows: Mapping[str, tuple[str, str]]) -> None:
    """Write id -> UIDs of study and series for the user only, for whoever must find an id in the archive."""
    file = out / "private" / "archive.csv"
    known: dict[str, tuple[str, str]] = {}
    if file.exists():
        with open(file, encoding="utf-8", newline="") as before:
            known = {row["id"]: (row["study"], row["series"]) for row in csv.DictReader(before)}
    if rows.items() <= known.items():
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "study", "series"])
    writer.writerows((case, *uids) for case, uids in sorted({**known, **rows}.items()))
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_text(file, text.getvalue(), mode=0o600)
