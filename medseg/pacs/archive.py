"""What a DICOMweb archive holds (QIDO-RS), and fetching it (WADO-RS); PS3.18 sections 10.4 and 10.6.

address -> studies -> series with the instances that they should have -> files, checked to be just these
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.errors import BatchError, ExportError, ReadError
from medseg.pacs.address import is_uid
from medseg.pacs.multipart import boundary_of, save_parts
from medseg.pacs.web import Answer, Request, Web
from medseg.privacy import keyed_id
from medseg.readers.dicom_identity import Identity, identify

PAGE = 100
NO_IMAGES = (
    *("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SR", "PR", "KO", "DOC", "REG", "RWV", "FID", "PLAN", "M3D"),
    *("AU", "ECG", "HD", "EPS", "SMR", "STAIN", "ASMT"),
)
"""Modalities of objects that are no images (PS3.3 section C.7.3.1.1.1)."""
OBJECTS = 'multipart/related; type="application/dicom"; transfer-syntax=*'
MAX_STUDY_BYTES = 32 * 1024**3
RESERVE_BYTES = 512 * 1024**2
"""What stays free on the disk: a full one harms more than this study."""


@dataclass(frozen=True)
class RemoteSeries:
    """A series as the archive lists it.

    Attributes
    ----------
    instances : UIDs of its instances.
    count : how many the archive says that there are; 0 when it does not say.
    """

    uid: str = field(repr=False)
    modality: str
    instances: frozenset[str] = field(repr=False)
    count: int

    @property
    def case(self) -> str:
        """The id under which the batch will know the series."""
        return keyed_id("case", self.uid, "")


@dataclass(frozen=True)
class RemoteStudy:
    """A study as the archive lists it, with the series that a model may want.

    Attributes
    ----------
    aside : number of series of other modalities.
    """

    uid: str = field(repr=False)
    series: tuple[RemoteSeries, ...]
    aside: int

    @property
    def id(self) -> str:
        """A name that tells nothing about the patient."""
        return keyed_id("study", self.uid)

    @property
    def content(self) -> str:
        """A keyed hash of all instances: another one when the archive's study has changed."""
        parts = [f"{series.uid} {uid}" for series in self.series for uid in series.instances]
        return keyed_id("content", *sorted(parts), digits=32)


def find_studies(web: Web) -> list[str]:
    """Return the UIDs of the studies that the address means, each once, in the order of the archive.

    Raises
    ------
    BatchError : the archive does not answer, or not as it should.
    """
    if web.address.study:
        return [web.address.study]
    return list(dict.fromkeys(_value(row, "0020000D") for row in _all(web, "/studies", web.address.study_filters)))


def look_up(web: Web, study: str, modalities: Collection[str]) -> RemoteStudy:
    """Return a study with those of its series that are images of one of `modalities` (none: of any).

    Raises
    ------
    BatchError : as `find_studies`; PACS_NOT_FOUND, the study has no series at all.
    """
    rows = _all(web, f"/studies/{study}/series", web.address.series_filters)
    if not rows:
        raise BatchError(f"{web.address.host}: the archive has no such study or series", code="PACS_NOT_FOUND")
    found = {_value(row, "0020000E"): row for row in rows}
    wanted = web.address.series
    if wanted and wanted not in found:
        raise BatchError(f"{web.address.host}: the study has no such series", code="PACS_NOT_FOUND")
    series = []
    for uid, row in sorted(found.items()):
        modality = str(_first(row, "00080060") or "")
        if uid == wanted or (not wanted and _is_wanted(modality, modalities)):
            series.append(_series(web, study, uid, modality, row))
    return RemoteStudy(study, tuple(series), 0 if wanted else len(found) - len(series))


def _is_wanted(modality: str, modalities: Collection[str]) -> bool:
    return modality in modalities if modalities and modality else modality not in NO_IMAGES


def _series(web: Web, study: str, uid: str, modality: str, row: dict[str, Any]) -> RemoteSeries:
    instances = _all(web, f"/studies/{study}/series/{uid}/instances", ())
    count = _first(row, "00201209")
    known = frozenset(_value(row, "00080018") for row in instances)
    return RemoteSeries(uid, modality, known, int(count) if str(count).isdigit() else 0)


def retrieve(web: Web, study: RemoteStudy, folder: Path, *, max_bytes: int = MAX_STUDY_BYTES) -> list[Path]:
    """Fetch the series of a study into `folder` (numbered names); every instance that is listed must come.

    Parameters
    ----------
    max_bytes : of the whole study.

    Raises
    ------
    BatchError : INCOMPLETE_RETRIEVAL (instances are missing, or belong elsewhere), STUDY_TOO_LARGE, or as
        `find_studies`.
    ExportError : DISK_FULL.
    """
    budget = _Budget(folder, max_bytes)
    files: list[Path] = []
    for series in study.series:
        place = folder / f"{len(files):06d}"
        got = _fetch(web, f"/studies/{study.uid}/series/{series.uid}", place, budget)
        _check_complete(web, study, series, [_identity(web, file) for file in got])
        files += got
    return files


