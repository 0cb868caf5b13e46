"""Results as DICOM Segmentation objects: BINARY, LABELMAP or FRACTIONAL, read back before they count.

One segment a label of the spec, in its order, empty ones included; one frame a slice of the source (and segment, but
in a LABELMAP), empty ones included, because viewers misplace frames where some are left out (OHIF/Viewers#2833).
All are uncompressed: DCMTK, and what is built on it, refuses a compressed LABELMAP.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from medseg.errors import ExportError
from medseg.exporters.dicom_codes import Segment, label_segments, soft_segments
from medseg.exporters.dicom_seg_check import check_fractional, check_labels
from medseg.exporters.dicom_source import (
    MANUFACTURER,
    RESEARCH,
    derived_uid,
    equipment,
    identity,
    tracking,
    write_object,
)
from medseg.exporters.result import Result

MAX_PIXEL_BYTES = 2**32 - 2
"""The longest value that an uncompressed element can have (PS3.5 section 7.1)."""


def write_seg(path: Path, result: Result) -> tuple[str, ...]:
    """Write a label map as a BINARY Segmentation on the grid of its source series.

    Returns
    -------
    tuple of str
        Notes: PRIVATE_CODE where a label has no code in the spec.

    Raises
    ------
    ExportError : NEEDS_DICOM, NOT_ON_SOURCE_GRID, SOURCE_CHANGED, UNKNOWN_LABEL (a value that the spec does not
        name), OBJECT_TOO_LARGE, READ_BACK (what was written differs in a voxel or a place), or it cannot be written.
    """
    return write_object(path, result, partial(build_seg, kind="SEG"), check_labels)


def write_labelmap(path: Path, result: Result) -> tuple[str, ...]:
    """Write a label map as a LABELMAP Segmentation (supplement 243, 2024): one frame a slice, a number a label.

    Returns and raises what write_seg does.
    """
    return write_object(path, result, partial(build_seg, kind="LABELMAP"), check_labels)


def write_fractional(path: Path, result: Result) -> tuple[str, ...]:
    """Write the probabilities of a result as a FRACTIONAL Segmentation in steps of 1/255.

    A segment is what the network gives a probability: a label, or a region where the spec has regions.

    Returns and raises what write_seg does.
    """
    return write_object(path, result, partial(build_seg, kind="FRACTIONAL"), check_fractional)


def seg_uid(result: Result) -> str:
    """Return the SOP instance UID of the BINARY Segmentation of a result, written or not."""
    return str(identity(result, "SEG")["sop_instance_uid"])


def build_seg(result: Result, images: list[Dataset], *, kind: str = "SEG") -> Dataset:
    """Return the object in memory; `images` are the source headers in the order of the mask's K.

    Takes one to two bytes a voxel for a label map, six bytes a voxel and segment for probabilities.
    """
    segments = soft_segments(result.spec) if kind == "FRACTIONAL" else label_segments(result.spec)
    _refuse_too_large(result, kind, len(segments))
    dataset: Dataset = highdicom.seg.Segmentation(
        images,
        probability_frames(result) if kind == "FRACTIONAL" else segment_numbers(result),
        "BINARY" if kind == "SEG" else kind,
        [_description(result, segment) for segment in segments],
        content_label=RESEARCH.replace(" ", "_"),
        content_description=f"{RESEARCH} ONLY, not reviewed by a person",
        content_creator_name=f"{MANUFACTURER}^",
        omit_empty_frames=False,
        **identity(result, kind),
        **equipment(result),
    )
    # Its own default is a random UID, which would make every writing another file.
    dimensions = derived_uid(result, kind, "dimensions")
    dataset.DimensionOrganizationSequence[0].DimensionOrganizationUID = dimensions
    for row in dataset.DimensionIndexSequence:
        row.DimensionOrganizationUID = dimensions
    return dataset


def _refuse_too_large(result: Result, kind: str, segments: int) -> None:
    voxels = int(np.prod(result.mask.shape))
    size = {"SEG": voxels * segments // 8, "FRACTIONAL": voxels * segments}.get(kind, voxels * 2)
    if size > MAX_PIXEL_BYTES:
        raise ExportError(
            f"{segments} segments of {voxels} voxels would need {size / 2**30:.1f} GiB, and one object holds at most "
            "4.0 GiB: choose --format seg-labelmap or seg",
            code="OBJECT_TOO_LARGE",
        )


def segment_numbers(result: Result) -> NDArray[np.uint8 | np.uint16]:
    """Return (K, J, I): the segment of each voxel, 1 for the first label of the spec; 0 is none.

    Raises
    ------
    ExportError : UNKNOWN_LABEL.
    """
    labels = result.mask.array[0].transpose(2, 1, 0)
    dtype: type[np.uint8 | np.uint16] = np.uint8 if len(result.spec.foreground) < 256 else np.uint16
    segments = np.zeros(labels.shape, dtype)
    for number, value in enumerate(result.spec.foreground.values(), start=1):
        segments[labels == value] = number
    strange = np.unique(labels[(segments == 0) & (labels != 0)])
    if strange.size:
        raise ExportError(
            f"the mask holds the value {strange[0]}, which no label of the spec has; known are "
            f"{sorted(result.spec.foreground.values())}",
            code="UNKNOWN_LABEL",
        )
    return segments


def probability_frames(result: Result) -> NDArray[np.float32]:
    """Return the probabilities as highdicom wants them: (K, J, I, segments)."""
    assert result.probabilities is not None, "an exporter that is `soft` is given probabilities"
    return np.ascontiguousarray(result.probabilities.array.transpose(3, 2, 1, 0), np.float32)


def _description(result: Result, segment: Segment) -> Any:
    """Return highdicom's description of a segment."""
    uid, text = tracking(result, segment.name)
    return highdicom.seg.SegmentDescription(
        segment_number=segment.number,
        segment_label=segment.name[:64],
        segmented_property_category=segment.category,
        segmented_property_type=segment.type,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=MANUFACTURER,
            family=codes.DCM.ArtificialIntelligence,
            version=equipment(result)["software_versions"],
            source=MANUFACTURER,
            parameters={"model": result.spec.name, "model_hash": result.model},
        ),
        tracking_uid=uid,
        tracking_id=text,
        display_color=segment.colour,
    )
