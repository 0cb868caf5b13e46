"""Our geometry and values against dcm2niix on real series; its own rounding is known to the digit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg.readers.dicom_geometry import series_stack
from medseg.readers.dicom_scan import find_series
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume, grid_distance, reorient

Run = Callable[..., str]
PATIENTS = ["STS_001/MR_T1", "STS_009/MR_T1", "STS_036/MR_T1", "STS_044/CT", "STS_044/PET", "STS_045/MR_T1"]


def converted(run: Run, source: Path, folder: Path) -> Volume:
    run("dcm2niix", "-b", "n", "-z", "n", "-f", "x", "-o", folder, source)
    (path,) = folder.glob("*.nii")
    image = nibabel.load(path)
    return Volume(np.asarray(image.dataobj, np.float64).reshape(image.shape[:3])[None], image.affine)


@pytest.mark.parametrize("name", PATIENTS)
def test_sarcoma(run: Run, data: Path, tmp_path: Path, name: str) -> None:
    (entry,) = find_series(data / "sarcoma/dicom" / name / "image")
    ours, theirs = read_series(entry), converted(run, data / "sarcoma/dicom" / name / "image", tmp_path)
    turned = reorient(theirs, ours.axis_codes)
    np.testing.assert_allclose(ours.array, turned.array, rtol=1e-6, atol=1e-3)
    # What it takes for the step: the first gap, between positions in float32.
    stack = series_stack(entry.headers)
    first = np.diff(stack.positions[:2].astype(np.float32), axis=0)[0]
    step = float(np.linalg.norm(theirs.affine[:3, 2]))
    assert step == pytest.approx(float(np.linalg.norm(first)), abs=1e-6)
    off = abs(step - float(np.linalg.norm(stack.affine[:3, 2]))) * (ours.shape[2] - 1)
    assert grid_distance(ours.shape, ours.affine, turned.affine) <= off + 1e-4


@pytest.mark.parametrize("number", [1, 3])
def test_mosaic(run: Run, data: Path, tmp_path: Path, number: int) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.dcm").symlink_to(data / f"dicom_hard/dcm_qa_ts/In/{number}.dcm")
    theirs = converted(run, tmp_path / "in", tmp_path)
    ours = read_series(data / f"dicom_hard/dcm_qa_ts/In/{number}.dcm")
    turned = reorient(theirs, ours.axis_codes)
    np.testing.assert_array_equal(ours.array, turned.array)
    assert grid_distance(ours.shape, ours.affine, turned.affine) < 1e-3
