"""What a run says about its origin, and how a repetition says whether it came out again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from medseg import api
from medseg.display import Display
from medseg.errors import TrainingError
from medseg.files import file_digest
from medseg.planning.plan import read_plan
from medseg.training import choose_schedule as schedule_module
from medseg.training import record, replay
from medseg.training.assume import REASONS
from medseg.training.schedule import ByClock
from medseg.training.state import load_state, save_state

Builder = Callable[..., Path]
SETTINGS = ("batch_size=2", "validations=2", "test_mirroring=false", "network.options.features=[4,8,8]")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder) -> Path:
    """A folder with data/ and a finished deterministic run/; tests do not write into these."""
    root = tmp_path_factory.mktemp("repeat")
    tiny_dataset(root / "data", cases=4, test=1)
    api.train(root / "data", out=root / "run", steps=3, settings=SETTINGS, deterministic=True)
    return root


def manifest(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "manifest.json").read_text()))


def test_the_manifest_names_everything_by_its_digest(place: Path) -> None:
    found = manifest(place / "run")
    data = json.loads((place / "run" / "1_dataset.json").read_text())
    model = json.loads((place / "run" / "6_model" / "model.json").read_text())
    assert found["data"]["digest"] == data["digest"] == model["dataset_digest"]
    assert found["cases"] == {row["id"]: row["source"] for row in data["train"]}
    assert found["prepared"].keys() == found["cases"].keys()
    assert all(len(value) == 64 for value in (*found["cases"].values(), *found["prepared"].values()))
    assert found["plan"] == read_plan(place / "run" / "3_plan.yaml").digest
    assert found["files"] == {name: file_digest(place / "run" / name) for name in found["files"]}
    assert set(found["files"]) >= {"1_dataset.json", "3_plan.yaml", "6_model/model.json", "6_model/fold_0.safetensors"}
    assert found["folds"]["0"]["weights"] == found["files"]["6_model/fold_0.safetensors"]
    assert found["folds"]["0"]["steps"] == 3
    assert (found["deterministic"], found["seed"]) == (True, 0)
    (here,) = found["environments"]
    assert here["threads"] == torch.get_num_threads()
    assert here["versions"]["torch"] == torch.__version__
    assert here["processes"] == 1
    assert len(here["code"]) == 64


def test_a_deterministic_plan_measures_nothing(place: Path) -> None:
    plan = read_plan(place / "run" / "3_plan.yaml")
    assert plan.precision == "fp32"
    assert plan.measured is not None
    assert "not measured" in plan.measured.device
    text = (place / "run" / "3_plan.yaml").read_text()
    assert all(reason.split(":")[0][:40] in text for reason in REASONS.values())


def test_torch_is_as_it_was_after_a_deterministic_run(place: Path) -> None:
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_repetition_is_identical_and_says_so(place: Path, tmp_path: Path) -> None:
    result = api.train(place / "data", out=tmp_path / "again", replay=place / "run")
    assert result.identical is True
    found, before = manifest(tmp_path / "again"), manifest(place / "run")
    assert found["replay"] == {"identical": True, "largest_difference": 0.0, "first_step": {"0": None}}
    assert found["deterministic"], "as the run that it repeats"
    for key in ("data", "cases", "prepared", "plan", "folds", "model", "environments"):
        if key == "folds":
            rows = [{**row["0"], "data_share": 0} for row in (found[key], before[key])]
            assert rows[0] == rows[1]
        else:
            assert found[key] == before[key], key
    assert api.train(place / "data", out=tmp_path / "again", replay=place / "run").identical is True, "asked again"


class Ticks:
    """A clock that advances by five minutes whenever it is asked."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 300.0
        return self.now


