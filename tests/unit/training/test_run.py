"""The train command: what is resumed, what is repeated, what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from rich.console import Console

from medseg import api
from medseg.bundle import PostStep, load_networks, open_bundle
from medseg.display import Display
from medseg.errors import ConfigError, ExportError, MedsegError, PlanError, SpecError, TrainingError
from medseg.evaluation.table import load_evaluation
from medseg.files import PARTIAL_PREFIX
from medseg.inference.postprocess import postprocess
from medseg.planning.plan import Measured, read_plan
from medseg.quality.signs import make_notes
from medseg.readers import read_image
from medseg.spec import Case
from medseg.training import make_plan as make_plan_module
from medseg.training.choose_steps import StepTrial
from medseg.training.finish import TRYING_SECONDS, Scored
from medseg.training.state import load_state
from medseg.training.temperature import VoxelSample
from medseg.volume import Volume

Builder = Callable[..., Path]
QUICK = ("batch_size=2", "validations=2", "test_mirroring=false", "precision=fp32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder, tiny_plan: Builder) -> Path:
    """A folder with data/, plan.yaml and a finished run/; tests do not write into these."""
    root = tmp_path_factory.mktemp("run")
    tiny_dataset(root / "data", cases=6, test=1)
    tiny_plan(root / "data", root / "plan.yaml", steps=4)
    api.train(root / "data", out=root / "run", steps=4, plan=root / "plan.yaml")
    return root


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a step time as given instead of measuring it."""
    measured = Measured(device="cpu", threads=1, step_seconds={"narrow fp32": 0.05})
    monkeypatch.setattr(make_plan_module, "measure", lambda *args, **options: measured)


def train(place: Path, out: Path, **options: Any) -> Any:
    return api.train(place / "data", out=out, **{"steps": 4, "plan": place / "plan.yaml", **options})


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((run / "6_model").glob("*.safetensors"))}


def test_the_run_folder_holds_every_stage_in_order(place: Path) -> None:
    names = sorted(p.name for p in (place / "run").iterdir() if p.name[0].isdigit())
    stages = ["1_dataset.json", "2_cases.json", "2_fingerprint.json", "3_plan.yaml", "4_cache", "5_folds", "6_model"]
    assert names == [*stages, "7_report"]
    assert sorted(p.name for p in (place / "run" / "5_folds" / "0").iterdir()) == ["checkpoint", "curves", "validation"]
    assert not list((place / "run").rglob(f"{PARTIAL_PREFIX}*"))
    manifest = json.loads((place / "run" / "1_dataset.json").read_text())
    assert [row["id"] for row in manifest["train"]] == ["c0", "c1", "c2", "c3", "c4"]
    assert [row["id"] for row in manifest["test"]] == ["c5"]


def test_a_finished_run_is_returned_and_nothing_is_touched(place: Path) -> None:
    before = tree(place / "run")
    times = {p: p.stat().st_mtime_ns for p in (place / "run").rglob("*")}
    result = train(place, place / "run")
    assert tree(place / "run") == before
    assert {p: p.stat().st_mtime_ns for p in (place / "run").rglob("*")} == times
    assert result.steps == 4
    assert set(result.dice) == {"ball", "box"}


