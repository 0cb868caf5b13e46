"""Say of the images of one SeriesInstanceUID what can be read on its own, by headers alone.

headers of one series UID -> frames of multi-frame files -> dicom_split -> check each part -> SeriesFiles
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydicom import uid

from medseg.errors import MedsegError
from medseg.readers.allowances import CORRECTABLE, Allowance
from medseg.readers.dicom_frames import MULTIFRAME, PLAIN_MULTIFRAME
from medseg.readers.dicom_geometry import series_grid
from medseg.readers.dicom_header import Header
from medseg.readers.dicom_refusals import Refusal, reason, refuse
from medseg.readers.dicom_split import Part, split

CLASSIC = (uid.CTImageStorage, uid.MRImageStorage, uid.PositronEmissionTomographyImageStorage)
PICTURES = (
    uid.SecondaryCaptureImageStorage,
    uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
    uid.EnhancedMRColorImageStorage,
)
"""Classes whose images may be colour pictures of CT, MR or PET that lie in the patient."""
MODALITIES = ("CT", "MR", "PT")
OWN_MANUFACTURER = "medseg"
"""Who stands as the maker in what medseg writes."""
LABELMAP_STORAGE = uid.UID("1.2.840.10008.5.1.4.1.1.66.7")
"""Label Map Segmentation Storage (2024), which pydicom 3.0 does not know by name."""
ONE_EACH = ("EchoNumbers", "DiffusionBValue", "ComplexImageComponent")
"""What no volume has two of: without repeated places these are remains of several, each of which lost slices."""
LABEL_STORAGE = (uid.SegmentationStorage, LABELMAP_STORAGE, uid.RTStructureSetStorage)


@dataclass(frozen=True)
class SeriesFiles:
    """One series, or one part of a series UID that holds several; readable unless `refusal` says why not.

    Attributes
    ----------
    uid, study_uid, patient_id : identity, for grouping in memory only: never print or store them.
    headers : one per slice: per file, or per frame of a multi-frame file; in the order found.
    part : "" or what set this part apart from others of the same series UID (MIXED_MATRIX, MIXED_SERIES, ...).
    refusal : why it cannot be read, as far as the headers show.
    lacks : at how many places it has no image where other parts of its series have one.
    """

    uid: str = field(repr=False)
    study_uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    modality: str
    headers: tuple[Header, ...] = field(repr=False)
    part: str = ""
    refusal: Refusal | None = None
    lacks: int = 0

    def refused(self, allow: Collection[Allowance] = ()) -> Refusal | None:
        """Return why it is not read where `allow` is allowed to be corrected; None where it may be tried."""
        if self.refusal is None or CORRECTABLE.get(self.refusal.code) not in allow:
            return self.refusal
        return Refusal("PART_INCOMPLETE", self.refusal.text) if self.lacks else None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, each once (exact duplicates included); other parts may use the same multi-frame file."""
        return tuple(dict.fromkeys(header.path for header in self.headers))

    @property
    def identity(self) -> tuple[str, ...]:
        """What tells this series, and this part of it, from all others, however files are called: do not print."""
        if not self.part:
            return self.uid, self.part
        uid, frame = min(header.key for header in self.headers)
        return self.uid, self.part, uid, str(frame)


def is_image(header: Header) -> bool:
    """Tell images from objects that refer to images (SEG, RTSTRUCT, SR, presentation states, raw data), and from ours.

    A page of pictures that medseg made lies in the study that it shows, and is no further image of the patient.
    """
    if header.meta.get("Manufacturer") == OWN_MANUFACTURER:
        return False
    private = header.class_name == "private" and header.rows > 0
    if not header.series_uid or header.sop_class == LABELMAP_STORAGE:
        return False
    return header.sop_class in CLASSIC + MULTIFRAME or "Image Storage" in header.class_name or private


def is_sized(header: Header) -> bool:
    """Tell whether an image declares rows and columns; where it does not, its header ends early."""
    return header.rows >= 1 and header.columns >= 1


def series_of(headers: Sequence[Header]) -> list[SeriesFiles]:
    """Split one series UID into what can be read on its own, and say of each part whether it can."""
    images = [frame for header in headers for frame in (header.expanded or [header])]
    return [_series(part) for part in split(images)]