def retrieve_instance(web: Web, item: Identity, folder: Path) -> Path:
    """Fetch one instance into `folder`; raise BatchError as `retrieve` does."""
    path = f"/studies/{item.study}/series/{item.series}/instances/{item.instance}"
    files = _fetch(web, path, folder, _Budget(folder.parent, MAX_STUDY_BYTES))
    if len(files) != 1:
        raise BatchError(f"{web.address.host}: {len(files)} objects came for one instance", code="PACS_ANSWER")
    return files[0]


def _fetch(web: Web, path: str, place: Path, budget: _Budget) -> list[Path]:
    before = budget.spent

    def take(answer: Answer) -> list[Path]:
        if answer.status == 204:
            return []
        shutil.rmtree(place, ignore_errors=True)  # of an attempt that broke off
        place.mkdir(mode=0o700)
        budget.spent = before
        return save_parts(answer.chunks(), boundary_of(answer.content_type), place, spent=budget.spend)

    try:
        return web.ask(Request("a retrieval", path, OBJECTS), take)
    except OSError as error:
        raise ExportError(
            f"a study from {web.address.host} cannot be stored ({error.strerror}); free space, then run the same "
            "command again",
            code="DISK_FULL",
        ) from error


@dataclass
class _Budget:
    """Bytes that may still come: counted before they are written."""

    folder: Path
    limit: int
    spent: int = 0
    checked: int = -1

    def spend(self, count: int) -> None:
        self.spent += count
        if self.spent > self.limit:
            raise BatchError(f"the study has more than {self.limit} bytes", code="STUDY_TOO_LARGE")
        if self.spent // 2**24 != self.checked:
            self.checked = self.spent // 2**24
            if shutil.disk_usage(self.folder).free < RESERVE_BYTES:
                raise ExportError(
                    f"less than {RESERVE_BYTES // 2**20} MiB are free for the study that is being fetched; free space, "
                    "then run the same command again",
                    code="DISK_FULL",
                )


def _identity(web: Web, file: Path) -> Identity:
    try:
        return identify(file)
    except ReadError as error:
        raise BatchError(f"{web.address.host}: an object that came is unusable: {error}", code="PACS_ANSWER") from error


def _check_complete(web: Web, study: RemoteStudy, series: RemoteSeries, came: Sequence[Identity]) -> None:
    here = {item.instance for item in came if (item.study, item.series) == (study.uid, series.uid)}
    expected = max(series.count, len(series.instances))
    if len({item.instance for item in came}) != len(here):
        raise BatchError(
            f"{web.address.host}: objects of another series came with the {len(here)} that were asked for",
            code="INCOMPLETE_RETRIEVAL",
        )
    if not here or len(here) < expected or series.instances - here:
        raise BatchError(
            f"{web.address.host}: {len(here)} of {expected} instances of a series came; nothing of the study is "
            "segmented. Run the same command again when the archive has them all",
            code="INCOMPLETE_RETRIEVAL",
        )


def _all(web: Web, path: str, search: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return every match, page by page; an archive without pages answers the same rows again, and that ends it."""
    return list(_pages(web, path, tuple(search)))


def _pages(web: Web, path: str, search: tuple[tuple[str, str], ...]) -> Iterator[dict[str, Any]]:
    tag = {"studies": "0020000D", "series": "0020000E", "instances": "00080018"}[path.rpartition("/")[2]]
    seen: set[str] = set()
    while True:
        page = web.query(path, (*search, ("limit", str(PAGE)), ("offset", str(len(seen)))))
        rows = {_uid(web, row, tag): row for row in page}
        fresh = {uid: row for uid, row in rows.items() if uid not in seen}
        yield from fresh.values()
        seen |= set(fresh)
        if not fresh:
            return


def _uid(web: Web, row: dict[str, Any], tag: str) -> str:
    uid = _value(row, tag)
    if not is_uid(uid):
        raise BatchError(f"{web.address.host}: a search answers with a UID that is none", code="PACS_ANSWER")
    return uid


def _value(row: dict[str, Any], tag: str) -> str:
    return str(_first(row, tag) or "")


def _first(row: dict[str, Any], tag: str) -> Any:
    """Return the first value of an attribute (PS3.18 section F.2.3), None where there is none."""
    element = row.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return values[0] if isinstance(values, list) and values else None
