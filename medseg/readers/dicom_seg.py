"""DICOM Segmentation objects (binary, fractional, label map) as planes on the grid of an image.

Each frame is placed by its own position and orientation, never by its number: frames may be omitted, in any order, of
another size than the image, mirrored or along another axis. It must lie on the voxels of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from medseg.readers.dicom_geometry import LPS_TO_RAS
from medseg.readers.dicom_header import PARSE_ERRORS
from medseg.readers.dicom_label_parts import LabelObject, Plane, refuse_labels
from medseg.volume import Volume

MAX_BYTES = 8 * 2**30
"""Largest unpacked size of all frames that is accepted."""
HALF = 0.5
"""Share of MaximumFractionalValue from which a voxel of a fractional segment belongs to it."""

Frame = NDArray[Any]


@dataclass(frozen=True)
class _Where:
    """Where one frame lies: the segment (None: any, a label map), and its pixels as an affine to RAS mm.

    `steps` is (3, 2): the way to the next column and to the next row.
    """

    number: int | None
    origin: NDArray[np.float64]
    steps: NDArray[np.float64]


def open_seg(dataset: Dataset) -> LabelObject:
    """Understand a segmentation object.

    Raises
    ------
    ReadError, GeometryError : NO_POSITION, NO_PIXEL_SPACING, OVERSIZED, TRUNCATED, NO_DECODER, UNREADABLE.
    """
    count, rows, columns = (int(dataset.get(word) or 1) for word in ("NumberOfFrames", "Rows", "Columns"))
    size = count * rows * columns * max(1, int(dataset.BitsAllocated) // 8)
    if size > MAX_BYTES:
        raise refuse_labels("OVERSIZED", f"{count} frames of {columns} x {rows} need {size / 2**30:.1f} GiB")
    items = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
    if len(items) != count:
        raise refuse_labels("NO_POSITION", f"{count} frames, of which {len(items)} say where they lie")
    shared = (list(dataset.get("SharedFunctionalGroupsSequence") or []) or [Dataset()])[0]
    kind = str(dataset.get("SegmentationType", "BINARY"))
    where = [_where(item, shared, kind) for item in items]
    inside = INSIDE.get(kind)
    if inside is None:
        raise refuse_labels("UNREADABLE", f"SegmentationType is none of {', '.join(INSIDE)}")
    frames = _frames(dataset, count, rows, columns)
    names = {int(item.SegmentNumber): str(item.get("SegmentLabel", "")).strip() for item in dataset.SegmentSequence}
    if kind == "LABELMAP":
        names = {number: name for number, name in names.items() if number not in (0, dataset.get("PixelPaddingValue"))}
    largest = int(dataset.get("MaximumFractionalValue") or 1)

    def planes(number: int, image: Volume, notes: set[str]) -> Iterator[Plane]:
        if kind == "FRACTIONAL":
            notes.add("FRACTIONAL_THRESHOLDED")
        seen: set[tuple[int, int]] = set()
        for index, place in enumerate(where):
            if place.number in (None, number):
                found = inside(frames(index), number, largest)
                if found.any():
                    plane = _on_grid(found, place, image)
                    _once(plane, seen)
                    yield plane

    return LabelObject(names, str(dataset.get("FrameOfReferenceUID", "")), _references(dataset), planes)


INSIDE: dict[str, Callable[[Frame, int, int], NDArray[np.bool_]]] = {
    "BINARY": lambda frame, number, largest: frame > 0,
    "FRACTIONAL": lambda frame, number, largest: frame >= HALF * largest,
    "LABELMAP": lambda frame, number, largest: frame == number,
}
"""SegmentationType -> (stored frame, segment number, MaximumFractionalValue) -> which pixels belong."""


def _once(plane: Plane, seen: set[tuple[int, int]]) -> None:
    """Refuse a second frame of one segment at one slice: its first may be an older state."""
    if (plane.axis, plane.index) in seen:
        raise refuse_labels("DUPLICATE_POSITION", f"two frames of one segment lie at slice {plane.index}")
    seen.add((plane.axis, plane.index))


def _where(item: Dataset, shared: Dataset, kind: str) -> _Where:
    def group(name: str) -> Dataset | None:
        found = item.get(name) or shared.get(name)
        return found[0] if found else None

    position, orientation = group("PlanePositionSequence"), group("PlaneOrientationSequence")
    measures, segment = group("PixelMeasuresSequence"), group("SegmentIdentificationSequence")
    if position is None or orientation is None or "ImagePositionPatient" not in position:
        raise refuse_labels("NO_POSITION", "a frame has no position or orientation in the patient")
    if measures is None or not measures.get("PixelSpacing"):
        raise refuse_labels("NO_PIXEL_SPACING", "PixelSpacing is absent")
    if segment is None and kind != "LABELMAP":
        raise refuse_labels("UNREADABLE", "a frame does not say which segment it belongs to")
    cosines = np.array(orientation.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    between_rows, between_columns = (float(value) for value in measures.PixelSpacing)
    origin = np.array(position.ImagePositionPatient, dtype=np.float64)
    if origin.shape != (3,) or not np.isfinite(origin).all() or min(between_rows, between_columns) <= 0:
        raise refuse_labels("NO_POSITION", "the position or spacing of a frame is no valid number")
    steps = LPS_TO_RAS @ (cosines * [[between_columns], [between_rows]]).T
    number = None if segment is None or kind == "LABELMAP" else int(segment.ReferencedSegmentNumber)
    return _Where(number, LPS_TO_RAS @ origin, steps)


def _on_grid(found: NDArray[np.bool_], place: _Where, image: Volume) -> Plane:
    """Move one frame (rows, columns) to its slice of the image.

    Raises
    ------
    GeometryError : LABEL_GRID, its pixels are no voxels of the image; SEGMENT_OUTSIDE, the segment goes beyond it.
    """
    inverse = np.linalg.inv(image.affine)
    origin = inverse[:3, :3] @ place.origin + inverse[:3, 3]
    steps = inverse[:3, :3] @ place.steps
    start, whole = np.rint(origin), np.rint(steps)
    axes = [int(np.abs(whole[:, n]).argmax()) for n in (0, 1)]
    ends = np.array(found.shape)[::-1] - 1
    drift = np.abs(origin - start) + np.abs(steps - whole) @ ends
    unit = np.array_equal(np.abs(whole), np.eye(3)[:, axes])
    if not unit or axes[0] == axes[1] or (drift > _tolerance(image)).any():
        sizes = "x".join(f"{length:.4g}" for length in np.linalg.norm(place.steps, axis=0))
        raise refuse_labels(
            "LABEL_GRID",
            f"pixels of {sizes} mm do not lie on the image's voxels of "
            f"{'x'.join(f'{s:.4g}' for s in image.spacing)} mm (off by up to {drift.max():.2g} voxels)",
        )
    third = 3 - sum(axes)
    pixels = np.argwhere(found)[:, ::-1]
    voxels = (start + pixels @ whole.T).astype(np.int64)
    if (voxels < 0).any() or (voxels >= image.shape).any():
        raise refuse_labels("SEGMENT_OUTSIDE", "a segment reaches beyond the image")
    inside = np.zeros([image.shape[axis] for axis in sorted(axes)], bool)
    inside[tuple(voxels[:, axis] for axis in sorted(axes))] = True
    return Plane(third, int(voxels[0, third]), inside)


def _tolerance(image: Volume) -> NDArray[np.float64]:
    """Return how far (in voxels, per axis) a frame may lie off: as far as a slice of the series may."""
    return np.asarray(np.minimum(np.maximum(0.01, 0.05 / np.array(image.spacing)), 0.1))


def _references(dataset: Dataset) -> frozenset[str]:
    """Return the SOP instances that the object names as its sources."""
    found = {
        str(instance.get("ReferencedSOPInstanceUID", ""))
        for series in dataset.get("ReferencedSeriesSequence") or []
        for instance in series.get("ReferencedInstanceSequence") or []
    }
    for item in dataset.get("PerFrameFunctionalGroupsSequence") or []:
        for derivation in item.get("DerivationImageSequence") or []:
            sources = derivation.get("SourceImageSequence") or []
            found |= {str(source.get("ReferencedSOPInstanceUID", "")) for source in sources}
    return frozenset(found - {""})


def _frames(dataset: Dataset, count: int, rows: int, columns: int) -> Callable[[int], Frame]:
    """Return a function from frame index to stored values (rows, columns), the length checked at once."""
    if "PixelData" not in dataset:
        raise refuse_labels("TRUNCATED", "the file ends before its pixels")
    syntax = UID(dataset.file_meta.get("TransferSyntaxUID", ""))
    bits = int(dataset.BitsAllocated)
    if syntax.is_compressed and syntax.is_encapsulated:
        return _decoded(dataset, syntax)
    needed = -(-count * rows * columns * bits // 8)
    if len(dataset.PixelData) < needed:
        raise refuse_labels("TRUNCATED", f"{len(dataset.PixelData)} of {needed} bytes of pixels are there")
    if bits == 1:
        if not syntax.is_little_endian:
            raise refuse_labels("NO_DECODER", "single bits in big-endian order are not read")
        # Frames follow each other without padding: one may start in the middle of a byte (PS3.5 8.1.1).
        packed = np.frombuffer(dataset.PixelData, np.uint8)
        return partial(_unpacked, packed, rows, columns)
    return partial(_native, dataset)


def _unpacked(packed: NDArray[np.uint8], rows: int, columns: int, index: int) -> Frame:
    first, last = index * rows * columns, (index + 1) * rows * columns
    bits = np.unpackbits(packed[first // 8 : -(-last // 8)], bitorder="little")
    return bits[first % 8 :][: rows * columns].reshape(rows, columns)


def _native(dataset: Dataset, index: int) -> Frame:
    try:
        return np.asarray(pixel_array(dataset, index=index, raw=True))
    except PARSE_ERRORS as error:
        text = f"frame {index + 1} cannot be decoded ({type(error).__name__})"
        raise refuse_labels("UNREADABLE", text) from error


def _decoded(dataset: Dataset, syntax: UID) -> Callable[[int], Frame]:
    """Decode compressed frames once each: a label map is asked for the same frame by every label."""
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise refuse_labels("NO_DECODER", f"no decoder for {syntax.name} is installed")
    kept: dict[int, Frame] = {}

    def frame(index: int) -> Frame:
        if index not in kept:
            kept[index] = _native(dataset, index)
        return kept[index]

    return frame
