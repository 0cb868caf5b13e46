"""Is there room for the results of a run? Asked before it begins, so that nobody finds out in the night."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from medseg.batch.ledger import Ledger
from medseg.batch.study_input import StudyInput
from medseg.errors import ExportError
from medseg.exporters import EXPORTERS
from medseg.sizes import said

SMALLEST = 1024
"""Bytes that no study goes below, with its entries in ledger and journal."""
MASK, SOFT = 0.08, 2.0
"""Of the bytes of an input, the share of a mask in one format, and of one that holds probabilities: mostly less."""


def estimate(studies: Sequence[StudyInput], formats: Sequence[str], out: Path) -> int:
    """Return about how many bytes the results of the studies that OUT does not have yet will take, rather too many."""
    share = sum(SOFT if EXPORTERS[name].soft else MASK for name in formats)
    return sum(int(input_bytes(study) * share) + 4 * SMALLEST for study in _missing(studies, out))


def require_room(studies: Sequence[StudyInput], formats: Sequence[str], out: Path) -> str:
    """Return a warning if the disk may become full, "" if there is room.

    Raises
    ------
    ExportError : DISK_FULL: there is surely too little room.
    """
    free = shutil.disk_usage(out).free
    missing = len(_missing(studies, out))
    if free < missing * SMALLEST:
        raise ExportError(
            f"the results of {missing} studies cannot be written: {said(free)} are free; free space or choose "
            "another --out",
            code="DISK_FULL",
        )
    needed = estimate(studies, formats, out)
    if free < needed:
        return f"the disk may become full: about {said(needed)} are needed, {said(free)} are free"
    return ""


def _missing(studies: Sequence[StudyInput], out: Path) -> list[StudyInput]:
    known = set(Ledger(out).studies())
    return [study for study in studies if study.id not in known and study.refusal is None]


def input_bytes(study: StudyInput) -> int:
    """Return the bytes of the files of a study, as far as they are there."""
    total = 0
    for file in study.files:
        try:
            total += os.stat(file).st_size
        except OSError:
            continue  # is refused later
    return total
