"""The three pipelines on a tiny dataset, from files to files, with real trainings of a few steps."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from medseg import cli
from medseg.errors import ConfigError
from medseg.planning.plan import Measured
from medseg.retraining import read_decisions, tick
from medseg.retraining.promotion import current_aliases
from medseg.training import make_plan as planning
from medseg.training import run as training
from pipelines import batch_inference, retraining, validation_report

Builder = Callable[..., Path]
QUICK = ["test_mirroring=false", "precision=fp32", "validations=2", "network.options.features=[4,8,8]", "batch_size=2"]
GOOD = {"steps": 60, "settings": [*QUICK, "learning_rate=0.02", "averaging=0.5"]}
POOR = {"steps": 2, "settings": QUICK}
EXAMPLE = Path(retraining.__file__).with_name("retraining.example.yaml")


def invoke(app: typer.Typer, *arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


class DiedError(BaseException):
    """Stands for SIGKILL: nothing in the library may catch it."""


class Hospital:
    """Four labelled patients to learn from, three for the gate, and the job of the example file."""

    def __init__(self, root: Path, tiny_dataset: Builder) -> None:
        self.root, self.store = root, root / "store"
        tiny_dataset(root / "all", cases=9, test=0)
        for number in range(9):
            if number != 4:
                self.arrive(f"c{number}", "gate" if number > 5 else "training")
        for place in ("gate", "training"):
            shutil.copyfile(root / "all" / "dataset.yaml", root / place / "dataset.yaml")

    def arrive(self, case: str, place: str) -> None:
        for kind in ("images", "masks"):
            (self.root / place / kind).mkdir(parents=True, exist_ok=True)
            name = f"{case}.nii.gz"
            shutil.copyfile(self.root / "all" / kind / name, self.root / place / kind / name)

    def job(self, **training: Any) -> Path:
        """The example as it is shipped, with a training of seconds and without the height of its bar."""
        job = yaml.safe_load(EXAMPLE.read_text())
        rule = {"min_improvement": 0.0, "max_drop": 0.5, "floor": 0.0}
        file = self.root / "job.yaml"
        file.write_text(yaml.safe_dump({**job, "training": training, "rule": rule, "min_new_cases": 1}))
        return file

    @property
    def aliases(self) -> dict[str, int]:
        return {k: v for k, v in current_aliases(self.store, "organs").items() if k != "candidate"}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder) -> Iterator[Hospital]:
    """After its first month: version 1, poorly trained, is the champion."""
    made = Hospital(tmp_path_factory.mktemp("hospital"), tiny_dataset)
    measured = Measured(device="cpu", threads=1, step_seconds={"narrow fp32": 0.05})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "measure", lambda *args, **options: measured)
        first = invoke(retraining.app, "tick", made.job(**POOR))
        assert first.exit_code == 0, first.output
        yield made


def test_retraining_through_a_crash_a_promotion_a_worse_model_and_a_rollback(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hospital.aliases == {"champion": 1}
    assert invoke(retraining.app, "tick", hospital.job(**POOR)).exit_code == 20

    # new data, and the power fails between the training and the decision
    hospital.arrive("c4", "training")
    good = hospital.job(**GOOD)
    fits: list[int] = []
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *args, **options: (fits.append(1), fit(*args, **options))[1])
    with monkeypatch.context() as patch:

        def dies(*args: Any) -> None:
            raise DiedError

        patch.setattr(tick, "_judge", dies)
        with pytest.raises(DiedError):
            tick.retrain(good)
    assert hospital.aliases == {"champion": 1}
    answer = hospital.root / "answer.json"
    better = invoke(retraining.app, "tick", good, "--json-out", answer)
    assert better.exit_code == 0, better.output
    assert fits == [1], "the training was repeated"
    assert hospital.aliases == {"champion": 2, "previous": 1}
    told = json.loads(answer.read_text())
    assert (told["outcome"], told["version"], told["former"]) == ("promoted", 2, 1)
    assert "Page:" in better.output
    assert Path(told["report"]).read_text().startswith("<!")

    # more data, a worse model
    hospital.arrive("c0", "training")
    worse = invoke(retraining.app, "tick", hospital.job(**{**POOR, "steps": 1}))
    assert worse.exit_code == 10, worse.output
    assert "FAIL" in worse.output
    assert hospital.aliases == {"champion": 2, "previous": 1, "challenger": 3}

    assert invoke(cli.app, "models", "rollback", "organs", "--track", hospital.store).exit_code == 0
    assert hospital.aliases == {"champion": 1, "challenger": 3}
    with pytest.raises(ConfigError, match="typo: this folder does not exist"):
        invoke(retraining.app, "decisions", hospital.root / "typo")
    shown = invoke(retraining.app, "decisions", hospital.store)
    events = [json.loads(line)["event"] for line in shown.output.splitlines()]
    assert [e for e in events if e != "aliases_moved"] == ["tick", "tick", "tick", "rollback"]
    assert len(read_decisions(hospital.store)) == len(events)


def test_the_run_of_the_challenger_tells_what_was_decided(hospital: Hospital) -> None:
    from medseg.tracking import list_versions
    from medseg.tracking.door import connect

    version = list_versions(hospital.store, "organs")[0]
    run = connect(hospital.store).get_run(version.run_id)
    decided = next(row for row in read_decisions(hospital.store) if row.content["event"] == "tick")
    assert run.data.tags["retraining.outcome"] == "promoted"
    assert run.data.tags["retraining.decision"] == decided.sha256
    assert "all_dice_ball" in run.data.metrics


def test_batch_inference_of_a_folder_with_a_broken_study(hospital: Hospital, tmp_path: Path) -> None:
    inbox, out = tmp_path / "inbox", tmp_path / "masks"
    shutil.copytree(hospital.root / "all" / "images", inbox)
    (inbox / "broken.nii.gz").write_bytes((inbox / "c0.nii.gz").read_bytes()[:400])
    command = (inbox, "--model", "models:/organs/1", "--track", hospital.store, "--out", out)
    result = invoke(batch_inference.app, *command)
    assert result.exit_code == 3
    assert "9 of 10 studies done" in result.output
    assert "1 refused" in result.output
    rows = list(csv.DictReader((out / "summary.csv").open()))
    assert [row["state"] for row in rows] == ["refused"] + ["done"] * 9
    assert len(list(out.glob("*.nii.gz"))) == 9

    # a mask is lost and the broken study arrives again: only these two are done
    kept = {p: p.stat().st_mtime_ns for p in out.glob("c*.nii.gz")}
    (out / "c3.nii.gz").unlink()
    shutil.copyfile(inbox / "c0.nii.gz", inbox / "broken.nii.gz")
    assert invoke(batch_inference.app, *command).exit_code == 0
    again = {p: p.stat().st_mtime_ns for p in out.glob("c*.nii.gz")}
    assert {p.name for p in again if again[p] != kept[p]} == {"c3.nii.gz"}


def test_batch_inference_without_any_usable_study_fails(hospital: Hospital, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.nii.gz").write_bytes(b"")
    command = (tmp_path / "in", "--model", "models:/organs/1", "--track", hospital.store, "--out", tmp_path / "out")
    assert invoke(batch_inference.app, *command).exit_code == 1


def test_validation_report(hospital: Hospital, tmp_path: Path) -> None:
    out = tmp_path / "validation"
    result = invoke(
        validation_report.app, hospital.root / "gate", "--model", "models:/organs/1", "--out", out,
        "--track", hospital.store,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "3 cases, 0 failed, mean Dice" in result.output
    page = (out / "report.html").read_text()
    # the worst cases (all three) and a typical one, as pictures inside the page
    assert page.count("data:image/png;base64,") == 4
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert str(hospital.root) not in page
    rows = list(csv.DictReader((out / "scores" / "cases.csv").open()))
    assert {row["case"] for row in rows} == {"c6", "c7", "c8"}
    pages = list((hospital.store / "mlartifacts").rglob("report.html"))
    assert [p.read_text() for p in pages] == [page]


def test_validation_report_against_an_earlier_one(hospital: Hospital, tmp_path: Path) -> None:
    command = (hospital.root / "gate", "--model", "models:/organs/1", "--track", hospital.store, "--no-track")
    assert invoke(validation_report.app, *command, "--out", tmp_path / "a").exit_code == 0
    assert invoke(validation_report.app, *command, "--out", tmp_path / "b", "--against", tmp_path / "a").exit_code == 0
    alone, compared = ((tmp_path / name / "report.html").read_text() for name in "ab")
    assert len(compared) > len(alone)
    assert "this evaluation minus the other" in compared
    assert "this evaluation minus the other" not in alone


def test_errors_are_one_message_and_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["retraining", "tick", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit) as caught:
        cli.main(retraining.app)
    assert caught.value.code == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_example_is_a_valid_job() -> None:
    from medseg.retraining.settings import load_settings

    settings = load_settings(EXAMPLE)
    assert settings.name == "organs"
    assert settings.training.budget == "30m"
