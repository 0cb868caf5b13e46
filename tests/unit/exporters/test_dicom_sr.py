"""Volumes as a Structured Report: the numbers, what they refer to, and never a wrong file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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


def groups(file: Path) -> dict[str, dict[str, tuple[float, str, str]]]:
    """Tracking text -> derivation ("" without) -> value, unit and name, by a walk that knows only relationships."""
    found = {}
    (container,) = [r for r in pydicom.dcmread(file).ContentSequence if name_of(r) == "126010"]
    for group in container.ContentSequence:
        assert name_of(group) == "125007"
        rows = group.ContentSequence
        (label,) = [r.TextValue for r in rows if name_of(r) == "112039"]
        found[label] = {
            "".join(code_of(m) for m in r.get("ContentSequence", ()) if name_of(m) == "121401"): (
                float(r.MeasuredValueSequence[0].NumericValue),
                r.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue,
                name_of(r),
            )
            for r in rows
            if r.ValueType == "NUM"
        }
    return found


def name_of(row: pydicom.Dataset) -> str:
    return str(row.ConceptNameCodeSequence[0].CodeValue)


def code_of(row: pydicom.Dataset) -> str:
    return str(row.ConceptCodeSequence[0].CodeMeaning)


@pytest.mark.parametrize(
    ("modality", "meta", "notes", "unit", "name"),
    [
        ("CT", {}, (), "[hnsf'U]", "112031"),
        ("CT", {}, ("NO_RESCALE",), "[arb'U]", "112031"),
        ("MR", {}, (), "[arb'U]", "110852"),
        ("CT", {}, ("NOT_HU",), "[arb'U]", "112031"),
        ("PT", {"Units": "GML"}, ("SUV_BW",), "{SUVbw}g/ml", "126401"),
        ("PT", {"Units": "GML"}, (), "[arb'U]", "110821"),  # of an unknown type
        ("PT", {"Units": "BQML"}, (), "Bq/ml", "110821"),
        ("PT", {"Units": "CNTS"}, (), "[arb'U]", "110821"),
    ],
)
def test_statistics_of_known_values(
    dicom_result: Build,
    tmp_path: Path,
    modality: str,
    meta: dict[str, str],
    notes: tuple[str, ...],
    unit: str,
    name: str,
) -> None:
    result = dicom_result(tmp_path / "in")
    array = np.full(result.mask.array.shape, -7777.0, np.float32)
    inside = result.mask.array == 7
    count = int(inside.sum())
    assert count == 40
    array[inside] = np.arange(count) * 2.5 - 10  # -10, -7.5 ... 87.5
    array[result.mask.array == 3] = 1234.5678
    image = replace(result.image, array=array, notes=notes, meta={"Modality": modality, **meta})
    write_sr(tmp_path / "x.sr.dcm", replace(result, image=image))
    found = groups(tmp_path / "x.sr.dcm")
    assert list(found) == ["torso liver", "torso thing_b", "torso lesion", "torso absent"]
    assert found["torso absent"] == {"": (0.0, "mL", "118565006")}
    # The deviation of n even steps is step * sqrt((n² - 1) / 12).
    deviation = round(2.5 * ((40**2 - 1) / 12) ** 0.5, 5)
    assert found["torso thing_b"] == {
        "": (round(40 * 0.8 * 1.1 * 2.5 / 1000, 4), "mL", "118565006"),
        "Minimum": (-10.0, unit, name),
        "Maximum": (87.5, unit, name),
        "Mean": (38.75, unit, name),
        "Standard Deviation": (deviation, unit, name),
        "Median": (38.75, unit, name),
    }
    assert found["torso lesion"]["Mean"][0] == 1234.568
    assert found["torso lesion"]["Standard Deviation"][0] == 0.0


def test_statistics_are_those_of_the_channel_on_whose_series_the_mask_lies(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    own = result.image.array
    channels = {"channels": {"adc": {}, "t2": {}}, "reference": "t2"}
    spec = result.spec.model_validate({**result.spec.model_dump(exclude_none=True), **channels})
    # Notes are those of all channels: what a PET or a CT beside it is measured in says nothing of this one.
    image = replace(result.image, array=np.concatenate([own * 0 - 1, own]), notes=("NO_RESCALE", "SUV_BW"))
    write_sr(tmp_path / "x.sr.dcm", replace(result, spec=spec, image=image))
    mean, unit, name = groups(tmp_path / "x.sr.dcm")["torso liver"]["Mean"]
    assert mean == pytest.approx(own[result.mask.array == 1].mean(), rel=1e-6)
    assert (unit, name) == ("[arb'U]", "110852")


def test_without_a_known_quantity_there_are_volumes_only(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    write_sr(tmp_path / "x.sr.dcm", replace(result, image=replace(result.image, meta={"Modality": "XA"})))
    assert all(list(rows) == [""] for rows in groups(tmp_path / "x.sr.dcm").values())


def test_a_mask_without_labels_is_a_report_too(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    write_sr(tmp_path / "x.sr.dcm", replace(result, mask=result.mask.with_array(np.zeros_like(result.mask.array))))
    assert all(rows == {"": (0.0, "mL", "118565006")} for rows in groups(tmp_path / "x.sr.dcm").values())


def test_a_wrong_statistic_is_never_left(dicom_result: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = dicom_sr.build_sr

    def damaged(*args: Any) -> pydicom.Dataset:
        dataset = build(*args)
        (container,) = [row for row in dataset.ContentSequence if name_of(row) == "126010"]
        row = [r for r in container.ContentSequence[1].ContentSequence if r.ValueType == "NUM"][3]
        row.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue = "mL"
        return dataset

    monkeypatch.setattr(dicom_sr, "build_sr", damaged)
    with pytest.raises(ExportError) as caught:
        write_sr(tmp_path / "x.sr.dcm", dicom_result(tmp_path / "in"))
    assert caught.value.code == "READ_BACK"


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