def _series(part: Part) -> SeriesFiles:
    """Describe one part and check all that its headers show."""
    first = part.headers[0]
    refusal = None
    try:
        check_headers(part.headers)
        if part.why and len({header.key for header in part.headers}) == 1:
            raise refuse("SINGLE_SLICE", "there is one slice of this kind beside others of its series")
    except MedsegError as error:
        refusal = reason(error)
    # Before what may be corrected: images that are lacking at its ends leave no gap.
    if part.lacks and (refusal is None or refusal.code in CORRECTABLE):
        text = f"this part has no image at {part.lacks} of the places where others of its series have one"
        refusal = Refusal("MISSING_SLICES", text)
    uids = first.series_uid, first.study_uid, first.patient_id
    return SeriesFiles(*uids, first.modality, part.headers, part.why, refusal, part.lacks)


def check_headers(headers: Sequence[Header]) -> None:
    """Refuse a series that its headers show to be no volume; a file that is there twice counts once.

    Raises
    ------
    ReadError, GeometryError : with the code.
    """
    _check_kind(headers)
    patients = {header.patient_id for header in headers}
    if len(patients) > 1:  # StudyInstanceUID is not asked: anonymisers draw it anew for parts of one series
        raise refuse("MIXED_PATIENT", f"the {len(headers)} slices name {len(patients)} patients")
    for header in headers:
        if header.damaged:
            raise refuse("UNREADABLE", f"{header.damaged} of instance {header.instance} has no valid value")
        if not is_sized(header):
            raise refuse("TRUNCATED", f"instance {header.instance} declares no size: its header ends early")
    _check_values(headers)
    first_of: dict[tuple[str, int], Header] = {}
    for header in headers:
        other = first_of.setdefault(header.key, header)
        if (header.position, header.orientation) != (other.position, other.orientation):
            raise refuse("DUPLICATE_POSITION", f"instance {header.instance} is there twice, at different places")
    series_grid(list(first_of.values()))


def _check_values(headers: Sequence[Header]) -> None:
    """Refuse slices whose numbers do not mean the same, or do not say what they mean."""
    for word in ONE_EACH:
        values = {header.telling.get(word, "") for header in headers}
        if len(values) > 1:
            raise refuse("MIXED_SERIES", f"the slices have {len(values)} values of {word}; no volume has two")
    scales = {header.rescale for header in headers}
    if None in scales and len(scales) > 1:
        raise refuse("BAD_RESCALE", "some slices have slope and intercept, some have not")
    if any(scale is not None and scale[0] == 0 for scale in scales):
        raise refuse("BAD_RESCALE", "a slope is zero")
    if len({header.meta.get("Units") for header in headers}) > 1:
        raise refuse("BAD_RESCALE", "the slices are in different Units")


def _check_kind(headers: Sequence[Header]) -> None:
    """Refuse what is not a stack of plain grey images of CT, MR or PET."""
    first = headers[0]
    facts = {
        "LOCALIZER": (any("LOCALIZER" in header.image_type for header in headers), "planning images"),
        "COLOUR": (
            any(not _is_grey(header) and not _is_rgb(header) for header in headers),
            f"{first.samples} samples of {first.bits} bits ({first.photometric or 'of unknown kind'})",
        ),
        "ENHANCED_MULTIFRAME": (
            first.frame is None
            and not first.damaged
            and (first.sop_class in MULTIFRAME or any(header.frames != 1 for header in headers)),
            f"{first.class_name} with {first.frames} frames",
        ),
        "UNSUPPORTED_CLASS": (not _is_readable(first), f"{first.class_name} is not read as a volume"),
        "MOSAIC": (
            any("MOSAIC" in header.image_type and not header.across for header in headers),
            "each image holds many slices, and its private elements do not say where they lie",
        ),
        "MODALITY_LUT": (
            # CT and PET must have slope and intercept; a table gives no values below zero, so no HU (PS3.3 C.11.1)
            any(header.modality_lut and (header.modality != "MR" or header.rescale) for header in headers),
            "values go through a lookup table",
        ),
    }
    for code, (found, text) in facts.items():
        if found:
            raise refuse(code, text)


def _is_grey(header: Header) -> bool:
    return header.samples == 1 and header.photometric != "PALETTE COLOR"


def _is_rgb(header: Header) -> bool:
    return header.samples == 3 and header.bits == 8


def _is_readable(header: Header) -> bool:
    """Tell classes that hold the values of CT, MR or PET; of others only frames that say all about themselves."""
    if header.sop_class in CLASSIC + MULTIFRAME:
        return True
    if _is_rgb(header):
        return header.sop_class in PICTURES and header.modality in MODALITIES
    plain = header.sop_class in PLAIN_MULTIFRAME or header.class_name == "private"
    return plain and header.frame is not None and header.modality in MODALITIES
