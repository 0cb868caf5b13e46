"""Many frames in one file (enhanced and legacy-converted CT, MR, PET): each as the classic image that it stands for.

DICOM keeps what belongs to one frame in functional groups (PS3.3 C.7.6.16): an item per frame, and one that all
frames share. `classic_frames` puts their values where a classic image has them, so that everything after the header
treats a frame as a slice; `frame_datasets` takes the pixels of chosen frames from a file that is read once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom import uid
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from medseg.readers.dicom_budget import check_budget
from medseg.readers.dicom_refusals import refuse

MULTIFRAME = (
    uid.EnhancedCTImageStorage,
    uid.EnhancedMRImageStorage,
    uid.EnhancedPETImageStorage,
    uid.LegacyConvertedEnhancedCTImageStorage,
    uid.LegacyConvertedEnhancedMRImageStorage,
    uid.LegacyConvertedEnhancedPETImageStorage,
)
PLAIN_MULTIFRAME = (
    uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
    uid.EnhancedMRColorImageStorage,
)
"""Others that carry the same groups (PS3.3 A.8, A.36); they are read where the groups are complete."""

GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
DIMENSIONS = "DimensionIndexSequence"

CLASSIC_NAMES: dict[str, tuple[str, ...]] = {
    "ImagePositionPatient": ("PlanePositionSequence/ImagePositionPatient",),
    "ImageOrientationPatient": ("PlaneOrientationSequence/ImageOrientationPatient",),
    "PixelSpacing": ("PixelMeasuresSequence/PixelSpacing",),
    "SliceThickness": ("PixelMeasuresSequence/SliceThickness",),
    "SpacingBetweenSlices": ("PixelMeasuresSequence/SpacingBetweenSlices",),
    "RescaleSlope": ("PixelValueTransformationSequence/RescaleSlope",),
    "RescaleIntercept": ("PixelValueTransformationSequence/RescaleIntercept",),
    "ImageType": (
        "MRImageFrameTypeSequence/FrameType",
        "CTImageFrameTypeSequence/FrameType",
        "PETFrameTypeSequence/FrameType",
    ),
    "ComplexImageComponent": ("MRImageFrameTypeSequence/ComplexImageComponent",),
    "StackID": ("FrameContentSequence/StackID",),
    "TemporalPositionIndex": ("FrameContentSequence/TemporalPositionIndex",),
    "AcquisitionNumber": ("FrameContentSequence/FrameAcquisitionNumber",),
    "AcquisitionTime": ("FrameContentSequence/FrameAcquisitionDateTime",),
    "ContentTime": ("FrameContentSequence/FrameReferenceDateTime",),
    "EchoTime": ("MREchoSequence/EffectiveEchoTime",),
    "InversionTime": ("MRModifierSequence/InversionTimes",),
    "FlipAngle": ("MRTimingAndRelatedParametersSequence/FlipAngle",),
    "DiffusionBValue": ("MRDiffusionSequence/DiffusionBValue",),
    "DiffusionGradientOrientation": (
        "MRDiffusionSequence/DiffusionGradientDirectionSequence/DiffusionGradientOrientation",
    ),
    "TriggerTime": ("CardiacSynchronizationSequence/NominalCardiacTriggerDelayTime",),
    "ConvolutionKernel": ("CTReconstructionSequence/ConvolutionKernel",),
}
"""Keyword of a classic image -> where its value stands in the functional groups."""
IN_PLACE = ("InStackPositionNumber", "ImagePositionPatient", "StackID")
"""Dimensions that count places: they do not tell images of one place apart."""


def may_have_frames(sop_class: str) -> bool:
    """Tell whether images of a class may hold frames with functional groups that are read as slices."""
    if sop_class in MULTIFRAME + PLAIN_MULTIFRAME:
        return True
    return str(UID(sop_class, validation_mode=pydicom.config.IGNORE).name) == sop_class  # private


def classic_frames(dataset: Dataset, keywords: Sequence[str]) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Yield each frame as a classic header, and the dimensions that may tell it apart from others of its place.

    What no group says is taken from the data set itself, but never the place of a frame.

    Parameters
    ----------
    keywords : which attributes of the data set a frame inherits; no sequences.

    Yields
    ------
    dict, dict
        Keyword -> value, for all that is there; name of a dimension -> its index.

    Raises
    ------
    ValueError : there are not as many items as frames; PARSE_ERRORS: what pydicom finds damaged.
    """
    items = dataset[GROUPS[1]].value
    if len(items) != int(dataset.NumberOfFrames):
        raise ValueError("the functional groups are not one per frame")
    common = {word: dataset[word].value for word in keywords if word in dataset and word != "ImagePositionPatient"}
    common |= _values(next(iter(dataset.get(GROUPS[0]) or ()), Dataset()))
    pointers = _pointers(dataset)
    for item in items:
        yield common | _values(item), _dimensions(item, pointers)


def _table() -> dict[BaseTag, list[tuple[tuple[BaseTag, ...], str]]]:
    """Return CLASSIC_NAMES by the tag of the group: the tags of the way from there to the value, and its keyword."""
    found: dict[BaseTag, list[tuple[tuple[BaseTag, ...], str]]] = {}
    for keyword, places in CLASSIC_NAMES.items():
        for place in places:
            group, *way = (Tag(word) for word in place.split("/"))
            found.setdefault(group, []).append((tuple(way), keyword))
    return found


BY_GROUP = _table()


