"""Find the DICOM series in any mix of files and folders, by headers alone.

paths -> files -> headers -> one group per SeriesInstanceUID -> dicom_index splits each -> Found
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from medseg.errors import ReadError
from medseg.readers.allowances import CORRECTABLE
from medseg.readers.dicom_header import PARSE_ERRORS, Header, quiet, read_header
from medseg.readers.dicom_index import SeriesFiles, is_image, series_of
from medseg.readers.dicom_refusals import Refusal


@dataclass(frozen=True)
class Found:
    """What lies under some paths.

    Attributes
    ----------
    series : readable and refused ones, localizers included (refused), in the order found.
    ignored : kinds of DICOM object without an image grid of their own -> how many ("Segmentation Storage": 2).
    not_dicom : number of files that are no DICOM.
    damaged : DICOM files that cannot be parsed; series in the same folder are refused, for they may lack slices.
    """

    series: tuple[SeriesFiles, ...]
    ignored: dict[str, int]
    not_dicom: int
    damaged: tuple[Path, ...]

    def describe(self) -> str:
        """Return one line for a message, without names or identifiers."""
        good = sum(series.refusal is None for series in self.series)
        refused = Counter(series.refusal.code for series in self.series if series.refusal is not None)
        parts = [f"{good} readable series"]
        parts += [f"{count} refused ({code})" for code, count in sorted(refused.items())]
        parts += [f"{count} {name}" for name, count in sorted(self.ignored.items())]
        parts += [f"{len(self.damaged)} damaged files"] * bool(self.damaged)
        parts += [f"{self.not_dicom} files that are not DICOM"] * bool(self.not_dicom)
        return ", ".join(parts)


def find_series(paths: Path | Iterable[Path]) -> list[SeriesFiles]:
    """Return every series under `paths` (files or folders, searched to the bottom, any file name).

    Raises
    ------
    ReadError : NOT_FOUND, a path does not exist.
    """
    return list(scan(paths).series)


def scan(paths: Path | Iterable[Path]) -> Found:
    """Index `paths` like `find_series` and also say what was left out.

    An empty folder gives an empty `Found`. Linked folders are not followed.

    Raises
    ------
    ReadError : NOT_FOUND, a path does not exist.
    """
    groups: dict[str, list[Header]] = {}
    damaged: list[Path] = []
    not_dicom = 0
    with quiet():
        for path in files_below(paths):
            try:
                header = read_header(path)
            except PARSE_ERRORS:
                damaged.append(path)
                continue
            if header is None:
                not_dicom += 1
            else:
                groups.setdefault(header.series_uid, []).append(header)
    ignored: Counter[str] = Counter()
    series: list[SeriesFiles] = []
    for headers in groups.values():
        images = [header for header in headers if is_image(header)]
        others = [header for header in headers if not is_image(header)]
        series += series_of(images) if images else []
        if images:  # a series holds one kind of object: what claims to be another is a damaged image
            damaged += [header.path for header in others]
        else:
            ignored.update(header.class_name for header in others)
    folders = Counter(path.parent for path in damaged)
    return Found(tuple(_doubt(entry, folders) for entry in series), dict(ignored), not_dicom, tuple(damaged))


def _doubt(series: SeriesFiles, damaged: Counter[Path]) -> SeriesFiles:
    """Refuse a series when damaged files lie beside its files: its last slice may be one of them."""
    count = sum(damaged[folder] for folder in {path.parent for path in series.files})
    correctable = series.refusal is None or series.refusal.code in CORRECTABLE
    if not count or not correctable:
        return series
    text = f"{count} damaged DICOM files lie beside its {len(series.files)} slices, which may be incomplete"
    return replace(series, refusal=Refusal("UNREADABLE", text))


def files_below(paths: Path | Iterable[Path]) -> Iterator[Path]:
    """Walk to the regular files, sorted, each once; raise ReadError(NOT_FOUND) where a path does not exist."""
    seen: set[Path] = set()
    for path in [paths] if isinstance(paths, Path) else paths:
        if not path.exists():
            raise ReadError(f"{path.name}: this file or folder does not exist", code="NOT_FOUND")
        for file in sorted(_walk(path)) if path.is_dir() else [path]:
            if file.is_file() and file not in seen:
                seen.add(file)
                yield file


def _walk(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)
