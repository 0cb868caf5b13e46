"""Several datasets as one: names, values, what is refused, and voxels as the joined spec has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from medseg.cases import content_digests
from medseg.errors import ReadError, SpecError
from medseg.files import digest
from medseg.joined import JoinedCase, annotated, annotates_all, dataset_of
from medseg.joining import join_specs, load_datasets
from medseg.spec import Spec, load_dataset, spec_digest
from medseg.studies import read_study

Builder = Callable[..., Path]
MakeSpec = Callable[..., Spec]


@pytest.fixture
def two(tmp_path: Path, tiny_dataset: Builder, tiny: SimpleNamespace) -> tuple[Path, Path]:
    """Folders a (ball 1, box 2, test c3) and b (box 1, rest 7, ignore 9; other images, cases c3 to c5)."""
    first = tiny_dataset(tmp_path / "a", cases=4, test=1, name="a")
    second = tmp_path / "b"
    for number in (3, 4, 5):
        image, mask = tiny.case(10 + number)
        other = np.zeros_like(mask)
        other[mask == 2], other[mask == 1], other[0] = 1, 7, 9
        tiny.save(second / f"{number}" / "mr.nii.gz", image)
        tiny.save(second / f"{number}" / "mask.nii.gz", other)
    spec = {
        "name": "b",
        "images": "{case}/mr.nii.gz",
        "masks": "{case}/mask.nii.gz",
        "channels": {"mr": {}},
        "labels": {"box": 1, "rest": 7},
        "ignore": 9,
    }
    (second / "dataset.yaml").write_text(yaml.safe_dump(spec))
    return first, second


def test_one_dataset_is_what_load_dataset_makes_of_it(two: tuple[Path, Path]) -> None:
    found = load_datasets(two[:1])
    assert found == load_dataset(two[0])
    assert not any(isinstance(case, JoinedCase) for case in found.cases)


def test_cases_keep_their_names_and_patients_get_that_of_their_dataset(two: tuple[Path, Path]) -> None:
    cases = {case.id: case for case in load_datasets(two).cases}
    assert sorted(cases) == ["3", "4", "5", "c0", "c1", "c2", "c3"]
    assert [cases[name].patient for name in ("c0", "3")] == ["a.c0", "b.3"]
    assert [name for name, case in cases.items() if case.split == "test"] == ["c3"]
    assert [dataset_of(cases[name]) for name in ("c0", "3")] == ["a", "b"]
    assert cases["3"].alone in load_dataset(two[1]).cases  # type: ignore[attr-defined]


def test_names_that_collide_get_the_name_of_their_dataset(tmp_path: Path, tiny_dataset: Builder) -> None:
    a = tiny_dataset(tmp_path / "a", cases=3, test=0, name="a")
    b = tiny_dataset(tmp_path / "b", cases=2, test=0, name="b", labels={"sphere": 1, "box": 2})
    assert [case.id for case in load_datasets([a, b]).cases] == ["a.c0", "a.c1", "c2", "b.c0", "b.c1"]


def test_the_same_images_are_of_one_patient(tmp_path: Path, tiny_dataset: Builder) -> None:
    a = tiny_dataset(tmp_path / "a", cases=3, test=0, name="a")
    b = tiny_dataset(tmp_path / "b", cases=2, test=0, name="b", labels={"sphere": 1, "box": 2})
    assert [case.patient for case in load_datasets([a, b]).cases] == ["a.c0", "a.c1", "a.c2", "a.c0", "a.c1"]


def test_labels_are_found_by_name_and_taken_values_give_way(make_spec: MakeSpec) -> None:
    specs = [
        make_spec({"liver": 1, "kidney": 3}, name="a", ignore=4),
        make_spec({"spleen": 3, "liver": 2, "aorta": 9}, name="b", ignore=5),
        make_spec({"vein": 1}, name="c"),
    ]
    joined = join_specs(specs)
    assert joined.foreground == {"liver": 1, "kidney": 3, "spleen": 5, "aorta": 9, "vein": 2}
    assert joined.ignore == 4
    assert joined.name == "a_b_c"
    assert join_specs([make_spec({"x": 1}, name="a"), make_spec({"y": 4}, name="b", ignore=1)]).ignore == 2


def test_codes_colours_and_rules_are_kept(make_spec: MakeSpec) -> None:
    code = {"value": "10200004", "meaning": "Liver"}
    a = make_spec({"liver": 1}, name="a", licence="CC0")
    b = make_spec({"liver": {"value": 2, "snomed": code, "color": "#ff0000"}}, name="b", studies="dicom", licence="MIT")
    joined = join_specs([a, b])
    assert joined.labels["liver"].snomed is not None
    assert (joined.labels["liver"].value, joined.labels["liver"].color) == (1, "#ff0000")
    assert joined.rules["t1"].modality == "MR"
    assert joined.licence == "CC0; MIT"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "channels": ({"channels": ("t1", "t2")}, "a has the channels t1, b has t1, t2"),
    "names": ({"name": "a"}, "2 are called a"),
    "units": ({"unit": "pixel"}, "some are in mm and some in pixel"),
    "writing": ({"labels": {"Organ": 1}}, "the label 'Organ' of b is 'organ' in a"),
    "regions": ({"regions": {"all": {"labels": ["organ"], "paint": "organ"}}}, "a exclusive labels"),
    "codes": (
        {"labels": {"organ": {"value": 1, "snomed": {"value": "2", "meaning": "Spleen"}}}},
        "the label organ is SCT 1 in a and SCT 2 in b",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_together_is_refused(make_spec: MakeSpec, what: str) -> None:
    changes, text = REFUSED[what]
    a = make_spec({"organ": {"value": 1, "snomed": {"value": "1", "meaning": "Liver"}}}, name="a")  # type: ignore[dict-item]
    with pytest.raises(SpecError, match=text) as found:
        join_specs([a, make_spec(**{"name": "b", **changes})])
    assert found.value.code == "DATASETS_DIFFER"


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        ({"modality": "MR"}, {"modality": "CT"}, "modality MR in a, CT in b"),
        ({"normalisation": "none"}, {"modality": "CT"}, "normalisation none in a, ct in b"),
        ({"modality": "PT", "values": "suv"}, {"modality": "PET", "values": "stored"}, "values suv in a, stored in b"),
    ],
)
def test_channels_of_another_kind_are_refused(one: dict[str, str], other: dict[str, str], text: str) -> None:
    specs = [
        Spec.model_validate({"name": name, "channels": {"x": row}, "labels": {"organ": 1}})
        for name, row in (("a", one), ("b", other))
    ]
    with pytest.raises(SpecError, match=text):
        join_specs(specs)


@pytest.mark.parametrize("rows", [({"modality": "MRI"}, {"modality": "MR"}), ({}, {"modality": "CT"})])
def test_channels_of_one_kind_under_another_word_are_one(rows: tuple[dict[str, str], ...]) -> None:
    specs = [
        Spec.model_validate({"name": name, "channels": {"x": row}, "labels": {"organ": 1}})
        for name, row in zip("ab", rows, strict=True)
    ]
    assert join_specs(specs).channels["x"].modality in ("MRI", "CT")


def test_voxels_have_the_values_of_the_joined_spec(two: tuple[Path, Path]) -> None:
    joined = load_datasets(two)
    assert joined.spec.foreground == {"ball": 1, "box": 2, "rest": 7}
    own = {case.id: case for case in load_dataset(two[1]).cases}
    spec = load_dataset(two[1]).spec
    for case in joined.cases:
        if case.id in own:
            before, after = read_study(spec, own[case.id]), read_study(joined.spec, case)
            assert before.mask is not None
            assert after.mask is not None
            table = {0: 0, 1: 2, 7: 7, 9: 9}
            np.testing.assert_array_equal(after.mask.array, np.vectorize(table.get)(before.mask.array))
            np.testing.assert_array_equal(after.image.array, before.image.array)


def test_channels_are_brought_into_the_order_of_the_first(tmp_path: Path, tiny: SimpleNamespace) -> None:
    image, mask = tiny.case(0)
    for name, order in (("a", ("t1", "t2")), ("b", ("t2", "t1"))):
        for number, channel in enumerate(("t1", "t2")):
            tiny.save(tmp_path / name / f"{name}0_{channel}.nii.gz", image + 1000 * number)
        tiny.save(tmp_path / name / f"{name}0.nii.gz", mask)
        spec = {
            "name": name,
            "images": "{case}_{channel}.nii.gz",
            "masks": "{case}.nii.gz",
            "channels": {channel: {"modality": "MR"} for channel in order},
            "labels": {"ball": 1, "box": 2},
        }
        (tmp_path / name / "dataset.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    joined = load_datasets([tmp_path / "a", tmp_path / "b"])
    first, second = (read_study(joined.spec, case) for case in joined.cases)
    np.testing.assert_array_equal(first.image.array, second.image.array)


def test_a_refusal_names_the_case_as_the_training_does(two: tuple[Path, Path]) -> None:
    joined = load_datasets(two)
    (two[0] / "masks" / "c0.nii.gz").unlink()
    with pytest.raises(ReadError, match=r"case c0: its mask"):
        read_study(joined.spec, next(case for case in joined.cases if case.id == "c0"))


def test_what_a_case_annotates(two: tuple[Path, Path]) -> None:
    joined = load_datasets(two)
    cases = {case.id: case for case in joined.cases}
    assert annotated(joined.spec, cases["c0"]) == {"ball": 1, "box": 2}
    assert annotated(joined.spec, cases["3"]) == {"box": 2, "rest": 7}
    assert annotates_all(joined.spec, cases["3"], ["box"])
    assert not annotates_all(joined.spec, cases["3"], ["ball", "box"])
    single = load_dataset(two[0])
    assert annotated(single.spec, single.cases[0]) == single.spec.foreground


def test_the_digest_of_a_case_depends_on_the_spec_it_is_read_by(two: tuple[Path, Path]) -> None:
    case = next(case for case in load_datasets(two).cases if case.id == "c0")
    assert isinstance(case, JoinedCase)
    source, image = content_digests(case.alone)
    assert content_digests(case) == (digest([spec_digest(case.own), source]), image)


def test_splits_name_cases_as_they_are_called_together(two: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "splits.yaml"
    file.write_text("test: ['3', c0]\n")
    found = load_datasets(two, splits=file)
    assert [case.id for case in found.cases if case.split == "test"] == ["c0", "3"]
    file.write_text("test: [c9]\n")
    with pytest.raises(SpecError, match="no case 'c9'"):
        load_datasets(two, splits=file)
