"""What lies in a folder of DICOM studies without labels, and what of it is usable: ``medseg check FOLDER``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg.cases import study_id
from medseg.errors import MedsegError
from medseg.files import write_json, write_text
from medseg.privacy import keyed_id
from medseg.readers.archive_members import ARCHIVE_ADVICE
from medseg.readers.archives import Archives, unpacked
from medseg.readers.dicom_damage import Lost
from medseg.readers.dicom_geometry import series_grid
from medseg.readers.dicom_index import SeriesFiles
from medseg.readers.dicom_refusals import REFUSALS, reason
from medseg.readers.dicom_scan import Found, scan
from medseg.readers.dicom_series import read_series
from medseg.readers.nifti import is_nifti

ASIDE = ("LOCALIZER",)
"""Refusals that are no fault: such series accompany others."""


@dataclass(frozen=True)
class SeriesFacts:
    """One series, or one part of it that can be read on its own, or damaged files of which no more is known.

    Attributes
    ----------
    id : the one under which ``medseg predict`` would write its mask.
    study : the same for series of one study; "" where it is unknown.
    size : columns, rows, slices; empty where the header does not say.
    spacing : mm between columns, rows, slices; empty where it is not known or not even.
    part : why it is apart from others of the same series.
    code, message, advice : why it cannot be used and what to do; all "" if it can.
    notes : what the reader remarked; only if the pixels were read.
    origin : its folder; for the terminal only.
    """

    id: str
    study: str
    modality: str
    files: int
    size: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    part: str = ""
    code: str = ""
    message: str = ""
    advice: str = ""
    notes: tuple[str, ...] = ()
    origin: Path = field(default_factory=Path, repr=False)

    @property
    def verdict(self) -> str:
        """Return "usable", "set aside" or "refused"."""
        return "usable" if not self.code else "set aside" if self.code in ASIDE else "refused"


@dataclass(frozen=True)
class TreeResult:
    """What ``medseg check`` found in a folder.

    Attributes
    ----------
    series : ordered by study and id.
    read : whether the pixels were decoded too, or only the headers read.
    ignored : kinds of DICOM object without an image of their own -> how many.
    others : what else was there -> how many.
    page : check.html, None where none was asked for.
    """

    series: tuple[SeriesFacts, ...]
    read: bool
    ignored: dict[str, int]
    others: dict[str, int]
    page: Path | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many series are usable, refused, set aside."""
        found = Counter(row.verdict for row in self.series)
        return {verdict: found[verdict] for verdict in ("usable", "refused", "set aside")}

    @property
    def studies(self) -> int:
        """How many studies there are."""
        return len({row.study for row in self.series if row.study})

    @property
    def ok(self) -> bool:
        """Whether every series is usable or rightly set aside, and there is one at least."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """0: all is usable; 3: some is; 1: nothing is."""
        counts = self.counts
        return 1 if not counts["usable"] else 3 if counts["refused"] else 0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; no path and nothing else that tells where or who."""
        rows = [{key: value for key, value in asdict(row).items() if key != "origin"} for row in self.series]
        verdicts = [row.verdict for row in self.series]
        return {
            "counts": self.counts,
            "studies": self.studies,
            "pixels_read": self.read,
            "ignored_objects": self.ignored,
            "others": self.others,
            "series": [{**row, "verdict": verdict} for row, verdict in zip(rows, verdicts, strict=True)],
        }

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False)


def is_tree(path: Path) -> bool:
    """Tell a folder of studies from a dataset, which is a spec file or a folder with dataset.yaml or dataset.json."""
    return path.is_dir() and not any((path / name).exists() for name in ("dataset.yaml", "dataset.json"))


