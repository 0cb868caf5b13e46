"""Results as DICOM are DICOM to others, and show them the mask where it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medseg.exporters.dicom_rtstruct import write_rtstruct
from medseg.exporters.dicom_seg import write_seg
from medseg.exporters.dicom_sr import write_sr

Build = Callable[..., Any]
Run = Callable[..., str]


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Error")]


def places(array: Any, affine: Any) -> set[tuple[float, ...]]:
    """Where the marked voxels lie, to 0.01 mm."""
    points = np.argwhere(array) @ affine[:3, :3].T + affine[:3, 3]
    return {tuple(float(x) + 0.0 for x in np.round(point, 2)) for point in points}


def test_validator_finds_no_error_in_a_segmentation(
    run: Run, dicom_result: Build, dicom_grid: str, tmp_path: Path
) -> None:
    write_seg(tmp_path / "x.seg.dcm", dicom_result(tmp_path / "in", dicom_grid))
    assert errors(run("dciodvfy", tmp_path / "x.seg.dcm", allowed=(0, 1))) == []


def test_dcmqi_sees_the_same_voxels(run: Run, dicom_result: Build, dicom_grid: str, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", dicom_grid)
    write_seg(tmp_path / "x.seg.dcm", result)
    (tmp_path / "out").mkdir()
    run("segimage2itkimage", "--inputDICOM", tmp_path / "x.seg.dcm", "--outputDirectory", tmp_path / "out", "-t", "nii")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert [group[0]["SegmentLabel"] for group in meta["segmentAttributes"]] == list(result.spec.foreground)
    for number, value in enumerate(result.spec.foreground.values(), start=1):
        theirs = nibabel.load(tmp_path / "out" / f"{number}.nii.gz")
        found = places(np.asarray(theirs.dataobj) > 0, theirs.affine)
        assert found == places(result.mask.array[0] == value, result.mask.affine)


def test_validator_finds_no_error_in_a_structure_set(
    run: Run, dicom_result: Build, dicom_grid: str, tmp_path: Path
) -> None:
    write_rtstruct(tmp_path / "x.rtstruct.dcm", dicom_result(tmp_path / "in", dicom_grid))
    assert errors(run("dciodvfy", tmp_path / "x.rtstruct.dcm", allowed=(0, 1))) == []


# Plastimatch stacks contours by their z, whatever the images are: sagittal and coronal ones it cannot read. The unit
# tests fill those by matplotlib.
@pytest.mark.parametrize("grid", ["axial", "oblique", "feet-first", "negated"])
def test_plastimatch_fills_the_same_voxels(run: Run, dicom_result: Build, grid: str, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", grid)
    write_rtstruct(tmp_path / "x.rtstruct.dcm", result)
    files = ("--input", tmp_path / "x.rtstruct.dcm", "--referenced-ct", tmp_path / "in")
    run("plastimatch", "convert", *files, "--output-prefix", tmp_path / "out", "--prefix-format", "nii.gz")
    for name, value in result.spec.foreground.items():
        wanted = result.mask.array[0] == value
        if not wanted.any():
            continue
        theirs = nibabel.load(tmp_path / "out" / f"{name}.nii.gz")
        marked = np.asarray(theirs.dataobj) > 0
        found, expected = places(marked, theirs.affine), places(wanted, result.mask.affine)
        assert 2 * len(found & expected) / (len(found) + len(expected)) >= 0.98, name
        offset = np.mean(list(found), axis=0) - np.mean(list(expected), axis=0)
        assert np.linalg.norm(offset) <= min(result.mask.spacing) / 2


def test_a_report_is_valid_and_dcmqi_reads_its_volumes(run: Run, dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", "oblique")
    write_sr(tmp_path / "x.sr.dcm", result)
    assert errors(run("dciodvfy", tmp_path / "x.sr.dcm", allowed=(0, 1))) == []
    run("tid1500reader", "--inputDICOM", tmp_path / "x.sr.dcm", "--outputMetadata", tmp_path / "x.json")
    rows = json.loads((tmp_path / "x.json").read_text())["Measurements"]
    found = [float(row["measurementItems"][0]["value"]) for row in rows]
    voxels = [int((result.mask.array == value).sum()) for value in (1, 7, 3)]
    assert found == [round(count * result.mask.voxel_volume / 1000, 4) for count in voxels]
