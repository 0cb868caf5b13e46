"""What a DICOM Segmentation holds, by pydicom and the frames' own positions alone, compared with the result.

Nothing of what wrote the file is used: not highdicom, not the source headers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.utils import unpack_bits

from medseg.exporters.dicom_codes import label_segments, soft_segments
from medseg.exporters.dicom_source import LPS_TO_RAS, ON_GRID_MM
from medseg.exporters.result import Result, read_back_error

FULL = 255
"""What stands for a probability of 1."""
Values = NDArray[Any]
Wanted = Mapping[int, Callable[[int], Values]]
"""Segment number -> (slice k) -> the values (I, J) that it must have there."""


@dataclass(frozen=True)
class _Frame:
    """A frame: values (rows, columns), its segment (0 in a LABELMAP), and (3, 3): (column, row, 1) -> mm in RAS+."""

    values: Values
    segment: int
    to_ras: NDArray[np.float64]


def check_labels(path: Path, *, name: str, result: Result) -> None:
    """Compare a BINARY or LABELMAP file with the mask: every voxel, and the centroid of every label in mm.

    Raises
    ------
    ExportError : READ_BACK.
    """
    mask = result.mask.array[0]
    wanted = {s.number: lambda k, value=s.value: mask[:, :, k] == value for s in label_segments(result.spec)}
    dataset = pydicom.dcmread(path)
    _check(dataset, np.frombuffer(dataset.PixelData, np.uint8), name, result, wanted)


def check_fractional(path: Path, *, name: str, result: Result) -> None:
    """Compare a FRACTIONAL file with the probabilities: every voxel to half a step, and the centroids in mm.

    Raises
    ------
    ExportError : READ_BACK.
    """
    assert result.probabilities is not None
    soft = result.probabilities.array
    dataset, pixels = _opened(path)
    if int(dataset.MaximumFractionalValue) != FULL:
        raise read_back_error(name, f"probability 1 is {dataset.MaximumFractionalValue}")
    wanted = {s.number: lambda k, n=s.number: in_steps(soft[n - 1, :, :, k]) for s in soft_segments(result.spec)}
    _check(dataset, pixels, name, result, wanted)


def in_steps(chances: Values) -> Values:
    """Return probabilities, float32 or steps already, as uint8 in steps of 1/255."""
    return chances if chances.dtype == np.uint8 else np.rint(chances * np.float32(FULL)).astype(np.uint8)


def _opened(path: Path) -> tuple[Dataset, Values]:
    """Return a dataset without its pixels, and these (bytes) as they lie in the file: they need not fit in memory."""
    with path.open("rb") as file:
        dataset = pydicom.dcmread(file, stop_before_pixels=True)
        # After tag, VR, two empty bytes and the length (PS3.5 section 7.1.2); nothing follows the pixels.
        offset = file.tell() + 12
    return dataset, np.memmap(path, np.uint8, "r", offset)


def _check(dataset: Dataset, pixels: Values, name: str, result: Result, wanted: Wanted) -> None:
    numbers = [int(row.SegmentNumber) for row in dataset.SegmentSequence]
    if [number for number in numbers if number] != list(wanted):
        raise read_back_error(name, f"segments {numbers}")
    frame_kinds = {0} if dataset.SegmentationType == "LABELMAP" else set(wanted)
    found, expected = _Mass(), _Mass()
    wrong, seen = 0, set()
    planes, size = result.planes, result.mask.shape[:2]
    for frame in _frames(dataset, pixels):
        k, off = _slice_of(planes, size, frame.to_ras)
        if frame.segment not in frame_kinds or off > ON_GRID_MM or (frame.segment, k) in seen:
            what = f"a frame of segment {frame.segment} lies {off:.3f} mm off its slice, or is there twice"
            raise read_back_error(name, what)
        seen.add((frame.segment, k))
        for number, values in _parts(frame, wanted):
            due = wanted[number](k)
            wrong += int(np.count_nonzero(due != values.T))
            found.add(number, values, frame.to_ras)
            expected.add(number, due.T, planes[k])
        if not frame.segment and frame.values.max(initial=0) > max(wanted):
            raise read_back_error(name, f"the value {frame.values.max()}")
    if wrong or len(seen) != len(frame_kinds) * len(planes):
        raise read_back_error(name, f"{wrong} voxels differ, {len(seen)} frames")
    for number in wanted:
        if np.abs(found.centroid(number) - expected.centroid(number)).max() > ON_GRID_MM:
            raise read_back_error(name, f"the centroid of segment {number} lies elsewhere")


def _parts(frame: _Frame, wanted: Wanted) -> Iterator[tuple[int, Values]]:
    """Return what a frame says of each segment that it speaks of."""
    if frame.segment:
        yield frame.segment, frame.values
    else:
        yield from ((number, frame.values == number) for number in wanted)


class _Mass:
    """Sums from which centroids follow, frame by frame."""

    def __init__(self) -> None:
        self._sums: dict[int, NDArray[np.float64]] = {}

    def add(self, number: int, values: Values, to_ras: NDArray[np.float64]) -> None:
        """Add values (rows, columns) whose (column, row, 1) lie at `to_ras`."""
        across, down = values.sum(axis=0, dtype=np.float64), values.sum(axis=1, dtype=np.float64)
        moment = np.array([across @ np.arange(across.size), down @ np.arange(down.size), across.sum()])
        total = self._sums.setdefault(number, np.zeros(4))
        total += (*(to_ras @ moment), moment[2])

    def centroid(self, number: int) -> NDArray[np.float64]:
        """Return the centroid in mm; NaN compares as equal to nothing, so an empty segment lies at the origin."""
        total = self._sums.get(number, np.zeros(4))
        return np.asarray(total[:3] / total[3] if total[3] else np.zeros(3))


def _frames(dataset: Dataset, content: Values) -> Iterator[_Frame]:
    shape = (int(dataset.NumberOfFrames), int(dataset.Rows), int(dataset.Columns))
    if dataset.BitsAllocated == 1:
        flat = np.asarray(unpack_bits(content.tobytes())).astype(bool)
    else:
        flat = content.view(f"<u{dataset.BitsAllocated // 8}")
    shared = dataset.SharedFunctionalGroupsSequence[0]
    pixels = flat[: int(np.prod(shape))].reshape(shape)
    for values, own in zip(pixels, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        # What all frames have in common stands once, in the shared groups.
        group = {word: (own.get(word) or shared.get(word) or [None])[0] for word in _GROUPS}
        number, measures, plane, place = group.values()
        down, across = (float(value) for value in measures.PixelSpacing)
        cosines = np.array(plane.ImageOrientationPatient, np.float64).reshape(2, 3)
        position = np.array(place.ImagePositionPatient, np.float64)
        to_lps = np.stack([cosines[0] * across, cosines[1] * down, position], axis=1)
        yield _Frame(values, 0 if number is None else int(number.ReferencedSegmentNumber), LPS_TO_RAS[:, None] * to_lps)


_GROUPS = (
    "SegmentIdentificationSequence",
    "PixelMeasuresSequence",
    "PlaneOrientationSequence",
    "PlanePositionSequence",
)


def _slice_of(planes: NDArray[np.float64], size: tuple[int, int], to_ras: NDArray[np.float64]) -> tuple[int, float]:
    """Return which slice (K, 3, 3) a frame is nearest to, and how far (mm) its corners lie from that slice's."""
    k = int(np.linalg.norm(planes[:, :, 2] - to_ras[:, 2], axis=1).argmin())
    right, down = size[0] - 1, size[1] - 1
    corners = np.array([(0, 0, 1), (right, 0, 1), (0, down, 1), (right, down, 1)], np.float64).T
    return k, float(np.linalg.norm((to_ras - planes[k]) @ corners, axis=0).max())
