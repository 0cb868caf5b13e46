"""One tick after the other, with trainings and scores that are given: what is decided, and what a crash leaves."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from medseg.bundle import Member, open_bundle
from medseg.cases import content_digests
from medseg.display import Display
from medseg.errors import ExportError, MedsegError, RetrainingError
from medseg.evaluation.evaluate import targets_of
from medseg.evaluation.table import Evaluation, Row, make_evaluation, write_evaluation
from medseg.files import write_json
from medseg.retraining import RetrainResult, decisions, promote_version, promotion, read_decisions, roll_back, tick
from medseg.retraining.decisions import LOG, locked
from medseg.retraining.promotion import current_aliases
from medseg.retraining.tick import retrain
from medseg.tracking import set_alias
from medseg.training.manifest import make_manifest

Writer = Callable[..., Path]
RULE: dict[str, Any] = {"min_improvement": 0.0, "max_drop": 0.2, "floor": 0.5}


class World:
    """A job in a folder: `qualities` are the mean Dice of the models in the order in which they are trained."""

    def __init__(self, root: Path, store: Path, tiny_dataset: Writer, write_job: Writer) -> None:
        self.root, self.store, self.write_job = root, store, write_job
        tiny_dataset(root / "all", cases=12, test=0)
        for number in (0, 1, 2, 3, 8, 9, 10, 11):
            self.copy(f"c{number}", "gate" if number >= 8 else "data")
        for place in ("data", "gate"):
            shutil.copyfile(root / "all" / "dataset.yaml", root / place / "dataset.yaml")
        self.qualities: list[float | None] = []
        self.trained: list[Path] = []
        self.starts: list[Path | None] = []
        self.config = write_job()

    def copy(self, case: str, to: str, name: str | None = None) -> None:
        for kind in ("images", "masks"):
            target = self.root / to / kind / f"{name or case}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / "all" / kind / f"{case}.nii.gz", target)

    def tick(self, quality: float | None = None, **options: Any) -> RetrainResult:
        if quality is not None:
            self.qualities.append(quality)
        return retrain(self.config, **options)

    @property
    def aliases(self) -> dict[str, int]:
        return {k: v for k, v in current_aliases(self.store, "tiny").items() if k != "candidate"}

    @property
    def outcomes(self) -> list[str]:
        rows = [row.content for row in read_decisions(self.store)]
        return [row["outcome"] for row in rows if row["event"] == "tick"]


@pytest.fixture
def world(
    tmp_path: Path,
    store: Path,
    tiny_dataset: Writer,
    write_job: Writer,
    make_spec: Any,
    make_plan: Any,
    make_bundle: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    made = World(tmp_path, store, tiny_dataset, write_job)
    spec = make_spec(labels={"ball": 1, "box": 2}, channels=("mr",))

    def train(dataset: Path, *, out: Path, splits: Any, **options: Any) -> SimpleNamespace:
        made.starts.append(options["request"].from_model)
        if not (out / "done.json").exists():
            made.trained.append(out)
            make_bundle(out / "6_model", spec, make_plan(spec, seed=len(made.trained)))
            write_json(out / "1_dataset.json", make_manifest(tick_dataset(dataset)))
            (out / "4_cache").mkdir()
            write_json(out / "done.json", {})
        return SimpleNamespace(model=out / "6_model")

    def score(job: Any, candidate: Any, display: Any) -> Evaluation | None:
        quality = made.qualities[candidate.version - 1]
        if quality is None:
            return None
        rows = []
        for number, case in enumerate(job.gate.cases):
            for label in job.gate.spec.foreground:
                value = quality + 0.01 * (number % 2)
                rows.append(Row(case.id, case.patient, label, "dice", "", value, "used", ""))
        evaluation = make_evaluation(targets_of(job.gate.spec), rows, {})
        write_evaluation(evaluation, candidate.scores)
        return evaluation

    def page(scores: Path, *, out: Path, against: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text("compared")

    for name, function in {"train": train, "_score": score, "report": page}.items():
        monkeypatch.setattr(tick, name, function)
    return made


def tick_dataset(path: Path) -> Any:
    from medseg.spec import load_dataset

    return load_dataset(path)


def test_the_first_model_needs_its_floor(world: World) -> None:
    result = world.tick(0.4)
    assert (result.outcome, result.exit_code, result.version, result.former) == ("not_promoted", 10, 1, None)
    assert world.aliases == {"challenger": 1}
    world.copy("c4", "data")
    result = world.tick(0.6)
    assert (result.outcome, result.exit_code, result.version) == ("promoted", 0, 2)
    assert world.aliases == {"champion": 2, "challenger": 1}


def test_better_is_promoted_worse_is_not_and_back_again(world: World) -> None:
    world.tick(0.6)
    world.copy("c4", "data")
    better = world.tick(0.8)
    assert (better.outcome, better.former) == ("promoted", 1)
    assert better.report is not None
    assert better.report.read_text() == "compared"
    assert {row["label"]: round(row["mean_difference"], 6) for row in better.comparison}["ball"] == 0.2
    assert world.aliases == {"champion": 2, "previous": 1}
    world.copy("c5", "data")
    worse = world.tick(0.7)
    assert (worse.outcome, worse.exit_code) == ("not_promoted", 10)
    assert "FAIL mean of labels" in worse.describe()
    assert world.aliases == {"champion": 2, "previous": 1, "challenger": 3}
    roll_back(world.store, "tiny")
    assert world.aliases == {"champion": 1, "challenger": 3}
    assert world.tick().outcome == "no_new_data"
    assert world.aliases["champion"] == 1


def test_nothing_new_trains_nothing(world: World) -> None:
    world.tick(0.6)
    log = (world.store / LOG).read_bytes()
    again = world.tick()
    assert (again.outcome, again.exit_code) == ("no_new_data", 20)
    assert len(world.trained) == 1
    assert (world.store / LOG).read_bytes() == log


def test_too_little_new_waits_and_adds_up(world: World) -> None:
    world.config = world.write_job(min_new_cases=2)
    world.tick(0.6)
    world.copy("c4", "data")
    assert world.tick().reason == "1 new training case(s), 2 are needed"
    world.copy("c5", "data")
    assert world.tick(0.8).outcome == "promoted"
    assert read_decisions(world.store)[-2].content["counts"]["new_cases"] == 2


def test_an_image_is_new_when_its_labels_arrive(world: World) -> None:
    world.tick(0.6)
    world.copy("c4", "data")
    mask = world.root / "data/masks/c4.nii.gz"
    mask.rename(world.root / "later.nii.gz")
    assert world.tick().reason == "0 new training case(s), 1 are needed"
    (world.root / "later.nii.gz").rename(mask)
    assert world.tick(0.8).outcome == "promoted"


def test_a_corrected_label_is_new(world: World) -> None:
    world.tick(0.6)
    shutil.copyfile(world.root / "all/masks/c5.nii.gz", world.root / "data/masks/c0.nii.gz")
    assert world.tick(0.8).outcome == "promoted"


def test_a_removed_case_alone_is_nothing_new(world: World) -> None:
    world.tick(0.6)
    (world.root / "data/images/c0.nii.gz").unlink()
    assert world.tick().exit_code == 20


def test_another_rule_decides_anew_without_training_anew(world: World) -> None:
    world.tick(0.4)
    world.config = world.write_job(rule={**RULE, "floor": 0.3})
    assert world.tick().outcome == "promoted"
    assert len(world.trained) == 1
    assert world.outcomes == ["not_promoted", "promoted"]
    digests = [row.content["digests"] for row in read_decisions(world.store) if "digests" in row.content]
    assert digests[0]["rule"] != digests[1]["rule"]
    assert digests[0]["dataset"] == digests[1]["dataset"]


def test_a_dry_run_only_talks(world: World) -> None:
    result = world.tick(dry_run=True)
    assert (result.outcome, result.exit_code) == ("would_train", 0)
    assert "4 cases, 4 of them new" in result.describe()
    assert world.trained == []
    assert read_decisions(world.store) == []
    world.tick(0.6)
    assert world.tick(dry_run=True).outcome == "no_new_data"


def test_a_gate_that_was_declared_is_held(world: World) -> None:
    digest = world.tick(dry_run=True).reason.split("digest ")[1][:64]
    world.config = world.write_job(gate={"dataset": "gate", "digest": digest})
    assert world.tick(0.6).outcome == "promoted"
    world.copy("c7", "gate")
    world.copy("c4", "data")
    refused(world, "GATE_CHANGED")


def test_a_gate_case_in_the_training_data_is_refused(world: World) -> None:
    world.copy("c8", "data")
    refused(world, "GATE_LEAK", "c8 has the same patient as gate case c8")


def test_a_gate_image_under_another_name_and_format_is_refused(world: World) -> None:
    import nibabel

    image = nibabel.load(world.root / "all/images/c9.nii.gz")
    flipped = nibabel.as_closest_canonical(image)
    data = np.asarray(flipped.dataobj).astype(np.float64)
    nibabel.Nifti1Image(data, flipped.affine).to_filename(world.root / "data/images/renamed.nii.gz")
    refused(world, "GATE_LEAK", "renamed has the same image as gate case c9")


def test_a_gate_of_one_patient_or_with_other_labels_is_refused(world: World) -> None:
    spec = world.root / "gate" / "dataset.yaml"
    text = spec.read_text()
    spec.write_text(text.replace("box: 2", "box: 3"))
    refused(world, "GATE_DIFFERS")
    spec.write_text(text + 'patient: "c"\n')
    refused(world, "GATE_TOO_SMALL")


def refused(world: World, code: str, message: str = ".") -> None:
    before = world.aliases
    with pytest.raises(RetrainingError, match=message) as caught:
        world.tick(0.9)
    assert caught.value.code == code
    assert world.aliases == before
    assert len(world.trained) == len(world.outcomes)


def test_a_model_that_predicts_nothing_is_not_promoted(world: World) -> None:
    world.tick(0.6)
    world.copy("c4", "data")
    world.qualities.append(None)
    assert world.tick().outcome == "not_promoted"
    assert world.aliases == {"champion": 1, "challenger": 2}


class DiedError(BaseException):
    """Stands for SIGKILL: nothing in the library may catch it."""


def dies(*args: Any, **options: Any) -> None:
    raise DiedError


@pytest.mark.parametrize(
    ("module", "function", "decided"),
    [
        (tick, "_register", 0),
        (tick, "_judge", 0),
        (tick, "report", 0),
        (tick, "keep_manifest", 0),
        (promotion, "append_decision", 0),
        (promotion, "_follow", 1),
        (promotion, "set_alias", 1),
        (tick, "_note", 1),
    ],
)
def test_a_crash_at_any_moment_is_gone_on_from(
    world: World, monkeypatch: pytest.MonkeyPatch, module: Any, function: str, decided: int
) -> None:
    world.tick(0.6)
    world.copy("c4", "data")
    world.qualities.append(0.8)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, dies)
        with pytest.raises(DiedError):
            world.tick()
    assert len(world.outcomes) == 1 + decided
    result = world.tick()
    # only when the aliases had moved already is there nothing left to tell
    assert result.outcome == ("no_new_data" if function == "_note" else "promoted")
    assert result.version in (2, None)
    assert len(world.trained) == 2
    assert world.outcomes == ["promoted", "promoted"]
    assert world.aliases == {"champion": 2, "previous": 1}
    assert world.tick().exit_code == 20


def test_a_full_disk_promotes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(decisions, "_append", full)
        with pytest.raises(ExportError):
            world.tick(0.6)
    assert world.aliases == {}
    assert world.tick().outcome == "promoted"


def test_two_ticks_do_not_run_together(world: World) -> None:
    with locked(world.root / "work" / "tick.lock", seconds=0, what="testing"):
        refused(world, "LOCKED")


def test_a_champion_that_a_person_moved_meanwhile_is_respected(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.tick(0.6)
    world.copy("c4", "data")
    judge = tick._judge

    def meanwhile(*args: Any) -> Any:
        promote_version(world.store, "tiny", 2)
        return judge(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tick, "_judge", meanwhile)
        with pytest.raises(RetrainingError) as caught:
            world.tick(0.8)
    assert caught.value.code == "CHAMPION_MOVED"
    assert world.tick().outcome == "not_promoted"
    assert world.aliases == {"champion": 2, "previous": 1, "challenger": 2}


def test_data_that_changed_before_the_training_read_them(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tick.train

    def late(*args: Any, **options: Any) -> Any:
        world.copy("c5", "data")
        return given(*args, **options)

    monkeypatch.setattr(tick, "train", late)
    with pytest.raises(RetrainingError) as caught:
        world.tick(0.6)
    assert caught.value.code == "DATA_CHANGED"
    assert world.outcomes == []


def test_a_tampered_log_stops_before_training(world: World) -> None:
    world.tick(0.6)
    world.copy("c4", "data")
    log = world.store / LOG
    log.write_bytes(log.read_bytes().replace(b'"floor":0.5', b'"floor":0.1'))
    with pytest.raises(RetrainingError) as caught:
        world.tick(0.9)
    assert caught.value.code == "LOG_TAMPERED"
    assert len(world.trained) == 1


def test_the_log_and_the_result_hold_numbers_and_name_nobody(world: World) -> None:
    world.tick(0.6)
    world.copy("c4", "data")
    result = world.tick(0.8)
    text = (world.store / LOG).read_text()
    assert str(world.root) not in text
    assert not [case for case in (f'"c{n}"' for n in range(12)) if case in text]
    row = read_decisions(world.store)[-2]
    assert row.content["counts"] == {
        "gate_cases": 4,
        "gate_patients": 4,
        "gate_used_before": 1,
        "new_cases": 1,
        "training_cases": 5,
    }
    assert result.decision == row.sha256
    assert json.loads(json.dumps(result.to_dict()))["exit_code"] == 0
    assert not list((world.root / "work").rglob("4_cache"))


def test_a_manually_set_challenger_alias_is_cleared_by_its_promotion(world: World) -> None:
    world.tick(0.6)
    set_alias(world.store, "tiny", "challenger", 1)
    world.copy("c4", "data")
    world.tick(0.8)
    promote_version(world.store, "tiny", 1)
    assert world.aliases == {"champion": 1, "previous": 2}


def test_errors_are_medseg_errors(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="cannot be read"):
        retrain(tmp_path / "nowhere.yaml")


def test_a_training_begins_with_the_champion_of_its_beginning(world: World) -> None:
    world.config = world.write_job(training={"steps": 2, "start": "champion"})
    world.tick(0.6)
    assert world.starts == [None], "the first model has nobody to begin with"
    world.copy("c4", "data")
    world.tick(0.7)
    first, second = world.trained
    assert open_bundle(world.starts[1] or Path()).info.digest == open_bundle(first / "6_model").info.digest
    # What the real training leaves; then the champion changes (it is the second now) and the rule asks anew.
    (second / "3_plan.yaml").write_text("begun")
    shutil.copytree(first / "6_model", second / "0_start")
    world.config = world.write_job(training={"steps": 2, "start": "champion"}, rule={**RULE, "max_drop": 0.3})
    world.tick()
    assert world.starts[2] == second / "0_start", "a training that has begun keeps its beginning"
    assert world.trained == [first, second]


def test_of_a_champion_of_several_configurations_the_best_member_is_fine_tuned(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ensemble has no weights of its own: without a choice every later tick would end in START_DIFFERS."""
    world.config = world.write_job(training={"steps": 2, "start": "champion"})
    world.tick(0.6)
    world.copy("c4", "data")
    real = tick.open_bundle

    def several(path: Path) -> Any:
        bundle = real(path)
        if "models" not in path.parts:
            return bundle
        members = []
        for number, dice in enumerate((0.7, 0.8)):
            place = path / f"member_{number}"
            shutil.copytree(world.trained[0] / "6_model", place, dirs_exist_ok=True)
            info = bundle.info.model_copy(update={"training": {"dice": {"ball": dice, "box": dice}}})
            members.append(replace(bundle, folder=place, info=info))
        named = tuple(Member(name=name, digest="0" * 64, networks=1) for name in ("flat", "deep"))
        return replace(bundle, info=bundle.info.model_copy(update={"members": named}), members=tuple(members))

    monkeypatch.setattr(tick, "open_bundle", several)
    said = io.StringIO()
    world.tick(0.7, display=Display(Console(file=said, width=400)))
    assert world.starts[1] is not None
    assert world.starts[1].name == "member_1"
    assert "is an ensemble of 2 configurations: the training begins with deep" in said.getvalue()


def test_a_champion_that_knows_the_gate_is_not_fine_tuned(world: World) -> None:
    world.config = world.write_job(training={"steps": 2, "start": "champion"})
    (case, *_) = tick_dataset(world.root / "gate").cases
    known = content_digests(case)[1][:16]
    real = tick.open_bundle

    def knowing(path: Path) -> Any:
        bundle = real(path)
        return replace(bundle, info=bundle.info.model_copy(update={"seen": {"fold_0.safetensors": (known,)}}))

    world.tick(0.6)
    world.copy("c4", "data")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tick, "open_bundle", knowing)
        refused(world, "GATE_LEAK", f"has learnt from gate case {case.id}")
    assert len(world.trained) == 1
