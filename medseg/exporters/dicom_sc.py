"""One page of slices with the outlines of a result as a DICOM Secondary Capture, read back before it counts.

For viewers that show nothing of a Segmentation. The page names no patient (BurnedInAnnotation NO); its header does.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from medseg.errors import ExportError
from medseg.exporters.dicom_codes import label_segments
from medseg.exporters.dicom_source import (
    RESEARCH,
    equipment,
    identity,
    item,
    study_of,
    write_object,
)
from medseg.exporters.dicom_sr import label_volumes
from medseg.exporters.result import Result, read_back_error
from medseg.volume import same_grid

HASH_LETTERS = 12
Page = NDArray[np.uint8]


def write_sc(path: Path, result: Result) -> tuple[str, ...]:
    """Write the overlay page of a result.

    Returns
    -------
    tuple of str
        No notes.

    Raises
    ------
    ExportError : NEEDS_DICOM, NOT_ON_SOURCE_GRID, SOURCE_CHANGED, READ_BACK, or it cannot be written.
    """
    result.need_series()
    page = draw_page(result)
    write_object(path, result, partial(build_sc, page=page), partial(check_sc, page=page))
    return ()


def draw_page(result: Result) -> Page:
    """Return the page (rows, columns, 3): slices, outlines, the volume of each label, and what made them.

    Raises
    ------
    ExportError : NOT_ON_SOURCE_GRID, the mask and the image do not lie on one grid.
    """
    from medseg.plots import Structure, colours_for, overlay_page

    if not same_grid(result.source, result.on_image):
        raise ExportError(
            "the mask does not lie on the grid of its image: no page shows both; leave sc out",
            code="NOT_ON_SOURCE_GRID",
        )
    segments = label_segments(result.spec)
    colours = colours_for((s.value for s in segments), {s.value: s.color for s in segments})
    volumes = label_volumes(result)
    rows = [
        Structure(s.value, s.name, colours[s.value], f"{volumes[s.name]:.4g} mL" if volumes[s.name] else "not found")
        for s in segments
    ]
    version = equipment(result)["software_versions"]
    footer = f"medseg {version}    model {result.spec.name}    {result.model[:HASH_LETTERS]}"
    return overlay_page(result.source, result.on_image, rows, footer=footer)


def build_sc(result: Result, images: list[Dataset], *, page: Page) -> Dataset:
    """Return the object in memory; `images` are the source headers in the order of the mask's K."""
    names, made_by = identity(result, "SC"), equipment(result)
    dataset = item(
        **study_of(images[0]),
        SOPClassUID=SecondaryCaptureImageStorage,
        SOPInstanceUID=names["sop_instance_uid"],
        SeriesInstanceUID=names["series_instance_uid"],
        Modality="OT",
        SeriesNumber=names["series_number"],
        SeriesDescription=names["series_description"],
        Laterality=None,  # unknown is allowed to be empty, absent is not
        Manufacturer=names["manufacturer"],
        ManufacturerModelName=made_by["manufacturer_model_name"],
        SoftwareVersions=made_by["software_versions"],
        DeviceSerialNumber=made_by["device_serial_number"],
        ConversionType="WSD",
        InstanceNumber=names["instance_number"],
        PatientOrientation=None,  # of many slices there is none
        ContentDate=None,
        ContentTime=None,
        DateOfSecondaryCapture=None,
        TimeOfSecondaryCapture=None,
        ImageType=["DERIVED", "SECONDARY", "OTHER"],
        DerivationDescription=f"Outlines of a segmentation by software, {RESEARCH} ONLY, model {result.model}",
        ImageComments=f"{RESEARCH} ONLY, not reviewed by a person",
        BurnedInAnnotation="NO",
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
        Rows=page.shape[0],
        Columns=page.shape[1],
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
        PixelData=page.tobytes(),
    )
    dataset["PixelData"].VR = "OB"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def check_sc(path: Path, *, name: str, result: Result, page: Page) -> None:
    """Compare the pixels in a file with the page, and its study with that of the series.

    Raises
    ------
    ExportError : READ_BACK.
    """
    dataset: Any = pydicom.dcmread(path)
    found = dataset.pixel_array
    if found.shape != page.shape or not np.array_equal(found, page):
        raise read_back_error(name, "other pixels")
    if (dataset.BurnedInAnnotation, dataset.StudyInstanceUID) != ("NO", result.need_series().study_uid):
        raise read_back_error(name, "another study")
