"""The header of one DICOM file as plain values, without its pixels; nothing here decides whether it is usable."""

from __future__ import annotations

import logging
import math
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import UID

from medseg.errors import ReadError
from medseg.readers.dicom_budget import open_dataset
from medseg.readers.dicom_frames import DIMENSIONS, GROUPS, classic_frames, may_have_frames
from medseg.readers.dicom_mosaic import mosaic_of
from medseg.readers.dicom_tags import CHUNKS, read_tags, wanted_tags
from medseg.readers.series_rules import WORDS

PARSE_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,  # RecursionError of nested sequences (pydicom#2330) and NotImplementedError are among these
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    BytesLengthException,
    InvalidDicomError,
)
"""What pydicom raises on damaged files; everything else is a fault of ours and must be seen."""

TELLING = (
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "AcquisitionNumber",
    "EchoNumbers",
    "EchoTime",
    "DiffusionBValue",
    "DiffusionGradientOrientation",
    "InversionTime",
    "FlipAngle",
    "TriggerTime",
    "FrameReferenceTime",
    "ConvolutionKernel",
    "ComplexImageComponent",
    "ImageType",
    "AcquisitionTime",
    "ContentTime",
)
"""Attributes that tell images of the same place apart, in the order in which they are asked (PS3.3 C.7.6, C.8)."""

