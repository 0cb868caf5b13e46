"""Volumes and statistics of the labels as a DICOM Structured Report (TID 1500), read back before it counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from highdicom import sr
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import SegmentationStorage

from medseg.exporters.dicom_codes import MILLILITRE, Segment, label_segments, quantity
from medseg.exporters.dicom_seg import build_seg, seg_uid
from medseg.exporters.dicom_source import (
    MANUFACTURER,
    derived_uid,
    equipment,
    identity,
    tracking,
    write_object,
)
from medseg.exporters.result import Result, read_back_error

DIGITS = 4
"""Decimals of a volume in mL, as in the ledger."""
STATISTICS: dict[Code, Callable[[NDArray[Any]], Any]] = {
    Code("255605001", "SCT", "Minimum"): np.min,
    Code("56851009", "SCT", "Maximum"): np.max,
    Code("373098007", "SCT", "Mean"): partial(np.mean, dtype=np.float64),
    Code("386136009", "SCT", "Standard Deviation"): partial(np.std, dtype=np.float64),
    Code("373099004", "SCT", "Median"): np.median,
}
"""What is said of the values inside a label (PS3.16 CID 7464); the deviation is that of a population (n, not n - 1)."""
VOLUME = ""
"""Stands for the volume where measurements are named by their statistic."""
Measurements = dict[str, tuple[float, str]]
"""VOLUME or the code of a statistic -> value, UCUM unit."""


def write_sr(path: Path, result: Result) -> tuple[str, ...]:
    """Write volume and statistics of each label, with a reference to its segment of the Segmentation.

    The statistics are those of the values of the source series, to 7 digits. A label that was not found has a volume
    of 0 mL and no statistics.

    Returns
    -------
    tuple of str
        Notes: PRIVATE_CODE where a label has no code in the spec.

    Raises
    ------
    ExportError : as write_seg.
    """
    return write_object(path, result, build_sr, check_sr)


def label_volumes(result: Result) -> dict[str, float]:
    """Return label -> mL, for every label of the spec."""
    mask = result.on_image
    counts = {name: int(np.count_nonzero(mask.array == v)) for name, v in result.spec.foreground.items()}
    return {name: round(n * mask.voxel_volume / 1000, DIGITS) for name, n in counts.items()}


def label_statistics(result: Result, segment: Segment) -> dict[Code, float]:
    """Return statistic -> value of the source series inside a label; nothing where it has no voxel."""
    values: NDArray[Any] = result.source.array[0][result.on_image.array[0] == segment.value]
    if not values.size:
        return {}
    return {code: float(f"{float(function(values)):.7g}") for code, function in STATISTICS.items()}


def build_sr(result: Result, images: list[Dataset]) -> Dataset:
    """Return the object in memory; `images` are the source headers in the order of the mask's K."""
    made_by = equipment(result)
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=derived_uid(result, "SR", "device"),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=made_by["manufacturer_model_name"],
        serial_number=made_by["device_serial_number"],
    )
    observer = sr.ObserverContext(codes.DCM.Device, device)
    volumes = label_volumes(result)
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=[
            _group(result, segment, volumes[segment.name]) for segment in label_segments(result.spec)
        ],
        title=codes.DCM.ImagingMeasurementReport,
    )
    dataset: Dataset = sr.Comprehensive3DSR(
        evidence=[*images, build_seg(result, images)],
        content=report[0],
        is_complete=True,
        **identity(result, "SR"),
    )
    return dataset


def _group(result: Result, segment: Segment, volume: float) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    """Return the measurements of one label."""
    series = result.need_series()
    uid, text = tracking(result, segment.name)
    measurements = [sr.Measurement(name=codes.SCT.Volume, value=volume, unit=MILLILITRE)]
    if (measured := quantity(result.source)) is not None:
        what, unit = measured
        measurements += [
            sr.Measurement(name=what, value=value, unit=unit, derivation=statistic)
            for statistic, value in label_statistics(result, segment).items()
        ]
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=uid, identifier=text),
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=SegmentationStorage,
            sop_instance_uid=seg_uid(result),
            segment_number=segment.number,
            source_series=sr.SourceSeriesForSegmentation(referenced_series_instance_uid=series.uid),
        ),
        finding_category=segment.category,
        finding_type=segment.type,
        algorithm_id=sr.AlgorithmIdentification(
            name=MANUFACTURER,
            version=equipment(result)["software_versions"],
            parameters=[f"model={result.spec.name}", f"model_hash={result.model}"],
        ),
        measurements=measurements,
    )


def check_sr(path: Path, *, name: str, result: Result) -> None:
    """Compare the measurements in a file, and the segments that they refer to, with the mask and the image.

    Raises
    ------
    ExportError : READ_BACK.
    """
    volumes, measured = label_volumes(result), quantity(result.source)
    wanted: dict[int, Measurements] = {}
    for segment in label_segments(result.spec):
        wanted[segment.number] = {VOLUME: (volumes[segment.name], MILLILITRE.value)}
        if measured is not None:
            statistics = label_statistics(result, segment)
            wanted[segment.number] |= {code.value: (value, measured[1].value) for code, value in statistics.items()}
    groups = [
        group
        for container in pydicom.dcmread(path).ContentSequence
        if container.ValueType == "CONTAINER"
        for group in container.get("ContentSequence", ())
    ]
    found = dict(_measurements(group) for group in groups)
    if found != wanted or len(groups) != len(wanted):
        raise read_back_error(name, f"measurements of segments {found}, expected {wanted}")


def _measurements(group: Dataset) -> tuple[int, Measurements]:
    """Return the segment that a group of measurements refers to, and what it says."""
    segment, rows = 0, {}
    for row in group.ContentSequence:
        if row.ValueType == "IMAGE":
            segment = int(np.atleast_1d(row.ReferencedSOPSequence[0].ReferencedSegmentNumber)[0])
        if row.ValueType == "NUM":
            value = row.MeasuredValueSequence[0]
            modifiers = [part for part in row.get("ContentSequence", ()) if part.ValueType == "CODE"]
            rows[modifiers[0].ConceptCodeSequence[0].CodeValue if modifiers else VOLUME] = (
                float(value.NumericValue),
                str(value.MeasurementUnitsCodeSequence[0].CodeValue),
            )
    return segment, rows
