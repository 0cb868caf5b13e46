"""Masks as DICOM RT Structure Sets (closed planar contours), read back before they count.

Contours follow the edges of the voxels, and holes are joined to their outline by a channel of no width (keyhole), so
that every reader fills the voxels of the mask: no centre lies on a contour, and no rule for holes is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.coding import Code
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage
from pydicom.valuerep import format_number_as_ds

from medseg.exporters.dicom_codes import Segment, label_segments
from medseg.exporters.dicom_source import (
    LPS_TO_RAS,
    MANUFACTURER,
    RESEARCH,
    equipment,
    identity,
    item,
    study_of,
    write_object,
)
from medseg.exporters.outlines import filled, outlines
from medseg.exporters.result import Result, read_back_error

OFF_PLANE = 0.01
"""How far a point may lie off its slice when it is read back, in slices: decimal strings are rounded."""


def write_rtstruct(path: Path, result: Result) -> tuple[str, ...]:
    """Write a label map as an RT Structure Set with one ROI a label of the spec; absent labels have no contour.

    Returns
    -------
    tuple of str
        Notes: PRIVATE_CODE where a label has no code in the spec.

    Raises
    ------
    ExportError : NEEDS_DICOM, NOT_ON_SOURCE_GRID, SOURCE_CHANGED, READ_BACK (the contours, filled, give another
        mask), or it cannot be written.
    """
    return write_object(path, result, build_rtstruct, check_rtstruct)


def build_rtstruct(result: Result, images: list[Dataset]) -> Dataset:
    """Return the object in memory; `images` are the source headers in the order of the mask's K."""
    source = images[0]
    frame = str(source.FrameOfReferenceUID)
    names, made_by = identity(result, "RTSTRUCT"), equipment(result)
    dataset = item(
        SpecificCharacterSet="ISO_IR 192",
        **study_of(source),
        SOPClassUID=RTStructureSetStorage,
        SOPInstanceUID=names["sop_instance_uid"],
        SeriesInstanceUID=names["series_instance_uid"],
        Modality="RTSTRUCT",
        SeriesNumber=names["series_number"],
        SeriesDescription=names["series_description"],
        OperatorsName=None,
        Manufacturer=MANUFACTURER,
        ManufacturerModelName=made_by["manufacturer_model_name"],
        SoftwareVersions=made_by["software_versions"],
        DeviceSerialNumber=made_by["device_serial_number"],
        InstanceNumber=names["instance_number"],
        FrameOfReferenceUID=frame,
        PositionReferenceIndicator=None,
        StructureSetLabel=RESEARCH,
        StructureSetDescription=f"{RESEARCH} ONLY, not reviewed by a person; model {result.model}",
        StructureSetDate=None,
        StructureSetTime=None,
        ApprovalStatus="UNAPPROVED",
        ReferencedFrameOfReferenceSequence=[_reference(images, frame)],
        StructureSetROISequence=[],
        ROIContourSequence=[],
        RTROIObservationsSequence=[],
    )
    for segment in label_segments(result.spec):
        dataset.StructureSetROISequence.append(
            item(
                ROINumber=segment.number,
                ReferencedFrameOfReferenceUID=frame,
                ROIName=segment.name[:64],
                ROIGenerationAlgorithm="AUTOMATIC",
                ROIGenerationDescription=f"medseg {made_by['software_versions']}",
            )
        )
        dataset.ROIContourSequence.append(_contours(result, segment, images))
        dataset.RTROIObservationsSequence.append(_observation(segment.number, segment.type))
    dataset.file_meta = FileMetaDataset()
    # In explicit syntaxes a contour may not have more than 64 KiB.
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return dataset


def _image(source: Dataset) -> Dataset:
    return item(ReferencedSOPClassUID=source.SOPClassUID, ReferencedSOPInstanceUID=source.SOPInstanceUID)


def _reference(images: list[Dataset], frame: str) -> Dataset:
    series = item(
        SeriesInstanceUID=images[0].SeriesInstanceUID, ContourImageSequence=[_image(image) for image in images]
    )
    study = item(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",  # Detached Study Management (retired), as PS3.3 C.8.8.5 says
        ReferencedSOPInstanceUID=images[0].StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    return item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[study])


def _observation(number: int, code: Code) -> Dataset:
    concept = item(CodeValue=code.value, CodingSchemeDesignator=code.scheme_designator, CodeMeaning=code.meaning)
    return item(
        ObservationNumber=number,
        ReferencedROINumber=number,
        RTROIIdentificationCodeSequence=[concept],
        RTROIInterpretedType=None,
        ROIInterpreter=None,
    )


def _contours(result: Result, segment: Segment, images: list[Dataset]) -> Dataset:
    """Return the contours of one label, slice by slice."""
    roi = item(ReferencedROINumber=segment.number)
    if segment.color is not None:
        roi.ROIDisplayColor = list(bytes.fromhex(segment.color[1:]))
    rows = []
    for k, (image, plane) in enumerate(zip(images, result.planes, strict=True)):
        for polygon in outlines(result.mask.array[0, :, :, k] == segment.value):
            points = np.c_[polygon, np.ones(len(polygon))] @ plane.T * LPS_TO_RAS
            rows.append(
                item(
                    ContourImageSequence=[_image(image)],
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(points),
                    ContourData=[format_number_as_ds(round(float(value), 5) + 0.0) for value in points.ravel()],
                )
            )
    if rows:
        roi.ContourSequence = rows
    return roi


def check_rtstruct(path: Path, *, name: str, result: Result) -> None:
    """Fill the contours of a file and compare with the mask: every voxel of every label.

    Equal voxels on one grid have equal centroids; that the grid is the source's has been checked before.

    Raises
    ------
    ExportError : READ_BACK.
    """
    dataset = pydicom.dcmread(path)
    values = list(result.spec.foreground.values())
    planes = result.planes
    normal = np.cross(planes[0, :, 0], planes[0, :, 1])
    depths = planes[:, :, 2] @ (normal / np.linalg.norm(normal))
    gap = float(np.abs(np.diff(depths)).min(initial=result.mask.spacing[2]))  # of one slice its thickness
    for roi in dataset.ROIContourSequence:
        polygons: dict[int, list[Any]] = {}
        for contour in roi.get("ContourSequence", ()):
            points = np.array(contour.ContourData, np.float64).reshape(-1, 3) * LPS_TO_RAS
            depth = points @ (normal / np.linalg.norm(normal))
            k = int(np.abs(depths - depth[0]).argmin())
            if np.abs(depth - depths[k]).max() > OFF_PLANE * gap:
                raise read_back_error(name, f"a contour lies off slice {k + 1}")
            polygons.setdefault(k, []).append((points - planes[k, :, 2]) @ np.linalg.pinv(planes[k, :, :2]).T)
        wanted = result.mask.array[0] == values[int(roi.ReferencedROINumber) - 1]
        for k in range(result.mask.shape[2]):
            found = filled(polygons.pop(k, []), result.mask.shape[:2])
            if not np.array_equal(found, wanted[:, :, k]):
                raise read_back_error(name, f"{np.count_nonzero(found ^ wanted[:, :, k])} voxels of slice {k + 1}")
    if len(dataset.ROIContourSequence) != len(values):
        raise read_back_error(name, f"{len(dataset.ROIContourSequence)} structures")