KEYWORDS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "FrameOfReferenceUID"),
    *("Modality", "Manufacturer", "Units", "ImageType", "InstanceNumber", "ModalityLUTSequence"),
    *("RescaleSlope", "RescaleIntercept"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated"),
    *("PixelSpacing", "ImagerPixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "StackID"),
    *("PhotometricInterpretation", "SpacingBetweenSlices", "SliceThickness"),
)
INHERITED = tuple(dict.fromkeys([*KEYWORDS, *TELLING, *WORDS]))
"""What a frame has from its file where its functional groups do not say it."""
TAGS: list[Any] = [*INHERITED, *GROUPS, DIMENSIONS]
WANTED = wanted_tags(INHERITED)


@dataclass(frozen=True)
class Header:
    """What is asked of one file, or of one frame of a file.

    Attributes
    ----------
    frame : which frame of its file, or tile of a mosaic, this is, from 0; None for a whole file.
    across : how many tiles a row of its mosaic has; 0 for what is no tile.
    stack : the name of the stack that a frame says it belongs to, else "".
    expanded : the frames of a multi-frame file whose functional groups could be read.
    orientation : direction cosines of a row and a column, LPS, six numbers; None when absent or not six.
    position : centre of the first pixel, mm in LPS; None when absent.
    thickness : SpacingBetweenSlices, or SliceThickness, in mm; asked only where there is a single slice.
    spacing : distance between rows, then between columns, in mm; None when absent.
    rescale : slope and intercept; None when both are absent.
    telling : attributes that may tell repeated images of one place apart, as text.
    described : the values of series_rules.WORDS as text, "" when absent; only to choose series by, never to be shown.
    damaged : the attribute whose value is no number, else "".
    """

    path: Path = field(repr=False)
    sop_class: str
    sop_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    study_uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    modality: str
    meta: dict[str, str]
    image_type: tuple[str, ...]
    instance: str
    rows: int
    columns: int
    frames: int
    samples: int
    bits: int
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    imager_spacing: bool
    modality_lut: bool
    rescale: tuple[float, float] | None
    frame_of_reference: str = field(repr=False)
    telling: dict[str, str] = field(repr=False)
    described: tuple[str, ...] = field(default=("",) * len(WORDS), repr=False)
    damaged: str = ""
    photometric: str = ""
    thickness: float | None = None
    frame: int | None = None
    across: int = 0
    stack: str = field(default="", repr=False)
    expanded: tuple[Header, ...] = field(default=(), repr=False)

    @property
    def key(self) -> tuple[str, int]:
        """What makes an image the same wherever it lies: its SOP instance and its frame (-1 for the whole)."""
        return self.sop_uid, -1 if self.frame is None else self.frame

    @property
    def class_name(self) -> str:
        """The standard's name of the kind of object, "private" when it has none."""
        return known_class(self.sop_class) or "private"


DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
APPLE_DOUBLE = b"\x00\x05\x16\x07"
"""Begins the file ``._NAME`` that macOS writes beside each NAME on foreign disks."""


@cache
def known_class(sop_class: str) -> str:
    """Return the standard's name of a storage class, "" when it has none (private or damaged)."""
    name = str(UID(sop_class, validation_mode=pydicom.config.IGNORE).name)
    return "" if name == sop_class else name


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom's warnings and log: they quote header values and paths, which may identify a patient."""
    # by level, not by `disabled`: that of its decoders' own loggers follows
    logger = logging.getLogger("pydicom")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def read_header(path: Path) -> Header | None:
    """Read one file's header.

    A file is DICOM when "DICM" stands after the preamble, or when it starts with group 2 or 8 as a bare data set does
    and turns out to belong to a series. One that is called .dcm and is neither, or is empty
    and called as scanners call slices, is damaged: a slice may be lost.

    Returns
    -------
    Header or None
        None when the file is not DICOM. `series_uid` is empty for objects outside any series (DICOMDIR).

    Raises
    ------
    PARSE_ERRORS : it is DICOM but damaged; call inside `quiet`.
    """
    with open(path, "rb", buffering=0) as handle:
        head = handle.read(CHUNKS[0])
        tags = read_tags(handle, head, WANTED) if head[128:132] == b"DICM" else None
    marked = head[128:132] == b"DICM"
    bare = head[:2] in (b"\x02\x00", b"\x08\x00") and len(head) >= 132 and head[3] == 0
    if head.startswith(APPLE_DOUBLE) and path.name.startswith("._"):
        return None
    if not head and _is_slice_name(path.name):
        raise InvalidDicomError("it is empty and has the name of a slice")
    if path.suffix.lower() in DICOM_SUFFIXES and not marked and not bare:
        raise InvalidDicomError("it is called DICOM and holds something else")
    if not marked and not bare:
        return None
    # Both answer `get`, `in` and `file_meta`; functional groups are for pydicom.
    dataset: Any = None if tags is None or may_have_frames(str(tags.get("SOPClassUID"))) else tags
    if dataset is None:
        try:
            dataset = open_dataset(path, stop_before_pixels=True, specific_tags=TAGS)
        except ReadError as error:
            raise MemoryError("it needs more memory than any image") from error
    sop_class = _class_of(dataset)
    belongs = bool(dataset.get("SeriesInstanceUID")) and bool(sop_class)
    if marked and not belongs and "Image Storage" in (known_class(sop_class) or "Image Storage"):
        raise EOFError("the header ends before it says which series the image belongs to")
    return _with_frames(dataset, path, sop_class) if marked or belongs else None


def _with_frames(dataset: Dataset, path: Path, sop_class: str) -> Header:
    """Return the header of a file, and in it those of its frames or tiles where it has any."""
    header = header_of(dataset, path, sop_class)
    if "MOSAIC" in header.image_type:
        return replace(header, expanded=_tiles(header))
    if not may_have_frames(sop_class) or not dataset.get(GROUPS[1]):
        return header
    try:
        frames = list(classic_frames(dataset, INHERITED))
    except PARSE_ERRORS:
        return replace(header, damaged=header.damaged or GROUPS[1])
    return replace(header, expanded=tuple(_frame(header, number, *frame, path) for number, frame in enumerate(frames)))


def _tiles(header: Header) -> tuple[Header, ...]:
    """Return the slices of a mosaic; none where its private elements do not say where they lie."""
    try:
        mosaic = mosaic_of(pydicom.dcmread(header.path, stop_before_pixels=True, force=True))
    except PARSE_ERRORS:
        return ()
    return tuple(
        replace(
            header,
            frame=number,
            across=mosaic.across,
            rows=mosaic.rows,
            columns=mosaic.columns,
            position=position,
            instance=f"{header.instance}, tile {number + 1}",
            telling=header.telling | {"SOPInstanceUID": header.sop_uid},
        )
        for number, position in enumerate(mosaic.positions)
    )


def _frame(header: Header, number: int, dataset: Any, dimensions: dict[str, str], path: Path) -> Header:
    found = header_of(dataset, path, header.sop_class)
    # The file of a frame tells time points apart where a scanner writes one file each and counts none of them.
    telling = found.telling | dimensions | {"SOPInstanceUID": header.sop_uid}
    return replace(found, frame=number, instance=f"{found.instance}, frame {number + 1}", telling=telling)


def may_be_slice(name: str) -> bool:
    """Tell whether a file of this name, which cannot be opened, may have been a slice."""
    return Path(name).suffix.lower() in DICOM_SUFFIXES or _is_slice_name(name)


def _is_slice_name(name: str) -> bool:
    """Tell names as scanners give them where they use no suffix: IM0009, 9, 1.2.840.9; not DONE or notes1.txt."""
    return re.fullmatch(r"[A-Za-z_-]*\d[\w-]*(\.\d+)*", name) is not None


def _class_of(dataset: Dataset) -> str:
    """Return the storage class, which stands in the file meta information and in the data set.

    Raises
    ------
    ValueError : both name a class of the standard, but not the same.
    """
    stated = (dataset.get("SOPClassUID"), dataset.file_meta.get("MediaStorageSOPClassUID"))
    classes = [str(value) for value in stated if value]
    known = {value for value in classes if known_class(value)}
    if len(known) > 1:
        raise ValueError("the file meta information and the data set name different classes")
    return known.pop() if known else "".join(classes[:1])


def header_of(dataset: Dataset, path: Path, sop_class: str) -> Header:
    """Take the plain values out of a data set."""
    damaged: list[str] = []

    def numbers(keyword: str, count: int) -> tuple[float, ...] | None:
        try:
            values = dataset.get(keyword)
            if values is None or values == "":
                return None
            texts = values if count > 1 else [values]
            # Python reads "0_9" as nine.
            floats = () if "_" in "".join(map(str, texts)) else tuple(map(float, texts))
        except PARSE_ERRORS:
            floats = ()
        if len(floats) != count or not all(math.isfinite(value) for value in floats):
            damaged.append(keyword)
            return None
        return floats

    def whole(keyword: str, default: int) -> int:
        value = numbers(keyword, 1)
        return default if value is None else int(value[0])

    def rescale() -> tuple[float, float] | None:
        slope, intercept = numbers("RescaleSlope", 1), numbers("RescaleIntercept", 1)
        if slope is not None and intercept is not None:
            return slope[0], intercept[0]
        if slope is not None or intercept is not None:
            damaged.append("RescaleSlope without RescaleIntercept (or the other way round)")
        return None

    return Header(
        path=path,
        sop_class=sop_class,
        sop_uid=_text(dataset, "SOPInstanceUID") or str(path),  # without one, no file is another's duplicate
        series_uid=_text(dataset, "SeriesInstanceUID"),
        study_uid=_text(dataset, "StudyInstanceUID"),
        patient_id=_text(dataset, "PatientID"),
        modality=_text(dataset, "Modality"),
        meta={word: _text(dataset, word) for word in ("Modality", "Manufacturer", "Units") if _text(dataset, word)},
        image_type=tuple(word.strip().upper() for word in _text(dataset, "ImageType").split("\\")),
        instance=_text(dataset, "InstanceNumber") or "without number",
        rows=whole("Rows", 0),
        columns=whole("Columns", 0),
        frames=whole("NumberOfFrames", 1),
        samples=whole("SamplesPerPixel", 1),
        bits=whole("BitsAllocated", 16),
        orientation=numbers("ImageOrientationPatient", 6),
        position=numbers("ImagePositionPatient", 3),
        spacing=numbers("PixelSpacing", 2),
        imager_spacing="ImagerPixelSpacing" in dataset,
        modality_lut="ModalityLUTSequence" in dataset,
        rescale=rescale(),
        frame_of_reference=_text(dataset, "FrameOfReferenceUID"),
        telling={word: _text(dataset, word) for word in TELLING if word in dataset},
        described=tuple(sys.intern(_text(dataset, word)) for word in WORDS),  # the same text in a thousand slices
        damaged=", ".join(damaged),
        photometric=_text(dataset, "PhotometricInterpretation").upper(),
        thickness=_thickness(dataset),
        stack=_text(dataset, "StackID"),
    )


def _thickness(dataset: Dataset) -> float | None:
    """Return the first positive one of two attributes; no volume needs them, so a wrong one is as good as none."""
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        try:
            value = abs(float(dataset.get(keyword) or 0))  # Philips writes negative distances
        except PARSE_ERRORS:
            continue
        if 0 < value < math.inf:
            return value
    return None


def _text(dataset: Dataset, keyword: str) -> str:
    """Return a value as text, several joined by a backslash as in the file, "" when absent or damaged."""
    try:
        value = dataset.get(keyword)
        if value is None or type(value) is str:  # nearly all are; the next question is a slow one
            return (value or "").strip()
        several = isinstance(value, (list, pydicom.multival.MultiValue))
        return "\\".join(map(str, value)) if several else str(value).strip()
    except PARSE_ERRORS:
        return ""
