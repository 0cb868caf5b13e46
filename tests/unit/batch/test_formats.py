"""A batch that writes DICOM: beside NIfTI, listed in the ledger, refused where there is no series."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medseg.batch.ledger import Ledger
from medseg.batch.run import predict
from medseg.errors import ExportError
from medseg.exporters import EXPORTERS, dicom_seg
from medseg.files import file_digest
from medseg.inference.predict import Model, load_model
from medseg.readers.nifti import read_nifti

Build = Callable[..., Any]
FORMATS = [name for name, row in EXPORTERS.items() if not row.picture]
"""Of DICOM inputs."""


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


def test_a_format_that_cannot_be_added_costs_no_mask(loaded: Model, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict([tree], model=loaded, out=out)
    masks = {file.name: file.read_bytes() for file in out.glob("*.nii.gz")}
    states = {e.id: e.code or e.state for e in predict([tree], model=loaded, out=out, formats=["nifti,seg"]).entries}
    assert states["c0"] == "NEEDS_DICOM"
    assert {file.name: file.read_bytes() for file in out.glob("*.nii.gz")} == masks
    assert Ledger(out).read("c0").state == "done"  # type: ignore[union-attr]
    attempts = json.loads((out / "journal" / "c0.json").read_text())["attempts"]
    assert predict([tree], model=loaded, out=out).complete
    assert json.loads((out / "journal" / "c0.json").read_text())["attempts"] == attempts


def test_what_is_written_before_a_format_fails_does_not_stay(
    loaded: Model, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "c0.nii.gz").unlink()
    out = tmp_path / "out"
    (done,) = predict([tree], model=loaded, out=out).entries

    def full(*_: object) -> None:
        raise ExportError("x: cannot be written", code="READ_BACK")

    monkeypatch.setitem(EXPORTERS._rows, "sr", replace(EXPORTERS["sr"], write=full))
    (failed,) = predict([tree], model=loaded, out=out, formats=["nifti,rtstruct,sr"]).entries
    assert (failed.state, failed.code) == ("failed", "READ_BACK")
    assert sorted(file.name for file in out.glob(f"{done.id}*")) == [f"{done.id}.nii.gz"]
    assert predict([tree], model=loaded, out=out).entries == (done,)


def test_results_below_the_input_are_no_inputs(loaded: Model, tree: Path, tmp_path: Path) -> None:
    (tree / "c0.nii.gz").unlink()
    (first,) = predict([tree], model=loaded, out=tree / "out", formats=FORMATS).entries
    (second,) = predict([tree], model=loaded, out=tmp_path / "elsewhere").entries
    assert (first.id, first.state, second.state) == (second.id, "done", "done")


CANARIES = {
    "PatientName": "CANARY^NAME",
    "PatientID": "CANARY-ID",
    "PatientBirthDate": "19551122",
    "AccessionNumber": "CANARY-ACC",
    "StudyID": "CANARY-STUDY",
    "ReferringPhysicianName": "CANARY^DOCTOR",
    "InstitutionName": "CANARY HOSPITAL",
    "SeriesDescription": "CANARY SERIES",
    "StudyDescription": "CANARY STUDY",
    "OtherPatientIDs": "CANARY-OTHER",
}


def test_only_dicom_objects_know_the_patient(
    loaded: Model,
    dicom_result: Build,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    series = dicom_result(tmp_path / "in" / "CANARY-FOLDER", **CANARIES).series
    out = tmp_path / "out"
    result = predict([tmp_path / "in"], model=loaded, out=out, formats=FORMATS)
    (entry,) = result.entries
    assert entry.state == "done", entry
    assert set(entry.outputs) == {f"{entry.id}{EXPORTERS[name].suffix}" for name in FORMATS}
    secrets = [b"CANARY", b"19551122", series.uid.encode(), series.study_uid.encode()]
    for file in out.rglob("*"):
        assert "CANARY" not in file.relative_to(out).as_posix()
        if not file.is_file() or file.name == "linkage.csv":
            continue
        if file.suffix == ".dcm":
            dataset = pydicom.dcmread(file)
            assert dataset.PatientID == "CANARY-ID", "an archive files it by its patient"
            assert dataset.StudyInstanceUID == series.study_uid
            assert "SERIES" not in dataset.SeriesDescription
        else:
            assert not [word for word in secrets if word in file.read_bytes()], file
    printed = capfd.readouterr()
    text = printed.out + printed.err + caplog.text + repr(result.entries)
    assert not [word for word in secrets if word.decode() in text]


def test_probabilities_and_mask_are_of_one_prediction(loaded: Model, tree: Path, tmp_path: Path) -> None:
    (tree / "c0.nii.gz").unlink()
    (entry,) = predict([tree], model=loaded, out=tmp_path / "out", formats=["nifti,seg-fractional"]).entries
    mask = read_nifti(tmp_path / "out" / f"{entry.id}.nii.gz")
    dataset = pydicom.dcmread(tmp_path / "out" / f"{entry.id}.fractional.dcm")
    groups = dataset.PerFrameFunctionalGroupsSequence
    z = np.array([float(g.PlanePositionSequence[0].ImagePositionPatient[2]) for g in groups])
    slices = np.rint((z - mask.affine[2, 3]) / mask.affine[2, 2]).astype(int)
    soft = np.zeros((2, *mask.shape), int)
    for k, group, frame in zip(slices, groups, dataset.pixel_array, strict=True):
        soft[group.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1, :, :, k] = frame.T
    background = 255 - soft.sum(axis=0)
    found = np.stack([background, *soft])
    sure = np.sort(found, axis=0)[-1] - np.sort(found, axis=0)[-2] > 3
    assert sure.mean() > 0.5
    assert np.array_equal(found.argmax(0)[sure], mask.array[0][sure])


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

    monkeypatch.setattr(dicom_seg, "check_labels", fails)
    (entry,) = predict([tree], model=loaded, out=tmp_path / "out", formats=["nifti", "seg"]).entries
    assert (entry.state, entry.code) == ("failed", "READ_BACK")
    assert not list((tmp_path / "out").glob("case*"))
