"""Masks as DICOM Segmentation objects (BINARY), read back before they count.

One segment a label of the spec, in its order, empty ones included; one frame a slice of the source, empty ones
included, because viewers misplace frames where some are left out (OHIF/Viewers#2833).
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from pathlib import Path

import highdicom
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.utils import unpack_bits
from pydicom.sr.codedict import codes

from medseg.errors import ExportError
from medseg.exporters.dicom_codes import display_colour, property_codes, uncoded
from medseg.exporters.dicom_source import (
    MANUFACTURER,
    ON_GRID_MM,
    RESEARCH,
    derived_uid,
    description,
    finish,
    save,
    silent,
    source_images,
)
from medseg.exporters.result import Result, read_back_error
from medseg.volume import Volume

SERIES_NUMBER = 9001
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
_GROUPS = (
    "SegmentIdentificationSequence",
    "PixelMeasuresSequence",
    "PlaneOrientationSequence",
    "PlanePositionSequence",
)


def write_seg(path: Path, result: Result) -> tuple[str, ...]:
    """Write a label map as a BINARY Segmentation on the grid of its source series.

    Returns
    -------
    tuple of str
        Notes: PRIVATE_CODE where a label has no code in the spec.

    Raises
    ------
    ExportError : NEEDS_DICOM, NOT_ON_SOURCE_GRID, SOURCE_CHANGED, UNKNOWN_LABEL (a value that the spec does not
        name), READ_BACK (what was written differs in a voxel or a place), or it cannot be written.
    """
    images = source_images(result)
    with silent():
        dataset = build_seg(result, images)
    save(path, dataset, partial(check_seg, name=path.name, result=result))
    return ("PRIVATE_CODE",) * uncoded(result.spec)


def seg_uid(result: Result) -> str:
    """Return the SOP instance UID of the Segmentation of a result, written or not."""
    return derived_uid(result, "SEG", "instance")


def build_seg(result: Result, images: list[Dataset]) -> Dataset:
    """Return the object in memory; `images` are the source headers in the order of the mask's K."""
    dataset: Dataset = highdicom.seg.Segmentation(
        images,
        segment_numbers(result),
        highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions(result),
        series_instance_uid=derived_uid(result, "SEG", "series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=seg_uid(result),
        instance_number=1,
        content_label=RESEARCH.replace(" ", "_"),
        content_description=f"{RESEARCH} ONLY, not reviewed by a person",
        content_creator_name=f"{MANUFACTURER}^",
        series_description=description(result.spec),
        omit_empty_frames=False,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=result.spec.name[:64],
        software_versions=version("medseg"),
        device_serial_number=result.model[:64],
    )
    # Its own default is a random UID, which would make every writing another file.
    dimensions = derived_uid(result, "SEG", "dimensions")
    dataset.DimensionOrganizationSequence[0].DimensionOrganizationUID = dimensions
    for item in dataset.DimensionIndexSequence:
        item.DimensionOrganizationUID = dimensions
    finish(dataset, images[0])
    return dataset


def segment_numbers(result: Result) -> NDArray[np.uint16]:
    """Return (K, J, I): the segment of each voxel, 1 for the first label of the spec; 0 is none.

    Raises
    ------
    ExportError : UNKNOWN_LABEL.
    """
    labels = result.mask.array[0].transpose(2, 1, 0)
    segments = np.zeros(labels.shape, np.uint16)
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


def segment_descriptions(result: Result) -> list[highdicom.seg.SegmentDescription]:
    """Return one description a label of the spec, in its order."""
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=MANUFACTURER,
        family=codes.DCM.ArtificialIntelligence,
        version=version("medseg"),
        source=MANUFACTURER,
        parameters={"model": result.spec.name, "model_hash": result.model},
    )
    rows = []
    for number, name in enumerate(result.spec.foreground, start=1):
        category, kind = property_codes(result.spec, name)
        rows.append(
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=name[:64],
                segmented_property_category=category,
                segmented_property_type=kind,
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                tracking_uid=derived_uid(result, "SEG", "tracking", name),
                tracking_id=f"{result.spec.name} {name}"[:64],
                display_color=display_colour(result.spec.labels[name]),
            )
        )
    return rows


