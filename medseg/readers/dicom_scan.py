"""Find the DICOM series in any mix of files and folders, by headers alone.

paths -> files -> headers -> one group per SeriesInstanceUID -> dicom_index splits each -> Found
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from medseg.readers.dicom_damage import Damage, Lost, judge
from medseg.readers.dicom_files import walk
from medseg.readers.dicom_header import Header, may_be_slice
from medseg.readers.dicom_index import LABEL_STORAGE, SeriesFiles, is_image, series_of
from medseg.readers.dicom_workers import read_all


@dataclass(frozen=True)
class Found:
    """What lies under some paths.

    Attributes
    ----------
    series : readable and refused ones, localizers included (refused), in the order found.
    ignored : kinds of DICOM object without an image grid of their own -> how many ("Segmentation Storage": 2).
    damaged : DICOM files that cannot be parsed; series to which they may belong are refused.
    lost : damaged files that belong to no series found, and folders that may not be listed.
    others : the files that are no DICOM.
    skipped : kind of what is not looked into (linked folders, pipes and devices) -> how many.
    labels : headers of the SEG and RTSTRUCT objects among the ignored.
    """

    series: tuple[SeriesFiles, ...]
    ignored: dict[str, int]
    others: tuple[Path, ...] = field(repr=False)
    damaged: tuple[Path, ...] = field(repr=False)
    lost: tuple[Lost, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    labels: tuple[Header, ...] = field(default=(), repr=False)

    def describe(self) -> str:
        """Return one line for a message, without names or identifiers."""
        good = sum(series.refusal is None for series in self.series)
        refused = Counter(series.refusal.code for series in self.series if series.refusal is not None)
        parts = [f"{good} readable series"]
        parts += [f"{count} refused ({code})" for code, count in sorted(refused.items())]
        parts += [f"{count} {name}" for name, count in sorted(self.ignored.items())]
        parts += [f"{len(self.damaged)} damaged files"] * bool(self.damaged)
        parts += [f"{sum(not part.files for part in self.lost)} folders that may not be listed"] * self.locked
        parts += [f"{count} {kind}" for kind, count in sorted(self.skipped.items())]
        parts += [f"{self.not_dicom} files that are not DICOM"] * bool(self.not_dicom)
        return ", ".join(parts)

    @property
    def not_dicom(self) -> int:
        """How many files are no DICOM."""
        return len(self.others)

    @property
    def locked(self) -> bool:
        """Whether there are folders that may not be listed."""
        return any(not part.files for part in self.lost)


def find_series(paths: Path | Iterable[Path]) -> list[SeriesFiles]:
    """Return every series under `paths` (files or folders, searched to the bottom, any file name).

    Raises
    ------
    ReadError : NOT_FOUND, a path does not exist.
    """
    return list(scan(paths).series)


def scan(paths: Path | Iterable[Path]) -> Found:
    """Index `paths` like `find_series` and also say what was left out.

    An empty folder gives an empty `Found`. See `walk` for links and pipes, and dicom_damage for what a damaged file
    costs. Equal trees give equal results, in the order of the names.

    Raises
    ------
    ReadError : NOT_FOUND, a path does not exist.
    """
    tree = walk(paths)
    files, locked = tree.files, [path for path in tree.locked if path.is_dir()]
    groups: dict[str, list[Header]] = {}
    damages = [Damage(path, unread=True) for path in tree.locked if not path.is_dir() and may_be_slice(path.name)]
    others: list[Path] = []
    for path, outcome in zip(files, read_all(files), strict=True):
        if isinstance(outcome, Damage):
            damages.append(outcome)
        elif outcome is None:
            others.append(path)
        else:
            groups.setdefault(outcome.series_uid, []).append(outcome)
    ignored: Counter[str] = Counter()
    labels: list[Header] = []
    series: list[SeriesFiles] = []
    for uid, headers in groups.items():
        images = [header for header in headers if is_image(header)]
        objects = [header for header in headers if not is_image(header)]
        series += series_of(images) if images else []
        if images:  # a series holds one kind of object: what claims to be another is a damaged image
            damages += [Damage(header.path, uid) for header in objects]
        else:
            ignored.update(header.class_name for header in objects)
            labels += [header for header in objects if header.sop_class in LABEL_STORAGE]
    judged, lost = judge(series, damages, locked)
    damaged = tuple(damage.path for damage in damages)
    return Found(judged, dict(ignored), tuple(others), damaged, lost, dict(tree.skipped), tuple(labels))
