"""Split the images of one SeriesInstanceUID into what can be read on its own, by headers alone.

headers of one series UID -> parts of one grid -> parts of one time point -> SeriesFiles
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom import uid

from medseg.errors import MedsegError
from medseg.readers.dicom_geometry import repeats, same_orientation, same_spacing, series_grid
from medseg.readers.dicom_header import TELLING, Header
from medseg.readers.dicom_refusals import Refusal, reason, refuse

CLASSIC = (uid.CTImageStorage, uid.MRImageStorage, uid.PositronEmissionTomographyImageStorage)
MULTIFRAME = (
    uid.EnhancedCTImageStorage,
    uid.EnhancedMRImageStorage,
    uid.EnhancedPETImageStorage,
    uid.LegacyConvertedEnhancedCTImageStorage,
    uid.LegacyConvertedEnhancedMRImageStorage,
    uid.LegacyConvertedEnhancedPETImageStorage,
)


LABELMAP_STORAGE = uid.UID("1.2.840.10008.5.1.4.1.1.66.7")
"""Label Map Segmentation Storage (2024), which pydicom 3.0 does not know by name."""


@dataclass(frozen=True)
class SeriesFiles:
    """One series, or one part of a series UID that holds several; readable unless `refusal` says why not.

    Attributes
    ----------
    uid, study_uid, patient_id : identity, for grouping in memory only: never print or store them.
    headers : one per file, in the order found.
    part : "" or what set this part apart from others of the same series UID (MIXED_MATRIX, MIXED_SERIES, ...).
    refusal : why it cannot be read, as far as the headers show.
    """

    uid: str = field(repr=False)
    study_uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    modality: str
    headers: tuple[Header, ...] = field(repr=False)
    part: str = ""
    refusal: Refusal | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, one per slice (exact duplicates included)."""
        return tuple(header.path for header in self.headers)


def is_image(header: Header) -> bool:
    """Tell images from objects that refer to images (SEG, RTSTRUCT, SR, presentation states, raw data)."""
    private = header.class_name == "private" and header.rows > 0
    if not header.series_uid or header.sop_class == LABELMAP_STORAGE:
        return False
    return header.sop_class in CLASSIC + MULTIFRAME or "Image Storage" in header.class_name or private


def series_of(headers: Sequence[Header]) -> list[SeriesFiles]:
    """Split one series UID into what can be read on its own, and say of each part whether it can."""
    grids = _split_by_grid(headers)
    if len(grids) > 1 and all(len(part) == 1 for _, part in grids):
        grids = [("", list(headers))]
    parts = []
    for why, part in grids:
        times = _split_by_repeats(part)
        parts += [_series(piece, "MIXED_SERIES" if len(times) > 1 else why) for piece in times]
    return parts


SPLITS: dict[str, Callable[[Header, Header], bool]] = {
    "LOCALIZER": lambda one, other: ("LOCALIZER" in one.image_type) == ("LOCALIZER" in other.image_type),
    "UNSUPPORTED_CLASS": lambda one, other: one.sop_class == other.sop_class and one.samples == other.samples,
    "MIXED_MATRIX": lambda one, other: (one.rows, one.columns) == (other.rows, other.columns),
    "MIXED_ORIENTATION": same_orientation,
    "MIXED_SPACING": same_spacing,
}
"""What must be the same inside one part, in the order in which it is asked."""


def _split_by_grid(headers: Sequence[Header]) -> list[tuple[str, list[Header]]]:
    """Sort headers into parts of one kind and one grid; each with what set it apart from the largest."""
    parts: list[list[Header]] = []
    for header in headers:
        for part in parts:
            if all(same(part[0], header) for same in SPLITS.values()):
                part.append(header)
                break
        else:
            parts.append([header])
    main = max(parts, key=len)
    reasons = {
        id(part): next(word for word, same in SPLITS.items() if not same(main[0], part[0]))
        for part in parts
        if part is not main
    }
    whole = next((reasons[id(part)] for part in parts if part is not main and reasons[id(part)] != "LOCALIZER"), "")
    return [(reasons.get(id(part), whole), part) for part in parts]


