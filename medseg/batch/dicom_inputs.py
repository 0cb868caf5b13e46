"""DICOM inputs of a batch: each series is a study, or, where the model has rules, its channels are found in a study."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from medseg.batch.names import LINKAGE
from medseg.batch.study_input import StudyInput
from medseg.cases import study_id, study_key
from medseg.errors import MedsegError, ReadError
from medseg.files import place_of
from medseg.privacy import keyed_id
from medseg.readers.archives import Archives
from medseg.readers.dicom_damage import Lost
from medseg.readers.dicom_files import SCRATCH_PREFIX
from medseg.readers.dicom_index import SeriesFiles
from medseg.readers.dicom_scan import scan
from medseg.readers.dicom_select import choose_series, fitting
from medseg.readers.series_rules import ALIASES, MODALITIES
from medseg.spec import Spec


def dicom_inputs(places: Sequence[Path], spec: Spec, archives: Archives) -> list[StudyInput]:
    """Return the studies below `places` (files and folders), and what is too damaged to tell.

    Without rules each series is one; left out are localizers that accompany others, and CT, MR and PET in studies
    where the model finds its own modality. Alone these are refused (OTHER_MODALITY). A model with one channel and a
    rule segments every series that fits; one with several channels takes one series for each from every study. A study
    without them is refused, not forgotten, and so are damaged files that belong to no series, folders that may not be
    listed, and a file of another kind that was named.

    Parameters
    ----------
    archives : know where unpacked files come from; ids never follow from where they lie.
    """
    found = scan(_outermost(places))
    files = {file for row in found.series for file in row.files}
    given = {place_of(place): place for place in places if place.is_file()}
    used = {place_of(file) for file in files}
    others = sorted(place for whole, place in given.items() if whole not in used)
    wanted = wanted_modalities(spec)
    rows = _ruled_inputs(found.series, spec, archives) if spec.rules else _series_inputs(found.series, wanted)
    rows += [StudyInput(keyed_id("case", str(place_of(place))), (place,), None, place) for place in others]
    lost = [part for part in found.lost if not part.files or {place_of(file) for file in part.files} - set(given)]
    return rows + [_lost_input(part, archives.origin(part.place)) for part in lost]


def _lost_input(part: Lost, origin: Path) -> StudyInput:
    words = (part.uid,) if part.uid else (str(place_of(origin)),)
    error = part.error()
    refusal = type(error)(f"{error} ({LINKAGE} says where it is)", code=error.code) if part.unread else error
    return StudyInput(keyed_id("case", *words), part.files or (part.place,), None, origin, refusal=refusal)


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


def wanted_modalities(spec: Spec) -> frozenset[str]:
    """Return the modalities of the model's channels as DICOM writes them; empty where one takes anything."""
    named = [channel.modality.upper() for channel in spec.channels.values()]
    return frozenset(ALIASES.get(word, word) for word in named) if all(named) else frozenset()


def _series_inputs(series: Sequence[SeriesFiles], wanted: Collection[str] = ()) -> list[StudyInput]:
    """Return a study for each series; of studies that hold better ones no localizers and no other modalities."""
    known = bool(wanted) and set(wanted) <= set(MODALITIES)  # else the spec names its modality in words of its own
    others = {id(row) for row in series if known and row.modality in MODALITIES and row.modality not in wanted}
    aside = others | {id(row) for row in series if _is_localizer(row)}
    shown = {study_key(row) for row in series if id(row) not in aside}
    rows = []
    for row in series:
        if id(row) in aside and study_key(row) in shown:
            continue
        folder = row.files[0].parent
        refusal = _other_modality(row, wanted) if id(row) in others else None
        rows.append(StudyInput(keyed_id("case", *row.identity), (folder,), row, folder, refusal=refusal))
    return rows


def _other_modality(row: SeriesFiles, wanted: Collection[str]) -> ReadError:
    """Return (not raise) the refusal of a series that the model was never shown the like of."""
    return ReadError(
        f"the series is {row.modality}, the model is for {' and '.join(sorted(wanted))} and has never seen the like; "
        "give a series of its modality, or another model",
        code="OTHER_MODALITY",
    )


def _is_localizer(series: SeriesFiles) -> bool:
    return series.refusal is not None and series.refusal.code == "LOCALIZER"


def _ruled_inputs(series: Sequence[SeriesFiles], spec: Spec, archives: Archives) -> list[StudyInput]:
    studies: dict[str, list[SeriesFiles]] = {}
    for row in series:
        # Where the header names no study, the folder does: that in the archive, for the other lasts one run.
        key = row.study_uid or str(place_of(archives.origin(row.files[0].parent)))
        studies.setdefault(key, []).append(row)
    rows: list[StudyInput] = []
    for uid, members in studies.items():
        fits = fitting(members, next(iter(spec.rules.values()))) if len(spec.channels) == 1 else []
        rows += _series_inputs(fits) or [chosen_input(study_id(uid), spec, members, list(spec.channels))]
    return rows


def _outermost(places: Iterable[Path]) -> list[Path]:
    """Return the places without those that lie in another one or are given twice."""
    kept: dict[Path, Path] = {}
    for place in sorted(places, key=lambda place: len(place_of(place).parts)):
        whole = place_of(place)
        # A walk does not enter a folder of unpacked archives, which may lie below another input.
        aside = any(part.startswith(SCRATCH_PREFIX) for part in whole.parts)
        if whole not in kept and (aside or not set(whole.parents) & set(kept)):
            kept[whole] = place
    return list(kept.values())


def common_folder(files: Sequence[Path]) -> Path:
    """Return the innermost folder that holds all files."""
    return Path(os.path.commonpath([file.absolute().parent for file in files]))
