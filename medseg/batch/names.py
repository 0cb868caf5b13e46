"""Names for NIfTI inputs: the stem of the file, told apart where two files share it, the same in every run."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from medseg.batch.ledger import Ledger
from medseg.batch.study_input import StudyInput
from medseg.errors import BatchError
from medseg.files import place_of
from medseg.privacy import keyed_id

LINKAGE = Path("private") / "linkage.csv"


def read_linkage(out: Path) -> dict[str, str]:
    """Return id -> path of the runs into `out` so far; empty where there was none."""
    file = out / LINKAGE
    if not file.exists():
        return {}
    with open(file, encoding="utf-8", newline="") as handle:
        return {row["id"]: row["path"] for row in csv.DictReader(handle)}


def told_apart(
    studies: Sequence[StudyInput], *, taken: set[str], out: Path | None, unpacked: Mapping[Path, Path]
) -> list[StudyInput]:
    """Give files that share a name ``<stem>-<8 hex digits>``, a keyed hash of their place.

    A file that an earlier run into `out` named keeps that name, so that inputs that are added later rename nothing.
    A stem that stands there for another file with other content is not used again.

    Parameters
    ----------
    studies : of NIfTI files, their ids the stems.
    taken : ids that other inputs of this run have.
    unpacked : image -> the file to read, where they differ: the images of archives are named by archive and member.
    """
    earlier = {} if out is None else read_linkage(out)
    named = {path: name for name, path in earlier.items()}
    stems = Counter(study.id for study in studies)
    rows = []
    for study in studies:
        places = _places(study)
        study = replace(study, images=tuple(unpacked.get(path, path) for path in study.images))
        before = next((named[place] for place in places if place in named), "")
        if before == study.id or before.startswith(f"{study.id}-"):
            name = before
        elif stems[study.id] == 1 and study.id not in taken and _free(study, earlier, out):
            name = study.id
        else:
            name = f"{study.id}-{keyed_id('place', places[0]).removeprefix('place-')[:8]}"
        rows.append(replace(study, id=name))
    return rows


def _places(study: StudyInput) -> list[str]:
    return [str(place_of(path)) for path in study.images]


def _free(study: StudyInput, earlier: Mapping[str, str], out: Path | None) -> bool:
    """Tell whether the stem is unused in `out`, or stands for the same content that lay elsewhere."""
    if out is None or study.id not in earlier:
        return True
    entry = Ledger(out).read(study.id)
    return entry is None or entry.input_digest == study.digest()


def refuse_same_names(studies: Sequence[StudyInput]) -> None:
    """Raise BatchError(SAME_NAME) where two inputs would be written to one file."""
    origins: dict[str, Path] = {}
    for study in studies:
        if study.id in origins:
            raise BatchError(
                f"{origins[study.id]} and {study.origin} would both be written as {study.id}; predict them into "
                "different --out folders, or give the input only once",
                code="SAME_NAME",
            )
        origins[study.id] = study.origin
