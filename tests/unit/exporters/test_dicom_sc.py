"""The overlay page as a Secondary Capture: its pixels, its study, and no word about the patient in the picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medseg.errors import ExportError
from medseg.exporters import dicom_sc
from medseg.exporters.dicom_sc import draw_page, write_sc
from medseg.exporters.dicom_seg import write_seg

Build = Callable[..., Any]


def written(folder: Path, result: Any) -> pydicom.Dataset:
    assert write_sc(folder / "x.sc.dcm", result) == ()
    return pydicom.dcmread(folder / "x.sc.dcm")


def test_it_holds_the_page(dicom_result: Build, dicom_grid: str, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", dicom_grid, PatientID="7", StudyDate="20010203")
    dataset = written(tmp_path, result)
    assert np.array_equal(dataset.pixel_array, draw_page(result))
    source = pydicom.dcmread(result.series.files[0])
    for keyword in ("PatientID", "StudyInstanceUID"):
        assert dataset[keyword].value == source[keyword].value
    assert dataset.SeriesInstanceUID != source.SeriesInstanceUID
    assert dataset.SOPClassUID.name == "Secondary Capture Image Storage"
    assert (dataset.BurnedInAnnotation, dataset.Modality) == ("NO", "OT")
    assert "RESEARCH USE" in dataset.SeriesDescription
    assert dataset.ContentDate == dataset.SeriesDate == dataset.DateOfSecondaryCapture


def test_the_patient_is_not_in_the_picture(dicom_result: Build, tmp_path: Path) -> None:
    tags = {
        "PatientName": "CANARY^NAME",
        "PatientID": "CANARY",
        "StudyDate": "20010203",
        "SeriesDate": "20010203",
        "AccessionNumber": "CANARY",
        "SeriesDescription": "CANARY",
        "InstitutionName": "CANARY",
    }
    plain, named = dicom_result(tmp_path / "a"), dicom_result(tmp_path / "b", **tags)
    assert np.array_equal(written(tmp_path, plain).pixel_array, written(tmp_path, named).pixel_array)


def test_same_bytes_and_another_model(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    one = written(tmp_path, result)
    before = (tmp_path / "x.sc.dcm").read_bytes()
    written(tmp_path, result)
    assert (tmp_path / "x.sc.dcm").read_bytes() == before
    other = written(tmp_path, replace(result, model="beef" * 16))
    write_seg(tmp_path / "x.seg.dcm", result)
    segmentation = pydicom.dcmread(tmp_path / "x.seg.dcm")
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber"):
        assert one[keyword].value != segmentation[keyword].value
    assert len({d.SOPInstanceUID for d in (one, other, segmentation)}) == 3
    assert len({d.SeriesInstanceUID for d in (one, other, segmentation)}) == 3


def test_an_empty_mask_is_a_page_too(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    assert written(tmp_path, replace(result, mask=result.mask.with_array(np.zeros_like(result.mask.array))))


def brighten(dataset: pydicom.Dataset) -> None:
    dataset.PixelData = bytes([dataset.PixelData[0] ^ 1]) + dataset.PixelData[1:]


def crop(dataset: pydicom.Dataset) -> None:
    dataset.Rows -= 1
    dataset.PixelData = dataset.PixelData[: -3 * dataset.Columns]


def move(dataset: pydicom.Dataset) -> None:
    dataset.StudyInstanceUID = "1.2.3"


@pytest.mark.filterwarnings("ignore:The pixel data length")
@pytest.mark.parametrize("damage", [brighten, crop, move])
def test_a_wrong_file_is_never_left(
    dicom_result: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[pydicom.Dataset], None]
) -> None:
    build = dicom_sc.build_sc

    def damaged(*args: Any, **options: Any) -> pydicom.Dataset:
        dataset = build(*args, **options)
        damage(dataset)
        return dataset

    monkeypatch.setattr(dicom_sc, "build_sc", damaged)
    with pytest.raises(ExportError) as caught:
        write_sc(tmp_path / "x.sc.dcm", dicom_result(tmp_path / "in"))
    assert caught.value.code == "READ_BACK"
    assert not list(tmp_path.glob("*.dcm"))


def test_mask_and_image_on_two_grids_are_not_drawn(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    moved = result.image.affine.copy()
    moved[2, 3] += 1
    with pytest.raises(ExportError) as caught:
        write_sc(tmp_path / "x.sc.dcm", replace(result, image=replace(result.image, affine=moved)))
    assert caught.value.code == "NOT_ON_SOURCE_GRID"


def test_it_needs_a_series(dicom_result: Build, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        write_sc(tmp_path / "x.sc.dcm", replace(dicom_result(tmp_path / "in"), series=None))
    assert caught.value.code == "NEEDS_DICOM"