def test_the_same_options_elsewhere_give_the_same_weights(place: Path, tmp_path: Path) -> None:
    train(place, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(place / "run")


def test_another_seed_gives_other_weights(place: Path, tmp_path: Path, no_measuring: None) -> None:
    for seed in (0, 1):
        settings = (*QUICK, "network.options.features=[4,8,8]")
        api.train(place / "data", out=tmp_path / str(seed), steps=2, seed=seed, settings=settings)
    assert weights(tmp_path / "0") != weights(tmp_path / "1")


def test_steps_asked_for_are_done_when_a_plan_says_another_number(place: Path, tmp_path: Path) -> None:
    assert train(place, tmp_path / "run", steps=2).steps == 2
    assert read_plan(tmp_path / "run" / "3_plan.yaml").steps == 2


STAGES = {
    "before the fingerprint": ["2_fingerprint.json", "3_plan.yaml", "4_cache", "5_folds", "6_model", "done.json"],
    "before the plan": ["3_plan.yaml", "4_cache", "5_folds", "6_model", "done.json"],
    "in the cache": ["4_cache", "5_folds", "6_model", "done.json"],
    "before the loop": ["5_folds", "6_model", "done.json"],
    "after the loop": ["5_folds/0/checkpoint/finished.json", "6_model", "done.json"],
    "before the bundle": ["6_model", "7_report", "done.json"],
    "in the bundle": ["6_model/model.json", "done.json"],
    "before the end": ["done.json"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_stopped_at_a_stage_ends_in_the_same_model(place: Path, tmp_path: Path, stage: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(place / "run", out)
    for name in STAGES[stage]:
        target = out / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    train(place, out)
    assert weights(out) == weights(place / "run")
    before, after = (json.loads((run / "6_model" / "model.json").read_text()) for run in (place / "run", out))
    for info in (before, after):
        info["training"].pop("seconds")
    assert after == before


def test_what_a_killed_process_left_half_written_is_swept(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(place / "run", out)
    (out / "done.json").unlink()
    leftovers = [out / f"{PARTIAL_PREFIX}0-x", out / "5_folds" / "0" / "checkpoint" / f"{PARTIAL_PREFIX}1-state"]
    for file in leftovers:
        file.write_bytes(b"half")
    train(place, out)
    assert not any(file.exists() for file in leftovers)


def test_a_second_command_in_the_same_folder_is_refused(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(place / "run", out)
    (out / "done.json").unlink()
    with FileLock(out / "train.lock"):
        refused("LOCKED", "another medseg train works in this folder", place, out)
        assert (out / "6_model" / "model.json").exists(), "what the other command has written stays"
    train(place, out)


def refused(code: str, words: str, *args: Any, **options: Any) -> None:
    with pytest.raises(MedsegError, match=words) as caught:
        train(*args, **options)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 5}, "steps: 4 then, 5 now"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"settings": ("batch_size=3",)}, r'settings: none then, \["batch_size=3"\] now'),
        ({"folds": 2}, "folds: none then, 2 now"),
        ({"steps": None, "budget": "1m"}, r"budget: none then, 60.0 now; steps: 4 then, none now"),
    ],
)
def test_other_options_are_refused_and_named(place: Path, options: dict[str, Any], words: str) -> None:
    before = tree(place / "run")
    refused("RUN_DIFFERS", rf"started with other options \({words}\)", place, place / "run", **options)
    assert tree(place / "run") == before


def test_another_plan_under_the_same_name_is_refused(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "plan.yaml"
    other.write_text((place / "plan.yaml").read_text().replace("learning_rate: 0.0", "learning_rate: 0.01"))
    refused("RUN_DIFFERS", r"other options \(another plan\)", place, place / "run", plan=other)


def test_the_same_plan_under_another_name_resumes(place: Path, tmp_path: Path) -> None:
    shutil.copyfile(place / "plan.yaml", tmp_path / "other.yaml")
    assert train(place, place / "run", plan=tmp_path / "other.yaml").steps == 4


def test_other_data_are_refused(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    shutil.copyfile(data / "images" / "c1.nii.gz", data / "images" / "c0.nii.gz")
    with pytest.raises(TrainingError, match=r"other data \(train cases c0\)") as caught:
        api.train(data, out=place / "run", steps=4, plan=place / "plan.yaml")
    assert caught.value.code == "RUN_DIFFERS"


def test_the_same_data_at_another_place_resume(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "moved")
    assert api.train(tmp_path / "moved", out=place / "run", steps=4, plan=place / "plan.yaml").steps == 4


def test_a_damaged_checkpoint_is_named_with_what_to_do(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(place / "run", out)
    (out / "done.json").unlink()
    file = out / "5_folds" / "0" / "checkpoint" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused("TRAINING", r"state\.safetensors: the checkpoint is damaged .*delete it to start", place, out)


@pytest.mark.parametrize(
    "name", ["1_dataset.json", "request.json", "2_cases.json", "2_fingerprint.json", "tracking.json"]
)
def test_a_damaged_record_of_the_run_is_named(place: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(place / "run", out)
    (out / "done.json").unlink()
    (out / name).write_text('{"half": ')
    with pytest.raises(TrainingError, match=f"{name}: damaged"):
        train(place, out)


def test_a_damaged_cache_is_prepared_again(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(place / "run", out)
    for name in ("done.json", "5_folds"):
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    file = next((out / "4_cache").rglob("image.npy"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 4
    file.write_bytes(raw)
    train(place, out)
    assert weights(out) == weights(place / "run")


# Folds


def test_folds_make_an_ensemble_and_one_fold_is_the_same_alone(place: Path, tmp_path: Path) -> None:
    all_folds = train(place, tmp_path / "all", folds=2)
    train(place, tmp_path / "one", folds=2, fold=1)
    assert all_folds.steps == 8
    assert sorted(weights(tmp_path / "all")) == ["fold_0.safetensors", "fold_1.safetensors"]
    assert list(weights(tmp_path / "one").values()) == [weights(tmp_path / "all")["fold_1.safetensors"]]
    scored = [p.name for fold in (0, 1) for p in (tmp_path / "all" / "5_folds" / str(fold)).rglob("c*.nii.gz")]
    assert sorted(scored) == [f"c{i}.nii.gz" for i in range(5)], "every case is scored by the network that missed it"
    report = tmp_path / "all" / "7_report"
    table = load_evaluation(report)
    assert table.cases == tuple(f"c{i}" for i in range(5)), "one table of all folds"
    assert table.provenance["folds"] == "2"
    assert len((report / "folds.csv").read_text().splitlines()) == 6
    assert (report / "postprocess.csv").read_text().startswith("label,step,n,before,after")
    info = open_bundle(tmp_path / "all").info
    assert info.calibration is not None
    assert info.calibration.cases == 5
    for label, value in info.training["dice"].items():
        assert value == pytest.approx(np.mean(list(table.values("dice", label).values())))
    predicted = api.predict(place / "data", model=tmp_path / "all", out=tmp_path / "masks")
    assert predicted.complete


def test_post_processing_is_chosen_from_what_the_networks_have_not_learnt_and_can_be_left_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PostStep(kind="largest_component", labels=("ball",))
    tried: list[int] = []

    def choose(trial: StepTrial) -> Any:
        tried.extend(len(rows) for rows in trial.dice.values())
        return (step,), []

    monkeypatch.setattr(StepTrial, "choose", choose)
    train(place, tmp_path / "run")
    assert tried == [1, 1], "the validation case of each label; no test case"
    info = open_bundle(tmp_path / "run").info
    assert info.postprocess == (step,)
    plain = {}
    for name, wanted in (("with", True), ("without", False)):
        out = tmp_path / name
        assert api.predict(place / "data", model=tmp_path / "run", out=out, postprocess=wanted).complete
        told = json.loads((out / "predictions.json").read_text())
        assert told["postprocess"] == ("largest_component of ball" if wanted else "")
        plain[name] = read_image(out / "c5.nii.gz")
    assert np.array_equal(plain["with"].array, postprocess(plain["without"], (step,), info.spec).array)
    again = api.predict(place / "data", model=tmp_path / "run", out=tmp_path / "without")
    assert again.complete
    assert np.array_equal(read_image(tmp_path / "without" / "c5.nii.gz").array, plain["with"].array), "done anew"


def test_validation_masks_name_the_network_that_made_them(model: Path) -> None:
    place = model / "5_folds" / "0" / "validation"
    told = json.loads((place / "predictions.json").read_text())
    info = open_bundle(place / "model").info
    assert told["model_hash"] == info.digest
    assert told["dataset_hash"] == info.dataset_digest == open_bundle(model).info.dataset_digest != ""


def test_trying_post_processing_takes_a_share_of_a_budget_only(
    make_spec: Any, make_plan: Any, make_fingerprint: Any
) -> None:
    def nothing(voxels: np.ndarray) -> torch.Tensor:
        return torch.zeros((2, len(voxels)))

    spec = make_spec()
    for hurry, expected in ((True, [True, False]), (False, [True, True])):
        scored = Scored(StepTrial(spec, make_fingerprint()), VoxelSample(spec, cases=2, seed=0))
        found = []
        for trying in (0.0, TRYING_SECONDS + 0.2):
            scored.trying, scored.predicting = trying, 1.0
            mask = Volume(np.ones((1, 4, 4, 4), np.uint8), np.eye(4))
            notes = make_notes(spec, make_plan(spec), networks=1, passes=1)
            scored.add(Case("c", (), None, "p"), Path("c.nii.gz"), notes, nothing, mask, mask, hurry=hurry)
            found.append(scored.trial.complete)
        assert found == expected


def test_a_fold_that_does_not_exist_is_refused(place: Path, tmp_path: Path) -> None:
    refused("TRAINING", "--fold 2: there are folds 0 to 1", place, tmp_path / "run", folds=2, fold=2)
    refused("TRAINING", "--fold 1: there are folds 0 to 0; give --folds", place, tmp_path / "run2", fold=1)


def test_cases_of_a_patient_stay_together(place: Path, tmp_path: Path, tiny_dataset: Builder) -> None:
    data = tiny_dataset(tmp_path / "data", cases=6, test=0)
    for kind in ("images", "masks"):
        for number in range(6):
            file = data / kind / f"c{number}.nii.gz"
            file.rename(data / kind / f"p{number // 2}_{number % 2}.nii.gz")
    spec = yaml.safe_load((data / "dataset.yaml").read_text())
    spec |= {"patient": "^(p[0-9]+)_", "splits": {}}
    (data / "dataset.yaml").write_text(yaml.safe_dump(spec))
    api.train(data, out=tmp_path / "run", steps=1, folds=3, plan=place / "plan.yaml")
    for fold in range(3):
        names = sorted(p.name for p in (tmp_path / "run" / "5_folds" / str(fold) / "validation").glob("*.nii.gz"))
        assert len(names) == 2
        assert len({name.partition("_")[0] for name in names}) == 1
    spec["splits"] = {"test": ["p0_0"]}
    (data / "dataset.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(TrainingError, match="p0") as caught:
        api.train(data, out=tmp_path / "leak", steps=1)
    assert caught.value.code == "PATIENT_IN_TWO_SPLITS"
    assert not (tmp_path / "leak").exists(), "nothing is written for what is refused at once"


def test_copies_of_an_image_are_never_on_both_sides(place: Path, tmp_path: Path, tiny_dataset: Builder) -> None:
    data = tiny_dataset(tmp_path / "data", cases=8, test=2)
    for copy, original in ((1, 0), (3, 2), (5, 4)):
        shutil.copy(data / "images" / f"c{original}.nii.gz", data / "images" / f"c{copy}.nii.gz")
    said: list[str] = []
    display = Display(None)
    display.say = said.append  # type: ignore[method-assign]
    api.train(data, out=tmp_path / "run", steps=1, folds=3, plan=place / "plan.yaml", display=display)
    for fold in range(3):
        found = {int(p.name[1]) for p in (tmp_path / "run" / "5_folds" / str(fold) / "validation").glob("c*.nii.gz")}
        assert len(found) == 2
        assert len({number // 2 for number in found}) == 1
    assert any("c1, c3, c5" in line and "one patient" in line for line in said)
    shutil.copy(data / "images" / "c0.nii.gz", data / "images" / "c7.nii.gz")
    with pytest.raises(TrainingError, match=r"very images of training cases: c7 those of c[01];") as caught:
        api.train(data, out=tmp_path / "leak", steps=1, plan=place / "plan.yaml")
    assert caught.value.code == "PATIENT_IN_TWO_SPLITS"


def test_blank_images_are_no_copies(place: Path, tmp_path: Path, tiny_dataset: Builder, tiny: Any) -> None:
    data = tiny_dataset(tmp_path / "data", cases=5, test=1)
    for number in (0, 1, 2, 4):
        tiny.save(data / "images" / f"c{number}.nii.gz", np.zeros(tiny.shape, np.float32))
    api.train(data, out=tmp_path / "run", steps=1, folds=4, plan=place / "plan.yaml")


def test_one_case_is_too_few(place: Path, tmp_path: Path, tiny_dataset: Builder) -> None:
    data = tiny_dataset(tmp_path / "data", cases=1, test=0)
    with pytest.raises(TrainingError, match=r"1 patient\(s\) to learn from; at least 2 are needed"):
        api.train(data, out=tmp_path / "run", steps=1, plan=place / "plan.yaml")


def test_a_plan_of_other_channels_is_refused(place: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((place / "plan.yaml").read_text())
    content["normalisation"] = {f"other_{name}": row for name, row in content["normalisation"].items()}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(PlanError, match=r"normalises the channels other_\w+, the dataset has \w+; name them in this"):
        api.train(place / "data", out=tmp_path / "run", steps=1, plan=tmp_path / "plan.yaml")
    assert not (tmp_path / "run" / "3_plan.yaml").exists()


def test_only_test_cases_are_too_few(tmp_path: Path, tiny_dataset: Builder) -> None:
    data = tiny_dataset(tmp_path / "data", cases=2, test=2)
    with pytest.raises(MedsegError, match="no case to learn from"):
        api.train(data, out=tmp_path / "run", steps=1)


def test_a_case_without_a_mask_is_left_out_and_that_is_said(
    place: Path, tmp_path: Path, tiny_dataset: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_dataset(tmp_path / "data", cases=3, test=0)
    (data / "masks" / "c1.nii.gz").unlink()
    assert api.check(data).ok
    api.train(data, out=tmp_path / "run", steps=1, plan=place / "plan.yaml", display=Display(Console()))
    assert "1 training case(s) have no mask and are left out" in capsys.readouterr().out
    assert open_bundle(tmp_path / "run").info.training["cases"] == 2
    for name in ("c0", "c2"):
        (data / "masks" / f"{name}.nii.gz").unlink()
    with pytest.raises(SpecError, match="no case to learn from"):
        api.train(data, out=tmp_path / "none", steps=1)


# Budget and replay


def test_a_budget_run_is_repeated_bit_for_bit(place: Path, tmp_path: Path, no_measuring: None) -> None:
    settings = (*QUICK, "network.options.features=[4,8,8]")
    first = api.train(place / "data", out=tmp_path / "timed", budget="14s", settings=settings)
    assert first.steps >= 1
    state = load_state_of(tmp_path / "timed")
    assert len(state.factors) == len(state.losses) == state.step == first.steps
    second = api.train(place / "data", out=tmp_path / "replay", replay=tmp_path / "timed")
    assert second.steps == first.steps
    assert weights(tmp_path / "replay") == weights(tmp_path / "timed")
    again = load_state_of(tmp_path / "replay")
    assert again.factors == state.factors
    assert again.losses == state.losses


def test_a_budget_that_reading_and_preparing_use_up_is_refused_and_not_overrun(
    place: Path, tmp_path: Path, no_measuring: None
) -> None:
    began = time.monotonic() - 25
    words = r"the budget of 0:20 was over before the first step: .* took 0:\d\d.* --budget \d+s or more"
    with pytest.raises(TrainingError, match=words):
        api.train(place / "data", out=tmp_path / "run", budget="20s", settings=QUICK, began=began)
    assert not (tmp_path / "run" / "6_model").exists()


def load_state_of(run: Path, fold: int = 0) -> Any:
    file = run / "5_folds" / str(fold) / "checkpoint" / "state.safetensors"
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        job = json.loads(opened.metadata()["state"])["job"]
    return load_state(file, job=job)


def test_a_replay_needs_no_other_option_whatever_the_run_was(place: Path, tmp_path: Path) -> None:
    train(place, tmp_path / "run", folds=2, fold=1, settings=("learning_rate=0.003",))
    result = api.train(place / "data", out=tmp_path / "replay", replay=tmp_path / "run")
    assert weights(tmp_path / "replay") == weights(tmp_path / "run")
    assert result.steps == 4
    assert read_plan(tmp_path / "replay" / "3_plan.yaml").learning_rate == 0.003


@pytest.mark.parametrize(
    "options",
    [{"steps": 3}, {"budget": "1m"}, {"folds": 2}, {"fold": 0}, {"settings": ("batch_size=3",)}, {"network": "unet"}],
)
def test_a_replay_takes_no_option_that_would_change_it(place: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="replay"):
        api.train(place / "data", out=tmp_path / "x", replay=place / "run", **options)
    assert not (tmp_path / "x").exists()


def test_a_replay_of_other_data_is_refused(place: Path, tmp_path: Path, tiny_dataset: Builder) -> None:
    other = tiny_dataset(tmp_path / "other", cases=5, test=1)
    with pytest.raises(TrainingError, match="learnt from other data") as caught:
        api.train(other, out=tmp_path / "x", replay=place / "run")
    assert caught.value.code == "RUN_DIFFERS"


def test_a_replay_of_an_unfinished_or_absent_run_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "half")
    (tmp_path / "half" / "5_folds" / "0" / "checkpoint" / "finished.json").unlink()
    with pytest.raises(TrainingError, match="fold 0 of that run has not been finished"):
        api.train(place / "data", out=tmp_path / "x", replay=tmp_path / "half")
    with pytest.raises(TrainingError, match="nowhere: this is no run of medseg train"):
        api.train(place / "data", out=tmp_path / "y", replay=tmp_path / "nowhere")


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": -1}, "steps"),
        ({"epochs": 0}, "epochs"),
        ({"budget": 0}, "longer than nothing"),
        ({"budget": float("nan")}, "budget"),
        ({"budget": float("inf")}, "budget"),
        ({"budget": "soon"}, "not a duration"),
        ({"budget": "1m", "steps": 3}, "one of budget, steps, epochs and replay, not budget and steps"),
        ({"epochs": 2, "steps": 3}, "not steps and epochs"),
    ],
)
def test_impossible_lengths_are_refused_before_anything_is_written(
    place: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        api.train(place / "data", out=tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_steps_asked_for_are_done_when_a_setting_says_another_number(
    place: Path, tmp_path: Path, no_measuring: None
) -> None:
    settings = (*QUICK, "network.options.features=[4,8,8]", "steps=7")
    assert api.train(place / "data", out=tmp_path / "run", steps=2, settings=settings).steps == 2


def test_epochs_are_passes_over_the_cases(place: Path, tmp_path: Path, no_measuring: None) -> None:
    settings = (*QUICK, "network.options.features=[4,8,8]")
    api.train(place / "data", out=tmp_path / "run", epochs=4, settings=settings)
    plan = read_plan(tmp_path / "run" / "3_plan.yaml")
    # 4 of the 5 cases are learnt from, 2 a step
    assert plan.batch_size == 2
    assert plan.steps == 8


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("batch_sise=3", "batch_sise: unknown key, did you mean 'batch_size'"),
        ("batch_size", "write KEY=VALUE"),
        ("batch_size=none", "batch_size"),
        ("dimensions=4", "2 or 3 are allowed"),
        ("precision=fp8", "precision"),
        ("network.name=unett", "unett"),
        ("loss=dicce", "dicce"),
    ],
)
def test_a_setting_that_does_not_fit_is_explained(
    place: Path, tmp_path: Path, no_measuring: None, setting: str, words: str
) -> None:
    with pytest.raises(MedsegError, match=words):
        api.train(place / "data", out=tmp_path / "run", steps=1, settings=(*QUICK, setting))


def test_a_mended_command_after_a_refused_one_may_use_the_same_folder(
    place: Path, tmp_path: Path, no_measuring: None
) -> None:
    with pytest.raises(PlanError):
        api.train(place / "data", out=tmp_path / "run", steps=1, settings=("batch_sise=3",))
    settings = (*QUICK, "network.options.features=[4,8,8]")
    assert api.train(place / "data", out=tmp_path / "run", steps=1, settings=settings).steps == 1


def test_an_unknown_network_lists_those_that_exist(place: Path, tmp_path: Path, no_measuring: None) -> None:
    with pytest.raises(MedsegError, match=r"'resnet'.*unet"):
        api.train(place / "data", out=tmp_path / "run", steps=1, network="resnet", settings=QUICK)


@pytest.mark.parametrize("network", ["fcn8s", "unet2015_valid", "unet3d"])
def test_another_network_is_trained_and_predicts(place: Path, tmp_path: Path, network: str, no_measuring: None) -> None:
    """Batch norm too (unet3d): its running statistics go into the weights that predict."""
    settings = (*QUICK, "network.options.features=[4, 4, 8]")
    api.train(place / "data", out=tmp_path / "run", steps=3, network=network, settings=settings)
    plan = read_plan(tmp_path / "run" / "3_plan.yaml")
    assert plan.network.name == network
    assert "kernels" not in plan.network.options
    result = api.predict(place / "data", model=tmp_path / "run", out=tmp_path / "masks")
    assert result.complete
    if network == "unet3d":
        network_ = load_networks(open_bundle(tmp_path / "run"))[0]
        means = [value for key, value in network_.state_dict().items() if key.endswith("running_mean")]
        assert means
        assert all(mean.abs().max() > 0 for mean in means)


def test_precision_of_the_plan_is_used(place: Path, tmp_path: Path) -> None:
    train(place, tmp_path / "fp32", settings=("precision=fp32",))
    train(place, tmp_path / "bf16", settings=("precision=bf16",))
    assert read_plan(tmp_path / "bf16" / "3_plan.yaml").precision == "bf16"
    assert weights(tmp_path / "fp32") != weights(tmp_path / "bf16")
    assert weights(tmp_path / "fp32") == weights(place / "run")


def test_an_output_folder_that_is_a_file_is_a_message(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    refused("NOT_WRITABLE", "cannot be written", place, tmp_path / "run")


# Full disk


def test_a_full_disk_is_a_message_and_the_same_command_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write of a run fails once, one after another; each time the next command goes on."""
    out, real = tmp_path / "run", os.replace
    failed: set[str] = set()
    messages: list[str] = []
    halves: list[Path] = []

    def replace(source: Any, target: Any) -> None:
        name = Path(target).relative_to(out).as_posix() if out in Path(target).parents else ""
        if name and name not in failed:
            failed.add(name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(200):
        try:
            train(place, out)
            break
        except ExportError as error:
            messages.append(f"{error.code}: {error}")
            halves += out.rglob(f"{PARTIAL_PREFIX}*")
    assert all(re.match("DISK_FULL: .*nothing was left under this name", message) for message in messages)
    assert halves == []
    assert {"1_dataset.json", "3_plan.yaml", "5_folds/0/checkpoint/state.safetensors", "6_model/model.json"} <= failed
    assert weights(out) == weights(place / "run")


@pytest.mark.parametrize("kilobytes", [16, 120, 200, 280, 400, 600])
def test_a_disk_that_is_really_full(place: Path, tmp_path: Path, kilobytes: int) -> None:
    disk = tmp_path / "small"
    disk.mkdir()

    def mount(words: str) -> bool:
        return subprocess.run(["mount", *words.split(), str(disk)], capture_output=True, check=False).returncode == 0

    if os.geteuid() != 0 or not mount(f"-t tmpfs -o size={kilobytes}k tmpfs"):
        pytest.skip("only root may mount a small file system")
    try:
        with pytest.raises(ExportError, match="cannot be written") as caught:
            train(place, disk / "run")
        assert caught.value.code == "DISK_FULL", caught.value
        assert not list(disk.rglob(f"{PARTIAL_PREFIX}*"))
        assert mount("-o remount,size=40m")
        train(place, disk / "run")
        assert weights(disk / "run") == weights(place / "run")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # memory maps are still open


def test_a_name_that_the_registry_does_not_take_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither / nor :"):
        api.train(tmp_path / "data", out=tmp_path / "run", steps=1, model_name="a/b")
    assert not (tmp_path / "run").exists()
