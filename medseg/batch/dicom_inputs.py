"""DICOM inputs of a batch: each series is a study, or, where the model has rules, its channels are found in a study."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from medseg.batch.study_input import StudyInput
from medseg.cases import study_id, study_key
from medseg.errors import MedsegError
from medseg.privacy import keyed_id
from medseg.readers.archives import Archives
from medseg.readers.dicom_damage import Lost
from medseg.readers.dicom_files import SCRATCH_PREFIX
from medseg.readers.dicom_index import SeriesFiles
from medseg.readers.dicom_scan import scan
from medseg.readers.dicom_select import choose_series, fitting
from medseg.spec import Spec


def dicom_inputs(places: Sequence[Path], spec: Spec, archives: Archives) -> list[StudyInput]:
    """Return the studies below `places` (files and folders), and what is too damaged to tell.

    Without rules each series is one, localizers that accompany others left out. A model with one channel and a rule
    segments every series that fits; one with several channels takes one series for each from every study. A study
    without them is refused, not forgotten, and so are damaged files that belong to no series, folders that may not be
    listed, and a file of another kind that was named.

    Parameters
    ----------
    archives : know where unpacked files come from; ids never follow from where they lie.
    """
    found = scan(_outermost(places))
    files = {file for row in found.series for file in row.files}
    given = {place.resolve(): place for place in places if place.is_file()}
    used = {file.resolve() for file in files}
    others = sorted(place for whole, place in given.items() if whole not in used)
    rows = _series_inputs(found.series) if not spec.rules else _ruled_inputs(found.series, spec, archives)
    rows += [StudyInput(keyed_id("case", str(place.resolve())), (place,), None, place) for place in others]
    lost = [part for part in found.lost if not part.files or {file.resolve() for file in part.files} - set(given)]
    return rows + [_lost_input(part, archives.origin(part.place)) for part in lost]


def _lost_input(part: Lost, origin: Path) -> StudyInput:
    words = (part.uid,) if part.uid else (str(origin.resolve()),)
    return StudyInput(keyed_id("case", *words), part.files or (part.place,), None, origin, refusal=part.error())


def chosen_input(name: str, spec: Spec, series: Sequence[SeriesFiles], order: Sequence[str]) -> StudyInput:
    """Return the study `name` made of the series (one at least) that the rules of `spec` choose.

    `order` names the channels of the spec in the order of the model. What cannot be chosen is refused later.
    """
    files = sorted({file for row in series for file in row.files})
    origin = common_folder(files)
    try:
        chosen = choose_series(series, spec.rules)
    except MedsegError as error:
        return StudyInput(name, tuple(files), None, origin, refusal=error)
    channels = tuple(chosen[key] for key in order)
    folders = tuple(sorted({file.parent for row in channels for file in row.files}))
    return StudyInput(name, folders, chosen[spec.reference_channel], origin, channels=channels)


def _series_inputs(series: Sequence[SeriesFiles]) -> list[StudyInput]:
    """Return a study for each series; localizers only of studies that hold nothing else."""
    shown = {study_key(row) for row in series if not _is_localizer(row)}
    return [
        StudyInput(keyed_id("case", *row.identity), (row.files[0].parent,), row, row.files[0].parent)
        for row in series
        if not _is_localizer(row) or study_key(row) not in shown
    ]


def _is_localizer(series: SeriesFiles) -> bool:
    return series.refusal is not None and series.refusal.code == "LOCALIZER"


def _ruled_inputs(series: Sequence[SeriesFiles], spec: Spec, archives: Archives) -> list[StudyInput]:
    studies: dict[str, list[SeriesFiles]] = {}
    for row in series:
        # Where the header names no study, the folder does: that in the archive, for the other lasts one run.
        key = row.study_uid or str(archives.origin(row.files[0].parent).resolve())
        studies.setdefault(key, []).append(row)
    rows: list[StudyInput] = []
    for uid, members in studies.items():
        fits = fitting(members, next(iter(spec.rules.values()))) if len(spec.channels) == 1 else []
        rows += _series_inputs(fits) or [chosen_input(study_id(uid), spec, members, list(spec.channels))]
    return rows


def _outermost(places: Iterable[Path]) -> list[Path]:
    """Return the places without those that lie in another one or are given twice."""
    kept: dict[Path, Path] = {}
    for place in sorted(places, key=lambda place: len(place.resolve().parts)):
        whole = place.resolve()
        # A walk does not enter a folder of unpacked archives, which may lie below another input.
        aside = any(part.startswith(SCRATCH_PREFIX) for part in whole.parts)
        if whole not in kept and (aside or not set(whole.parents) & set(kept)):
            kept[whole] = place
    return list(kept.values())


def common_folder(files: Sequence[Path]) -> Path:
    """Return the innermost folder that holds all files."""
    return Path(os.path.commonpath([file.absolute().parent for file in files]))
