from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from medseg.errors import ExportError
from medseg.phantom.dicom import PLANES, write_series
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume, align_to

AFFINE = np.array([[-0.7, 0, 0, 12.5], [0, -0.9, 0, -31.25], [0, 0, 2.5, 101.0], [0, 0, 0, 1.0]])


@pytest.fixture
def volume(rng: np.random.Generator) -> Volume:
    return Volume(rng.integers(-900, 2000, (1, 9, 11, 8)).astype(np.float32), AFFINE)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_arguments_give_the_same_bytes(volume: Volume, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_series(volume, tmp_path / name, shuffle=True, seed=3, patient_id="P1")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("other", [{"seed": 1}, {"patient_id": "P2"}, {"description": "x"}, {"series_number": 2}])
def test_series_uids_differ_between_series(other: dict[str, object], volume: Volume, tmp_path: Path) -> None:
    first = write_series(volume, tmp_path / "one")
    second = write_series(volume, tmp_path / "two", **other)  # type: ignore[arg-type]
    uids = [{pydicom.dcmread(path).SOPInstanceUID for path in paths} for paths in (first, second)]
    assert len(uids[0] | uids[1]) == 16
    assert pydicom.dcmread(first[0]).SeriesInstanceUID != pydicom.dcmread(second[0]).SeriesInstanceUID


@pytest.mark.parametrize("plane", PLANES)
def test_planes_cut_the_patient_as_named(plane: str, volume: Volume, tmp_path: Path) -> None:
    paths = write_series(volume, tmp_path, plane=plane)  # type: ignore[arg-type]
    cosines = np.array(pydicom.dcmread(paths[0]).ImageOrientationPatient, dtype=float)
    normal = np.abs(np.cross(cosines[:3], cosines[3:]))
    assert int(normal.argmax()) == {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    assert len(paths) == {"sagittal": 9, "coronal": 11, "axial": 8}[plane]
    aligned = align_to(read_series(paths), volume)
    assert aligned is not None
    np.testing.assert_array_equal(aligned.array, volume.array)


def test_returned_files_follow_k_whatever_their_names(volume: Volume, tmp_path: Path) -> None:
    paths = write_series(volume, tmp_path, shuffle=True)
    heights = [float(pydicom.dcmread(path).ImagePositionPatient[2]) for path in paths]
    assert heights == sorted(heights)
    assert [path.name for path in paths] != sorted(path.name for path in paths)


def test_identity_is_empty_unless_given(volume: Volume, tmp_path: Path) -> None:
    dataset = pydicom.dcmread(write_series(volume, tmp_path)[0])
    assert [dataset[word].value or "" for word in ("PatientName", "PatientID", "PatientBirthDate", "StudyDate")] == [
        ""
    ] * 4


def test_what_a_series_cannot_hold_is_refused(volume: Volume, tmp_path: Path) -> None:
    skewed = volume.affine.copy()
    skewed[1, 0] = 0.2
    cases = {
        "one channel": Volume(np.concatenate([volume.array] * 2), AFFINE),
        "in pixel": Volume(volume.array, AFFINE, unit="pixel"),
        "right angles": Volume(volume.array, skewed),
        "must lie in": volume.with_array(volume.array * 1e3),
        "got nan": volume.with_array(volume.array * np.nan),
    }
    for text, case in cases.items():
        with pytest.raises(ExportError, match=text):
            write_series(case, tmp_path)
    with pytest.raises(ExportError, match="must lie in 0 to 65535"):
        write_series(volume, tmp_path, modality="MR")
    with pytest.raises(ExportError, match="not one of CT, MR, PT"):
        write_series(volume, tmp_path, modality="US")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
