"""Which object a DICOM file holds, and whether two files hold the same one: for what archives send and store."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom.dataset import Dataset

from medseg.errors import ReadError
from medseg.readers.dicom_header import PARSE_ERRORS, known_class, quiet
from medseg.readers.dicom_index import LABELMAP_STORAGE, OWN_MANUFACTURER

_TAGS: list[Any] = [
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Manufacturer", "Modality"),
]
_FILED_BY = (
    "SpecificCharacterSet TimezoneOffsetFromUTC InstanceCreatorUID InstanceCreationDate InstanceCreationTime "
    "PatientName PatientID IssuerOfPatientID IssuerOfPatientIDQualifiersSequence OtherPatientIDsSequence "
    "PatientBirthDate PatientBirthTime PatientSex PatientAge PatientSize PatientWeight PatientComments EthnicGroup "
    "AccessionNumber IssuerOfAccessionNumberSequence StudyDate StudyTime StudyID StudyDescription "
    "ReferringPhysicianName ProcedureCodeSequence InstitutionName InstitutionAddress RequestAttributesSequence "
    "ReferencedStudySequence RetrieveAETitle InstanceAvailability DigitalSignaturesSequence"
)
"""What archives may correct to their own records when they store an object (PS3.4 section B.4.1.3, coercion)."""


@dataclass(frozen=True)
class Identity:
    """The identifiers of one object; they identify a patient: never print or store them."""

    study: str = field(repr=False)
    series: str = field(repr=False)
    instance: str = field(repr=False)
    sop_class: str
    modality: str
    manufacturer: str = field(repr=False)
    syntax: str

    @property
    def is_image(self) -> bool:
        """Whether it is an image (or of a private class), not a result, report or state that refers to images."""
        if self.sop_class == LABELMAP_STORAGE:
            return False
        name = known_class(self.sop_class)
        return not name or "Image Storage" in name

    @property
    def is_ours(self) -> bool:
        """Whether medseg made it: such an image (a page of pictures) must not be segmented again."""
        return self.manufacturer == OWN_MANUFACTURER


def identify(source: Path | BinaryIO) -> Identity:
    """Read the identifiers of a DICOM file.

    Raises
    ------
    ReadError : UNREADABLE, it is no DICOM file or lacks an identifier.
    """
    try:
        with quiet():
            dataset = pydicom.dcmread(source, stop_before_pixels=True, specific_tags=_TAGS)
            words = [str(dataset.get(keyword) or "").strip() for keyword in _UIDS]
            syntax = str(dataset.file_meta.get("TransferSyntaxUID") or "")
            modality, maker = str(dataset.get("Modality") or ""), str(dataset.get("Manufacturer") or "")
    except PARSE_ERRORS as error:
        # pydicom's own text may quote the header
        raise ReadError(f"this is no DICOM file, or a damaged one ({type(error).__name__})") from None
    if not all(words):
        raise ReadError(f"a DICOM object without {_UIDS[words.index('')]} cannot be filed")
    return Identity(words[0], words[1], words[2], words[3], modality, maker, syntax)


_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")


def difference(sent: Path, found: Path) -> str:
    """Return what of an object an archive changed, "" where nothing of its own is different.

    Everything that was sent must be in `found` with the same value, pixels byte for byte; an archive may add
    attributes, and correct those by which it files patients and studies.

    Raises
    ------
    ReadError : UNREADABLE, a file cannot be parsed.
    """
    try:
        with quiet():
            ours, theirs = pydicom.dcmread(sent), pydicom.dcmread(found)
            syntaxes = {str(dataset.file_meta.get("TransferSyntaxUID")) for dataset in (ours, theirs)}
            names = [element.keyword or str(element.tag) for element in ours if not _equal(element, theirs)]
    except PARSE_ERRORS as error:
        raise ReadError(f"an object cannot be compared ({type(error).__name__})") from None
    return ", ".join(["transfer syntax"] * (len(syntaxes) > 1) + names)


def _equal(element: Any, other: Dataset) -> bool:
    if element.keyword in _FILED_BY.split() or element.tag.element == 0:
        return True
    return element.tag in other and bool(other[element.tag].value == element.value)
