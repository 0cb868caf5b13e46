"""From finished runs to the chosen model: what is compared, what is written, what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medseg import api
from medseg.bundle import MODEL_FILE, load_networks, open_bundle
from medseg.display import Display
from medseg.errors import BundleError, ConfigError, MedsegError, TrainingError
from medseg.evaluation.table import load_evaluation
from medseg.inference.predict import load_model, predict_soft
from medseg.readers import read_image
from medseg.training import select as module
from medseg.training.ensembles import choose
from medseg.training.select import select_model

Builder = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder, tiny_plan: Builder) -> Path:
    """A folder with data/ and the runs deep (3-D) and flat (2-D), of two folds each; tests do not write into these."""
    root = tmp_path_factory.mktemp("select")
    tiny_dataset(root / "data", cases=8, test=1)
    for name, dimensions in (("deep", 3), ("flat", 2)):
        tiny_plan(root / "data", root / f"{name}.yaml", steps=6, dimensions=dimensions)
        api.train(root / "data", out=root / name, steps=6, folds=2, plan=root / f"{name}.yaml")
    return root


def always(size: int) -> Callable[..., Any]:
    """Return a rule that takes the first candidate of `size` models."""

    def rule(candidates: Any) -> Any:
        found = choose(candidates)
        chosen = next(row for row in candidates if len(row.names) == size)
        return type(found)(found.candidates, found.best, chosen, found.level)

    return rule


@pytest.fixture(scope="module")
def both(place: Path) -> Path:
    """The ensemble of the two runs, whatever its Dice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose", always(2))
        select_model(place / "data", [place / "deep", place / "flat"], out=place / "both")
    return place / "both"


def test_single_scores_are_those_of_the_runs(place: Path, both: Path) -> None:
    """Each case was predicted by the network that had not seen it, as when the run was finished."""
    told = json.loads((both / "7_report" / "selection.json").read_text())
    rows = {row["model"]: row for row in told["table"]}
    assert set(rows) == {"deep", "flat", "deep + flat"}
    for name in ("deep", "flat"):
        run = load_evaluation(place / name / "7_report")
        assert rows[name]["dice"] == pytest.approx(run.mean_dice, abs=1e-12)
        for label in ("ball", "box"):
            values = run.values("dice", label)
            assert rows[name][f"dice {label}"] == pytest.approx(np.mean(list(values.values())), abs=1e-12)
            assert rows[name][f"n {label}"] == len(values)
    assert rows["deep + flat"]["networks"] == 4
    assert rows["deep + flat"]["seconds"] == pytest.approx(rows["deep"]["seconds"] + rows["flat"]["seconds"], abs=2e-3)


def test_scores_of_the_ensemble_are_those_of_its_masks(both: Path) -> None:
    told = json.loads((both / "7_report" / "selection.json").read_text())
    row = next(row for row in told["table"] if row["model"] == "deep + flat")
    assert load_evaluation(both / "7_report").mean_dice == pytest.approx(row["dice"], abs=1e-12)
    assert row["chosen"] is True
    assert told["chosen"] == ["deep", "flat"]
    with open(both / "7_report" / "selection.csv", encoding="utf-8", newline="") as table:
        assert [line["model"] for line in csv.DictReader(table)] == [r["model"] for r in told["table"]]
    assert len(list((both / "5_folds" / "validation").glob("*.nii.gz"))) == 7
    assert sum(told["repeated"]["chosen"].values()) == 2


def test_the_ensemble_predicts_the_mean_of_the_runs(place: Path, both: Path) -> None:
    image = read_image(sorted((place / "data").rglob("c7*.nii.gz"))[0])
    alone = [predict_soft(load_model(place / name), image)[1].array for name in ("deep", "flat")]
    model = load_model(both)
    assert [member.name for member in model.bundle.info.members] == ["deep", "flat"]
    digests = [open_bundle(place / name).info.digest for name in ("deep", "flat")]
    assert [member.digest for member in model.bundle.info.members] == digests
    whole = (alone[0] + alone[1]) / 2
    found = predict_soft(model, image)[1].array
    heat = model.bundle.info.temperature
    powers = np.stack([1 - whole.sum(0), *whole]) ** (1 / heat)
    np.testing.assert_allclose(found, (powers / powers.sum(0))[1:], atol=1e-4)


