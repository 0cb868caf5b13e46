"""A tree of studies with two sequences each is a dataset: found by rules, learnt, predicted, scored, as it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import yaml
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from medseg import api
from medseg.channels import choose_channels
from medseg.errors import MedsegError, SpecError
from medseg.readers.dicom_series import read_series
from medseg.readers.nifti import read_nifti
from medseg.spec import load_dataset
from medseg.studies import read_study
from medseg.volume import align_to

Builder = Callable[..., Path]


def save_seg(path: Path, series: Path, mask: np.ndarray, **tags: Any) -> None:
    """Write the labels ball and box as a SEG that was drawn on a series, in its patient, study and frame."""
    image = read_series(series)
    files = sorted(series.iterdir())
    order = np.argsort([pydicom.dcmread(file).ImagePositionPatient[2] for file in files])
    assert image.shape == mask.shape
    segments = np.stack([mask == value for value in (1, 2)], axis=-1).astype(np.uint8)
    seg = highdicom.seg.Segmentation(
        source_images=[pydicom.dcmread(files[n]) for n in order],
        pixel_array=segments.transpose(2, 1, 0, 3),
        segmentation_type="BINARY",
        segment_descriptions=[
            highdicom.seg.SegmentDescription(n, name, codes.SCT.Organ, codes.SCT.Liver, "MANUAL")
            for n, name in enumerate(("ball", "box"), start=1)
        ],
        series_instance_uid=generate_uid(),
        series_number=9,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=tags.pop("Manufacturer", "reader"),
        manufacturer_model_name="test",
        software_versions="1",
        device_serial_number="1",
    )
    for word, value in tags.items():
        setattr(seg, word, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)


def write_spec(root: Path, channels: dict[str, Any], **changes: Any) -> Path:
    spec: dict[str, Any] = {
        "name": "studies",
        "studies": ".",
        "channels": channels,
        "labels": {"ball": 1, "box": 2},
        **changes,
    }
    (root / "dataset.yaml").write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return root


@pytest.fixture
def tree(tmp_path: Path, two_sequences: SimpleNamespace, tiny: SimpleNamespace) -> Path:
    """Four studies: labels beside the series, in its folder, in another tree, and all files flat in the root."""
    root = tmp_path / "tree"
    for number in range(4):
        folder = two_sequences.write(root / f"p{number}", number)
        place = [folder / "seg", folder / "S1", root / "labels", folder][number] / f"seg{number}.dcm"
        save_seg(place, folder / "S1", tiny.case(number)[1])
    for file in sorted((root / "p3").rglob("*.dcm")):
        shutil.move(file, root / f"flat-{file.parent.name}-{file.name}")
    return write_spec(root, two_sequences.channels)


def test_every_study_is_a_case_with_its_labels(tree: Path, tiny: SimpleNamespace) -> None:
    dataset = load_dataset(tree)
    assert len(dataset.cases) == 4
    assert len({case.patient for case in dataset.cases}) == 4
    told = repr([(case.id, case.patient) for case in dataset.cases])
    assert "DOE" not in told
    found = []
    for case in dataset.cases:
        study = read_study(dataset.spec, case)
        assert study.image.array.shape[0] == 2
        assert study.mask is not None
        found += [n for n in range(4) if np.array_equal(study.mask.array[0], tiny.case(n)[1])]
    assert sorted(found) == [0, 1, 2, 3]


def test_check_train_predict_evaluate(
    tree: Path, tmp_path: Path, tiny_plan: Builder, two_sequences: SimpleNamespace
) -> None:
    result = api.check(tree, out=tmp_path / "check")
    assert result.ok, [finding for finding in result.findings if finding.severity == "error"]
    assert "CHANNEL_RESAMPLED" in {finding.code for finding in result.findings}
    plan = tiny_plan(tree, tmp_path / "plan.yaml", steps=40)
    api.train(tree, out=tmp_path / "run", plan=plan, steps=40)
    new = two_sequences.write(tmp_path / "new", 7)
    predicted = api.predict(new, model=tmp_path / "run", out=tmp_path / "masks", formats=["nifti", "seg"])
    assert predicted.complete, [entry.message for entry in predicted.entries]
    (entry,) = predicted.entries
    assert "CHANNEL_RESAMPLED" in entry.notes
    t1 = read_series(new / "S1")
    mask = read_nifti(tmp_path / "masks" / f"{entry.id}.nii.gz")
    assert mask.shape == t1.shape
    np.testing.assert_allclose(mask.affine, t1.affine, atol=1e-4)
    seg = pydicom.dcmread(next((tmp_path / "masks").glob("*.dcm")))
    referred = {item.SeriesInstanceUID for item in seg.ReferencedSeriesSequence}
    assert referred == {pydicom.dcmread(next((new / "S1").iterdir())).SeriesInstanceUID}
    for file in (new / "S1").iterdir():
        dataset = pydicom.dcmread(file)
        dataset.SeriesDescription = "t1_km"
        dataset.save_as(file)
    again = {"model": tmp_path / "run", "out": tmp_path / "masks"}
    assert [e.code for e in api.predict(new, **again).entries] == ["CHANNEL_MISSING"]
    assert not (tmp_path / "masks" / f"{entry.id}.nii.gz").exists()
    rules = {"channels": two_sequences.channels | {"t1": {"match": {"SeriesDescription": "^t1_km$"}}}}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    assert api.predict(new, channels=tmp_path / "rules.yaml", **again).complete
    api.predict(tree, model=tmp_path / "run", out=tmp_path / "known")
    scores = api.evaluate(tmp_path / "known", tree, out=tmp_path / "scores")
    used = {row.label: row.n_total for row in scores.summary if row.metric == "dice"}
    assert (used["ball"], used["box"]) == (4, 4)


def test_predictions_of_the_tree_itself_are_scored_by_the_dataset(
    tree: Path, tmp_path: Path, tiny_plan: Builder
) -> None:
    """The same study has the same id, whether it is found as a case or as an input."""
    plan = tiny_plan(tree, tmp_path / "plan.yaml", steps=1)
    api.train(tree, out=tmp_path / "run", plan=plan, steps=1)
    cases = {case.id for case in load_dataset(tree).cases}
    predicted = api.predict(
        *(tree / name for name in ("p0", "p1", "p2")), model=tmp_path / "run", out=tmp_path / "masks"
    )
    assert predicted.complete
    assert {entry.id for entry in predicted.entries} < cases


def test_studies_of_one_patient_are_never_separated(tree: Path, two_sequences: SimpleNamespace) -> None:
    two_sequences.write(tree / "again", 0, study_uid="1.2.3.4")
    patients = [case.patient for case in load_dataset(tree).cases]
    assert len(patients) == 5
    assert len(set(patients)) == 4
    write_spec(tree, two_sequences.channels, patient=r"^(D)")
    assert len({case.patient for case in load_dataset(tree).cases}) == 1


def test_a_study_without_labels_and_one_without_a_channel(tree: Path, two_sequences: SimpleNamespace) -> None:
    two_sequences.write(tree / "unlabelled", 10)
    two_sequences.write(tree / "t1", 11, flair=False)
    result = api.check(tree)
    assert [f.code for f in result.findings if f.severity == "error"] == ["CHANNEL_MISSING"]
    assert [f.code for f in result.findings].count("UNLABELLED") == 2


def test_the_digest_of_a_case_follows_its_bytes_and_no_names(tree: Path, tmp_path: Path) -> None:
    from medseg.cases import source_digest

    before = {case.id: source_digest(case) for case in load_dataset(tree).cases}
    other = tmp_path / "renamed"
    other.mkdir()
    for number, file in enumerate(sorted(tree.rglob("*.dcm"), reverse=True)):
        shutil.copy(file, other / f"{number:04d}")
    shutil.copy(tree / "dataset.yaml", other)
    assert {case.id: source_digest(case) for case in load_dataset(other).cases} == before
    assert {case.patient for case in load_dataset(other).cases} == {case.patient for case in load_dataset(tree).cases}
    name = next(other / f"{n:04d}" for n in range(999) if b"FLAIR" in (other / f"{n:04d}").read_bytes())
    name.write_bytes(name.read_bytes() + b"\0\0")
    after = {case.id: source_digest(case) for case in load_dataset(other).cases}
    assert sum(after[key] != before[key] for key in before) == 1


def test_a_damaged_file_beside_a_series_still_refuses_it(tree: Path) -> None:
    (tree / "p0" / "S1" / "IM9999.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 50)
    result = api.check(tree)
    assert [f.code for f in result.findings if f.severity == "error"] == ["UNREADABLE"]


def test_results_of_medseg_in_the_archive_are_no_labels(tree: Path, tiny: SimpleNamespace) -> None:
    wrong = tiny.case(5)[1]
    save_seg(tree / "p0" / "result.dcm", tree / "p0" / "S1", wrong, Manufacturer="medseg")
    assert api.check(tree).ok


def test_an_object_in_a_study_of_its_own_belongs_to_what_it_names(tree: Path, tiny: SimpleNamespace) -> None:
    file = tree / "labels" / "seg2.dcm"
    seg = pydicom.dcmread(file)
    seg.StudyInstanceUID, seg.PatientID = "1.2.3", "ANON"
    seg.save_as(file)
    dataset = load_dataset(tree)
    assert all(case.mask is not None for case in dataset.cases)
    seg.ReferencedSeriesSequence = []
    for frame in seg.PerFrameFunctionalGroupsSequence:
        frame.DerivationImageSequence = []
    seg.save_as(file)
    dataset = load_dataset(tree)
    assert all(case.mask is not None for case in dataset.cases), "by its frame of reference"
    masks = [read_study(dataset.spec, case).mask for case in dataset.cases]
    assert sum(mask is not None and np.array_equal(mask.array[0], tiny.case(2)[1]) for mask in masks) == 1
    seg.FrameOfReferenceUID = "1.2.4"
    seg.save_as(file)
    assert sum(case.mask is None for case in load_dataset(tree).cases) == 1, "nothing tells whose it is"


def test_labels_of_the_other_sequence_give_way(tree: Path, tiny: SimpleNamespace) -> None:
    """Both sequences were segmented: those drawn on the reference channel are taken, with a note."""
    flair = read_series(tree / "p0" / "S2")
    save_seg(tree / "p0" / "other.dcm", tree / "p0" / "S2", np.ones(flair.shape, np.uint8))
    result = api.check(tree)
    assert result.ok, result.findings
    assert "LABELS_SET_ASIDE" in {finding.code for finding in result.findings}


def test_a_whole_study_in_the_folder_of_a_pattern(tree: Path, two_sequences: SimpleNamespace) -> None:
    """Images and labels of a case may lie in one folder."""
    changes = {"images": "{case}", "masks": "{case}", "studies": "", "case_ids": "name"}
    write_spec(tree, two_sequences.channels, **changes)
    shutil.copy(tree / "labels" / "seg2.dcm", tree / "p2")
    shutil.rmtree(tree / "labels")
    shutil.rmtree(tree / "p3")
    for file in tree.glob("flat-*"):
        file.unlink()
    (tree / "dataset.yaml").rename(tree.parent / "spec.yaml")
    text = (tree.parent / "spec.yaml").read_text()
    (tree.parent / "spec.yaml").write_text(text + "root: tree\n")
    result = api.check(tree.parent / "spec.yaml")
    assert result.ok, result.findings
    assert [case.id for case in result.cases] == ["p0", "p1", "p2"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"images": "{case}"}, "studies: it stands instead of `images` and `masks`"),
        ({"case_ids": "name"}, "case_ids: DICOM studies have no names"),
        ({"studies": "nowhere"}, "studies: the folder nowhere does not exist"),
        ({"channels": {"ct": {"modality": "CT"}}}, "no DICOM study has a series that fits"),
        ({"patient": "^X"}, "finds nothing in a PatientID"),
    ],
)
def test_specs_that_are_wrong(
    tree: Path, two_sequences: SimpleNamespace, changes: dict[str, Any], problem: str
) -> None:
    write_spec(tree, **{"channels": two_sequences.channels, **changes})
    with pytest.raises(SpecError) as caught:
        load_dataset(tree)
    assert problem in str(caught.value)
    assert "DOE" not in str(caught.value)


def test_mr_and_pet_of_the_sarcoma_collection(data: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 17 patients has PET, in the frame of reference of the MR; its mask is the publisher's to the voxel."""
    monkeypatch.setenv("MEDSEG_DATA", str(data))
    dataset = load_dataset(repository / "data_specs" / "sarcoma-mr-pet.yaml")
    assert len({case.patient for case in dataset.cases}) == len(dataset.cases) == 17
    codes = []
    for case in dataset.cases:
        try:
            choose_channels(dataset.spec, case.images)
        except MedsegError as error:
            codes.append(error.code)
        else:
            study = read_study(dataset.spec, case)
    assert codes == ["CHANNEL_MISSING"] * 16
    assert study.image.notes == ("CHANNEL_RESAMPLED", "DERIVED", "SUV_BW")
    assert study.image.shape == (180, 191, 52)
    assert study.mask is not None
    published = align_to(read_nifti(data / "sarcoma/nifti_masks/STS_044/MR_T1_mask.nii.gz"), study.image)
    assert published is not None
    np.testing.assert_array_equal(published.array != 0, study.mask.array != 0)
    inside = study.mask.array[0] > 0
    assert study.image.array[1][inside].mean() > 1.5 * study.image.array[1].mean(), "the tumour takes up the tracer"
