"""RTSTRUCT contours as planes on the grid of an image.

Convention: a voxel belongs to a structure when its centre lies inside the contours of its slice by the even-odd rule,
all contours of one ROI together, so that a contour within another is a hole and a keyhole's two edges cancel out. A
centre on the line belongs to the side of growing indices (half-open), so that neighbours share no voxel. No contour is
widened by half a voxel and nothing is interpolated between slices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from medseg.readers.dicom_geometry import LPS_TO_RAS, tolerance
from medseg.readers.dicom_header import PARSE_ERRORS
from medseg.readers.dicom_label_parts import LabelObject, Plane, refuse_labels
from medseg.volume import Volume

NEAREST = 0.25
"""A contour up to this share of a gap off its slice is given to it, with a note; further off it is refused."""
GRAIN = 256
"""Vertices are rounded to 1/256 voxel, so that the last digits of a text do not decide about centres on a line."""
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
OPEN = ("OPEN_PLANAR", "OPEN_NONPLANAR")

Points = NDArray[np.float64]


@dataclass(frozen=True)
class _Contour:
    """One closed contour on the slice `index`: `depth` is its real index, `points` (n, 2) in the other two axes."""

    index: int
    depth: float
    points: Points


def open_rtstruct(dataset: Dataset) -> LabelObject:
    """Understand a structure set; contours are read when they are asked for.

    Raises
    ------
    ReadError : UNREADABLE, an ROI has no number.
    """
    rois = list(dataset.get("StructureSetROISequence") or [])
    names = {int(roi.ROINumber): str(roi.get("ROIName", "")).strip() for roi in rois}
    contours: dict[int, list[Dataset]] = defaultdict(list)
    for item in dataset.get("ROIContourSequence") or []:
        contours[int(item.ReferencedROINumber)] += list(item.get("ContourSequence") or [])
    frames = {str(roi.get("ReferencedFrameOfReferenceUID", "")) for roi in rois if contours[int(roi.ROINumber)]}
    references = frozenset(
        str(image.get("ReferencedSOPInstanceUID", ""))
        for group in contours.values()
        for contour in group
        for image in contour.get("ContourImageSequence") or []
    )
    frames |= {str(dataset.get("FrameOfReferenceUID", ""))} if not frames - {""} else set()
    if len(frames - {""}) > 1:
        raise refuse_labels("FRAME_OF_REFERENCE", f"one structure set in {len(frames - {''})} frames of reference")

    def planes(number: int, image: Volume, notes: set[str]) -> Iterator[Plane]:
        return _planes([_points(contour) for contour in contours[number] if _encloses(contour)], image, notes)

    return LabelObject(names, next(iter(frames - {""}), ""), references - {""}, planes)


def _encloses(contour: Dataset) -> bool:
    """Tell whether a contour encloses something; refuse open ones, whose end is unknown.

    A point is a mark and no structure: an ROI of points alone is empty.
    """
    kind = str(contour.get("ContourGeometricType", ""))
    if kind == "POINT":
        return False
    if kind not in CLOSED:
        raise refuse_labels("CONTOUR_TYPE", f"a contour is {kind if kind in OPEN else 'of no known kind'}")
    if any(float(value) for value in contour.get("ContourOffsetVector") or []):
        raise refuse_labels("CONTOUR_TYPE", "a contour is moved by a ContourOffsetVector")
    return True


def _points(contour: Dataset) -> Points:
    """Return the vertices (n, 3) in RAS mm."""
    try:
        values = _numbers(contour)
        declared = int(contour.get("NumberOfContourPoints", len(values) // 3))
    except PARSE_ERRORS as error:
        raise refuse_labels("UNREADABLE", "ContourData holds something that is no number") from error
    if len(values) != 3 * declared or not np.isfinite(values).all():
        raise refuse_labels("UNREADABLE", f"a contour of {declared} points holds {len(values)} valid coordinates")
    return np.asarray(values.reshape(-1, 3) @ LPS_TO_RAS)


def _numbers(contour: Dataset) -> NDArray[np.float64]:
    """Return ContourData, from its text where pydicom has not parsed it yet: a hundred times faster."""
    element = contour.get_item("ContourData") if "ContourData" in contour else None
    value = None if element is None else element.value
    if isinstance(value, bytes):
        value = value.decode("ascii").strip("\0 ").split("\\") if value.strip(b"\0 ") else None
    return np.atleast_1d(np.array([] if value is None else value, dtype=np.float64))


def _planes(contours: Sequence[Points], image: Volume, notes: set[str]) -> Iterator[Plane]:
    """Rasterise all contours of one ROI."""
    inverse = np.linalg.inv(image.affine)
    indices = [points @ inverse[:3, :3].T + inverse[:3, 3] for points in contours if len(points) >= 3]
    if not indices:
        return
    axis = _slice_axis(indices, image)
    placed: dict[int, list[_Contour]] = defaultdict(list)
    for points in indices:
        contour = _place(points, axis, image, notes)
        placed[contour.index].append(contour)
    _check_gaps(sorted(placed), notes)
    shape = tuple(size for number, size in enumerate(image.shape) if number != axis)
    for index, group in placed.items():
        depths = [contour.depth for contour in group]
        if np.ptp(depths) * image.spacing[axis] > 2 * tolerance(image.spacing[axis]):
            raise refuse_labels("CONTOUR_OFF_PLANE", f"contours at different depths are nearest to slice {index}")
        polygons = _each_once([contour.points for contour in group], notes)
        if _cross(polygons, shape):
            notes.add("CONTOURS_CROSS")
        yield Plane(axis, index, fill(polygons, shape))


def _slice_axis(indices: Sequence[Points], image: Volume) -> int:
    """Return the axis of the image along which every contour is flat (the last of several)."""
    spread = np.max([np.ptp(points, axis=0) for points in indices], axis=0) * image.spacing
    axis = 2 - int(np.argmin(spread[::-1]))
    allowed = 2 * tolerance(image.spacing[axis])
    if spread[axis] > allowed:
        raise refuse_labels(
            "CONTOUR_OFF_PLANE",
            f"contours are not parallel to the slices of the image: one leaves its plane by {spread[axis]:.2f} mm, "
            f"allowed are {allowed:.2f}",
        )
    return axis


def _place(points: Points, axis: int, image: Volume, notes: set[str]) -> _Contour:
    """Find the slice of one contour and check that it lies in the image."""
    depth = float(points[:, axis].mean())
    index = round(depth)
    off, gap = abs(depth - index), image.spacing[axis]
    if not 0 <= index < image.shape[axis]:
        raise refuse_labels(
            "CONTOUR_OUTSIDE", f"a contour lies at slice {depth:.1f}, the image has slices 0 to {image.shape[axis] - 1}"
        )
    if off > NEAREST:
        raise refuse_labels("CONTOUR_OFF_PLANE", f"a contour lies between slices, at {depth:.2f} (gap {gap:.3g} mm)")
    if off * gap > tolerance(gap):
        notes.add("CONTOUR_NEAREST_SLICE")
    flat = np.delete(points, axis, axis=1)
    sizes = np.delete(np.array(image.shape), axis)
    low, high = flat.min(axis=0), flat.max(axis=0)
    if (high < -0.5).any() or (low > sizes - 0.5).any():
        raise refuse_labels("CONTOUR_OUTSIDE", f"a contour on slice {index} lies beside the image")
    if (low < -0.5).any() or (high > sizes - 0.5).any():
        notes.add("CONTOUR_CLIPPED")
    return _Contour(index, depth, np.rint(flat * GRAIN) / GRAIN)


def _check_gaps(slices: Sequence[int], notes: set[str]) -> None:
    """Refuse contours drawn on every second or third slice, which would teach stripes; note other gaps."""
    steps = np.diff(slices)
    if len(steps) >= 2 and steps.min() == steps.max() > 1:
        raise refuse_labels(
            "CONTOURS_SPARSE", f"contours are drawn on every {steps[0]}th slice only, {len(slices)} in all"
        )
    if len(steps) and steps.max() > 1:
        notes.add("CONTOUR_GAPS")


def _each_once(polygons: Sequence[Points], notes: set[str]) -> list[Points]:
    """Drop repeated contours, which would cancel each other out."""
    kept: dict[frozenset[bytes], Points] = {}
    for points in polygons:
        if kept.setdefault(frozenset(row.tobytes() for row in points + 0.0), points) is not points:
            notes.add("CONTOUR_REPEATED")
    return list(kept.values())


def _cross(polygons: Sequence[Points], shape: tuple[int, ...]) -> bool:
    """Tell whether two contours of a slice overlap in part: neither apart nor one within the other."""
    if len(polygons) < 2:
        return False
    filled = [fill([points], shape) for points in polygons]
    return any((a & b).any() and (a & ~b).any() and (b & ~a).any() for a, b in combinations(filled, 2))


def fill(polygons: Sequence[Points], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return which voxel centres lie inside closed polygons, by the even-odd rule over all of them.

    Parameters
    ----------
    polygons : each (n, 2) in index units, closed by itself; none gives all False.
    shape : (A, B) of the result.

    Returns
    -------
    ndarray
        bool (A, B). Half-open: a centre on a line belongs to the polygon on the side of growing indices.
    """
    toggles = np.zeros((shape[0] + 1, shape[1]), np.int64)
    for points in polygons:
        start, end = points, np.roll(points, -1, axis=0)
        low = np.clip(np.ceil(np.minimum(start[:, 1], end[:, 1])), 0, shape[1]).astype(np.int64)
        high = np.clip(np.ceil(np.maximum(start[:, 1], end[:, 1])), 0, shape[1]).astype(np.int64)
        edge = np.repeat(np.arange(len(points)), high - low)
        first = np.repeat(np.cumsum(high - low) - (high - low), high - low)
        column = np.arange(len(edge)) - first + low[edge]
        # From the lower vertex, so that an edge shared by two polygons crosses at the very same place in both.
        swapped = (start[:, 1] > end[:, 1])[:, None]
        lower, upper = np.where(swapped, end, start)[edge], np.where(swapped, start, end)[edge]
        share = (column - lower[:, 1]) / (upper[:, 1] - lower[:, 1])
        crossing = lower[:, 0] + share * (upper[:, 0] - lower[:, 0])
        row = np.clip(np.ceil(crossing), 0, shape[0]).astype(np.int64)
        np.add.at(toggles, (row, column), 1)
    return np.asarray(np.cumsum(toggles, axis=0)[:-1] % 2 == 1)