def check_tree(
    path: Path, *, read: bool = False, out: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> TreeResult:
    """List the DICOM series below a folder, also those in archives, and say which are usable.

    Parameters
    ----------
    read : decode the pixels, too; otherwise only the headers are read, which cannot show a file cut among its pixels
        or a compression without decoder.
    out : folder for check.html and check.json; nothing is written unless told.

    Raises
    ------
    ReadError : NOT_FOUND.
    ExportError : the page, or the files of an archive, cannot be written.
    """
    with unpacked([path]) as archives:
        found = scan(archives.paths)
        rows = [_series_facts(row, archives) for row in found.series]
        for number, row in enumerate(found.series if read else (), start=1):
            rows[number - 1] = _read(row, rows[number - 1])
            if progress is not None:
                progress(number, len(found.series))
        rows += [_lost_facts(part, archives) for part in found.lost]
        rows += [_archive_facts(row.place, row.error.code, str(row.error)) for row in archives.refused]
        others = _others(path, found, archives)
    rows.sort(key=lambda row: (not row.study, row.study, row.id))
    page = None if out is None else out / "check.html"
    result = TreeResult(tuple(rows), read, dict(sorted(found.ignored.items())), others, page)
    if page is not None:
        from medseg.checking.tree_page import page_html  # needs jinja2

        write_text(page, page_html(result))
        write_json(page.with_suffix(".json"), result.to_dict())
    return result


def _series_facts(row: SeriesFiles, archives: Archives) -> SeriesFacts:
    first, refusal = row.headers[0], row.refusal
    folder = archives.origin(row.files[0].parent)
    facts = SeriesFacts(
        id=keyed_id("case", *row.identity),
        study=study_id(row.study_uid or str(folder.resolve())),
        modality=row.modality,
        files=len(row.files),
        size=(first.columns, first.rows, len({header.key for header in row.headers})) if first.rows else (),
        part=row.part,
        origin=folder,
    )
    if refusal is not None:
        spacing = first.spacing[::-1] if first.spacing else ()
        return replace(facts, spacing=spacing, code=refusal.code, message=refusal.text, advice=refusal.advice)
    headers = list({header.key: header for header in row.headers}.values())
    steps = np.linalg.norm(series_grid(headers).affine[:3, :3], axis=0)
    return replace(facts, spacing=tuple(round(float(step), 4) for step in steps))


def _read(row: SeriesFiles, facts: SeriesFacts) -> SeriesFacts:
    """Decode the pixels of a series that its headers call usable."""
    if row.refusal is not None:
        return facts
    try:
        volume = read_series(row)
    except MedsegError as error:
        if error.code not in REFUSALS:
            return replace(facts, code=error.code, message=str(error))
        found = reason(error)
        return replace(facts, code=found.code, message=found.text, advice=found.advice)
    return replace(facts, notes=volume.notes)


def _lost_facts(part: Lost, archives: Archives) -> SeriesFacts:
    place = archives.origin(part.place)
    found = reason(part.error())
    return SeriesFacts(
        id=keyed_id("case", part.uid or str(place.resolve())),
        study="",
        modality="",
        files=len(part.files),
        code=found.code,
        message=found.text,
        advice=found.advice,
        origin=place,
    )


def _archive_facts(place: Path, code: str, text: str) -> SeriesFacts:
    advice = ARCHIVE_ADVICE[code]
    message = text.removeprefix(f"archive refused, {code}: ").removesuffix(f"; {advice}")
    name = keyed_id("case", str(place.resolve()))
    return SeriesFacts(name, "", "", 1, code=code, message=message, advice=advice, origin=place)


def _others(path: Path, found: Found, archives: Archives) -> dict[str, int]:
    """Count what is no DICOM series."""
    unpacked_archives = len([place for place in archives.paths if place != path])
    read = unpacked_archives + sum(row.place.is_file() for row in archives.refused)
    nifti = sum(is_nifti(file) for file in found.others)
    counts = {
        "archives": read,
        "damaged DICOM files": len(found.damaged),
        "NIfTI files": nifti,
        "other files": found.not_dicom - nifti - read,
        **found.skipped,
    }
    return {kind: count for kind, count in counts.items() if count > 0}


def findings(result: TreeResult) -> dict[str, Sequence[SeriesFacts]]:
    """Return code -> the series that it concerns, the most frequent first."""
    groups: dict[str, list[SeriesFacts]] = {}
    for row in result.series:
        if row.code:
            groups.setdefault(row.code, []).append(row)
    return dict(sorted(groups.items(), key=lambda group: (group[0] in ASIDE, -len(group[1]), group[0])))


def summary(result: TreeResult) -> str:
    """Return the answer in one line."""
    counts = ", ".join(f"{n} {verdict}" for verdict, n in result.counts.items() if n) or "no DICOM series"
    how = "pixels read" if result.read else "headers only"
    return f"{result.studies} studies, {len(result.series)} series: {counts} ({how})"
