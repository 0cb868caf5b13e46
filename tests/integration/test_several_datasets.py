"""Several datasets with other labels, values and layouts: one model that finds all of them, everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from medseg import api
from medseg.bundle import open_bundle
from medseg.evaluation.table import load_evaluation
from medseg.spec import load_dataset
from medseg.training.manifest import make_manifest
from medseg.training.run import TrainResult

STEPS = 160
SETTINGS = ("batch_size=4", "precision=fp32", "network.options.features=[12,24,24]")
Builder = Callable[..., Path]


def write(root: Path, tiny: SimpleNamespace, name: str, labels: dict[str, int], numbers: range, *, deep: bool) -> Path:
    """Write a dataset that annotates only `labels` (ball, box) with these values; `deep`: a folder a case."""
    places = ("{case}/scan.nii.gz", "{case}/truth.nii.gz") if deep else ("images/{case}.nii.gz", "masks/{case}.nii.gz")
    for number in numbers:
        image, truth = tiny.case(number)
        mask = np.zeros_like(truth)
        for label, value in labels.items():
            mask[truth == {"ball": 1, "box": 2}[label]] = value
        for place, array in zip(places, (image, mask), strict=True):
            tiny.save(root / place.format(case=f"c{number}"), array)
    spec = {"name": name, "images": places[0], "masks": places[1], "channels": {"mr": {"modality": "MR"}}}
    (root / "dataset.yaml").write_text(yaml.safe_dump({**spec, "labels": labels}))
    return root


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny: SimpleNamespace, tiny_dataset: Builder, tiny_plan: Builder
) -> Path:
    """A folder with balls/ (6 cases), boxes/ (4 cases, value 1), whole/ (all labels, other cases), plan.yaml, run/."""
    root = tmp_path_factory.mktemp("several")
    write(root / "balls", tiny, "balls", {"ball": 1}, range(6), deep=False)
    write(root / "boxes", tiny, "boxes", {"box": 1}, range(4, 8), deep=True)
    write(root / "whole", tiny, "whole", {"ball": 3, "box": 1}, range(20, 23), deep=False)
    tiny_plan(tiny_dataset(root / "like"), root / "plan.yaml", steps=STEPS, settings=SETTINGS)
    train([root / "balls", root / "boxes"], root, root / "run")
    return root


def train(data: list[Path], place: Path, out: Path, **options: int) -> TrainResult:
    return api.train(data, out=out, plan=place / "plan.yaml", **{"steps": STEPS, **options})


def dice(run: Path, place: Path, out: Path) -> dict[str, float]:
    """Return label -> mean Dice on whole/, which has other values than the model."""
    api.predict(place / "whole", model=run, out=out / "masks", cases="all")
    api.evaluate(out / "masks", place / "whole", out=out / "scores")
    found = load_evaluation(out / "scores")
    return {label: float(np.mean(list(found.values("dice", label).values()))) for label in ("ball", "box")}


def test_all_labels_are_found_where_each_was_annotated_in_a_part_only(
    place: Path, tmp_path: Path, tiny: SimpleNamespace
) -> None:
    joint = dice(place / "run", place, tmp_path / "joint")
    assert min(joint.values()) > 0.9


def test_the_run_says_whose_cases_it_learnt_from(place: Path) -> None:
    info = open_bundle(place / "run").info
    assert (info.name, info.spec.foreground) == ("balls_boxes", {"ball": 1, "box": 2})
    manifest = json.loads((place / "run" / "1_dataset.json").read_text())
    alone = {name: make_manifest(load_dataset(place / name))["digest"] for name in ("balls", "boxes")}
    assert {row["name"]: row["digest"] for row in manifest["datasets"]} == alone
    assert {row["id"] for row in manifest["train"]} == {
        *(f"c{n}" for n in (0, 1, 2, 3, 6, 7)),
        *(f"{name}.c{n}" for name in ("balls", "boxes") for n in (4, 5)),
    }


def test_what_was_not_annotated_is_not_scored(place: Path) -> None:
    rows = load_evaluation(place / "run" / "7_report").rows
    cases = {row.case: {r.label for r in rows if r.case == row.case} for row in rows}
    manifest = json.loads((place / "run" / "1_dataset.json").read_text())
    patients = {row["id"]: row["patient"] for row in manifest["train"]}
    for case, labels in cases.items():
        # Cases 4 and 5 are in both, under the patient of the first.
        own = case.split(".")[0] if "." in case else patients[case].split(".")[0]
        assert labels == {{"balls": "ball", "boxes": "box"}[own]}
    assert {label for labels in cases.values() for label in labels} == {"ball", "box"}, "of each dataset some validate"


def test_the_same_images_are_never_on_both_sides(place: Path) -> None:
    validation = {row.case for row in load_evaluation(place / "run" / "7_report").rows}
    for number in (4, 5):
        assert len({f"{name}.c{number}" in validation for name in ("balls", "boxes")}) == 1
