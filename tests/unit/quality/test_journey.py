"""From a small cross-validation to flagged studies: what a radiology group sees."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from medseg import api
from medseg.bundle import BundleInfo, open_bundle
from medseg.display import Display
from medseg.exporters.nifti import write_nifti
from medseg.files import file_digest
from medseg.inference.chosen import unprocessed
from medseg.inference.predict import load_model, predict_case, predict_soft, predict_volume
from medseg.phantom.degrade import DEGRADATIONS
from medseg.planning.plan import override, read_plan, write_plan
from medseg.quality.apply import image_numbers
from medseg.readers.nifti import read_nifti

Builder = Callable[..., Path]
CASES, CLEAN, STEPS = 24, 8, 140


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder, tiny_plan: Builder) -> Path:
    """A folder with data/ (CASES to learn from, CLEAN held out) and run/, a cross-validation of two folds."""
    root = tmp_path_factory.mktemp("quality")
    tiny_dataset(root / "data", cases=CASES + CLEAN, test=CLEAN)
    settings = ("test_mirroring=true", "augmentation.mirror_axes=[0]", "learning_rate=0.005")
    plan = read_plan(tiny_plan(root / "data", root / "first.yaml", steps=STEPS))
    stages = len(plan.network.options["features"])
    features = f"network.options.features={[8, 16, 16, 16, 16][:stages]}"
    write_plan(root / "plan.yaml", override(plan, (features, *settings)), {})
    api.train(root / "data", out=root / "run", steps=STEPS, folds=2, plan=root / "plan.yaml")
    return root


@pytest.fixture(scope="module")
def masks(place: Path) -> Any:
    """The result of the held-out cases, in place/masks."""
    return api.predict(place / "data", model=place / "run", out=place / "masks", cases="test")


def info(place: Path) -> BundleInfo:
    return open_bundle(place / "run").info


def test_the_report_tells_how_good_the_estimate_is(place: Path) -> None:
    summary = json.loads((place / "run" / "7_report" / "quality.json").read_text())
    assert (summary["cases"], summary["folds"], summary["mirror"]) == (CASES, 2, True)
    assert set(summary["labels"]) == {"ball", "box"}
    assert summary["case_mean"]["n"] == CASES
    assert summary["worst"]["worst"] == 2
    rows = list(csv.DictReader((place / "run" / "7_report" / "quality.csv").open()))
    assert {row["case"] for row in rows} == {f"c{n}" for n in range(CASES)}
    assert (place / "run" / "7_report" / "quality.html").exists()


def test_the_real_dice_of_the_table_is_that_of_the_masks_as_they_end_up(place: Path) -> None:
    assert not info(place).postprocess, "then these are the masks that were scored"
    rows = {row["case"]: row for row in csv.DictReader((place / "run" / "7_report" / "quality.csv").open())}
    cases = csv.DictReader((place / "run" / "7_report" / "cases.csv").open())
    real = {row["case"]: row["value"] for row in cases if (row["metric"], row["label"]) == ("dice", "ball")}
    assert all(float(rows[case]["ball_dice"]) == pytest.approx(float(real[case]), abs=1e-4) for case in real)


def test_every_study_has_an_expected_dice_and_a_flag(place: Path, masks: Any) -> None:
    assert masks.complete
    for entry in masks.entries:
        assert set(entry.expected_dice) == {"ball", "box"}
        assert all(0 <= value <= 1 for value in entry.expected_dice.values())
        assert entry.review is bool(entry.review_reasons)
    rows = list(csv.DictReader((place / "masks" / "summary.csv").open()))
    assert {row["review"] for row in rows} <= {"yes", "no"}
    assert float(rows[0]["ball_expected_dice"]) == masks.entries[0].expected_dice["ball"]
    page = (place / "masks" / "journal" / "summary.html").read_text()
    assert "Dice to expect" in page
    assert "images/" not in (place / "masks" / "summary.csv").read_text()


def test_degraded_images_are_flagged_more_than_clean_ones(place: Path, masks: Any) -> None:
    clean = sum(bool(entry.review) for entry in masks.entries)
    assert clean <= CLEAN // 2
    model = load_model(place / "run")
    for kind, degrade in DEGRADATIONS.items():
        flagged = 0
        for number in range(4):
            image = read_nifti(place / "data" / "images" / f"c{CASES + number}.nii.gz")
            found = predict_case(model, degrade(image, np.random.default_rng(number)))
            assert found.quality is not None
            flagged += found.quality.review
        assert flagged >= 3, f"{kind}: {flagged} of 4 are flagged"


def test_masks_are_those_of_a_bundle_that_estimates_nothing(place: Path) -> None:
    model = load_model(place / "run")
    image = read_nifti(place / "data" / "images" / "c0.nii.gz")
    found = predict_case(model, image, soft=True)
    assert np.array_equal(found.mask.array, predict_volume(model, image).array)
    assert found.soft is not None
    assert np.array_equal(found.soft.array, predict_soft(model, image)[1].array)
    assert predict_case(model, image).soft is None


def test_another_way_of_mirroring_is_not_estimated(place: Path) -> None:
    model = load_model(place / "run")
    image = read_nifti(place / "data" / "images" / "c0.nii.gz")
    assert predict_case(model, image, mirror=False).quality is None
    assert predict_case(model, image, mirror=True).quality == predict_case(model, image).quality


def test_a_bundle_of_before_says_nothing_and_its_tables_are_as_they_were(place: Path, tmp_path: Path) -> None:
    told = info(place)
    bare = told.model_copy(update={"quality": None})
    old = bare.model_dump(mode="json")
    del old["quality"]
    assert BundleInfo.model_validate(old).digest == bare.digest != told.digest
    folder = tmp_path / "old"
    folder.mkdir()
    for file in (place / "run" / "6_model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.json").write_text(json.dumps(old))
    result = api.predict(place / "data" / "images" / "c0.nii.gz", model=folder, out=tmp_path / "masks")
    assert result.entries[0].review is None
    header = (tmp_path / "masks" / "summary.csv").read_text().splitlines()[0]
    assert header == "id,state,code,message,notes,model_digest,ball_ml,box_ml"
    assert file_digest(tmp_path / "masks" / "c0.nii.gz")


def test_an_estimate_of_before_is_left_out_and_that_is_said(place: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    display = Display(Console(file=said, width=500))
    folder = tmp_path / "old"
    shutil.copytree(place / "run" / "6_model", folder)
    old = json.loads((folder / "model.json").read_text())
    for row in old["quality"]["labels"].values():
        row["ridge"]["names"] = ["confidence", "entropy", "margin"][: len(row["ridge"]["names"])]
    (folder / "model.json").write_text(json.dumps(old))
    image = place / "data" / "images" / "c0.nii.gz"
    result = api.predict(image, model=folder, out=tmp_path / "masks", display=display)
    assert said.getvalue().count("quality estimate was fitted by an earlier medseg") == 1
    assert result.entries[0].review is None
    api.predict(image, model=place / "run", out=tmp_path / "same", display=display)
    assert said.getvalue().count("earlier medseg") == 1, "of this one there is nothing to say"
    first, second = (read_nifti(tmp_path / name / "c0.nii.gz").array for name in ("masks", "same"))
    assert np.array_equal(first, second)


def test_masks_without_their_post_processing_are_not_estimated(place: Path) -> None:
    bundle = open_bundle(place / "run")
    bare = unprocessed(bundle)
    assert (bare.info.quality is None) == bool(bundle.info.postprocess)


def test_an_empty_mask_of_labels_that_are_always_there_is_flagged(place: Path) -> None:
    model = load_model(place / "run")
    image = read_nifti(place / "data" / "images" / "c0.nii.gz")
    flat = image.with_array(np.random.default_rng(0).normal(100, 1, image.array.shape).astype(np.float32))
    found = predict_case(model, flat)
    assert found.quality is not None
    assert found.quality.review


def test_the_numbers_of_the_image_are_named_alike_in_model_and_prediction(place: Path) -> None:
    quality = info(place).quality
    assert quality is not None
    from medseg.inference.predict import notes_for, predict_logits

    model = load_model(place / "run")
    notes = notes_for(model, mirror=True)
    predict_logits(model, read_nifti(place / "data" / "images" / "c0.nii.gz"), notes=notes)
    assert notes.image is not None
    assert tuple(image_numbers(notes.image, quality.layout)) == quality.image.names


def test_a_few_validation_cases_give_no_estimate(model: Path, tmp_path: Path) -> None:
    assert open_bundle(model).info.quality is None
    assert not (model / "7_report" / "quality.json").exists()


def test_what_is_written_names_no_file(place: Path, masks: Any) -> None:
    texts = [(place / "run" / "7_report" / f"quality.{kind}").read_text() for kind in ("csv", "json", "html")]
    texts += [entry.model_dump_json() for entry in masks.entries]
    assert not any(str(place) in text or "images/" in text for text in texts)


def test_a_written_degraded_study_is_flagged_in_the_table(place: Path, tmp_path: Path) -> None:
    image = read_nifti(place / "data" / "images" / f"c{CASES}.nii.gz")
    write_nifti(tmp_path / "in" / "odd.nii.gz", DEGRADATIONS["contrast"](image, np.random.default_rng(0)))
    api.predict(tmp_path / "in", model=place / "run", out=tmp_path / "out")
    row = next(csv.DictReader((tmp_path / "out" / "summary.csv").open()))
    assert row["review"] == "yes"
    assert row["review_reasons"]
