"""Masks as NIfTI: what other programs read, and never a wrong file."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg.errors import ExportError
from medseg.exporters import nifti as module
from medseg.exporters.nifti import write_nifti
from medseg.readers.nifti import holds, read_nifti
from medseg.volume import Volume

ROTATED = np.array([[-0.9, 0.1, 0.0, 12.0], [0.1, 0.9, 0.0, -7.0], [0.0, 0.0, 2.5, 33.0], [0, 0, 0, 1]])
SHEARED = np.array([[1.0, 0, 0, 0], [0, 1.0, 0.4, 0], [0, 0, 3.0, 0], [0, 0, 0, 1]])


def mask(affine: np.ndarray = ROTATED, dtype: type = np.uint8) -> Volume:
    return Volume(np.random.default_rng(0).integers(0, 2, (1, 5, 6, 7)).astype(dtype), affine)


@pytest.mark.parametrize("affine", [np.eye(4), ROTATED, SHEARED, np.diag([-1.0, 1, 1, 1])])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int16, np.int64, np.uint64, bool])
def test_round_trip(tmp_path: Path, affine: np.ndarray, dtype: type) -> None:
    volume = mask(affine, dtype)
    write_nifti(tmp_path / "x.nii.gz", volume)
    ours, theirs = read_nifti(tmp_path / "x.nii.gz"), nibabel.load(tmp_path / "x.nii.gz")
    assert np.array_equal(ours.array, volume.array)
    assert np.array_equal(np.asarray(theirs.dataobj), volume.array[0])
    assert np.abs(ours.affine - volume.affine).max() < 1e-5
    assert np.abs(theirs.affine - volume.affine).max() < 1e-5
    assert np.allclose(theirs.header.get_zooms(), volume.spacing, rtol=1e-6)
    assert theirs.header.get_xyzt_units()[0] == "mm"
    assert theirs.get_data_dtype().itemsize <= 4


def test_both_forms_are_set_where_both_can_say_it(tmp_path: Path) -> None:
    write_nifti(tmp_path / "x.nii.gz", mask(ROTATED))
    header = nibabel.load(tmp_path / "x.nii.gz").header
    assert int(header["sform_code"]) == int(header["qform_code"]) == 1
    assert np.abs(header.get_qform() - ROTATED).max() < 1e-5
    write_nifti(tmp_path / "y.nii.gz", mask(SHEARED))
    header = nibabel.load(tmp_path / "y.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 0), "a qform has no shear"


def test_same_mask_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_nifti(tmp_path / f"{name}.nii.gz", mask())
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_large_label_values(tmp_path: Path) -> None:
    volume = Volume(np.full((1, 2, 2, 2), 2_000_000_000, np.int64), np.eye(4))
    write_nifti(tmp_path / "x.nii.gz", volume)
    assert read_nifti(tmp_path / "x.nii.gz").array.max() == 2_000_000_000


def test_pictures_have_no_millimetres(tmp_path: Path) -> None:
    volume = Volume(np.ones((1, 4, 4, 1), np.uint8), np.eye(4), unit="pixel")
    write_nifti(tmp_path / "x.nii.gz", volume)
    assert nibabel.load(tmp_path / "x.nii.gz").header.get_xyzt_units()[0] == "unknown"


@pytest.mark.parametrize("what", ["values", "place"])
def test_a_file_that_reads_back_differently_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    written = mask()
    other = written.array.copy()
    other[0, 4, 5, 6] = 1 - other[0, 4, 5, 6]  # the last voxel
    moved = written.affine.copy()
    moved[0, 3] += 1
    damaged = written.with_array(other) if what == "values" else Volume(written.array, moved)
    monkeypatch.setattr(module, "holds", lambda path, _: holds(path, damaged))
    with pytest.raises(ExportError) as caught:
        write_nifti(tmp_path / "x.nii.gz", mask())
    assert caught.value.code == "READ_BACK"
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_no_type_holds_is_refused(tmp_path: Path) -> None:
    volume = Volume(np.full((1, 2, 2, 2), 2**40 + 1, np.int64), np.eye(4))
    with pytest.raises(ExportError):
        write_nifti(tmp_path / "x.nii.gz", volume)
    assert list(tmp_path.iterdir()) == []


def test_writing_takes_less_memory_than_the_mask(tmp_path: Path) -> None:
    volume = Volume(np.zeros((1, 256, 256, 1024), np.uint8), ROTATED)
    tracemalloc.start()
    write_nifti(tmp_path / "x.nii.gz", volume)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < volume.array.nbytes


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").write_bytes(b"old")
    write_nifti(tmp_path / "x.nii.gz", mask())
    assert read_nifti(tmp_path / "x.nii.gz").array.shape == (1, 5, 6, 7)