def test_the_ensemble_serves_the_other_verbs(place: Path, both: Path, tmp_path: Path) -> None:
    result = api.predict(place / "data", model=both, out=tmp_path / "masks", workers=1)
    assert result.complete
    evaluation = api.evaluate(tmp_path / "masks", place / "data", out=tmp_path / "scores")
    assert evaluation.provenance["folds"] == "4"
    assert evaluation.provenance["model_hash"] == open_bundle(both).info.digest
    assert load_networks(open_bundle(both)) == []


def test_a_single_run_is_copied_as_it_is(place: Path, tmp_path: Path) -> None:
    """Seven patients of hardly trained networks: what wins is whatever the rule says; here it is told to take one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose", always(1))
        found = select_model(place / "data", [place / "deep", place / "flat"], out=tmp_path / "one")
    copied = {p.name: p.read_bytes() for p in found.model.iterdir()}
    assert copied == {p.name: p.read_bytes() for p in (place / "deep" / "6_model").iterdir()}
    with pytest.raises(ConfigError, match="holds a model already"):
        select_model(place / "data", [place / "deep", place / "flat"], out=tmp_path / "one")


def test_what_is_told(place: Path, both: Path) -> None:
    told = json.loads((both / "7_report" / "selection.json").read_text())
    assert told["level"] == 0.95
    found = SimpleNamespace(**told)
    assert found.best_single in ("deep", "flat")
    gains = {row["model"]: row["gain"] for row in found.table}
    assert gains[found.best_single] is None
    assert all(row["low"] <= row["gain"] <= row["high"] for row in found.table if row["gain"] is not None)


def refused(data: Path, runs: list[Path], out: Path, **options: Any) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        select_model(data, runs, out=out, **options)
    assert not (out / "6_model").exists()
    return caught.value


def test_runs_that_cannot_be_compared_are_refused(place: Path, tmp_path: Path, tiny_dataset: Builder) -> None:
    deep, flat, out = place / "deep", place / "flat", tmp_path / "out"
    assert "give 2 to 5" in str(refused(place / "data", [deep], out))
    assert "give 2 to 5" in str(refused(place / "data", [deep] * 6, out))
    error = refused(place / "data", [deep, deep], out)
    assert (error.code, "same model" in str(error)) == ("RUNS_DIFFER", True)
    assert "no finished run" in str(refused(place / "data", [deep, flat / "6_model"], out))
    assert "no finished run" in str(refused(place / "data", [deep, tmp_path / "nothing"], out))

    other = tiny_dataset(tmp_path / "other", cases=8, test=2)
    error = refused(other, [deep, flat], out)
    assert (error.code, "learnt from other data than" in str(error)) == ("RUNS_DIFFER", True)


def changed(run: Path, to: Path, file: str, before: str, after: str) -> Path:
    shutil.copytree(run, to)
    text = (to / file).read_text()
    assert before in text
    (to / file).write_text(text.replace(before, after))
    return to


def test_other_folds_or_data_are_refused(place: Path, tmp_path: Path) -> None:
    deep, out = place / "deep", tmp_path / "out"
    folds = (place / "flat" / "7_report" / "folds.csv").read_text().splitlines()
    first = folds[1]
    moved = changed(
        place / "flat", tmp_path / "moved", "7_report/folds.csv", first, f"{first[:-1]}{1 - int(first[-1])}"
    )
    error = refused(place / "data", [deep, moved], out)
    assert (error.code, "other folds" in str(error), first.split(",")[0] in str(error)) == ("RUNS_DIFFER", True, True)

    digest = json.loads((place / "flat" / "1_dataset.json").read_text())["digest"]
    foreign = changed(place / "flat", tmp_path / "foreign", "1_dataset.json", digest, "0" * 64)
    assert refused(place / "data", [deep, foreign], out).code == "RUNS_DIFFER"

    for content in ("case,fold\n", "nothing\n", "case,fold\nc0,x\n"):
        damaged = changed(place / "flat", tmp_path / f"d{len(content)}", "7_report/folds.csv", "\n".join(folds), "")
        (damaged / "7_report" / "folds.csv").write_text(content)
        error = refused(place / "data", [deep, damaged], out)
        assert isinstance(error, TrainingError)
        assert "damaged" in str(error)


def began_with(run: Path, to: Path, known: list[int | None]) -> Path:
    """Copy a run as if it had been fine-tuned from a model that knew so many validation cases of each fold."""
    shutil.copytree(run, to)
    content = json.loads((to / "6_model" / MODEL_FILE).read_text())
    content["training"]["start"] = {"model": "0" * 64, "validation_cases_seen_before": known}
    (to / "6_model" / MODEL_FILE).write_text(json.dumps(content))
    return to


def test_a_run_that_knew_its_validation_cases_before_is_refused(place: Path, tmp_path: Path) -> None:
    """Its Dice is not one of unseen cases: it would win against every honest run."""
    tuned = began_with(place / "flat", tmp_path / "tuned", [2, 1])
    error = refused(place / "data", [place / "deep", tuned], tmp_path / "out")
    assert (error.code, "tuned" in str(error), "learnt from 3 of its" in str(error)) == ("RUNS_DIFFER", True, True)


def test_a_run_whose_beginning_is_not_known_is_doubted(place: Path, tmp_path: Path) -> None:
    tuned = began_with(place / "flat", tmp_path / "tuned", [None, None])
    said: list[str] = []
    display = Display(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(display, "say", said.append)
        select_model(place / "data", [place / "deep", tuned], out=tmp_path / "out", display=display)
    assert sum("does not tell what it learnt from" in line for line in said) == 1, said


def test_tables_are_there_before_the_model(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model a selection is complete, and the same command does nothing more."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_copy", killed)
    with pytest.raises(KeyboardInterrupt):
        select_model(place / "data", [place / "deep", place / "flat"], out=tmp_path / "out")
    assert (tmp_path / "out" / "7_report" / "selection.json").exists()
    assert (tmp_path / "out" / "7_report" / "selection.csv").exists()


def test_files_hold_the_logits_of_one_case_at_a_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most, real = weakref.WeakSet[Any](), [0], module.kept

    def kept(*args: Any) -> Any:
        found = real(*args)
        alive.add(found.planes)
        most.append(len(alive))
        return found

    monkeypatch.setattr(module, "kept", kept)
    monkeypatch.setattr(module, "choose", always(2))
    select_model(place / "data", [place / "deep", place / "flat"], out=tmp_path / "out")
    assert len(most) > 2 * 8, "for the candidates, and again for the ensemble"
    assert max(most) == 2


def test_a_damaged_model_is_refused_before_anything_is_predicted(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "flat", tmp_path / "flat")
    (tmp_path / "flat" / "6_model" / "fold_1.safetensors").write_bytes(b"0")
    error = refused(place / "data", [place / "deep", tmp_path / "flat"], tmp_path / "out")
    assert isinstance(error, BundleError)


def test_half_a_copy_is_no_model(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is killed while it copies leaves nothing that opens; the same command then goes through."""

    def killed(source: Any, target: Any) -> None:
        if Path(source).name == MODEL_FILE:
            raise KeyboardInterrupt
        Path(target).write_bytes(Path(source).read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(module, "choose", always(1))
        patch.setattr(module.shutil, "copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            select_model(place / "data", [place / "deep", place / "flat"], out=tmp_path / "out")
    assert list((tmp_path / "out" / "6_model").iterdir())
    with pytest.raises(BundleError):
        open_bundle(tmp_path / "out")
    found = select_model(place / "data", [place / "deep", place / "flat"], out=tmp_path / "out")
    assert open_bundle(tmp_path / "out").folder == found.model


def test_two_runs_of_one_name_are_told_apart(place: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("deep", "flat")):
        shutil.copytree(place / name, tmp_path / str(number) / "run")
    found = select_model(place / "data", [tmp_path / "0" / "run", tmp_path / "1" / "run"], out=tmp_path / "out")
    assert {row["model"] for row in found.table} == {"run (1)", "run (2)", "run (1) + run (2)"}
