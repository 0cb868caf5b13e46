"""Results as DICOM Segmentation objects: BINARY, LABELMAP or FRACTIONAL, read back before they count.

One segment a label of the spec, in its order, empty ones included; one frame a slice of the source (and segment, but
in a LABELMAP), empty ones included, because viewers misplace frames where some are left out (OHIF/Viewers#2833).
All are uncompressed: DCMTK, and what is built on it, refuses a compressed LABELMAP.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
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
from medseg.exporters.dicom_seg_check import FULL, check_fractional, check_labels, in_steps
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
    return write_object(path, result, build_fractional, check_fractional)


def seg_uid(result: Result) -> str:
    """Return the SOP instance UID of the BINARY Segmentation of a result, written or not."""
    return str(identity(result, "SEG")["sop_instance_uid"])


def build_seg(result: Result, images: list[Dataset], *, kind: str = "SEG") -> Dataset:
    """Return the object in memory; `images` are the source headers in the order of the mask's K.

    Takes one to two bytes a voxel.
    """
    segments = label_segments(result.spec)
    _refuse_too_large(result, kind, len(segments))
    return _segmentation(result, images, segment_numbers(result), segments, kind)


def build_fractional(result: Result, images: list[Dataset]) -> Dataset:
    """Return the object with the probabilities, whose pixels are read from the result only while it is written.

    highdicom is given frames of a few pixels that say what each is of, so that it makes everything but the pixels.
    """
    segments = soft_segments(result.spec)
    _refuse_too_large(result, "FRACTIONAL", len(segments))
    rows, columns = images[0].Rows, images[0].Columns
    tokens = [[_digits(number, k) for number in range(len(segments))] for k in range(len(images))]
    frames = np.array(tokens, np.float32)[:, None].transpose(0, 1, 3, 2) / np.float32(FULL)
    for image in images:
        image.Rows, image.Columns = frames.shape[1:3]
    dataset = _segmentation(result, images, frames, segments, "FRACTIONAL")
    for each in (dataset, *images):
        each.Rows, each.Columns = rows, columns
    found = np.frombuffer(dataset.PixelData, np.uint8)[: frames.size].reshape(-1, frames.shape[2]).tolist()
    order = [(low + (high << 8), k0 + (k1 << 8)) for low, high, k0, k1 in found]
    assert result.probabilities is not None, "an exporter that is `soft` is given probabilities"
    dataset.PixelData = Frames(result.probabilities.array, order)
    return dataset


def _digits(segment: int, k: int) -> tuple[int, int, int, int]:
    return segment & 255, segment >> 8, k & 255, k >> 8


class Frames(io.BufferedIOBase):
    """The bytes of frames (rows, columns), made of probabilities (segments, I, J, K) one by one as they are read.

    Parameters
    ----------
    order : (segment, k) of each frame.
    """

    def __init__(self, soft: NDArray[Any], order: Sequence[tuple[int, int]]) -> None:
        self._soft, self._order = soft, order
        self._frame = int(soft.shape[1] * soft.shape[2])
        self._size = self._frame * len(order)
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return how many bytes were read."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        start: int = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._padded}[whence]
        self._at = min(max(0, start + offset), self._padded)
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes, fewer than `size` only at the end."""
        stop = self._padded if size is None or size < 0 else min(self._at + size, self._padded)
        parts = []
        while self._at < stop:
            number, skip = divmod(self._at, self._frame)
            content = self._bytes(number)[skip : skip + stop - self._at]
            parts.append(content)
            self._at += len(content)
        return b"".join(parts)

    @property
    def _padded(self) -> int:
        return self._size + self._size % 2

    def _bytes(self, number: int) -> bytes:
        if number == len(self._order):
            return b"\0"  # to an even length
        segment, k = self._order[number]
        return np.ascontiguousarray(in_steps(self._soft[segment, :, :, k]).T).tobytes()


def _segmentation(
    result: Result, images: list[Dataset], frames: NDArray[Any], segments: Sequence[Segment], kind: str
) -> Dataset:
    dataset: Dataset = highdicom.seg.Segmentation(
        images,
        frames,
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