def test_a_budget_is_repeated_by_its_record(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks()
    monkeypatch.setattr(schedule_module, "ByClock", lambda *given, **named: ByClock(*given, **named | {"clock": ticks}))
    said = StringIO()
    show = Display(Console(file=said, width=200))
    data = place / "data"
    timed = api.train(data, out=tmp_path / "timed", budget="1h", settings=SETTINGS, deterministic=True, display=show)
    assert 1 < timed.steps < 20
    assert "--deterministic: the clock decides the number of steps; --replay repeats them" in said.getvalue()
    again = api.train(data, out=tmp_path / "again", replay=tmp_path / "timed")
    assert (again.identical, again.steps) == (True, timed.steps)


def test_a_repetition_that_differs_is_found_with_the_step(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "other")
    file = tmp_path / "other" / "5_folds" / "0" / "checkpoint" / "state.safetensors"
    job = json.loads(_metadata(file)["state"])["job"]
    state = load_state(file, job=job)
    state.losses[1] += 1e-9
    name = next(iter(state.best))
    state.best[name].view(-1)[0] += 0.25
    save_state(file, state, job=job)
    result = api.train(place / "data", out=tmp_path / "again", replay=tmp_path / "other")
    assert result.identical is False
    found = manifest(tmp_path / "again")["replay"]
    assert found["largest_difference"] == pytest.approx(0.25, abs=1e-3)
    assert found["first_step"] == {"0": 2}
    assert "DIFFER" in replay.told(found)
    assert "fold 0 from step 2" in replay.told(found)


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def test_a_run_that_is_ordinary_says_nothing_of_a_repetition(place: Path, tmp_path: Path) -> None:
    plan = place / "run" / "3_plan.yaml"
    assert api.train(place / "data", out=tmp_path / "plain", steps=1, plan=plan).identical is None
    assert not manifest(tmp_path / "plain")["deterministic"]


def test_differences_between_environments_in_words() -> None:
    before = {"code": "a", "versions": {"torch": "2.10.0", "numpy": "2.0"}, "threads": 2}
    now = {"code": "b", "versions": {"torch": "2.11.0", "numpy": "2.0"}, "threads": 1}
    assert sorted(record.differences(before, now)) == [
        "another source code of medseg",
        "threads 2 then, 1 now",
        "torch 2.10.0 then, 2.11.0 now",
    ]
    assert record.differences(before, before) == []


def begun_elsewhere(place: Path, out: Path, **changes: Any) -> None:
    """Copy the run as if it had been begun in another environment and stopped before its end."""
    shutil.copytree(place / "run", out)
    (out / "done.json").unlink()
    content = manifest(out)
    content["environments"][0].update(changes)
    (out / "manifest.json").write_text(json.dumps(content))


def resume(place: Path, out: Path, **options: Any) -> Any:
    return api.train(place / "data", out=out, steps=3, settings=SETTINGS, deterministic=True, **options)


def test_a_deterministic_run_does_not_go_on_with_other_code(place: Path, tmp_path: Path) -> None:
    begun_elsewhere(place, tmp_path / "run", code="0" * 64)
    with pytest.raises(TrainingError, match=r"another environment \(another source code of medseg\)") as caught:
        resume(place, tmp_path / "run")
    assert caught.value.code == "RUN_DIFFERS"


def test_a_deterministic_run_goes_on_with_its_number_of_threads(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = torch.get_num_threads() + 1
    begun_elsewhere(place, tmp_path / "run", threads=other)
    before = torch.get_num_threads()
    resume(place, tmp_path / "run")
    assert manifest(tmp_path / "run")["environments"][0]["threads"] == other
    assert len(manifest(tmp_path / "run")["environments"]) == 1
    assert torch.get_num_threads() == before


def test_the_flag_is_one_of_the_options_that_a_resumed_run_must_share(place: Path) -> None:
    with pytest.raises(TrainingError, match="deterministic: true then, false now"):
        api.train(place / "data", out=place / "run", steps=3, settings=SETTINGS)


def test_a_run_from_before_there_was_the_option_resumes(place: Path, tmp_path: Path) -> None:
    plan = place / "run" / "3_plan.yaml"
    out = tmp_path / "run"
    api.train(place / "data", out=out, steps=1, plan=plan)
    asked = json.loads((out / "request.json").read_text())
    asked.pop("deterministic")
    (out / "request.json").write_text(json.dumps(asked))
    (out / "manifest.json").unlink()
    assert api.train(place / "data", out=out, steps=1, plan=plan).steps == 1
    again = api.train(place / "data", out=tmp_path / "again", replay=out)
    assert again.identical is True
