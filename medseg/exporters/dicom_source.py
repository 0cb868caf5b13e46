"""What every DICOM object made from a series shares: the source headers in order, identifiers, dates, equipment.

An object is the same bytes whenever it is made from the same series by the same model: its UIDs are derived from
theirs, and its dates are those of the images, so that sending it twice changes nothing in an archive. When it was
really made stands in the journal of the run.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import generate_uid
from pydicom.valuerep import format_number_as_ds, validate_value

from medseg.errors import ExportError
from medseg.exporters.dicom_codes import label_segments
from medseg.exporters.dicom_frames import classic_headers, refer_to_frames
from medseg.exporters.result import Result
from medseg.files import write_atomically
from medseg.readers.dicom_geometry import Stack, faults, mean_directions, series_stack
from medseg.readers.dicom_header import Header, quiet
from medseg.readers.dicom_index import OWN_MANUFACTURER
from medseg.spec import Spec
from medseg.volume import grid_distance

RESEARCH = "RESEARCH USE"
MANUFACTURER = OWN_MANUFACTURER
SERIES_NUMBERS = {"SEG": 9001, "RTSTRUCT": 9002, "SR": 9003, "LABELMAP": 9004, "FRACTIONAL": 9005, "SC": 9006}
"""Kind of object -> number of its series: each kind is a series of its own."""
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
ON_GRID_MM = 0.05
"""How far the mask's grid may lie from that of the series: what the reader allows a slice to be off its place."""

_EMPTY = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber "
    "ReferringPhysicianName"
)
"""Demanded of every object, but may be empty (type 2): old archives leave them out altogether."""
_OF_STUDY = (
    "StudyInstanceUID StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName StudyDescription "
    "PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex"
)
_PATIENT_GROUP = 0x0010
_DATES = ("Content", "Acquisition", "Series", "Study")
_UNKNOWN_DATE = "19000101"
_OWN_DATES = (
    ("SeriesDate", "SeriesTime"),
    ("ContentDate", "ContentTime"),
    ("StructureSetDate", "StructureSetTime"),
    ("DateOfSecondaryCapture", "TimeOfSecondaryCapture"),
)
"""When an object was made, by its own account."""


def write_object(
    path: Path,
    result: Result,
    build: Callable[[Result, list[Dataset]], Dataset],
    check: Callable[..., None],
) -> tuple[str, ...]:
    """Build an object of a result, write it atomically, and let it count only after `check` has read it back.

    Parameters
    ----------
    build : (result, source headers in the order of the mask's K) -> the object.
    check : (file, name=, result=); raises ExportError(READ_BACK).

    Returns
    -------
    tuple of str
        Notes: PRIVATE_CODE where a label has no code in the spec.

    Raises
    ------
    ExportError : NEEDS_DICOM, NOT_ON_SOURCE_GRID, SOURCE_CHANGED, READ_BACK, or it cannot be written.
    """
    images = source_images(result)
    with silent():
        dataset = build(result, images)
        refer_to_frames(dataset, result.need_series().headers)
        finish(dataset, images[0])
    save(path, dataset, partial(check, name=path.name, result=result))
    return ("PRIVATE_CODE",) * any(segment.uncoded for segment in label_segments(result.spec))


def source_images(result: Result) -> list[Dataset]:
    """Return the headers of the series, without pixels, one per slice in the order of the mask's K.

    A frame of a multi-frame file is given as a classic header with a UID of its own (see dicom_frames).

    Attributes that DICOM demands but allows to be empty are added empty; a series without frame of reference gets
    one made from its UID. The files are not touched.

    Raises
    ------
    ExportError : NEEDS_DICOM; NOT_ON_SOURCE_GRID, the mask lies on another grid; SOURCE_CHANGED, a file of the
        series is no longer what was read.
    """
    series = result.need_series()
    headers = list({header.key: header for header in series.headers}.values())
    stack = series_stack(headers)
    if not _on_slices(result, stack):
        raise ExportError(
            f"the mask {result.mask.shape} does not lie on the {len(headers)} slices of its series: a DICOM object "
            "must; write NIfTI instead",
            code="NOT_ON_SOURCE_GRID",
        )
    directions = [format_number_as_ds(float(value)) for value in mean_directions(headers).ravel()]
    with quiet():
        images = _slices([headers[index] for index in stack.order])
        for image in images:
            # Slices that the reader took for parallel are made exactly so: highdicom refuses the least difference.
            image.ImageOrientationPatient = directions
            image.PixelSpacing = list(headers[0].spacing or ())
            # May be empty or left out, and highdicom asks for it: the slices stand for what lies between them.
            image.SliceThickness = image.get("SliceThickness") or format_number_as_ds(result.mask.spacing[2])
        return [_completed(image) for image in images]


def _slices(headers: Sequence[Header]) -> list[Dataset]:
    """Return what the files say of each slice: a file, or a frame as if it were one; each file is read once."""
    images: dict[tuple[str, int], Dataset] = {}
    for path in dict.fromkeys(header.path for header in headers):
        own = [header for header in headers if header.path == path]
        whole = pydicom.dcmread(path, stop_before_pixels=True)
        if str(whole.get("SOPInstanceUID", "")) != own[0].sop_uid:
            raise ExportError(
                f"instance {own[0].instance} of the series has no SOPInstanceUID or has changed since it was read; an "
                "object cannot refer to it",
                code="SOURCE_CHANGED",
            )
        rows = [whole] if own[0].frame is None else classic_headers(whole, own)
        images |= {header.key: row for header, row in zip(own, rows, strict=True)}
    return [images[header.key] for header in headers]


