"""The cases that a spec means on disk: files found by patterns, or the DICOM studies of a tree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import SpecError
from medseg.files import digest, file_digest
from medseg.joined import source_among
from medseg.privacy import keyed_id
from medseg.readers import reader_for
from medseg.spec import Case, Spec

if TYPE_CHECKING:
    from medseg.readers.dicom_header import Header
    from medseg.readers.dicom_index import SeriesFiles
    from medseg.readers.dicom_scan import Found

OURS = "medseg"
"""Manufacturer of the objects that medseg writes: a result in an archive must never become what is learnt."""


def source_digest(case: Case) -> str:
    """Return the SHA-256 of the bytes of all files of a case (file names and places do not count)."""
    return content_digests(case)[0]


def content_digests(case: Case) -> tuple[str, str]:
    """Return the SHA-256 of the bytes of all files of a case, and of those of its images alone; each is read once.

    The first of a case among several datasets depends on the spec by which it is read, too.
    """
    files: dict[Path, str] = {}
    for path in (*case.images, *case.label_files):
        if path not in files:  # images and labels may share a folder
            files[path] = _path_digest(path)
    images = [files[path] for path in case.images]
    return source_among(case, digest([*images, *(files[path] for path in case.label_files)])), digest(images)


def image_files(case: Case) -> list[Path]:
    """Return every file of the images of a case that is there."""
    return [file for path in case.images if path.exists() for file in _inside(path)]


def _inside(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def image_digest(case: Case) -> str:
    """Return the SHA-256 of the bytes of a case's images alone; its labels need not be there."""
    return digest([_path_digest(path) for path in case.images])


def _path_digest(path: Path) -> str:
    return digest(sorted(file_digest(p) for p in _inside(path)))


def find_cases(spec: Spec, root: Path) -> tuple[Case, ...]:
    """Return the cases whose first channel exists below `root`, ordered by path; other files may still be missing."""
    tokens = [name if channel.file is None else channel.file for name, channel in spec.channels.items()]
    per_channel = "{channel}" in spec.images
    patterns = [spec.images.replace("{channel}", token) for token in tokens] if per_channel else [spec.images]
    expression = re.compile("(.+?)".join(re.escape(part) for part in patterns[0].split("{case}")))
    cases = []
    for found in sorted(root.glob(patterns[0].replace("{case}", "*"))):
        match = expression.fullmatch(found.relative_to(root).as_posix())
        if match is None:
            continue
        name = match[1]
        images = tuple(root / pattern.replace("{case}", name) for pattern in patterns)
        mask = root / spec.masks.replace("{case}", name)
        cases.append(make_case(spec, name, images, mask if mask.exists() else None))
    return tuple(cases)


def make_case(spec: Spec, name: str, images: tuple[Path, ...], mask: Path | None) -> Case:
    """Return a Case named by the rule of the spec (names that may identify are hashed)."""
    patient = _patient(spec, name, what=f"the case id {name!r}")
    hashed = spec.case_ids == "hash" or (spec.case_ids is None and reader_for(images[0]).identifying)
    if hashed:
        name, patient = keyed_id("case", spec.name, name), keyed_id("pat", spec.name, patient)
    return Case(id=name, images=images, mask=mask, patient=patient)


def _patient(spec: Spec, name: str, *, what: str) -> str:
    if spec.patient is None:
        return name
    match = re.search(spec.patient, name)
    if match is None:
        raise SpecError(f"patient: the expression {spec.patient!r} finds nothing in {what}")
    return match[1] if match.groups() else match[0]


def study_id(study_uid: str) -> str:
    """Return the name of a DICOM study whose channels are chosen by rules, the same in a dataset and in a batch."""
    return keyed_id("case", "study", study_uid)


def find_studies(spec: Spec, root: Path) -> tuple[Case, ...]:
    """Return the DICOM studies below ``root / spec.studies`` that hold a series for any channel, ordered by id.

    A case has the files of the series that fit a rule (and damaged files beside them, which may be lost slices), and
    the SEG and RTSTRUCT objects of its study; without any it has no mask. What medseg wrote is no label. An object
    stored in a study of its own belongs to the study whose instances it names, else to the only one in its frame of
    reference, else to the only one of its patient.
    """
    from medseg.readers.dicom_scan import scan
    from medseg.readers.dicom_select import fitting

    found = scan(root / spec.studies)
    studies: dict[str, list[SeriesFiles]] = {}
    for row in found.series:
        studies.setdefault(study_key(row), []).append(row)
    labels = _labels_of(studies, [header for header in found.labels if header.meta.get("Manufacturer") != OURS])
    cases = []
    for key, series in studies.items():
        wanted = {row.uid for rule in spec.rules.values() for row in fitting(series, rule)}
        if not wanted:
            continue
        mask = tuple(header.path for header in labels.get(key, ()))
        name = series[0].patient_id
        patient = _patient(spec, name, what="a PatientID") if name else key
        images = _images([row for row in series if row.uid in wanted], found)
        cases.append(Case(study_id(key), images, mask or None, keyed_id("pat", spec.name, patient)))
    return tuple(sorted(cases, key=lambda case: case.id))


def study_key(series: SeriesFiles) -> str:
    """Return what series of one study share: its UID, or the folder where it has none."""
    return series.study_uid or str(series.files[0].parent.resolve())


def _images(series: Sequence[SeriesFiles], found: Found) -> tuple[Path, ...]:
    """Return the files of some series, ordered by what they hold, and damaged ones that may belong to them."""
    headers = {header.path: header for row in series for header in row.headers}
    folders = {path.parent for path in headers}
    doubted = any(row.refusal is not None and row.refusal.code == "UNREADABLE" for row in series)
    lost = [path for path in found.damaged if doubted or path.parent in folders]
    return (*sorted(headers, key=lambda path: (headers[path].series_uid, headers[path].key)), *lost)


@dataclass(frozen=True)
class _Owners:
    """Study by what a label object may know of it; "" where several share it."""

    instance: Mapping[str, str]
    frame: Mapping[str, str]
    patient: Mapping[str, str]


def _labels_of(studies: Mapping[str, Sequence[SeriesFiles]], labels: Sequence[Header]) -> dict[str, list[Header]]:
    """Return study -> its label objects, ordered by their instance."""
    owners = None
    rows: dict[str, list[Header]] = {}
    for header in sorted(labels, key=lambda header: header.sop_uid):
        key = header.study_uid
        if key not in studies:
            owners = owners or _owners(studies)
            key = _owner(header, owners)
        rows.setdefault(key, []).append(header)
    return rows


def _owners(studies: Mapping[str, Sequence[SeriesFiles]]) -> _Owners:
    rows = [(key, header) for key, series in studies.items() for row in series for header in row.headers]
    return _Owners(
        _only((header.sop_uid, key) for key, header in rows),
        _only((header.frame_of_reference, key) for key, header in rows),
        _only((header.patient_id, key) for key, header in rows),
    )


def _only(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return word -> study, "" where several studies share the word."""
    found: dict[str, str] = {}
    for word, key in pairs:
        if word:
            found[word] = key if found.setdefault(word, key) == key else ""
    return found


def _owner(header: Header, owners: _Owners) -> str:
    from medseg.errors import MedsegError
    from medseg.readers.dicom_labels import label_identity

    try:
        frame, references = label_identity(header.path)
    except MedsegError:  # damaged: it says no more than its header
        frame, references = header.frame_of_reference, frozenset()
    named = {owners.instance[uid] for uid in references if uid in owners.instance}
    if len(named) == 1:
        return named.pop()
    return owners.frame.get(frame, "") or owners.patient.get(header.patient_id, "")
