"""Write a Volume as a classic DICOM series (one file per slice), as a scanner would.

Deterministic: the same arguments give the same bytes, UIDs included. Every identifying tag is empty unless given.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds

from medseg.errors import ExportError
from medseg.files import write_atomically
from medseg.volume import Volume, reorient

Plane = Literal["axial", "sagittal", "coronal"]
PLANES: dict[str, str] = {"axial": "LPS", "sagittal": "PIR", "coronal": "LIP"}
"""Axis codes (columns, rows, slices) of the usual way to slice a patient."""

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Modality:
    """How a scanner of one kind stores its values.

    Attributes
    ----------
    sop_class : DICOM storage class.
    dtype : type of the stored values.
    rescale : (slope, intercept), None for stored values without a rescale, "slice" for a slope per slice.
    tags : what the module of that modality demands, by keyword.
    """

    sop_class: str
    dtype: type[np.integer[Any]]
    rescale: tuple[float, float] | Literal["slice"] | None
    tags: dict[str, Any]


MODALITIES: dict[str, Modality] = {
    "CT": Modality(
        CTImageStorage,
        np.int16,
        (1.0, -1024.0),
        {"KVP": "120", "AcquisitionNumber": "1", "PatientPosition": "HFS"},
    ),
    "MR": Modality(
        MRImageStorage,
        np.uint16,
        None,
        {
            "ScanningSequence": "SE",
            "SequenceVariant": "NONE",
            "ScanOptions": None,
            "MRAcquisitionType": "2D",
            "RepetitionTime": "500",
            "EchoTime": "10",
            "EchoTrainLength": "1",
            "AcquisitionNumber": "1",
            "PatientPosition": "HFS",
        },
    ),
    "PT": Modality(
        PositronEmissionTomographyImageStorage,
        np.uint16,
        "slice",
        {
            "Units": "BQML",
            "DecayCorrection": "START",
            "DecayFactor": "1",
            "CountsSource": "EMISSION",
            "SeriesType": ["STATIC", "IMAGE"],
            "CorrectedImage": ["DECY", "ATTN"],
            "CollimatorType": "NONE",
            "ActualFrameDuration": "60000",
            "FrameReferenceTime": "0",
            "AcquisitionDate": "20000101",
            "AcquisitionTime": "120000",
            # type 2: present, empty when unknown; the orientation excludes PatientPosition
            "RadiopharmaceuticalInformationSequence": [],
            "PatientOrientationCodeSequence": [],
            "PatientGantryRelationshipCodeSequence": [],
        },
    ),
}


def write_series(  # noqa: PLR0913 (each is a DICOM attribute that a caller may need to set)
    volume: Volume,
    folder: Path,
    *,
    modality: Literal["CT", "MR", "PT"] = "CT",
    plane: Plane | None = None,
    series_uid: str | None = None,
    study_uid: str | None = None,
    patient_id: str = "",
    description: str = "",
    manufacturer: str = "",
    series_number: int = 1,
    shuffle: bool = False,
    seed: int = 0,
) -> list[Path]:
    """Write one slice per step along K; I runs along a row (column index), J down the rows.

    Parameters
    ----------
    volume : (1, I, J, K) in mm; CT in HU (rounded to whole HU), MR in whole numbers 0 to 65535, PT in Bq/mL (a slope
        per slice, so values keep four to five digits). I and J must be at right angles; K may lean (a tilted gantry).
    folder : made when absent; files are called ``IM0001.dcm``, ...
    plane : turn the volume first so that its slices are axial, sagittal or coronal; None slices along its K.
    series_uid, study_uid : made from `seed`, `patient_id`, the texts and the voxels when None.
    shuffle : give the files names in an order that has nothing to do with their place.

    Returns
    -------
    list of Path
        The files in order of K.

    Raises
    ------
    ExportError : the volume has several channels, no scale in mm, a skewed slice, or values that the modality cannot
        store; or the files cannot be written.
    """
    volume = volume if plane is None else reorient(volume, PLANES[plane])
    _check(volume, modality)
    kind = MODALITIES[modality]
    content = hashlib.sha256(volume.array.tobytes() + volume.affine.tobytes()).hexdigest()
    study_uid = study_uid or generate_uid(entropy_srcs=["study", str(seed), patient_id])
    series_uid = series_uid or generate_uid(
        entropy_srcs=["series", study_uid, modality, description, str(series_number), content]
    )
    common = _image_plane(volume) | kind.tags
    common |= {
        "SOPClassUID": kind.sop_class,
        "Modality": modality,
        "StudyInstanceUID": study_uid,
        "SeriesInstanceUID": series_uid,
        "FrameOfReferenceUID": generate_uid(entropy_srcs=["frame of reference", study_uid]),
        "PatientID": patient_id,
        "SeriesDescription": description,
        "Manufacturer": manufacturer,
        "SeriesNumber": series_number,
        "NumberOfSlices": volume.shape[2] if modality == "PT" else None,
    }
    numbers = np.arange(volume.shape[2])
    if shuffle:
        numbers = np.random.default_rng(seed).permutation(numbers)
    paths = []
    for k, number in enumerate(numbers):
        dataset = _slice(volume, k, kind, common)
        paths.append(Path(folder) / f"IM{number + 1:04d}.dcm")
        write_atomically(paths[-1], partial(_save, dataset))
    return paths


def _check(volume: Volume, modality: str) -> None:
    """Refuse a volume that the series could not hold without loss of place or scale."""
    if modality not in MODALITIES:
        raise ExportError(f"modality {modality!r} is not one of {', '.join(MODALITIES)}")
    if volume.array.shape[0] != 1 or volume.unit != "mm":
        raise ExportError(
            f"a series holds one channel in mm, got {volume.array.shape[0]} channels in {volume.unit}; pick a channel"
        )
    columns, rows = (volume.affine[:3, axis] / volume.spacing[axis] for axis in (0, 1))
    if abs(columns @ rows) > 1e-4:
        raise ExportError("rows and columns are not at right angles: DICOM has no place for such a slice; resample it")
    low, high = (float(bound) for bound in (volume.array.min(), volume.array.max()))
    limits = {"CT": (-33792.0, 31743.0), "MR": (0.0, 65535.0), "PT": (0.0, np.inf)}[modality]
    if not (limits[0] <= low and high <= limits[1]):
        raise ExportError(f"{modality} values must lie in {limits[0]:g} to {limits[1]:g}, got {low:g} to {high:g}")


def _image_plane(volume: Volume) -> dict[str, Any]:
    """Attributes that every slice shares: orientation, spacing, and the fixed ones of a plain image."""
    lps = LPS_FROM_RAS @ volume.affine[:3, :3]
    columns, rows = lps[:, 0] / volume.spacing[0], lps[:, 1] / volume.spacing[1]
    empty = (
        "PatientName PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName "
        "PositionReferenceIndicator Laterality"
    )
    return dict.fromkeys(empty.split()) | {
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL" if abs(np.cross(columns, rows)[2]) > 0.9 else "OTHER"],
        "SeriesDate": "20000101",
        "SeriesTime": "120000",
        "ImageOrientationPatient": [_ds(value) for value in (*columns, *rows)],
        # DICOM's order is distance between rows (along J), then between columns (along I)
        "PixelSpacing": [_ds(volume.spacing[1]), _ds(volume.spacing[0])],
        "SliceThickness": _ds(volume.spacing[2]),
        "Columns": volume.shape[0],
        "Rows": volume.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
    }


def _slice(volume: Volume, k: int, kind: Modality, common: dict[str, Any]) -> Dataset:
    """Build the dataset of slice `k`."""
    dataset = Dataset()
    for keyword, value in common.items():
        if keyword != "NumberOfSlices" or value is not None:
            setattr(dataset, keyword, value)
    position = LPS_FROM_RAS @ (volume.affine[:3, 2] * k + volume.affine[:3, 3])
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[common["SeriesInstanceUID"], str(k)])
    dataset.InstanceNumber = k + 1
    dataset.ImagePositionPatient = [_ds(value) for value in position]
    if common["Modality"] == "PT":
        dataset.ImageIndex = k + 1
    values = volume.array[0, :, :, k].T.astype(np.float64)
    rescale = _slice_rescale(values) if kind.rescale == "slice" else kind.rescale
    stored = values if rescale is None else (values - rescale[1]) / rescale[0]
    if rescale is not None:
        dataset.RescaleSlope, dataset.RescaleIntercept = _ds(rescale[0]), _ds(rescale[1])
        if common["Modality"] == "CT":
            dataset.RescaleType = "HU"
    dataset.PixelRepresentation = int(np.issubdtype(kind.dtype, np.signedinteger))
    pixels: NDArray[Any] = np.ascontiguousarray(np.rint(stored).astype(np.dtype(kind.dtype).newbyteorder("<")))
    dataset.PixelData = pixels.tobytes()
    return dataset


def _slice_rescale(values: NDArray[np.float64]) -> tuple[float, float]:
    """Spread one slice over the stored range, with a slope short enough to be written exactly."""
    slope = float(f"{values.max() / 32767:.6e}")
    return (slope if slope > 0 else 1.0, 0.0)


def _ds(value: float) -> str:
    """Write a number as a DICOM decimal string (16 characters at most), without a negative zero."""
    return str(format_number_as_ds(float(value) + 0.0))


def _save(dataset: Dataset, path: Path) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta = meta
    dataset.save_as(path, enforce_file_format=True)
