"""Dataset specs, MSD folders and nnU-Net v2 folders: the same cases, and every problem told with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medseg import config
from medseg.errors import SpecError
from medseg.spec import Label, Region, Spec, load_dataset, spec_digest

GOOD: dict[str, Any] = {
    "name": "toy",
    "images": "images/{case}_{channel}.nii.gz",
    "masks": "masks/{case}.nii.gz",
    "channels": {"T1": {"modality": "MR"}, "T2": {"file": "0001"}},
    "labels": {"liver": 1, "tumour": {"value": 2, "color": "#ff0000"}},
}


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write(folder: Path, **changes: Any) -> Path:
    """Write a spec and its (empty) files: three cases of two patients."""
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump({**GOOD, **changes}, sort_keys=False))
    for case in ("p1_a", "p1_b", "p2_a"):
        touch(*(folder / "images" / f"{case}_{c}.nii.gz" for c in ("T1", "0001")), folder / "masks" / f"{case}.nii.gz")
    return file


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(SpecError) as caught:
        load_dataset(path, **options)
    return str(caught.value)


# --- our own specs -----------------------------------------------------------------------------------------------


def test_cases_are_found_by_their_first_channel_in_order(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path))
    assert [case.id for case in dataset.cases] == ["p1_a", "p1_b", "p2_a"]
    first = dataset.cases[0]
    assert [path.name for path in first.images] == ["p1_a_T1.nii.gz", "p1_a_0001.nii.gz"]
    assert first.mask == tmp_path / "masks" / "p1_a.nii.gz"
    assert (first.patient, first.split) == ("p1_a", "train")
    assert dataset.spec.foreground == {"liver": 1, "tumour": 2}
    assert dataset.spec.values == {0, 1, 2}


def test_a_folder_with_dataset_yaml_is_a_dataset(tmp_path: Path) -> None:
    write(tmp_path).rename(tmp_path / "dataset.yaml")
    assert load_dataset(tmp_path) == load_dataset(tmp_path / "dataset.yaml")


def test_a_case_without_mask_and_one_without_second_channel_stay_cases(tmp_path: Path) -> None:
    file = write(tmp_path)
    (tmp_path / "masks" / "p1_b.nii.gz").unlink()
    (tmp_path / "images" / "p2_a_0001.nii.gz").unlink()
    dataset = load_dataset(file)
    assert [case.mask is None for case in dataset.cases] == [False, True, False]
    assert len(dataset.cases[2].images) == 2


def test_an_empty_channel_word_is_a_word(tmp_path: Path) -> None:
    file = write(tmp_path, images="images/{case}{channel}.nii.gz", channels={"T1": {"file": ""}})
    assert [case.id for case in load_dataset(file).cases][:2] == ["p1_a_0001", "p1_a_T1"]


def test_patterns_may_have_folders_and_words_of_regular_expressions(tmp_path: Path) -> None:
    touch(*(tmp_path / folder / "a.nii.gz" for folder in ("x+1/mr.1", "x+2/mr.1", "x+3/mrx1")))
    file = write(tmp_path, images="{case}/mr.1/a.nii.gz", masks="{case}/m.nii.gz", channels={"T1": {}})
    assert [case.id for case in load_dataset(file).cases] == ["x+1", "x+2"]


def test_patients_by_regular_expression(tmp_path: Path) -> None:
    assert [c.patient for c in load_dataset(write(tmp_path, patient=r"^p\d")).cases] == ["p1", "p1", "p2"]
    assert [c.patient for c in load_dataset(write(tmp_path, patient=r"^p(\d)_")).cases] == ["1", "1", "2"]
    assert "finds nothing in the case id 'p1_a'" in refusal(write(tmp_path, patient="^q"))


def test_hashed_ids_show_nothing_and_keep_patients_together(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, patient=r"^p\d", case_ids="hash"))
    assert all(case.id.startswith("case-") and "p1" not in case.id for case in dataset.cases)
    assert dataset.cases[0].patient == dataset.cases[1].patient != dataset.cases[2].patient
    assert dataset.cases[0].patient.startswith("pat-")
    assert len({case.id for case in dataset.cases}) == 3


def test_splits_mark_and_select(tmp_path: Path) -> None:
    marked = load_dataset(write(tmp_path, splits={"test": ["p2_a"]}))
    assert [c.split for c in marked.cases] == ["train", "train", "test"]
    assert [c.id for c in marked.select("test")] == ["p2_a"]
    selected = load_dataset(write(tmp_path, splits={"train": ["p1_a"], "test": ["p2_a"]}))
    assert [(c.id, c.split) for c in selected.cases] == [("p1_a", "train"), ("p2_a", "test")]


def test_splits_from_a_file_replace_the_specs_own(tmp_path: Path) -> None:
    file = write(tmp_path, splits={"test": ["p2_a"]})
    (tmp_path / "s.json").write_text('{"test": ["p1_a"]}')
    assert [c.split for c in load_dataset(file, splits=tmp_path / "s.json").cases] == ["test", "train", "train"]
    (tmp_path / "s.yaml").write_text("tset: [p1_a]\n")
    assert "s.yaml:1: tset: unknown key, did you mean 'test'?" in refusal(file, splits=tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text("test: [p1a]\n")
    assert "there is no case 'p1a', did you mean 'p1_a'?" in refusal(file, splits=tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text("test: [p1_a]\ntrain: [p1_a]\n")
    assert "'p1_a' stands in train and in test" in refusal(file, splits=tmp_path / "s.yaml")


def test_root_may_be_relative_home_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    specs = tmp_path / "specs"
    specs.mkdir()
    monkeypatch.setenv("TOY_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in ("../data", "${TOY_DATA}", "$TOY_DATA", "~/data"):
        (specs / "toy.yaml").write_text(yaml.safe_dump({**GOOD, "root": root}))
        assert len(load_dataset(specs / "toy.yaml").cases) == 3
    (specs / "toy.yaml").write_text(yaml.safe_dump({**GOOD, "root": "${TOY_DTAA}/x"}))
    assert "TOY_DTAA is not set" in refusal(specs / "toy.yaml")
    (specs / "toy.yaml").write_text(yaml.safe_dump({**GOOD, "root": "nowhere"}))
    assert "the folder nowhere does not exist" in refusal(specs / "toy.yaml")


def test_every_problem_is_told_with_line_and_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(
        "name: 'no spaces, please'\n"
        "imagse: images/{case}.nii.gz\n"
        "channels:\n"
        "  T1: {modalty: MR}\n"
        "labels:\n"
        "  liver: {vlaue: 1}\n"
        "  tumour: {value: 2, color: red}\n"
        "spacing: [1, 1]\n"
        "patient: '(unclosed'\n"
    )
    lines = refusal(file).splitlines()
    places = [line.split(": ")[0].rsplit(":", 1)[1] + " " + line.split(": ")[1] for line in lines]
    for expected in ("1 name", "2 imagse", "4 channels.T1.modalty", "6 labels.liver.vlaue", "7 labels.tumour.color"):
        assert expected in places
    assert any(place.startswith("8 spacing") for place in places)
    assert "9 patient" in places
    text = "\n".join(lines)
    for suggestion in ("'images'", "'modality'", "'value'"):
        assert f"did you mean {suggestion}?" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": {"a": 1, "b": 1}}, "value 1 is given to two labels"),
        ({"labels": {"a": 0}}, "value 0 is the background's"),
        ({"labels": {"background": 0}}, "at least one label beside the background"),
        ({"labels": {"a": -1}}, "labels.a.value: Input should be greater than or equal to 0"),
        ({"labels": {"a": True}}, "labels.a"),
        ({"labels": {"a": {"value": True}}}, "labels.a.value"),
        ({"labels": {"a": 1.5}}, "labels.a"),
        ({"labels": ["a", "b"]}, "labels: "),
        ({"ignore": 2}, "value 2 is also a label's"),
        ({"ignore": 0}, "ignore: "),
        ({"regions": {"all": {"labels": ["liver", "tumor"], "paint": "liver"}}}, "did you mean 'tumour'?"),
        ({"regions": {"all": {"labels": [], "paint": "liver"}}}, "regions.all.labels"),
        ({"images": "images/x.nii.gz"}, "must hold {case} once"),
        ({"masks": "{case}/{case}.nii.gz"}, "must hold {case} once"),
        ({"splits": {"train": ["a"], "test": ["a"]}}, "'a' stands in train and in test"),
        ({"splits": {"test": ["nobody"]}}, "there is no case 'nobody'"),
        ({"spacing": [1, 1, 0]}, "three positive numbers"),
        ({"spacing": [1, 1, float("nan")]}, "spacing"),
        ({"channels": {}}, "channels"),
        ({"unit": "cm"}, "unit"),
        ({"images": ""}, "images: this key is missing"),
        ({"images": "elsewhere/{case}_{channel}.nii.gz"}, "no case was found"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in refusal(write(tmp_path, **changes))


def test_problems_of_several_keys_are_told_together(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, labels={"a": 1, "b": 1}, ignore=1, masks="m.nii.gz"))
    for part in ("given to two labels", "also a label's", "must hold {case} once"):
        assert part in text


def test_paths_that_are_no_dataset(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "gone")
    assert "neither dataset.yaml" in refusal(tmp_path)
    (tmp_path / "a.nii.gz").write_bytes(b"\x1f\x8b\x00")
    assert refusal(tmp_path / "a.nii.gz")


def test_the_digest_of_a_spec_forgets_only_where_the_data_lie() -> None:
    spec = Spec.model_validate(GOOD)
    assert spec_digest(spec) == spec_digest(Spec.model_validate({**GOOD, "root": "/elsewhere"}))
    assert spec_digest(spec) != spec_digest(Spec.model_validate({**GOOD, "ignore": 9}))


# --- Medical Segmentation Decathlon ------------------------------------------------------------------------------


def msd(folder: Path, **changes: Any) -> Path:
    content = {
        "name": "Toy Task",
        "modality": {"0": "FLAIR", "1": "CT"},
        "labels": {"0": "background", "1": "edema", "2": "tumour"},
        "training": [{"image": f"./imagesTr/t_{n}.nii.gz", "label": f"./labelsTr/t_{n}.nii.gz"} for n in (2, 1)],
        "test": ["./imagesTs/t_9.nii.gz"],
    }
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({**content, **changes}))
    return folder


def test_an_msd_folder_is_a_dataset(tmp_path: Path) -> None:
    dataset = load_dataset(msd(tmp_path))
    assert dataset.spec.name == "Toy_Task"
    assert dataset.spec.foreground == {"edema": 1, "tumour": 2}
    assert list(dataset.spec.channels) == ["FLAIR", "CT"]
    assert dataset.spec.channels["CT"].modality == "CT"
    # The unlabelled test images of the challenge are no cases.
    assert [(c.id, c.split, len(c.images)) for c in dataset.cases] == [("t_1", "train", 1), ("t_2", "train", 1)]
    assert dataset.cases[0].mask == tmp_path / "labelsTr" / "t_1.nii.gz"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": {"zero": "background"}}, "does not follow the layout"),
        ({"training": [{"image": "a.nii.gz"}]}, "does not follow the layout"),
        ({"training": []}, "no case was found"),
        ({"modality": None, "labels": None}, "does not follow the layout"),
    ],
)
def test_a_broken_msd_folder_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in refusal(msd(tmp_path, **changes))


def test_a_dataset_json_of_another_kind_is_refused(tmp_path: Path) -> None:
    texts = {"{}": "neither", "{": "not valid JSON", "[1]": "dataset.json", '"x"': "dataset.json"}
    for text, expected in texts.items():
        (tmp_path / "dataset.json").write_text(text)
        assert expected in refusal(tmp_path)


def test_the_hippocampus_folder(data: Path) -> None:
    dataset = load_dataset(data / "hippocampus")
    assert len(dataset.cases) == 200
    assert dataset.spec.foreground == {"Anterior": 1, "Posterior": 2}
    assert all(case.mask is not None and case.mask.exists() for case in dataset.cases)


# --- nnU-Net v2 --------------------------------------------------------------------------------------------------


def nnunet(folder: Path, **changes: Any) -> Path:
    content = {
        "channel_names": {"1": "T2", "0": "CT"},
        "labels": {"background": 0, "edema": 1, "tumour": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    folder = folder / "Dataset042_Toy"
    for case in ("c_01", "c_02"):
        touch(*(folder / "imagesTr" / f"{case}_000{n}.nii.gz" for n in (0, 1)), folder / "labelsTr" / f"{case}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({**content, **changes}))
    return folder


def test_an_nnunet_folder_is_a_dataset(tmp_path: Path) -> None:
    dataset = load_dataset(nnunet(tmp_path))
    assert dataset.spec.name == "Dataset042_Toy"
    # Channels come by number, not by their order in the file: the network would see them exchanged.
    assert list(dataset.spec.channels) == ["CT", "T2"]
    assert dataset.spec.channels["CT"].modality == "CT"
    assert [case.id for case in dataset.cases] == ["c_01", "c_02"]
    assert [path.name for path in dataset.cases[0].images] == ["c_01_0000.nii.gz", "c_01_0001.nii.gz"]
    assert dataset.spec.foreground == {"edema": 1, "tumour": 2}


def test_nnunets_labelled_test_cases_are_test_cases(tmp_path: Path) -> None:
    folder = nnunet(tmp_path)
    touch(folder / "imagesTs" / "c_03_0000.nii.gz", folder / "labelsTs" / "c_03.nii.gz")
    touch(folder / "imagesTs" / "c_04_0000.nii.gz")
    dataset = load_dataset(folder)
    assert [(c.id, c.split) for c in dataset.cases] == [("c_01", "train"), ("c_02", "train"), ("c_03", "test")]
    assert dataset.cases[2].mask == folder / "labelsTs" / "c_03.nii.gz"


def test_nnunets_regions_and_ignore_label(tmp_path: Path) -> None:
    """The example of nnU-Net's documentation (region_based_training.md, ignore_label.md): BraTS."""
    labels = {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": 3, "ignore": 4}
    spec = load_dataset(nnunet(tmp_path, labels=labels, regions_class_order=[1, 2, 3])).spec
    assert spec.ignore == 4
    assert {label.value for label in spec.labels.values() if label.value} == {1, 2, 3}
    names = {label.value: name for name, label in spec.labels.items()}
    assert names[3] == "enhancing_tumor"
    assert spec.regions == {
        "whole_tumor": Region(labels=(names[1], names[2], names[3]), paint=names[1]),
        "tumor_core": Region(labels=(names[2], names[3]), paint=names[2]),
        "enhancing_tumor": Region(labels=(names[3],), paint=names[3]),
    }
    assert list(spec.regions) == ["whole_tumor", "tumor_core", "enhancing_tumor"]
    assert spec.values == {0, 1, 2, 3, 4}


def test_nnunets_ignore_label_without_regions(tmp_path: Path) -> None:
    spec = load_dataset(nnunet(tmp_path, labels={"background": 0, "edema": 1, "ignore": 2})).spec
    assert (spec.foreground, spec.ignore, spec.regions) == ({"edema": 1}, 2, {})


@pytest.mark.parametrize("name", ["noNorm", "NoNorm", "nonorm"])
def test_nnunets_channels_that_are_not_normalised(tmp_path: Path, name: str) -> None:
    spec = load_dataset(nnunet(tmp_path, channel_names={"0": name})).spec
    assert spec.channels[name].normalisation == "none"


def test_nnunets_channels_of_one_name_stay_two(tmp_path: Path) -> None:
    spec = load_dataset(nnunet(tmp_path, channel_names={"0": "MRI", "1": "MRI"})).spec
    assert len(spec.channels) == 2
    assert {channel.modality for channel in spec.channels.values()} == {"MRI"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"file_ending": ".mha"}, "file_ending '.mha' is not read"),
        ({"labels": {"background": 0}}, "at least one label"),
        ({"labels": {"background": 0, "a": [1, 2]}}, "regions_class_order"),
        ({"labels": {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order": [1]}, "does not follow"),
        ({"labels": {"background": 0, "a": [1, 2]}, "regions_class_order": [7]}, "does not follow"),
        ({"channel_names": ["CT"]}, "does not follow"),
        ({"labels": {"background": 0, "a": "one"}}, "does not follow"),
    ],
)
def test_a_broken_nnunet_folder_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in refusal(nnunet(tmp_path, **changes))


# --- what we ship ------------------------------------------------------------------------------------------------


def test_every_shipped_spec_is_valid(repository: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg import config

    monkeypatch.setenv("MEDSEG_DATA", str(data))
    files = sorted((repository / "data_specs").glob("*.yaml"))
    assert files
    for file in files:
        spec = config.load(Spec, file)
        assert spec.name
        assert spec.foreground


def test_labels_may_be_written_short() -> None:
    assert Spec.model_validate({**GOOD, "labels": {"a": 3}}).labels == {"a": Label(value=3)}


def test_the_digest_of_a_spec_knows_the_order_of_its_labels() -> None:
    text = "name: x\nimages: 'i/{{case}}.nii'\nmasks: 'm/{{case}}.nii'\nchannels: {{t1: {{}}}}\nlabels: {labels}\n"
    first = config.parse(Spec, text.format(labels="{a: 1, b: 2}"), name="x")
    second = config.parse(Spec, text.format(labels="{b: 2, a: 1}"), name="x")
    assert spec_digest(first) != spec_digest(second), "channels of a network follow the order of the labels"
