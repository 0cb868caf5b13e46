"""Frames of multi-frame sources and tiles of mosaics: each as the classic image that it stands for, and back.

What is built of a series refers to its slices. Where a slice is a frame, it gets a UID of its own while an object is
built, as if it were a file; then each reference is made one to the file, with the number of the frame where DICOM
asks for it (PS3.3 section 10.3 and C.7.6.16.2.6) and without it where the whole instance is meant. A tile of a mosaic
is a part of a classic image: DICOM has no words for it, so the reference is to the image, whose pixels lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import (
    CTImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds

from medseg.readers.dicom_frames import DIMENSIONS, GROUPS, classic_frames
from medseg.readers.dicom_header import Header

CLASSIC = {"CT": CTImageStorage, "MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage}
OF_FRAMES = ("SourceImageSequence", "ContourImageSequence")
"""References that name a frame, where they name one image."""
_OF_MANY = (*GROUPS, DIMENSIONS, "DimensionOrganizationSequence", "NumberOfFrames")


def classic_headers(whole: Dataset, headers: Sequence[Header]) -> list[Dataset]:
    """Return frames (or tiles) of a file as classic headers, in the order of `headers`, which are all of that file."""
    if not whole.get(GROUPS[1]):
        return [_classic(whole, whole, header) for header in headers]
    frames = [frame for frame, _ in classic_frames(whole, ())]
    return [_classic(whole, frames[header.frame or 0], header) for header in headers]


def _classic(whole: Dataset, frame: Dataset | Mapping[str, Any], header: Header) -> Dataset:
    image = Dataset()
    # Copies: to set an attribute of one frame must not set that of the others.
    image.update({element.tag: deepcopy(element) for element in whole if element.keyword not in _OF_MANY})
    image.file_meta = whole.file_meta
    image.SOPClassUID = CLASSIC.get(header.modality, MRImageStorage)
    image.SOPInstanceUID = frame_uid(header)
    image.ImagePositionPatient = [format_number_as_ds(value) for value in header.position or ()]
    image.Rows, image.Columns = header.rows, header.columns
    image.SliceThickness = frame.get("SliceThickness")
    return image


def frame_uid(header: Header) -> str:
    """Return the UID by which a frame is known while an object is built; it is in no file."""
    return str(generate_uid(entropy_srcs=["frame", header.sop_uid, str(header.frame)]))


def refer_to_frames(dataset: Dataset, headers: Sequence[Header]) -> None:
    """Make every reference to a frame's own UID one to its file, and frame where one is meant."""
    known = {frame_uid(header): header for header in headers if header.frame is not None}
    if known:
        _refer(dataset, known)


def _refer(dataset: Dataset, known: Mapping[str, Header]) -> None:
    for element in dataset:
        if element.VR != "SQ":
            continue
        one = len(element.value) == 1 and element.keyword in OF_FRAMES
        kept, seen = [], set()
        for row in element.value:
            header = known.get(str(row.get("ReferencedSOPInstanceUID", "")))
            if header is None:
                _refer(row, known)
            else:
                _refer_one(row, header, to_frame=one)
                if header.sop_uid in seen:
                    continue
                seen.add(header.sop_uid)
            kept.append(row)
        if len(kept) != len(element.value):
            element.value = kept


def _refer_one(row: Dataset, header: Header, *, to_frame: bool) -> None:
    row.ReferencedSOPClassUID, row.ReferencedSOPInstanceUID = header.sop_class, header.sop_uid
    if header.sop_class in CLASSIC.values():
        if "SpatialLocationsPreserved" in row:
            row.SpatialLocationsPreserved = "NO"
    elif to_frame:
        row.ReferencedFrameNumber = (header.frame or 0) + 1
