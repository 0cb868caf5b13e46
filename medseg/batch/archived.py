"""Studies that come out of archives: named by their archive and member, not by where they were unpacked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medseg.batch.dicom_inputs import common_folder
from medseg.batch.study_input import StudyInput
from medseg.privacy import keyed_id
from medseg.readers.archive_members import refuse_archive
from medseg.readers.archives import Archives
from medseg.readers.nifti import stem

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of members that may become names of results; others are replaced by a hash."""


def member_name(path: Path, archives: Archives) -> Path:
    """Return ``ARCHIVE/MEMBER`` for an unpacked NIfTI file, whose stem becomes its id; any other path as it is."""
    origin = archives.origin(path)
    if origin == path or _SAFE.fullmatch(origin.name):
        return origin
    return origin.with_name(keyed_id("case", str(origin)) + path.name.removeprefix(stem(path)))


def with_origins(studies: Sequence[StudyInput], archives: Archives) -> list[StudyInput]:
    """Say of DICOM studies that were unpacked from which folder of which archive they come."""
    rows = []
    for study in studies:
        origins = [archives.origin(file) for file in study.files]
        moved = origins != list(study.files)
        rows.append(replace(study, origin=common_folder(origins)) if moved else study)
    return rows


def refused_archives(archives: Archives, found: Sequence[StudyInput]) -> list[StudyInput]:
    """Return a refused study for each archive that cannot be read, or that was given and holds no image."""
    rows = [(row.place, row.error) for row in archives.refused]
    used = {parent for study in found for file in study.files for parent in file.parents}
    outer = {row.place for row in archives.refused} | {up for row in archives.refused for up in row.place.parents}
    empty = [archive for place, archive in archives.named.items() if place not in used and archive not in outer]
    rows += [(archive, refuse_archive("ARCHIVE_EMPTY", "no image was found in it")) for archive in empty]
    return [
        StudyInput(keyed_id("case", str(place.resolve())), (place,), None, place, refusal=error)
        for place, error in rows
    ]
