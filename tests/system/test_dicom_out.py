"""Results as DICOM are DICOM to others, and show them the mask where it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medseg.exporters.dicom_seg import write_seg

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
