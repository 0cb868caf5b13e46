"""Masks as RT Structure Sets: filled by another program's rule they are the mask; a wrong file is never left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Polygon

from medseg.errors import ExportError
from medseg.exporters import dicom_rtstruct
from medseg.exporters.dicom_rtstruct import write_rtstruct

Build = Callable[..., Any]


def written(folder: Path, result: Any) -> pydicom.Dataset:
    write_rtstruct(folder / "x.rtstruct.dcm", result)
    return pydicom.dcmread(folder / "x.rtstruct.dcm")


def filled_on(image: pydicom.Dataset, roi: pydicom.Dataset) -> np.ndarray:
    """(rows, columns) of the structure on one slice, from the attributes of DICOM and matplotlib alone."""
    start = np.array(image.ImagePositionPatient, float)
    cosines = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
    down, across = map(float, image.PixelSpacing)
    centres = np.argwhere(np.ones((image.Rows, image.Columns), bool))[:, ::-1] * [across, down]
    inside = np.zeros(len(centres), bool)
    for contour in roi.get("ContourSequence", ()):
        if contour.ContourImageSequence[0].ReferencedSOPInstanceUID == image.SOPInstanceUID:
            points = np.array(contour.ContourData, float).reshape(-1, 3) - start
            assert contour.NumberOfContourPoints == len(points)
            assert np.abs(points @ np.cross(*cosines)).max() < 1e-3, "the contour lies in the plane of its image"
            inside |= Polygon(points @ cosines.T).contains_points(centres)
    return inside.reshape(image.Rows, image.Columns)


def test_filled_contours_are_the_mask(dicom_result: Build, dicom_grid: str, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", dicom_grid)
    dataset = written(tmp_path, result)
    images = [pydicom.dcmread(file) for file in result.series.files]
    normal = np.cross(*np.array(images[0].ImageOrientationPatient, float).reshape(2, 3))
    images.sort(key=lambda image: float(np.array(image.ImagePositionPatient, float) @ normal))
    for roi, value in zip(dataset.ROIContourSequence, result.spec.foreground.values(), strict=True):
        for k, image in enumerate(images):
            assert np.array_equal(filled_on(image, roi), (result.mask.array[0, :, :, k] == value).T)


def test_it_says_what_it_is(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", PatientName="Müller^Änne", SpecificCharacterSet="ISO_IR 100", PatientID="7")
    dataset = written(tmp_path, result)
    source = pydicom.dcmread(result.series.files[0])
    assert str(dataset.PatientName) == "Müller^Änne"
    for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert dataset[keyword].value == source[keyword].value
    assert dataset.StructureSetLabel == "RESEARCH USE"
    assert dataset.ApprovalStatus == "UNAPPROVED"
    assert [roi.ROIName for roi in dataset.StructureSetROISequence] == ["liver", "thing_b", "lesion", "absent"]
    assert {roi.ROIGenerationAlgorithm for roi in dataset.StructureSetROISequence} == {"AUTOMATIC"}
    liver, *_, absent = dataset.ROIContourSequence
    assert list(liver.ROIDisplayColor) == [0xB5, 0x52, 0x3B]
    assert {contour.ContourGeometricType for contour in liver.ContourSequence} == {"CLOSED_PLANAR"}
    assert "ContourSequence" not in absent
    assert dataset.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence[0].CodeValue == "10200004"


def test_same_bytes_and_another_model(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    one = written(tmp_path, result)
    before = (tmp_path / "x.rtstruct.dcm").read_bytes()
    written(tmp_path, result)
    assert (tmp_path / "x.rtstruct.dcm").read_bytes() == before
    assert written(tmp_path, replace(result, model="beef" * 16)).SOPInstanceUID != one.SOPInstanceUID


def move(dataset: pydicom.Dataset) -> None:
    contour = dataset.ROIContourSequence[0].ContourSequence[0]
    contour.ContourData = [float(x) + 0.9 for x in contour.ContourData]


def lift(dataset: pydicom.Dataset) -> None:
    contour = dataset.ROIContourSequence[0].ContourSequence[0]
    contour.ContourData = [float(x) + (0.5 if n % 3 == 2 else 0) for n, x in enumerate(contour.ContourData)]


def lose(dataset: pydicom.Dataset) -> None:
    del dataset.ROIContourSequence[0].ContourSequence[-1]


def swap(dataset: pydicom.Dataset) -> None:
    one, other = dataset.ROIContourSequence[:2]
    one.ReferencedROINumber, other.ReferencedROINumber = 2, 1


def forget(dataset: pydicom.Dataset) -> None:
    del dataset.ROIContourSequence[1]


@pytest.mark.parametrize("damage", [move, lift, lose, swap, forget])
def test_a_wrong_file_is_never_left(
    dicom_result: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[pydicom.Dataset], None]
) -> None:
    build = dicom_rtstruct.build_rtstruct

    def damaged(*args: Any) -> pydicom.Dataset:
        dataset = build(*args)
        damage(dataset)
        return dataset

    monkeypatch.setattr(dicom_rtstruct, "build_rtstruct", damaged)
    with pytest.raises(ExportError) as caught:
        write_rtstruct(tmp_path / "x.rtstruct.dcm", dicom_result(tmp_path / "in"))
    assert caught.value.code == "READ_BACK"
    assert not list(tmp_path.glob("*.dcm"))


def test_it_needs_a_series(dicom_result: Build, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        write_rtstruct(tmp_path / "x.rtstruct.dcm", replace(dicom_result(tmp_path / "in"), series=None))
    assert caught.value.code == "NEEDS_DICOM"