def _split_by_repeats(headers: list[Header]) -> list[list[Header]]:
    """Split images of the same places (time points, echoes) by the attribute that separates them cleanly, if any.

    Clean: as many parts as images at the fullest place, at least two slices in each, no place twice in a part.
    """
    once = list({header.sop_uid: header for header in headers}.values())
    if len(once) < 4 or any(header.position is None or header.orientation is None for header in once):
        return [headers]
    places = repeats(once)
    most = int(np.bincount(places).max())
    place_of = {header.sop_uid: int(place) for header, place in zip(once, places, strict=True)}
    for word in TELLING if most > 1 else ():
        parts: dict[str, list[Header]] = {}
        for header in headers:
            parts.setdefault(header.telling.get(word, ""), []).append(header)
        if len(parts) == most and all(_each_place_once(part, place_of) for part in parts.values()):
            return list(parts.values())
    return [headers]


def _each_place_once(headers: Sequence[Header], place_of: dict[str, int]) -> bool:
    uids = {header.sop_uid for header in headers}
    return len(uids) >= 2 and len({place_of[uid] for uid in uids}) == len(uids)


def _series(headers: Sequence[Header], part: str) -> SeriesFiles:
    """Describe one part and check all that its headers show."""
    first = headers[0]
    refusal = None
    try:
        check_headers(headers)
    except MedsegError as error:
        refusal = reason(error)
    return SeriesFiles(
        first.series_uid, first.study_uid, first.patient_id, first.modality, tuple(headers), part, refusal
    )


def check_headers(headers: Sequence[Header]) -> None:
    """Refuse a series that its headers show to be no volume; a file that is there twice counts once.

    Raises
    ------
    ReadError, GeometryError : with the code.
    """
    _check_kind(headers)
    for header in headers:
        if header.damaged:
            raise refuse("UNREADABLE", f"{header.damaged} of instance {header.instance} has no valid value")
        if header.rows < 1 or header.columns < 1:
            raise refuse("TRUNCATED", f"instance {header.instance} declares no size: its header ends early")
    scales = {header.rescale for header in headers}
    if None in scales and len(scales) > 1:
        raise refuse("BAD_RESCALE", "some slices have slope and intercept, some have not")
    if any(scale is not None and scale[0] == 0 for scale in scales):
        raise refuse("BAD_RESCALE", "a slope is zero")
    first_of: dict[str, Header] = {}
    for header in headers:
        other = first_of.setdefault(header.sop_uid, header)
        if (header.position, header.orientation) != (other.position, other.orientation):
            raise refuse("DUPLICATE_POSITION", f"instance {header.instance} is there twice, at different places")
    series_grid(list(first_of.values()))


def _check_kind(headers: Sequence[Header]) -> None:
    """Refuse what is not a stack of plain grey images of CT, MR or PET."""
    first = headers[0]
    facts = {
        "LOCALIZER": (any("LOCALIZER" in header.image_type for header in headers), "planning images"),
        "COLOUR": (any(header.samples != 1 for header in headers), f"{first.samples} samples per pixel"),
        "ENHANCED_MULTIFRAME": (
            first.sop_class in MULTIFRAME or any(header.frames != 1 for header in headers),
            f"{first.class_name} with {first.frames} frames",
        ),
        "UNSUPPORTED_CLASS": (first.sop_class not in CLASSIC, f"{first.class_name} is not read as a volume"),
        "MOSAIC": (any("MOSAIC" in header.image_type for header in headers), "each image holds many slices"),
        "MODALITY_LUT": (any(header.modality_lut for header in headers), "values go through a lookup table"),
    }
    for code, (found, text) in facts.items():
        if found:
            raise refuse(code, text)
