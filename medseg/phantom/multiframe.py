"""Write volumes as one enhanced multi-frame DICOM file, many frames with functional groups (PS3.3 C.7.6.16)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.valuerep import format_number_as_ds

from medseg.files import write_atomically
from medseg.volume import Volume

CLASSES: dict[str, tuple[str, str]] = {
    "CT": (uid.EnhancedCTImageStorage, "CTImageFrameTypeSequence"),
    "MR": (uid.EnhancedMRImageStorage, "MRImageFrameTypeSequence"),
    "PT": (uid.EnhancedPETImageStorage, "PETFrameTypeSequence"),
}


def write_multiframe(
    volumes: Sequence[Volume], path: Path, *, modality: str, slopes: Sequence[float] = (1.0,), seed: int | None = None
) -> Path:
    """Write time points of one grid into one file.

    Parameters
    ----------
    volumes : each (1, I, J, K) of whole multiples of the slopes that fit 16 signed bits; frames run along K.
    slopes : of each slice, or one for all.
    seed : shuffles the frames in the file; None leaves them in order.
    """
    first = volumes[0]
    places = [(time, k) for time in range(len(volumes)) for k in range(first.shape[2])]
    if seed is not None:
        places = [places[n] for n in np.random.default_rng(seed).permutation(len(places))]
    scale = [slopes[k % len(slopes)] for k in range(first.shape[2])]
    frames = [np.rint(volumes[time].array[0, :, :, k].T / scale[k]) for time, k in places]
    dataset = _head(first, modality, len(volumes))
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = len(places), first.shape[1], first.shape[0]
    dataset.SharedFunctionalGroupsSequence = [_shared(first, CLASSES[modality][1])]
    dataset.PerFrameFunctionalGroupsSequence = [_own(first, time, k, scale[k]) for time, k in places]
    dataset.PixelData = np.stack(frames).astype("<i2").tobytes()
    write_atomically(path, partial(_save, dataset))
    return path


def _save(dataset: Dataset, path: Path) -> None:
    dataset.save_as(path, enforce_file_format=True)


def _item(**values: Any) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _numbers(values: Any) -> list[str]:
    return [str(format_number_as_ds(float(value) + 0.0)) for value in values]


def _head(volume: Volume, modality: str, times: int) -> Dataset:
    names = [modality, str(times), volume.grid]
    dimensions = uid.generate_uid(entropy_srcs=[*names, "dimensions"])
    pointers = ("StackID", "InStackPositionNumber", "TemporalPositionIndex")
    dataset = _item(
        SOPClassUID=CLASSES[modality][0],
        SOPInstanceUID=uid.generate_uid(entropy_srcs=[*names, "instance"]),
        StudyInstanceUID=uid.generate_uid(entropy_srcs=[*names, "study"]),
        SeriesInstanceUID=uid.generate_uid(entropy_srcs=[*names, "series"]),
        FrameOfReferenceUID=uid.generate_uid(entropy_srcs=[*names, "frame"]),
        Modality=modality,
        PatientID="PHANTOM",
        InstanceNumber=1,
        ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=16,
        BitsStored=16,
        HighBit=15,
        PixelRepresentation=1,
        DimensionOrganizationSequence=[_item(DimensionOrganizationUID=dimensions)],
        DimensionIndexSequence=[
            _item(
                DimensionOrganizationUID=dimensions,
                DimensionIndexPointer=Tag(word),
                FunctionalGroupPointer=Tag("FrameContentSequence"),
            )
            for word in pointers
        ],
    )
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    if modality == "PT":
        dataset.Units = "BQML"
    return dataset


def _shared(volume: Volume, frame_type: str) -> Dataset:
    cosines = np.diag([-1.0, -1, 1]) @ volume.affine[:3, :2] / volume.spacing[:2]
    measures = _item(
        PixelSpacing=_numbers([volume.spacing[1], volume.spacing[0]]),
        SliceThickness=_numbers(volume.spacing[2:])[0],
    )
    return _item(
        PixelMeasuresSequence=[measures],
        PlaneOrientationSequence=[_item(ImageOrientationPatient=_numbers(cosines.T.ravel()))],
        **{frame_type: [_item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])]},
    )


def _own(volume: Volume, time: int, k: int, slope: float) -> Dataset:
    position = np.diag([-1.0, -1, 1]) @ (volume.affine[:3, 3] + k * volume.affine[:3, 2])
    content = _item(
        StackID="1",
        InStackPositionNumber=k + 1,
        TemporalPositionIndex=time + 1,
        DimensionIndexValues=[1, k + 1, time + 1],
    )
    return _item(
        FrameContentSequence=[content],
        PlanePositionSequence=[_item(ImagePositionPatient=_numbers(position))],
        PixelValueTransformationSequence=[
            _item(RescaleIntercept="0", RescaleSlope=_numbers([slope])[0], RescaleType="HU")
        ],
    )