def _values(groups: Dataset) -> dict[str, Any]:
    """Return what one item of functional groups says, by the keywords of a classic image."""
    found = {}
    for tag in groups.keys() & BY_GROUP.keys():
        rows: Sequence[Dataset] = groups[tag].value or []
        for way, keyword in BY_GROUP[tag] if rows else ():
            value = _value(rows[0], way)
            if value is not None:
                found[keyword] = value
    return found


def _value(groups: Dataset, way: Sequence[BaseTag]) -> Any:
    for tag in way[:-1]:
        if tag not in groups or not groups[tag].value:
            return None
        groups = groups[tag].value[0]
    return groups[way[-1]].value if way[-1] in groups else None


def _pointers(dataset: Dataset) -> list[str]:
    """Return the name of each dimension, "" for those that count places (PS3.3 C.7.6.17)."""
    names = []
    for item in dataset.get(DIMENSIONS) or ():
        pointer = item.get("DimensionIndexPointer")
        name = "" if pointer is None else keyword_for_tag(pointer) or str(Tag(pointer))
        names.append("" if name in IN_PLACE else f"dimension {name}" * bool(name))
    return names


def _dimensions(item: Dataset, pointers: Sequence[str]) -> dict[str, str]:
    content = next(iter(item.get("FrameContentSequence") or ()), Dataset())
    values = content.get("DimensionIndexValues")
    several = list(values) if isinstance(values, (list, pydicom.multival.MultiValue)) else [values]
    if len(several) != len(pointers):
        return {}
    return {name: str(value) for name, value in zip(pointers, several, strict=True) if name}


def frame_datasets(path: Path, frames: Sequence[int], *, size: int, count: int) -> Iterator[Dataset]:
    """Yield chosen frames of a file, each as a data set with the pixels of that frame alone.

    The file is opened once; uncompressed frames are read at their place, compressed ones are passed one by one, so
    that never more than one frame is in memory (deflated files are inflated as a whole).

    Parameters
    ----------
    frames : ascending, from 0.
    size, count : bytes of one frame, and number of frames, that the header declares.

    Raises
    ------
    EOFError : the file ends inside its pixels or has not enough of them; ReadError: LENGTH_MISMATCH, it has more
        than it declares; PARSE_ERRORS.
    """
    check_budget(path, size * count)
    with open(path, "rb") as handle:
        dataset = pydicom.dcmread(handle, stop_before_pixels=True, force=True)
        syntax = UID(dataset.file_meta.get("TransferSyntaxUID", "") or uid.ImplicitVRLittleEndian)
        if syntax == uid.DeflatedExplicitVRLittleEndian:
            handle.seek(0)
            whole = pydicom.dcmread(handle, force=True)
            if "PixelData" not in whole:
                raise EOFError("the file ends before its pixels")
            data = whole["PixelData"]
            _check_size(len(data.value), size, count)
            pieces: Iterator[bytes] = (data.value[frame * size : (frame + 1) * size] for frame in frames)
            vr = data.VR
        else:
            vr, length = _pixel_element(handle, dataset)
            if syntax.is_encapsulated:
                pieces = _compressed(handle, frames, count)
            else:
                _check_size(length, size, count)
                pieces = _plain(handle, handle.tell(), frames, size)
        if not syntax.is_encapsulated and not syntax.is_little_endian and vr == "OW" and dataset.BitsAllocated == 8:
            raise ValueError("bytes of a word are swapped across frames")
        for piece in pieces:
            dataset.NumberOfFrames = 1
            dataset["PixelData"] = DataElement(Tag("PixelData"), vr, piece)
            yield dataset


def _pixel_element(handle: BinaryIO, dataset: Dataset) -> tuple[str, int]:
    """Read the start of the pixel element, at which the file stands: its VR and length; then its value follows."""
    implicit, little = dataset.original_encoding
    order = "<" if little else ">"
    start = handle.read(8)
    if len(start) < 8:
        raise EOFError("the file ends before its pixels")
    group, element = struct.unpack(order + "HH", start[:4])
    if (group, element) != (0x7FE0, 0x0010):
        raise ValueError("the pixels are no whole numbers")
    if implicit:
        return "OW", int(struct.unpack(order + "L", start[4:])[0])
    more = handle.read(4)
    if len(more) < 4:
        raise EOFError("the file ends before its pixels")
    return start[4:6].decode("ascii", "replace"), int(struct.unpack(order + "L", more)[0])


def _check_size(length: int, size: int, count: int) -> None:
    """Compare the bytes that are there with those that the frames need."""
    if length < size * count:
        raise EOFError(f"there are {length} bytes of pixels where {count} frames need {size * count}")
    if length > size * count + 1:
        text = f"there are {length} bytes of pixels where {count} frames need {size * count}"
        raise refuse("LENGTH_MISMATCH", text)


def _plain(handle: BinaryIO, start: int, frames: Sequence[int], size: int) -> Iterator[bytes]:
    for frame in frames:
        handle.seek(start + frame * size)
        piece = handle.read(size)
        if len(piece) < size:
            raise EOFError("the file ends inside its pixels")
        yield piece


def _compressed(handle: BinaryIO, frames: Sequence[int], count: int) -> Iterator[bytes]:
    wanted = set(frames)
    for number, piece in enumerate(generate_frames(handle, number_of_frames=count)):
        if number in wanted:
            wanted.discard(number)
            yield encapsulate([piece])
        if not wanted:
            return
    raise EOFError("there are fewer compressed frames than declared")
