"""Series to draw labels on, in every way to slice a patient; a writer of structure sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from medseg.phantom.dicom import write_series
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume

SHAPE = (21, 18, 9)
"""No multiple of eight: single bits of frames do not end at bytes."""
TURN = nibabel.eulerangles.euler2mat(0.3, -0.2, 0.4)
STEPS = (0.8, 1.1, 3.0)
DIRECTIONS: dict[str, np.ndarray] = {
    "axial": np.diag([-1.0, -1, 1]),
    "sagittal": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
    "coronal": np.array([[-1.0, 0, 0], [0, 0, -1], [0, -1, 0]]),
    "oblique": TURN @ np.diag([-1.0, -1, 1]),
    "feet first": np.diag([1.0, -1, -1]),
    "prone": np.diag([1.0, 1, 1]),
}
"""Name -> directions of I, J, K as columns, RAS."""


@pytest.fixture(params=list(DIRECTIONS))
def direction(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_series(tmp_path: Path) -> Callable[..., tuple[Volume, list[Path]]]:
    """Write an MR series in a direction; return it as read, and its files in the order of K."""

    def make(direction: str = "axial", name: str = "image", **how: Any) -> tuple[Volume, list[Path]]:
        affine = nibabel.affines.from_matvec(DIRECTIONS[direction] @ np.diag(STEPS), [12.5, -31.25, 101])
        values = np.random.default_rng(3).integers(0, 500, (1, *SHAPE)).astype(np.float32)
        files = write_series(Volume(values, affine), tmp_path / name, modality="MR", **how)
        image = read_series(tmp_path / name)
        np.testing.assert_allclose(image.affine, affine, atol=1e-6)
        return image, files

    return make


def truth(number: int = 0) -> np.ndarray:
    """A lopsided structure that no mirroring and no swap of axes leaves as it is; others do not touch it."""
    found = np.zeros(SHAPE, bool)
    if number == 0:
        found[3:12, 4:9, 2:7] = True
        found[9:15, 9:12, 3] = True
        found[4:6, 5:7, 4] = False
    else:
        found[16:20, 2:15, 6:8] = True
    return found


def save_structures(  # (each is something that a test changes)
    path: Path,
    image: Volume,
    rois: dict[str, Sequence[Any]],
    *,
    frame: str = "",
    references: Sequence[str] = (),
    kind: str = "CLOSED_PLANAR",
    digits: int = 6,
) -> Path:
    """Write a structure set.

    rois : ROI name -> contours, each (n, 3) in index units of the image.
    """
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = generate_uid(), generate_uid()
    dataset.Modality = "RTSTRUCT"
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(rois.items(), start=1):
        roi, group = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, frame
        group.ReferencedROINumber, group.ContourSequence = number, []
        for points in contours:
            contour, lps = Dataset(), nibabel.affines.apply_affine(image.affine, points) * [-1, -1, 1]
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
            contour.ContourData = [f"{value:.{digits}f}" for value in lps.ravel()]
            contour.ContourImageSequence = [Dataset() for _ in references]
            for item, uid in zip(contour.ContourImageSequence, references, strict=True):
                item.ReferencedSOPInstanceUID = uid
            group.ContourSequence.append(contour)
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(group)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def structures() -> Callable[..., Path]:
    return save_structures


@pytest.fixture
def structure() -> Callable[..., np.ndarray]:
    return truth


@pytest.fixture
def frame_of() -> Callable[[Path], str]:
    return lambda file: str(pydicom.dcmread(file).FrameOfReferenceUID)
