"""From what a person types to studies: nothing is forgotten, nothing is taken twice, nothing is overwritten."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest

from medseg.batch.inputs import find_inputs
from medseg.batch.ledger import Entry, Ledger
from medseg.batch.run import _write_linkage
from medseg.batch.study_input import StudyInput
from medseg.errors import BatchError
from medseg.phantom.dicom import write_series
from medseg.spec import Channel, Label, Spec
from medseg.volume import Volume

ONE = Spec(name="one", channels={"mr": Channel()}, labels={"ball": Label(value=1)})
TWO = Spec(name="two", channels={"t1": Channel(), "post_t1": Channel()}, labels={"ball": Label(value=1)})


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def ids(studies: list[StudyInput]) -> list[str]:
    return [study.id for study in studies]


def remember(out: Path, studies: list[StudyInput]) -> None:
    """Leave in `out` what a run leaves there."""
    _write_linkage(out, studies)
    for study in studies:
        Ledger(out).write(Entry(id=study.id, state="refused", input_digest=study.digest(), model_digest="m"))


def series(folder: Path, seed: int = 0, shape: tuple[int, int, int] = (8, 9, 6)) -> list[Path]:
    values = np.random.default_rng(seed).integers(0, 500, (1, *shape)).astype(np.float32)
    return write_series(Volume(values, np.diag([1.0, 1, 2, 1])), folder, modality="MR", seed=seed)


def test_files_folders_and_trees_are_one_list_ordered_by_id(tmp_path: Path) -> None:
    touch(tmp_path / "b.nii.gz", tmp_path / "tree" / "deep" / "a.nii", tmp_path / "tree" / "notes.txt")
    found = find_inputs([tmp_path / "b.nii.gz", tmp_path / "tree"], ONE)
    assert ids(found) == ["a", "b"]
    assert [study.origin.name for study in found] == ["a.nii", "b.nii.gz"]


def test_what_is_half_written_or_hidden_is_no_input(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii.gz", tmp_path / ".partial-01234567-b.nii.gz", tmp_path / "._a.nii.gz")
    assert ids(find_inputs([tmp_path], ONE)) == ["a"]


def test_a_link_to_a_file_that_is_gone_is_a_study_and_not_forgotten(tmp_path: Path) -> None:
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "unmounted" / "x.nii.gz")
    assert ids(find_inputs([tmp_path], ONE)) == ["gone"]


def test_a_link_to_itself_is_a_study_that_is_refused_and_stops_no_other(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii.gz")
    (tmp_path / "round.nii.gz").symlink_to("round.nii.gz")
    assert ids(find_inputs([tmp_path], ONE, out=tmp_path / "out")) == ["a", "round"]


@pytest.mark.parametrize("out", ["tree/out", "tree/deep/er/out"])
def test_masks_below_the_input_are_not_predicted_again(tmp_path: Path, out: str) -> None:
    touch(tmp_path / "tree" / "a.nii.gz", tmp_path / out / "a.nii.gz", tmp_path / out / "z.nii.gz")
    assert ids(find_inputs([tmp_path / "tree"], ONE, out=tmp_path / out)) == ["a"]


def test_masks_of_an_earlier_run_into_another_folder_are_no_images(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.nii.gz", "masks/a.nii.gz", "masks/ledger/a.json")))
    found = find_inputs([tmp_path], ONE, out=tmp_path / "other")
    assert [study.origin for study in found] == [tmp_path / "a.nii.gz"]


def test_an_output_folder_above_the_input_hides_nothing(tmp_path: Path) -> None:
    touch(tmp_path / "tree" / "a.nii.gz")
    assert ids(find_inputs([tmp_path / "tree"], ONE, out=tmp_path)) == ["a"]


def test_masks_beside_a_dicom_series_are_not_inputs(tmp_path: Path) -> None:
    series(tmp_path / "series")
    first = find_inputs([tmp_path], ONE, out=tmp_path)
    touch(tmp_path / f"{first[0].id}.nii.gz", tmp_path / "ledger" / f"{first[0].id}.json")
    assert ids(find_inputs([tmp_path], ONE, out=tmp_path)) == ids(first)


@pytest.mark.parametrize("given", ["a.nii.gz", "."])
def test_an_input_is_never_overwritten(tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.nii.gz")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BatchError, match=r"would be written over it; choose another --out") as caught:
        find_inputs([Path(given)], ONE, out=tmp_path)
    assert caught.value.code == "OVERWRITES_INPUT"


def test_two_files_of_one_name_are_told_apart_by_a_hash_of_their_place(tmp_path: Path) -> None:
    touch(tmp_path / "Doe" / "a.nii.gz", tmp_path / "Roe" / "a.nii.gz", tmp_path / "Roe" / "b.nii")
    found = find_inputs([tmp_path], ONE)
    assert re.fullmatch(r"a-[0-9a-f]{8} a-[0-9a-f]{8} b", " ".join(ids(found)))
    assert len(set(ids(found))) == 3
    assert ids(find_inputs([tmp_path / "Roe", tmp_path / "Doe"], ONE)) == ids(found), "in any order of the inputs"
    touch(tmp_path / "z" / "c.nii", tmp_path / "z" / "c.nii.gz")
    assert [len(name) for name in ids(find_inputs([tmp_path / "z"], ONE))] == [10, 10]


def test_an_input_added_later_renames_nothing(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "a.nii.gz")
    out = tmp_path / "out"
    first = find_inputs([tmp_path / "x"], ONE, out=out)
    assert ids(first) == ["a"]
    remember(out, first)
    touch(tmp_path / "y" / "a.nii.gz", tmp_path / "y" / "b.nii.gz")
    second = {study.origin: study.id for study in find_inputs([tmp_path / "x", tmp_path / "y"], ONE, out=out)}
    assert second[tmp_path / "x" / "a.nii.gz"] == "a"
    assert re.fullmatch(r"a-[0-9a-f]{8}", second[tmp_path / "y" / "a.nii.gz"])
    remember(out, find_inputs([tmp_path / "x", tmp_path / "y"], ONE, out=out))
    touch(tmp_path / "z" / "a.nii.gz")
    third = {study.origin: study.id for study in find_inputs([tmp_path], ONE, out=out)}
    assert third.items() >= second.items()
    assert len(set(third.values())) == 4
    alone = find_inputs([tmp_path / "y" / "a.nii.gz"], ONE, out=out)
    assert ids(alone) == [second[tmp_path / "y" / "a.nii.gz"]], "also when the other one is not given"


def test_the_name_of_another_file_is_not_taken_over_unless_it_has_the_same_content(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "a.nii.gz")
    out = tmp_path / "out"
    remember(out, find_inputs([tmp_path / "x"], ONE, out=out))
    shutil.copytree(tmp_path / "x", tmp_path / "copy")
    assert ids(find_inputs([tmp_path / "copy"], ONE, out=out)) == ["a"], "the same study elsewhere"
    (tmp_path / "copy" / "a.nii.gz").write_bytes(b"other")
    assert re.fullmatch(r"a-[0-9a-f]{8}", ids(find_inputs([tmp_path / "copy"], ONE, out=out))[0])
    (tmp_path / "x" / "a.nii.gz").write_bytes(b"changed in its place")
    assert ids(find_inputs([tmp_path / "x"], ONE, out=out)) == ["a"]


def test_an_input_given_twice_is_one_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "x" / "a.nii.gz")
    series(tmp_path / "x" / "s")
    monkeypatch.chdir(tmp_path)
    found = find_inputs([Path("x"), tmp_path / "x" / "a.nii.gz", tmp_path / "x", tmp_path / "x" / "s"], ONE)
    assert len(found) == 2
    assert ids(found) == ids(find_inputs([tmp_path], ONE))


def test_cases_of_two_datasets_keep_their_names_and_so_must_differ(
    tmp_path: Path, tiny_dataset: Callable[..., Path]
) -> None:
    one = tiny_dataset(tmp_path / "one", cases=2, test=0)
    two = tiny_dataset(tmp_path / "two", cases=1, test=0)
    assert ids(find_inputs([one, one], ONE)) == ["c0", "c1"]
    with pytest.raises(
        BatchError, match=r"one/images/c0.* and .*two/images/c0.* would both be written as c0"
    ) as caught:
        find_inputs([one, two], ONE)
    assert caught.value.code == "SAME_NAME"
    with_file = find_inputs([one, two / "images" / "c0.nii.gz"], ONE)
    assert [name[:3] for name in ids(with_file)] == ["c0", "c0-", "c1"]


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_nothing_to_do_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BatchError) as caught:
        find_inputs([tmp_path / name], ONE)
    assert caught.value.code == {"nothing": "NOT_FOUND", "empty": "EMPTY_INPUT"}[name]
    assert name in str(caught.value)


def test_channels_of_a_case_are_put_together_in_the_order_of_the_model(tmp_path: Path) -> None:
    touch(*(tmp_path / f"{case}_{token}.nii.gz" for case in ("a", "b") for token in ("post_t1", "t1")))
    found = find_inputs([tmp_path], TWO)
    assert ids(found) == ["a", "b"]
    assert [path.name for path in found[0].images] == ["a_t1.nii.gz", "a_post_t1.nii.gz"]


def test_one_channel_alone_still_counts_as_its_case(tmp_path: Path) -> None:
    touch(tmp_path / "a_t1.nii.gz", tmp_path / "b_post_t1.nii.gz")
    found = find_inputs([tmp_path], TWO)
    assert ids(found) == ["a", "b"]
    assert {path.name for path in found[1].images} == {"b_t1.nii.gz", "b_post_t1.nii.gz"}


def test_files_named_by_their_channel_alone_belong_to_the_case_that_names_their_folder(tmp_path: Path) -> None:
    touch(*(tmp_path / case / f"{token}.nii.gz" for case in ("a", "b") for token in ("t1", "post_t1")))
    touch(tmp_path / "c" / "post_t1.nii.gz")
    found = find_inputs([tmp_path], TWO)
    assert ids(found) == ["a", "b", "c"]
    assert found[0].images == (tmp_path / "a" / "t1.nii.gz", tmp_path / "a" / "post_t1.nii.gz")
    assert found[2].images[0] == tmp_path / "c" / "t1.nii.gz", "missing: refused when it is read"


def test_a_file_with_all_channels_is_a_case(tmp_path: Path) -> None:
    touch(tmp_path / "whole.nii.gz")
    assert find_inputs([tmp_path], TWO)[0].images == (tmp_path / "whole.nii.gz",)


def test_cases_of_two_folders_are_not_mixed(tmp_path: Path) -> None:
    touch(*(tmp_path / folder / f"a_{token}.nii.gz" for folder in ("x", "y") for token in ("t1", "post_t1")))
    found = find_inputs([tmp_path], TWO)
    assert {tuple(path.parent.name for path in study.images) for study in found} == {("x", "x"), ("y", "y")}
    assert len(set(ids(found))) == 2


def test_the_time_points_of_one_series_are_two_studies(tmp_path: Path) -> None:
    for file in [*series(tmp_path / "one", seed=1), *series(tmp_path / "two", seed=2)]:
        dataset = pydicom.dcmread(file)
        dataset.TemporalPositionIdentifier = 1 if file.parent.name == "one" else 2
        dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.4"
        dataset.save_as(file)
    found = find_inputs([tmp_path], ONE)
    assert len(set(ids(found))) == 2
    assert ids(find_inputs([tmp_path], ONE)) == ids(found)


def test_series_are_named_by_hashes_that_stay(tmp_path: Path) -> None:
    series(tmp_path / "Doe_John" / "one", seed=1)
    series(tmp_path / "Doe_John" / "two", seed=2)
    found = find_inputs([tmp_path], ONE)
    assert len(found) == 2
    assert all(re.fullmatch(r"case-[0-9a-f]{12}", study.id) for study in found)
    shutil.move(tmp_path / "Doe_John", tmp_path / "moved")
    assert ids(find_inputs([tmp_path], ONE)) == ids(found), "the same series elsewhere is the same study"


def test_a_folder_of_damaged_files_alone_is_a_study(tmp_path: Path) -> None:
    touch(tmp_path / "bad" / "IM0001.dcm")
    series(tmp_path / "good")
    found = find_inputs([tmp_path], ONE)
    assert sorted(study.origin.name for study in found) == ["bad", "good"]


def test_a_file_of_another_kind_that_was_named_is_a_study(tmp_path: Path) -> None:
    touch(tmp_path / "scan.mha")
    assert [study.origin for study in find_inputs([tmp_path / "scan.mha"], ONE)] == [tmp_path / "scan.mha"]


def test_the_digest_follows_the_bytes_and_nothing_else(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "a.nii.gz")
    first = find_inputs([tmp_path], ONE)[0].digest()
    shutil.move(tmp_path / "x", tmp_path / "y")
    assert find_inputs([tmp_path], ONE)[0].digest() == first
    (tmp_path / "y" / "a.nii.gz").write_bytes(b"y")
    assert find_inputs([tmp_path], ONE)[0].digest() != first


def test_the_digest_of_a_series_counts_every_slice(tmp_path: Path) -> None:
    files = series(tmp_path / "s")
    first = find_inputs([tmp_path], ONE)[0].digest()
    files[2].unlink()
    assert find_inputs([tmp_path], ONE)[0].digest() != first


def test_cases_of_a_dataset(tmp_path: Path, tiny_dataset: Callable[..., Path]) -> None:
    data = tiny_dataset(tmp_path / "data", cases=4, test=1)
    assert ids(find_inputs([data], ONE)) == ["c3"]
    assert ids(find_inputs([data / "dataset.yaml"], ONE, choice="train")) == ["c0", "c1", "c2"]
    assert ids(find_inputs([data], ONE, choice="all")) == ["c0", "c1", "c2", "c3"]
    (tmp_path / "splits.yaml").write_text("test: [c0, c1]\n")
    assert ids(find_inputs([data], ONE, splits=tmp_path / "splits.yaml")) == ["c0", "c1"]
    whole = tiny_dataset(tmp_path / "whole", cases=2, test=0)
    assert ids(find_inputs([whole], ONE)) == ["c0", "c1"]
    with pytest.raises(BatchError, match="no test case") as caught:
        find_inputs([whole], ONE, choice="test")
    assert caught.value.code == "EMPTY_INPUT"


def test_channels_of_a_dataset_stand_where_the_model_expects_them(
    tmp_path: Path, tiny_dataset: Callable[..., Path]
) -> None:
    channels = {"post_t1": {}, "t1": {}}
    data = tiny_dataset(tmp_path / "data", cases=1, test=0, channels=channels, images="images/{case}_{channel}.nii.gz")
    touch(data / "images" / "c0_t1.nii.gz", data / "images" / "c0_post_t1.nii.gz")
    (found,) = find_inputs([data], TWO)
    assert [path.name for path in found.images] == ["c0_t1.nii.gz", "c0_post_t1.nii.gz"]
    stacked = tiny_dataset(tmp_path / "stacked", cases=1, test=0, channels=channels)
    with pytest.raises(
        BatchError, match=r"hold the channels post_t1, t1, the model needs them as t1, post_t1"
    ) as caught:
        find_inputs([stacked], TWO)
    assert caught.value.code == "CHANNEL_ORDER"


def test_rules_make_one_study_of_the_series_of_several_channels(tmp_path: Path, two_sequences: SimpleNamespace) -> None:
    spec = Spec.model_validate({"name": "two", "channels": two_sequences.channels, "labels": {"ball": 1}})
    for number in range(2):
        two_sequences.write(tmp_path / "archive" / str(number), number)
    two_sequences.write(tmp_path / "archive" / "t1", 2, flair=False)
    found = find_inputs([tmp_path / "archive"], spec)
    assert all(re.fullmatch("case-[0-9a-f]{12}", name) for name in ids(found))
    by_place = {study.origin.name: study for study in found}
    assert set(by_place) == {"0", "1", "t1"}
    first = by_place["0"]
    assert [row.files[0].parent.name for row in first.channels] == ["S1", "S2"]
    assert first.series is first.channels[0]
    assert first.refusal is None
    assert by_place["t1"].refusal is not None
    assert by_place["t1"].refusal.code == "CHANNEL_MISSING"
    before = first.digest()
    shutil.move(tmp_path / "archive" / "0", tmp_path / "moved")
    assert ids(find_inputs([tmp_path / "moved"], spec)) == [first.id]
    (again,) = find_inputs([tmp_path / "moved"], spec)
    assert again.digest() == before
    next((tmp_path / "moved" / "S3").iterdir()).unlink()
    assert find_inputs([tmp_path / "moved"], spec)[0].digest() == before, "the localizer is no input"
    file = next((tmp_path / "moved" / "S2").iterdir())
    file.write_bytes(file.read_bytes() + b"\0\0")
    assert find_inputs([tmp_path / "moved"], spec)[0].digest() != before


def test_a_rule_of_a_single_channel_leaves_other_series_out(tmp_path: Path, two_sequences: SimpleNamespace) -> None:
    rule = {"mr": {"modality": "MR", "match": {"SeriesDescription": "T1"}}}
    spec = Spec.model_validate({"name": "one", "channels": rule, "labels": {"ball": 1}})
    two_sequences.write(tmp_path)
    found = find_inputs([tmp_path], spec)
    assert sorted(study.origin.name for study in found) == ["S1", "S4"], "both T1, not the FLAIR nor the localizer"
    assert set(ids(found)) < set(ids(find_inputs([tmp_path], ONE)))
    shutil.rmtree(tmp_path / "S1")
    shutil.rmtree(tmp_path / "S4")
    (missing,) = find_inputs([tmp_path], spec)
    assert missing.refusal is not None
    assert missing.refusal.code == "CHANNEL_MISSING"


def test_a_series_of_another_modality_is_never_segmented(tmp_path: Path) -> None:
    """An MR model that is given a whole archive paints organs into CT without a word."""
    volume = Volume(np.arange(432, dtype=np.float32).reshape(1, 8, 9, 6), np.diag([1.0, 1, 2, 1]))
    for number, modality in enumerate(["MR", "CT", "PT"]):
        write_series(volume, tmp_path / modality, modality=modality, seed=number)  # type: ignore[arg-type]
    spec = Spec.model_validate({"name": "one", "channels": {"a": {"modality": "MRI"}}, "labels": {"ball": 1}})
    of = {study.origin.name: study for study in find_inputs([tmp_path], spec)}
    codes = {name: study.refusal.code if study.refusal else "" for name, study in of.items()}
    assert codes == {"MR": "", "CT": "OTHER_MODALITY", "PT": "OTHER_MODALITY"}
    assert "the series is CT, the model is for MR" in str(of["CT"].refusal)
    for channel in ({}, {"modality": "any"}):
        free = Spec.model_validate({"name": "one", "channels": {"a": channel}, "labels": {"ball": 1}})
        assert all(study.refusal is None for study in find_inputs([tmp_path], free))
    study = pydicom.uid.generate_uid()
    for file in tmp_path.rglob("*.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.StudyInstanceUID = study
        dataset.save_as(file)
    assert [study.origin.name for study in find_inputs([tmp_path], spec)] == ["MR"], "left out, as localizers are"


def test_time_points_of_one_file_are_studies_of_their_own(tmp_path: Path, write_enhanced: Callable[..., Path]) -> None:
    volumes = [Volume(np.full((1, 8, 9, 6), value, np.float32), np.diag([-1.0, -1, 2, 1])) for value in (1, 2, 3)]
    write_enhanced(tmp_path / "in/x.dcm", *volumes, tags=[{"time": 1}, {"time": 2}, {"time": 3}])
    found = find_inputs([tmp_path / "in"], ONE)
    assert len({study.id for study in found}) == 3
    assert [study.series.files for study in found if study.series] == [(tmp_path / "in/x.dcm",)] * 3
    assert len({study.digest() for study in found}) == 1  # of the file's bytes
    shutil.move(tmp_path / "in", tmp_path / "moved")
    assert ids(find_inputs([tmp_path / "moved"], ONE)) == ids(found)


PIXELS = Spec(name="pixels", unit="pixel", channels={"em": Channel()}, labels={"cell": Label(value=255)})


def test_pictures_are_inputs_of_a_model_in_pixels(tmp_path: Path) -> None:
    names = ["a.png", "b.TIF", "c.jpeg", "deep/d.tiff", "e.nii.gz"]
    touch(*(tmp_path / name for name in names), tmp_path / "notes.txt", tmp_path / ".hidden.png")
    assert ids(find_inputs([tmp_path], PIXELS)) == ["a", "b", "c", "d", "e"]
    assert ids(find_inputs([tmp_path], ONE)) == ["e"], "beside volumes a picture is a preview"
    assert ids(find_inputs([tmp_path / "a.png"], ONE)) == ["a"], "and what is given is never forgotten"


def test_pictures_of_one_name_are_told_apart(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "a.tif", tmp_path / "deep" / "a.png")
    found = ids(find_inputs([tmp_path], PIXELS))
    assert len(set(found)) == 3
    assert all(re.fullmatch(r"a-[0-9a-f]{8}", name) for name in found)


def test_a_mask_never_takes_the_place_of_its_picture(tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    with pytest.raises(BatchError) as caught:
        find_inputs([tmp_path / "a.png"], PIXELS, out=tmp_path)
    assert caught.value.code == "OVERWRITES_INPUT"


def test_masks_of_pictures_below_the_input_are_no_inputs(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "old" / "a.png", tmp_path / "old" / "ledger" / "a.json")
    assert ids(find_inputs([tmp_path], PIXELS)) == ["a"]
