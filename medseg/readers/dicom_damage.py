"""Which series a damaged file may belong to: exactly one where its header still says so, else all in its folder.

A series that lost its last slice looks complete. So a damaged file always costs somebody something, and the question is
only whom.

- Its header names a series that was found: that one, wherever it lies.
- It names another one, and that can be believed: nobody here; a series of its own is lost. Believed are files that are
  merely cut short (what stands before the cut is as it was), and names that two damaged files share.
- Both places that say so call it an object without slices (a structure set, a report): nobody.
- It can be parsed, but lacks what an image must have (a position, a pixel spacing) and was therefore set apart from the
  other images of its series: those look whole without it, and are refused.
- It says nothing that can be believed: every series with files in the same folder. Counts that some headers hold
  (ImagesInAcquisition) do not acquit them: they count an acquisition, and a series may have several.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medseg.errors import MedsegError
from medseg.readers.allowances import CORRECTABLE
from medseg.readers.dicom_header import WANTED, known_class
from medseg.readers.dicom_index import SeriesFiles
from medseg.readers.dicom_refusals import Refusal, refuse
from medseg.readers.dicom_tags import told_by

EXPLAINED = (*CORRECTABLE, "SINGLE_SLICE")
"""Refusals that lost slices may be the cause of, so that these are the reason to give, and nothing is corrected."""
SICK = ("BAD_ORIENTATION", "NO_PIXEL_SPACING", "NO_POSITION", "TRUNCATED", "UNREADABLE")
"""Refusals of a part whose images may be damaged slices of the other parts."""
_UID = re.compile(r"[!-~]+")
"""Not as the standard has it: anonymisers write what they like, but no control characters."""


@dataclass(frozen=True)
class Damage:
    """One damaged file, and what it still tells.

    Attributes
    ----------
    path : the file, or a folder that may not be listed.
    series_uid : of the series that it says it belongs to, "" where it does not say.
    certain : whether that can be believed without a second witness.
    object_only : whether it is surely no image.
    unread : the system did not give the file (rights, a drive that does not answer): it may be sound.
    """

    path: Path = field(repr=False)
    series_uid: str = field(default="", repr=False)
    certain: bool = False
    object_only: bool = False
    unread: bool = False


@dataclass(frozen=True)
class Lost:
    """Damaged files that belong to none of the series found: a study of which nothing can be read.

    Attributes
    ----------
    uid : of their series, "" where they do not say.
    place : their folder.
    files : the files; none for a folder that may not be listed.
    unread : the system gave none of them, so that nothing is known to be damaged.
    """

    uid: str = field(repr=False)
    place: Path = field(repr=False)
    files: tuple[Path, ...] = field(repr=False)
    unread: bool = False

    def error(self) -> MedsegError:
        """Return the refusal of this study."""
        if self.unread:
            text = f"{len(self.files)} DICOM files may not be read" if self.files else "the folder may not be listed"
            return Refusal("UNREADABLE", text, passing=True).error()
        return refuse("UNREADABLE", f"{len(self.files)} damaged DICOM files belong to no series that can be read")


def is_uid(text: str) -> bool:
    """Tell whether a text may name a series."""
    return _UID.fullmatch(text) is not None


def examine(path: Path) -> Damage:
    """Look into a file that cannot be parsed for what it still tells."""
    try:
        tags, cut = told_by(path, WANTED)
    except OSError:
        return Damage(path, unread=True)
    uid = str(tags.get("SeriesInstanceUID") or "")
    kinds = {str(tags.get("SOPClassUID") or ""), str(tags.meta.get("MediaStorageSOPClassUID") or "")}
    name = known_class(kinds.pop()) if len(kinds) == 1 else ""
    object_only = bool(name) and "Image Storage" not in name
    return Damage(path, uid if is_uid(uid) else "", cut, object_only)


def judge(
    series: Sequence[SeriesFiles], damages: Iterable[Damage], locked: Iterable[Path]
) -> tuple[tuple[SeriesFiles, ...], tuple[Lost, ...]]:
    """Refuse every series that may have lost a slice to a damaged file; also return what belongs to none of them."""
    damages = [damage for damage in damages if not damage.object_only]
    known = {row.uid for row in series}
    unread = {damage.path for damage in damages if damage.unread}
    told = Counter(damage.series_uid for damage in damages)
    by_uid: dict[str, list[Path]] = defaultdict(list)
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for damage in damages:
        uid = damage.series_uid
        if uid and (uid in known or damage.certain or told[uid] > 1):
            by_uid[uid].append(damage.path)
        else:
            by_folder[damage.path.parent].append(damage.path)
    sick = _sick_files(series)
    judged = tuple(
        _doubt(row, len(by_uid[row.uid]) + sick[row.uid, row.headers[0].sop_class], by_folder, unread) for row in series
    )
    places = {file.parent for row in series for file in row.files}
    lost = [Lost(uid, files[0].parent, tuple(files)) for uid, files in by_uid.items() if files and uid not in known]
    alone = {folder: tuple(files) for folder, files in by_folder.items() if folder not in places}
    lost += [Lost("", folder, files, unread >= set(files)) for folder, files in alone.items()]
    return judged, (*lost, *(Lost("", folder, (), unread=True) for folder in locked))


def _sick_files(series: Sequence[SeriesFiles]) -> Counter[tuple[str, str]]:
    """Count the files of parts that something missing in their headers set apart, by series and kind of image."""
    count: Counter[tuple[str, str]] = Counter()
    for row in series:
        if row.refusal is not None and row.refusal.code in SICK:
            count[row.uid, row.headers[0].sop_class] += len(row.files)
    return count


def _doubt(row: SeriesFiles, own: int, by_folder: dict[Path, list[Path]], unread: Collection[Path]) -> SeriesFiles:
    if row.refusal is not None and row.refusal.code not in EXPLAINED:
        return row
    beside = [file for folder in {file.parent for file in row.files} for file in by_folder.get(folder, ())]
    passing = not own and all(file in unread for file in beside)
    if own:
        text = f"{own} of its files are damaged, beside {len(row.files)} that are not"
    elif beside:
        what = "files that may not be read" if passing else "damaged DICOM files"
        text = f"{len(beside)} {what} lie beside its {len(row.files)} slices, which may be incomplete"
    else:
        return row
    return replace(row, refusal=Refusal("UNREADABLE", text, passing))
