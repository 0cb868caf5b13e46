"""Results as DICOM are DICOM to others, and show them the mask where it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest

from medseg.exporters.dicom_rtstruct import write_rtstruct
from medseg.exporters.dicom_sc import write_sc
from medseg.exporters.dicom_seg import write_fractional, write_labelmap, write_seg
from medseg.exporters.dicom_sr import write_sr
from medseg.volume import Volume, align_to

Build = Callable[..., Any]
Run = Callable[..., str]


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Error")]


def places(array: Any, affine: Any) -> set[tuple[float, ...]]:
    """Where the marked voxels lie, to 0.01 mm."""
    points = np.argwhere(array) @ affine[:3, :3].T + affine[:3, 3]
    return {tuple(float(x) + 0.0 for x in np.round(point, 2)) for point in points}


@pytest.mark.parametrize("write", [write_seg, write_fractional, write_rtstruct, write_sr, write_sc])
def test_validator_finds_no_error(
    run: Run, dicom_result: Build, dicom_grid: str, tmp_path: Path, write: Callable[..., Any]
) -> None:
    write(tmp_path / "x.dcm", dicom_result(tmp_path / "in", dicom_grid))
    assert errors(run("dciodvfy", tmp_path / "x.dcm", allowed=(0, 1))) == []


@pytest.mark.parametrize("write", [write_seg, write_fractional, write_rtstruct, write_sr, write_sc])
def test_validator_finds_no_error_on_a_multi_frame_source(
    run: Run, dicom_result: Build, tmp_path: Path, write: Callable[..., Any]
) -> None:
    write(tmp_path / "x.dcm", dicom_result(tmp_path / "in", "oblique", enhanced=True))
    assert errors(run("dciodvfy", tmp_path / "x.dcm", allowed=(0, 1))) == []


def dcmqi_segments(run: Run, file: Path) -> tuple[list[str], list[Any]]:
    """The names that dcmqi reads and, for each, its image; an image of a LABELMAP holds the segments by number."""
    out = file.with_suffix(".out")
    out.mkdir()
    run("segimage2itkimage", "--inputDICOM", file, "--outputDirectory", out, "-t", "nii")
    rows = json.loads((out / "meta.json").read_text())["segmentAttributes"]
    images = [nibabel.load(path) for path in sorted(out.glob("*.nii.gz"), key=lambda p: int(p.name.split(".")[0]))]
    return [row["SegmentLabel"] for group in rows for row in group], images


def test_dcmqi_sees_the_same_voxels(run: Run, dicom_result: Build, dicom_grid: str, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", dicom_grid)
    write_seg(tmp_path / "x.seg.dcm", result)
    names, images = dcmqi_segments(run, tmp_path / "x.seg.dcm")
    assert names == list(result.spec.foreground)
    for image, value in zip(images, result.spec.foreground.values(), strict=True):
        found = places(np.asarray(image.dataobj) > 0, image.affine)
        assert found == places(result.mask.array[0] == value, result.mask.affine)


def test_dcmqi_sees_the_same_labelmap(run: Run, dicom_result: Build, dicom_grid: str, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", dicom_grid)
    write_labelmap(tmp_path / "x.labelmap.dcm", result)
    names, images = dcmqi_segments(run, tmp_path / "x.labelmap.dcm")
    assert names == list(result.spec.foreground)
    for number, value in enumerate(result.spec.foreground.values(), start=1):
        image = images[0] if len(images) == 1 else images[number - 1]
        array = np.asarray(image.dataobj)
        found = places(array == number, image.affine)
        assert found == places(result.mask.array[0] == value, result.mask.affine)


def test_dcmqi_sees_the_same_probabilities(run: Run, dicom_result: Build, dicom_grid: str, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", dicom_grid)
    write_fractional(tmp_path / "x.fractional.dcm", result)
    names, images = dcmqi_segments(run, tmp_path / "x.fractional.dcm")
    assert names == list(result.spec.foreground)
    for image, soft in zip(images, result.probabilities.array, strict=True):
        theirs = align_to(Volume(np.asarray(image.dataobj)[None].astype(np.float32), image.affine), result.mask)
        assert theirs is not None
        assert np.abs(theirs.array[0] / 255 - soft).max() <= 0.5 / 255 + 1e-6


def turn_to_axial(images: Path, structures: Path) -> Any:
    """Turn a series and its contours as one rigid body until the slices are axial; return the turn (3, 3) in RAS+."""
    series = [pydicom.dcmread(file) for file in images.iterdir()]
    rows, columns = np.array(series[0].ImageOrientationPatient, float).reshape(2, 3)
    turn = np.stack([rows, columns, np.cross(rows, columns)])
    for file, image in zip(images.iterdir(), series, strict=True):
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.ImagePositionPatient = [round(float(x), 6) for x in turn @ np.array(image.ImagePositionPatient, float)]
        image.save_as(file)
    dataset = pydicom.dcmread(structures)
    for roi in dataset.ROIContourSequence:
        for contour in roi.get("ContourSequence", ()):
            points = np.array(contour.ContourData, float).reshape(-1, 3) @ turn.T
            contour.ContourData = [round(float(x), 5) for x in points.ravel()]
    dataset.save_as(structures)
    flip = np.diag([-1.0, -1.0, 1.0])
    return flip @ turn @ flip


# Plastimatch stacks contours by their z, whatever the images are, and gives wrong masks for sagittal and coronal
# ones without a word: these are turned to axial first. The unit tests fill them where they are, by matplotlib.
def test_plastimatch_fills_the_same_voxels(run: Run, dicom_result: Build, dicom_grid: str, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", dicom_grid)
    write_rtstruct(tmp_path / "x.rtstruct.dcm", result)
    affine = np.array(result.mask.affine)
    if dicom_grid in ("sagittal", "coronal"):
        affine[:3] = turn_to_axial(tmp_path / "in", tmp_path / "x.rtstruct.dcm") @ affine[:3]
    files = ("--input", tmp_path / "x.rtstruct.dcm", "--referenced-ct", tmp_path / "in")
    run("plastimatch", "convert", *files, "--output-prefix", tmp_path / "out", "--prefix-format", "nii.gz")
    for name, value in result.spec.foreground.items():
        wanted = result.mask.array[0] == value
        if not wanted.any():
            continue
        theirs = nibabel.load(tmp_path / "out" / f"{name}.nii.gz")
        marked = np.asarray(theirs.dataobj) > 0
        found, expected = places(marked, theirs.affine), places(wanted, affine)
        assert 2 * len(found & expected) / (len(found) + len(expected)) >= 0.98, name
        offset = np.mean(list(found), axis=0) - np.mean(list(expected), axis=0)
        assert np.linalg.norm(offset) <= min(result.mask.spacing) / 2


def test_dcmqi_reads_the_measurements(run: Run, dicom_result: Build, dicom_grid: str, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", dicom_grid)
    write_sr(tmp_path / "x.sr.dcm", result)
    run("tid1500reader", "--inputDICOM", tmp_path / "x.sr.dcm", "--outputMetadata", tmp_path / "x.json")
    rows = json.loads((tmp_path / "x.json").read_text())["Measurements"]
    assert [row["TrackingIdentifier"] for row in rows] == [f"torso {name}" for name in result.spec.foreground]
    for row, value in zip(rows, result.spec.foreground.values(), strict=True):
        inside = result.image.array[result.mask.array == value].astype(np.float64)
        volume, *others = row["measurementItems"]
        assert (volume["quantity"]["CodeMeaning"], volume["units"]["CodeValue"]) == ("Volume", "mL")
        assert float(volume["value"]) == round(inside.size * result.mask.voxel_volume / 1000, 4)
        found = {item["derivationModifier"]["CodeMeaning"]: float(item["value"]) for item in others}
        expected = (
            {
                "Minimum": inside.min(),
                "Maximum": inside.max(),
                "Mean": inside.mean(),
                "Standard Deviation": inside.std(),
                "Median": np.median(inside),
            }
            if inside.size
            else {}
        )
        assert found == pytest.approx(expected, rel=1e-6)
        assert {item["units"]["CodeValue"] for item in others} <= {"[arb'U]"}
