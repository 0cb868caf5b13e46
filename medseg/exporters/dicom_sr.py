"""Volumes of the labels as a DICOM Structured Report (TID 1500), read back before it counts."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pydicom
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import SegmentationStorage

from medseg.exporters.dicom_codes import property_codes, uncoded
from medseg.exporters.dicom_seg import build_seg, seg_uid
from medseg.exporters.dicom_source import (
    MANUFACTURER,
    derived_uid,
    description,
    finish,
    save,
    silent,
    source_images,
)
from medseg.exporters.result import Result, read_back_error

SERIES_NUMBER = 9003
MILLILITRE = Code("mL", "UCUM", "milliliter")
DIGITS = 4
"""Decimals of a volume in mL, as in the ledger."""


def write_sr(path: Path, result: Result) -> tuple[str, ...]:
    """Write the volume of each label that was found, with a reference to its segment of the Segmentation.

    A mask without any label gives a report without measurements.

    Returns
    -------
    tuple of str
        Notes: PRIVATE_CODE where a label has no code in the spec.

    Raises
    ------
    ExportError : as write_seg.
    """
    images = source_images(result)
    with silent():
        dataset = build_sr(result, images)
    save(path, dataset, partial(check_sr, name=path.name, result=result))
    return ("PRIVATE_CODE",) * uncoded(result.spec)


def label_volumes(result: Result) -> dict[str, float]:
    """Return label -> mL for the labels that stand in the mask."""
    counts = {name: int(np.count_nonzero(result.mask.array == v)) for name, v in result.spec.foreground.items()}
    return {name: round(n * result.mask.voxel_volume / 1000, DIGITS) for name, n in counts.items() if n}


def build_sr(result: Result, images: list[Dataset]) -> Dataset:
    """Return the object in memory; `images` are the source headers in the order of the mask's K."""
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=derived_uid(result, "SR", "device"),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=result.spec.name[:64],
        serial_number=result.model[:64],
    )
    observer = sr.ObserverContext(codes.DCM.Device, device)
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=[_group(result, name, volume) for name, volume in label_volumes(result).items()],
        title=codes.DCM.ImagingMeasurementReport,
    )
    dataset: Dataset = sr.Comprehensive3DSR(
        evidence=[*images, build_seg(result, images)],
        content=report[0],
        series_instance_uid=derived_uid(result, "SR", "series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=derived_uid(result, "SR", "instance"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        series_description=description(result.spec),
    )
    finish(dataset, images[0])
    return dataset


def _group(result: Result, name: str, volume: float) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    """Return the measurement of one label."""
    series = result.need_series()
    category, kind = property_codes(result.spec, name)
    number = list(result.spec.foreground).index(name) + 1
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=derived_uid(result, "SEG", "tracking", name), identifier=f"{result.spec.name} {name}"[:64]
        ),
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=SegmentationStorage,
            sop_instance_uid=seg_uid(result),
            segment_number=number,
            source_series=sr.SourceSeriesForSegmentation(referenced_series_instance_uid=series.uid),
        ),
        finding_category=category,
        finding_type=kind,
        algorithm_id=sr.AlgorithmIdentification(
            name=MANUFACTURER,
            version=version("medseg"),
            parameters=[f"model={result.spec.name}", f"model_hash={result.model}"],
        ),
        measurements=[sr.Measurement(name=codes.SCT.Volume, value=volume, unit=MILLILITRE)],
    )


def check_sr(path: Path, *, name: str, result: Result) -> None:
    """Compare the volumes in a file, and the segments that they refer to, with the mask.

    Raises
    ------
    ExportError : READ_BACK.
    """
    found: dict[int, float] = {}
    numbers: list[int] = []
    for item in pydicom.dcmread(path).ContentSequence:
        for group in item.get("ContentSequence", ()) if item.ValueType == "CONTAINER" else ():
            segment, volume = 0, 0.0
            for row in group.ContentSequence:
                if row.ValueType == "IMAGE":
                    segment = int(np.atleast_1d(row.ReferencedSOPSequence[0].ReferencedSegmentNumber)[0])
                if row.ValueType == "NUM":
                    volume = float(row.MeasuredValueSequence[0].NumericValue)
            found[segment] = volume
            numbers.append(segment)
    names = list(result.spec.foreground)
    wanted = {names.index(label) + 1: volume for label, volume in label_volumes(result).items()}
    if found != wanted or len(numbers) != len(wanted):
        raise read_back_error(name, f"volumes of segments {found}, expected {wanted}")