def check_seg(path: Path, *, name: str, result: Result) -> None:
    """Compare a file with the mask: every voxel, and the centroid of every label in mm.

    It reads by pydicom and the frames' own positions alone, with nothing of what wrote it.

    Raises
    ------
    ExportError : READ_BACK.
    """
    dataset = pydicom.dcmread(path)
    numbers = dict(enumerate(result.spec.foreground.values(), start=1))
    found = dict.fromkeys(numbers.values(), 0)
    sums = {value: np.zeros(3) for value in numbers.values()}
    wrong, seen = 0, set()
    for frame, number, to_ras in _frames(dataset):
        value = numbers.get(number, 0)
        k, off = _slice_of(result.mask, to_ras)
        if off > ON_GRID_MM or not value or (value, k) in seen:
            raise read_back_error(name, f"a frame lies {off:.3f} mm off its slice, or is there twice")
        seen.add((value, k))
        wrong += int(np.count_nonzero((result.mask.array[0, :, :, k] == value) ^ frame.T))
        rows, columns = np.nonzero(frame)
        found[value] += rows.size
        sums[value] += to_ras @ np.array([columns.sum(), rows.sum(), rows.size])
    if wrong or len(seen) != len(numbers) * result.mask.shape[2]:
        raise read_back_error(name, f"{wrong} voxels differ, {len(seen)} frames")
    for value, total in sums.items():
        if found[value] and np.abs(total / found[value] - _centroid(result.mask, value)).max() > ON_GRID_MM:
            raise read_back_error(name, f"the centroid of label value {value} lies elsewhere")


def _frames(dataset: Dataset) -> list[tuple[NDArray[np.bool_], int, NDArray[np.float64]]]:
    """Return each frame (rows, columns), its segment, and (3, 3): (column, row, 1) -> mm in RAS+."""
    shape = (int(dataset.NumberOfFrames), int(dataset.Rows), int(dataset.Columns))
    bits = np.asarray(unpack_bits(dataset.PixelData))[: int(np.prod(shape))].reshape(shape).astype(bool)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    rows = []
    for frame, item in zip(bits, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        # What all frames have in common stands once, in the shared groups.
        groups = {word: (item.get(word) or shared[word].value)[0] for word in _GROUPS}
        number, measures, plane, place = groups.values()
        down, across = (float(value) for value in measures.PixelSpacing)
        cosines = np.array(plane.ImageOrientationPatient, np.float64).reshape(2, 3)
        position = np.array(place.ImagePositionPatient, np.float64)
        to_lps = np.stack([cosines[0] * across, cosines[1] * down, position], axis=1)
        rows.append((frame, int(number.ReferencedSegmentNumber), LPS_TO_RAS[:, None] * to_lps))
    return rows


def _slice_of(mask: Volume, to_ras: NDArray[np.float64]) -> tuple[int, float]:
    """Return which slice of the mask a frame is nearest to, and how far (mm) its corners lie from that slice's."""
    k = round(float((np.linalg.inv(mask.affine) @ [*to_ras[:, 2], 1])[2]))
    if not 0 <= k < mask.shape[2]:
        return 0, np.inf
    right, down = mask.shape[0] - 1, mask.shape[1] - 1
    corners = np.array([(0, 0), (right, 0), (0, down), (right, down)], np.float64)
    frame = to_ras @ np.c_[corners, np.ones(4)].T
    own = mask.affine[:3] @ np.c_[corners, np.full(4, k), np.ones(4)].T
    return k, float(np.linalg.norm(frame - own, axis=0).max())


def _centroid(mask: Volume, value: int) -> NDArray[np.float64]:
    index = np.argwhere(mask.array[0] == value).mean(axis=0)
    return np.asarray(mask.affine[:3, :3] @ index + mask.affine[:3, 3])
