"""evaluate(): a table computed by hand, cases that fail, geometry, labels, regions, splits, bytes on disk."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg.errors import ConfigError, ExportError, GeometryError, MedsegError, SpecError
from medseg.evaluation.evaluate import evaluate
from medseg.evaluation.table import MEAN, Evaluation, SummaryRow, load_evaluation
from medseg.spec import Spec

from .conftest import AFFINE, World, bar, save


def run(world: World, **options: object) -> Evaluation:
    return evaluate(world.predictions, world.root, out=world.out, **options)  # type: ignore[arg-type]


def summary(evaluation: Evaluation, metric: str, label: str) -> SummaryRow:
    return next(row for row in evaluation.summary if (row.metric, row.label) == (metric, label))


@pytest.fixture
def three(world: World) -> World:
    """Case a is perfect for one and 0.5 for two, b misses two, c has no prediction and no `two`."""
    world.add("a", bar(4, 2), bar(4, 6))
    world.add("b", bar(6, 3), bar(2, 0))
    world.add("c", bar(5, 0), None)
    return world


def test_table_computed_by_hand(three: World) -> None:
    evaluation = run(three)
    dice = {(r.case, r.label): (r.value, r.status, r.reason) for r in evaluation.rows if r.metric == "dice"}
    assert dice == {
        ("a", "one"): (1.0, "used", ""),
        ("a", "two"): (0.5, "used", ""),
        ("b", "one"): (0.5, "used", ""),
        ("b", "two"): (0.0, "used", "PREDICTION_EMPTY"),
        ("c", "one"): (0.0, "imputed", "PREDICTION_MISSING"),
        ("c", "two"): (None, "excluded", "PREDICTION_MISSING"),
    }
    one, two = summary(evaluation, "dice", "one"), summary(evaluation, "dice", "two")
    assert (one.n_total, one.n_used, one.n_imputed) == (3, 2, 1)
    assert (two.n_total, two.n_used, two.n_imputed) == (3, 2, 0)
    assert (one.mean, one.sd, one.median, one.q1, one.q3) == pytest.approx((0.5, 0.5, 0.5, 0.25, 0.75))
    assert (one.min, one.max) == (0.0, 1.0)
    assert evaluation.mean_dice == summary(evaluation, "dice", MEAN).mean == pytest.approx((0.5 + 0.25) / 2)
    assert evaluation.failed == {"c": "PREDICTION_MISSING"}
    # Voxels of 10 mm³ are 0.01 mL.
    assert evaluation.values("volume_reference", "one") == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.05})
    assert evaluation.values("volume_difference", "one") == pytest.approx({"a": 0.0, "b": -0.04})
    assert {row.unit for row in evaluation.rows} == {"", "mL"}


def test_files_are_complete_and_deterministic(three: World, tmp_path: Path) -> None:
    evaluation = run(three)
    names = ["cases.csv", "summary.csv", "summary.json"]
    assert sorted(path.name for path in three.out.iterdir()) == names
    again = tmp_path / "again"
    evaluate(three.predictions, three.root, out=again)
    assert [(again / name).read_bytes() for name in names] == [(three.out / name).read_bytes() for name in names]
    rows = list(csv.DictReader((three.out / "cases.csv").open()))
    assert list(rows[0]) == ["case", "patient", "label", "metric", "unit", "value", "status", "reason"]
    assert len(rows) == 3 * 2 * 4
    told = json.loads((three.out / "summary.json").read_text())
    assert told["mean_dice"] == evaluation.mean_dice
    assert load_evaluation(three.out) == evaluation
    text = "".join((three.out / name).read_text() for name in names)
    assert str(tmp_path) not in text


def test_predictions_without_a_chosen_reference_are_listed(three: World) -> None:
    for name in ("x9", "a2"):
        three.predict(name, bar(4, 2))
    (three.predictions / ".partial-b.nii.gz").write_bytes(b"")
    (three.predictions / "notes.txt").write_text("no mask")
    evaluation = run(three)
    assert evaluation.not_scored == ("a2", "x9")
    assert json.loads((three.out / "summary.json").read_text())["not_scored"] == ["a2", "x9"]
    assert load_evaluation(three.out) == evaluation
    assert evaluation.cases == ("a", "b", "c"), "what is scored stays the same"


def test_a_changed_table_is_refused(three: World) -> None:
    run(three)
    table = three.out / "cases.csv"
    table.write_text(table.read_text().replace("0.5", "0.9"))
    with pytest.raises(ConfigError) as caught:
        load_evaluation(three.out)
    assert caught.value.code == "CHANGED_TABLE"
    with pytest.raises(ConfigError) as caught:
        load_evaluation(three.root)
    assert caught.value.code == "NOT_AN_EVALUATION"


def test_an_unreadable_prediction_counts_as_failed(three: World) -> None:
    path = three.predictions / "b.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    (three.predictions / "a.nii.gz").write_bytes(b"")
    three.predict("c", bar(5, 0))
    evaluation = run(three)
    assert set(evaluation.failed) == {"a", "b"}
    assert evaluation.failed["b"] == "TRUNCATED"
    assert summary(evaluation, "dice", "one").mean == pytest.approx(1 / 3)
    assert summary(evaluation, "dice", "two").n_imputed == 2


def test_the_ledger_tells_why_and_outdated_masks_do_not_count(three: World) -> None:
    ledger = three.predictions / "ledger"
    ledger.mkdir()
    for case, entry in {
        "a": {"state": "done", "code": ""},
        "b": {"state": "refused", "code": "MISSING_SLICES"},
        "c": {"state": "failed", "code": "INTERNAL"},
    }.items():
        (ledger / f"{case}.json").write_text(json.dumps(entry))
    assert run(three).failed == {"b": "MISSING_SLICES", "c": "INTERNAL"}
    (ledger / "a.json").write_text('{"state"')
    with pytest.raises(ConfigError) as caught:
        run(three)
    assert caught.value.code == "BAD_LEDGER"


def test_no_prediction_at_all_is_an_error(three: World) -> None:
    with pytest.raises(ConfigError, match=r"for example a\.nii\.gz") as caught:
        evaluate(three.root, three.root, out=three.out)
    assert caught.value.code == "NO_PREDICTIONS"
    assert not three.out.exists()


def test_another_axis_order_is_the_same_grid(three: World) -> None:
    image = nibabel.load(three.predictions / "a.nii.gz")
    turned = image.as_reoriented(np.array([[2, 1], [0, -1], [1, -1]]))
    turned.to_filename(three.predictions / "a.nii.gz")
    assert run(three).values("dice", "two")["a"] == 0.5


@pytest.mark.parametrize("change", ["shift", "size", "spacing"])
def test_another_grid_is_refused(three: World, change: str) -> None:
    affine, mask = AFFINE.copy(), bar(4, 6)
    if change == "shift":
        affine[0, 3] += 2
    elif change == "spacing":
        affine[2, 2] = 3
    else:
        mask = mask[:-1]
    three.predict("a", mask, affine)
    with pytest.raises(GeometryError, match="case a") as caught:
        run(three)
    assert caught.value.code == "PREDICTION_GRID"
    assert not three.out.exists()


@pytest.mark.parametrize(
    ("mask", "code"), [(bar(4, 6, 3), "PREDICTION_VALUES"), (bar(4).astype(np.float32) / 2, "LABEL_NOT_INTEGER")]
)
def test_foreign_values_are_refused(three: World, mask: np.ndarray, code: str) -> None:
    three.predict("b", mask)
    with pytest.raises(SpecError, match="case b") as caught:
        run(three)
    assert caught.value.code == code


def test_ignored_voxels_do_not_count(world: World) -> None:
    world.write_spec(ignore=9)
    reference = bar(4)
    reference[4:8, 1, 0] = 9
    world.add("a", reference, bar(8))
    evaluation = run(world)
    assert evaluation.values("dice", "one") == {"a": 1.0}
    assert evaluation.values("volume_predicted", "one") == pytest.approx({"a": 0.04})
    world.predict("a", reference)
    with pytest.raises(SpecError, match="9"):
        run(world)


def test_regions_are_scored_as_unions_and_stay_out_of_the_mean(world: World) -> None:
    regions = {"both": {"labels": ["one", "two"], "paint": "one"}, "two": {"labels": ["two"], "paint": "two"}}
    world.write_spec(regions=regions)
    reference = bar(4, 4)
    swapped = np.array([0, 2, 1], np.uint8)[reference]
    world.add("a", reference, swapped)
    evaluation = run(world)
    assert [(t.name, t.values, t.region) for t in evaluation.targets] == [
        ("one", (1,), False),
        ("two", (2,), False),
        ("both", (1, 2), True),
        ("two (region)", (2,), True),
    ]
    assert evaluation.values("dice", "both") == {"a": 1.0}
    assert evaluation.mean_dice == 0.0


def test_test_cases_unless_told(three: World) -> None:
    three.write_spec(splits={"test": ["a"]})
    assert run(three).cases == ("a",)
    assert run(three, split="all").cases == ("a", "b", "c")
    assert run(three, split="train").cases == ("b", "c")
    splits = three.root.parent / "splits.yaml"
    splits.write_text("test: [b, c]\n")
    evaluation = run(three, splits=splits)
    assert evaluation.cases == ("b", "c")
    assert evaluation.provenance["split"] == "test"


def test_patients_group_cases(three: World) -> None:
    three.write_spec(patient="^(.)")
    three.add("a2", bar(1), bar(1))
    patients = {row.case: row.patient for row in run(three).rows}
    assert patients == {"a": "a", "a2": "a", "b": "b", "c": "c"}


def test_cases_without_a_mask_are_told(three: World) -> None:
    (three.root / "masks" / "b.nii.gz").unlink()
    evaluation = run(three)
    assert evaluation.cases == ("a", "c")
    assert evaluation.provenance["cases_without_reference"] == "1"


def test_a_broken_reference_is_an_error(three: World) -> None:
    (three.root / "masks" / "b.nii.gz").write_bytes(b"broken")
    with pytest.raises(MedsegError, match="case b"):
        run(three)


def test_a_folder_of_masks_names_labels_by_value(three: World) -> None:
    three.predict("b", bar(6, 3, 2))
    evaluation = evaluate(three.predictions, three.root / "masks", out=three.out)
    assert [target.name for target in evaluation.targets] == ["label_1", "label_2", "label_3"]
    # Only a prediction holds label 3: a false alarm in b, nothing elsewhere.
    assert evaluation.values("dice", "label_3") == {"b": 0.0}
    assert evaluation.failed == {"c": "PREDICTION_MISSING"}


def test_a_folder_of_masks_with_a_spec(three: World) -> None:
    spec_file = three.root / "dataset.yaml"
    evaluation = evaluate(three.predictions, three.root / "masks", out=three.out, spec=spec_file)
    assert [target.name for target in evaluation.targets] == ["one", "two"]
    spec = Spec(name="s", channels={"mr": {}}, labels={"uno": 1, "due": 2}, unit="pixel")  # type: ignore[arg-type]
    in_voxels = evaluate(three.predictions, three.root / "masks", out=three.out, spec=spec)
    assert in_voxels.values("volume_reference", "uno") == {"a": 4, "b": 6, "c": 5}
    assert {row.unit for row in in_voxels.rows} == {"", "voxels"}
    save(three.root / "masks" / "c.nii.gz", bar(1, 1, 1))
    with pytest.raises(SpecError, match="case c: the reference mask holds the value") as caught:
        evaluate(three.predictions, three.root / "masks", out=three.out, spec=spec)
    assert caught.value.code == "LABEL_VALUES"


def test_an_empty_folder_is_no_reference(three: World, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither a dataset nor a folder"):
        evaluate(three.predictions, tmp_path / "empty", out=three.out)
    save(tmp_path / "zeros" / "a.nii.gz", bar())
    with pytest.raises(ConfigError, match="no label"):
        evaluate(tmp_path / "zeros", tmp_path / "zeros", out=three.out)


def test_provenance_keeps_known_keys_only(three: World) -> None:
    told = {"model_hash": "abc", "dataset_hash": "def", "tta": True, "input": "/home/jane/patient"}
    (three.predictions / "predictions.json").write_text(json.dumps(told))
    provenance = run(three).provenance
    assert [provenance[k] for k in ("model_hash", "training_dataset_hash", "mirroring")] == ["abc", "def", "True"]
    assert "jane" not in json.dumps(dict(provenance))
    (three.predictions / "predictions.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        run(three)


def test_nothing_is_left_when_the_disk_is_full(three: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ExportError) as caught:
        run(three)
    assert caught.value.code == "DISK_FULL"
    assert list(three.out.iterdir()) == []


def test_real_masks_score_as_simpleitk_says(data: Path, tmp_path: Path) -> None:
    import SimpleITK

    masks = sorted((data / "hippocampus" / "labelsTr").glob("*.nii.gz"))[:3]
    for path in masks:
        image = nibabel.load(path)
        shifted = np.roll(np.asanyarray(image.dataobj), 2, axis=1)
        save(tmp_path / "predictions" / path.name, shifted, image.affine)
        save(tmp_path / "masks" / path.name, np.asanyarray(image.dataobj), image.affine)
    evaluation = evaluate(tmp_path / "predictions", tmp_path / "masks", out=tmp_path / "out")
    for path in masks:
        overlap = SimpleITK.LabelOverlapMeasuresImageFilter()
        folders = (tmp_path / "masks", tmp_path / "predictions")
        overlap.Execute(
            *(SimpleITK.Cast(SimpleITK.ReadImage(folder / path.name), SimpleITK.sitkUInt8) for folder in folders)
        )
        for value in (1, 2):
            ours = evaluation.values("dice", f"label_{value}")[path.name[:-7]]
            assert ours == pytest.approx(overlap.GetDiceCoefficient(value), abs=1e-12)
