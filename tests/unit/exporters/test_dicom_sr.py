"""Volumes as a Structured Report: the numbers, what they refer to, and never a wrong file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest

from medseg.errors import ExportError
from medseg.exporters import dicom_sr
from medseg.exporters.dicom_seg import seg_uid
from medseg.exporters.dicom_sr import write_sr

Build = Callable[..., Any]


def test_volumes_and_references(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", PatientID="7")
    write_sr(tmp_path / "x.sr.dcm", result)
    before = (tmp_path / "x.sr.dcm").read_bytes()
    write_sr(tmp_path / "x.sr.dcm", result)
    assert (tmp_path / "x.sr.dcm").read_bytes() == before
    dataset = pydicom.dcmread(tmp_path / "x.sr.dcm")
    assert dataset.PatientID == "7"
    assert "RESEARCH USE" in dataset.SeriesDescription
    text = dataset.to_json()
    voxel = 0.8 * 1.1 * 2.5 / 1000
    for value in (1, 7, 3):
        assert str(round(int((result.mask.array == value).sum()) * voxel, 4)) in text
    assert seg_uid(result) in text


def test_a_wrong_volume_is_never_left(dicom_result: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = dicom_sr.build_sr

    def damaged(*args: Any) -> pydicom.Dataset:
        dataset = build(*args)
        groups = next(row for row in dataset.ContentSequence[::-1] if row.ValueType == "CONTAINER")
        rows = groups.ContentSequence[0].ContentSequence
        next(row for row in rows if row.ValueType == "NUM").MeasuredValueSequence[0].NumericValue = "9.9"
        return dataset

    monkeypatch.setattr(dicom_sr, "build_sr", damaged)
    with pytest.raises(ExportError) as caught:
        write_sr(tmp_path / "x.sr.dcm", dicom_result(tmp_path / "in"))
    assert caught.value.code == "READ_BACK"
    assert not list(tmp_path.glob("*.dcm"))
