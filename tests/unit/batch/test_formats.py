"""A batch that writes DICOM: beside NIfTI, listed in the ledger, refused where there is no series."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medseg.batch.run import predict
from medseg.errors import ExportError
from medseg.exporters import dicom_seg
from medseg.files import file_digest
from medseg.inference.predict import Model, load_model
from medseg.readers.nifti import read_nifti

Build = Callable[..., Any]


@pytest.fixture(scope="module")
def loaded(model: Path) -> Model:
    return load_model(model)


@pytest.fixture
def tree(tmp_path: Path, model: Path, dicom_result: Build) -> Path:
    """A folder with a DICOM series of a patient and a NIfTI image."""
    dicom_result(tmp_path / "in" / "CANARY-FOLDER", PatientID="CANARY-ID", PatientName="CANARY^NAME")
    shutil.copyfile(model.parent / "data" / "images" / "c0.nii.gz", tmp_path / "in" / "c0.nii.gz")
    return tmp_path / "in"


def test_both_formats_hold_the_same_mask(loaded: Model, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = predict([tree], model=loaded, out=out, formats=["nifti,seg"])
    failed, done = sorted(result.entries, key=lambda entry: entry.state, reverse=True)
    assert (failed.id, failed.state, failed.code, failed.outputs) == ("c0", "failed", "NEEDS_DICOM", {})
    assert set(done.outputs) == {f"{done.id}.nii.gz", f"{done.id}.seg.dcm"}
    assert all(file_digest(out / name) == digest for name, digest in done.outputs.items())
    assert "PRIVATE_CODE" in done.notes
    assert not (out / "c0.nii.gz").exists()
    mask = read_nifti(out / f"{done.id}.nii.gz")
    dataset = pydicom.dcmread(out / f"{done.id}.seg.dcm")
    found = np.zeros(mask.shape, int)
    for frame, item in zip(dataset.pixel_array, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        # axial: the slice follows from z alone
        z = float(item.PlanePositionSequence[0].ImagePositionPatient[2])
        k = round((z - mask.affine[2, 3]) / mask.affine[2, 2])
        found[:, :, k] += frame.T * int(item.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
    assert np.array_equal(found, mask.array[0])
    assert found.max() > 0
    # By design the object belongs to its patient; nothing else does.
    assert dataset.PatientID == "CANARY-ID"
    for file in out.rglob("*"):
        assert "CANARY" not in file.relative_to(out).as_posix()
        if file.is_file() and file.name not in ("linkage.csv", f"{done.id}.seg.dcm"):
            assert b"CANARY" not in file.read_bytes(), file


def test_formats_come_and_stay(loaded: Model, tree: Path, tmp_path: Path) -> None:
    (tree / "c0.nii.gz").unlink()
    out = tmp_path / "out"

    def run(*formats: str) -> set[str]:
        (entry,) = predict([tree], model=loaded, out=out, formats=formats).entries
        assert set(entry.outputs) == {p.name for p in out.iterdir() if p.is_file() and p.name.startswith("case")}
        return {name.removeprefix(entry.id) for name in entry.outputs}

    assert run("nifti") == {".nii.gz"}
    assert run("seg") == {".nii.gz", ".seg.dcm"}
    (file,) = out.glob("*.seg.dcm")
    before, content = file.stat().st_mtime_ns, file.read_bytes()
    assert run("nifti") == run("seg") == {".nii.gz", ".seg.dcm"}
    assert file.stat().st_mtime_ns == before, "what is done is not done again"
    file.write_bytes(b"damaged")
    assert run("nifti") == {".nii.gz", ".seg.dcm"}
    assert file.read_bytes() == content, "the same series and model give the same bytes"


def test_a_study_is_not_half_done(loaded: Model, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "c0.nii.gz").unlink()

    def fails(*args: Any, **options: Any) -> None:
        raise ExportError("differs", code="READ_BACK")

    monkeypatch.setattr(dicom_seg, "check_seg", fails)
    (entry,) = predict([tree], model=loaded, out=tmp_path / "out", formats=["nifti", "seg"]).entries
    assert (entry.state, entry.code) == ("failed", "READ_BACK")
    assert not list((tmp_path / "out").glob("case*"))