def _on_slices(result: Result, stack: Stack) -> bool:
    """Tell whether the mask lies on the slices: by one affine where they are even, tilted or not, else each by each."""
    shape = (*stack.size, len(stack.order))
    if result.mask.shape != shape:
        return False
    if result.stack is not None:
        return bool(np.abs(result.stack.planes - stack.planes).max() < ON_GRID_MM)
    even = faults(stack).keys() <= {"GANTRY_TILT"}
    return even and grid_distance(shape, stack.affine, result.mask.affine) <= ON_GRID_MM


def _completed(image: Dataset) -> Dataset:
    image.decode()
    image.SpecificCharacterSet = "ISO_IR 192"  # some of the older sets are unknown to highdicom
    for keyword in _EMPTY.split():
        if keyword not in image:
            setattr(image, keyword, None)
    for element in image:
        if (element.tag.group == _PATIENT_GROUP or element.keyword in _EMPTY.split()) and not _is_valid(element):
            element.value = None
    if not image.get("FrameOfReferenceUID"):
        image.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame of reference", str(image.SeriesInstanceUID)])
    return image


def _is_valid(element: DataElement) -> bool:
    """Tell whether a value fits its VR: an age of "0Y", say, must not go on into an object of ours."""
    values = element.value if isinstance(element.value, MultiValue) else [element.value]
    try:
        for value in values:
            if value is not None and element.VR != "SQ":
                validate_value(element.VR, value, pydicom.config.RAISE)
    except ValueError:
        return False
    return True


def derived_uid(result: Result, *words: str) -> str:
    """Return a UID that depends on the instances of the series, the model and `words`, and on nothing else."""
    series = result.need_series()
    images = {h.sop_uid if h.frame is None else f"{h.sop_uid} {h.frame}" for h in series.headers}
    content = hashlib.sha256("\n".join(sorted(images)).encode()).hexdigest()
    return str(generate_uid(entropy_srcs=[series.uid, content, result.model, *words]))


def identity(result: Result, kind: str) -> dict[str, Any]:
    """Return what names an object of one of the SERIES_NUMBERS, as highdicom's keywords."""
    return {
        "series_instance_uid": derived_uid(result, kind, "series"),
        "series_number": SERIES_NUMBERS[kind],
        "sop_instance_uid": derived_uid(result, kind, "instance"),
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
        "series_description": description(result.spec),
    }


def study_of(source: Dataset) -> dict[str, Any]:
    """Return patient and study of a source image, by which an archive files what was made of it."""
    return {word: source.get(word) for word in _OF_STUDY.split() if word in source}


def equipment(result: Result) -> dict[str, Any]:
    """Return what made an object, as highdicom's keywords."""
    return {
        "manufacturer_model_name": result.spec.name[:64],
        "software_versions": version("medseg"),
        "device_serial_number": result.model[:64],
    }


def tracking(result: Result, name: str) -> tuple[str, str]:
    """Return UID and text by which a label is the same thing in every object of a result."""
    return derived_uid(result, "SEG", "tracking", name), f"{result.spec.name} {name}"[:64]


def item(**values: Any) -> Dataset:
    """Return a dataset with these attributes, in whose names pydicom knows them."""
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def description(spec: Spec) -> str:
    """Return the text that a viewer shows for the series, at most 64 characters."""
    return f"{RESEARCH} medseg {spec.name}"[:64]


@contextmanager
def silent() -> Iterator[None]:
    """Silence highdicom and pydicom: what they say about a value quotes it, and it may name the patient."""
    logger = logging.getLogger("highdicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # its modules' loggers have no level of their own
    try:
        with quiet():
            yield
    finally:
        logger.setLevel(level)


def source_date(source: Dataset) -> tuple[str, str]:
    """Return date and time of the images; without any 1900-01-01, which nobody takes for real: some must be given."""
    kind = next((word for word in _DATES if source.get(f"{word}Date")), None)
    return str(source.get(f"{kind}Date", _UNKNOWN_DATE)), str(source.get(f"{kind}Time") or "000000")


def finish(dataset: Dataset, source: Dataset) -> None:
    """Replace the clock's dates by those of the images, and write all text as UTF-8."""
    for row in dataset.get("ContributingEquipmentSequence", ()):
        if "ContributionDateTime" in row:
            del row.ContributionDateTime
    for keyword in ("InstanceCreationDate", "InstanceCreationTime"):
        if keyword in dataset:
            delattr(dataset, keyword)
    date, time = source_date(source)
    for day, clock in _OWN_DATES:
        if day in dataset or day == "SeriesDate":
            setattr(dataset, day, date)
            setattr(dataset, clock, time)
    dataset.SpecificCharacterSet = "ISO_IR 192"


def save(path: Path, dataset: Dataset, check: Callable[[Path], None]) -> None:
    """Write an object atomically; `check` looks at what was written before it gets its name."""

    def write(dataset: Dataset, temporary: Path) -> None:
        with silent():
            dataset.save_as(temporary, enforce_file_format=True)
            check(temporary)

    write_atomically(path, partial(write, dataset))
