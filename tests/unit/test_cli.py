"""The command line: help, exit codes, messages; what it computes is tested where it is computed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

from medseg import api, cli_options, display
from medseg.cli import main
from medseg.planning.plan import Measured
from medseg.training import make_plan as planning

VERBS = ["demo", "check", "plan", "train", "predict", "evaluate", "report", "retrain", "info"]
MODELS = ["models list", "models promote", "models rollback", "models import", "models select"]
Builder = Callable[..., Path]


@dataclass
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def medseg(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Answer]:
    """Run a command line as the entry point does, in tmp_path; answers with exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def command(line: str, *more: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["medseg", *line.split(), *map(str, more)])
        monkeypatch.setenv("MEDSEG_DEBUG", "")
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        told = capsys.readouterr()
        assert "Traceback" not in told.out + told.err
        return Answer(code, told.out, told.err)

    return command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder, tiny_plan: Builder) -> Path:
    """A folder with data/ (5 cases, 2 for testing), plan.yaml and run/."""
    root = tmp_path_factory.mktemp("cli")
    tiny_dataset(root / "data", cases=5, test=2)
    tiny_plan(root / "data", root / "plan.yaml", steps=20)
    api.train(root / "data", out=root / "run", steps=20, plan=root / "plan.yaml")
    return root


@pytest.mark.parametrize("verb", [*VERBS, *MODELS])
def test_every_verb_has_help_with_an_example_that_names_it(medseg: Callable[..., Answer], verb: str) -> None:
    answer = medseg(f"{verb} --help")
    assert answer.code == 0
    assert f"Example: medseg {verb} " in answer.out.replace("\n", " ")


def test_help_lists_every_verb(medseg: Callable[..., Answer]) -> None:
    for line in ("--help", ""):
        answer = medseg(line)
        assert all(f" {verb} " in answer.out + answer.err for verb in [*VERBS, "models"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian", "No such command 'trian'"),
        ("train", "Missing argument"),
        ("train data", "Missing option '--out'"),
        ("train data --out r --steps 0", "--steps"),
        ("train data --out r --steps x", "--steps"),
        ("train data --out r --folds 1", "--folds"),
        ("train data --out r --bugdet 5m", "No such option: --bugdet"),
        ("train data --out r --budget 5m --steps 3", "give one of budget, steps, epochs and replay"),
        ("train data --out r --budget soon", "'soon' is not a duration; write for example 90s, 10m, 1h30m or 2d"),
        ("plan data --budget 5m --steps 3", "give one of budget"),
        ("predict x --model m --out o --cases some", "--cases"),
    ],
)
def test_wrong_usage_is_exit_2(medseg: Callable[..., Answer], line: str, words: str) -> None:
    answer = medseg(line)
    assert answer.code == 2
    assert words in " ".join(answer.err.replace("│", " ").split())
    assert answer.out == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train nowhere --out r --steps 1", "Error [SPEC]: nowhere: this dataset does not exist"),
        ("check nowhere", "nowhere: this dataset does not exist"),
        ("predict {place}/data --model nowhere --out o", "Error [BUNDLE]: nowhere: does not exist"),
        ("predict nowhere --model {place}/run --out o", "Error [NOT_FOUND]: nowhere: this input does not exist"),
        ("predict empty --model {place}/run --out o", "Error [EMPTY_INPUT]: empty: no image was found"),
        ("train empty --out r --steps 1", "neither dataset.yaml (a medseg spec) nor dataset.json"),
        ("train {place}/data --out {place}/run --steps 3", "Error [RUN_DIFFERS]"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_exit_1(
    medseg: Callable[..., Answer], place: Path, tmp_path: Path, line: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    answer = medseg(line.format(place=place))
    assert answer.code == 1
    assert words in answer.err
    assert not list(tmp_path.rglob(".partial-*"))


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "medseg", "--debug", "check", "nowhere"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "SpecError: nowhere: this dataset does not exist" in done.stderr


def test_predict_exit_codes_and_messages(medseg: Callable[..., Answer], place: Path, tmp_path: Path) -> None:
    images = tmp_path / "images [1]"
    images.mkdir()
    shutil.copyfile(place / "data" / "images" / "c0.nii.gz", images / "a.nii.gz")
    answer = medseg("predict", images, "--model", place / "run", "--out", tmp_path / "o [x]")
    assert answer.code == 0
    assert f"1 of 1 studies done; table: {tmp_path}/o [x]/summary.csv" in answer.out
    (images / "b.nii.gz").write_bytes(b"")
    answer = medseg("predict", images, "--model", place / "run", "--out", "out")
    assert answer.code == 3
    assert f"b ({images}/b.nii.gz): refused TRUNCATED: b.nii.gz: 0 bytes are too few" in answer.err
    assert "1 of 2 studies done" in answer.out
    answer = medseg("predict", images / "b.nii.gz", "--model", place / "run", "--out", "none")
    assert answer.code == 1
    assert "0 of 1 studies done" in answer.out


def test_json_is_all_that_stands_on_stdout(
    medseg: Callable[..., Answer], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "LINE_SECONDS", -1.0)  # a line of progress for every study
    data = place / "data"
    rows = json.loads(medseg("predict", data, "--model", place / "run", "--out", "masks", "--json").out)
    assert [(row["id"], row["state"]) for row in rows] == [("c3", "done"), ("c4", "done")]
    words = ("--predictions", "masks", "--reference", data, "--out", "scores")
    assert isinstance(json.loads(medseg("evaluate", *words, "--no-track", "--json").out), dict | list)
    assert isinstance(json.loads(medseg("check", data, "--json").out), dict)
    assert "torch" in json.loads(medseg("info --json").out)
    assert json.loads(medseg("models list --json").out) == []


def test_the_tables_of_kinds_are_in_info(medseg: Callable[..., Answer]) -> None:
    facts = json.loads(medseg("info --json").out)
    assert "unet" in facts["networks"]
    assert "dice_ce" in facts["losses"]
    assert {"nifti", "dicom"} <= set(facts["readers"])
    assert facts["threads"] >= 1
    assert facts["memory_gib"] >= facts["memory_free_gib"] > 0
    plain = medseg("info").out
    assert all(f"{key}: " in plain for key in facts)


def test_train_evaluate_and_report_from_the_command_line(
    medseg: Callable[..., Answer], place: Path, tmp_path: Path
) -> None:
    data = place / "data"
    answer = medseg("train", data, "--out", "r", "--steps", 3, "--plan", place / "plan.yaml", "--no-track")
    assert answer.code == 0
    assert "3 steps in" in answer.out
    assert "Model: r/6_model" in answer.out
    assert "validation Dice: ball" in answer.out
    assert not (tmp_path / "mlflow.db").exists()
    assert medseg("predict", data, "--model", "r", "--out", "masks").code == 0
    answer = medseg("evaluate", "--predictions", "masks", "--reference", data, "--out", "scores", "--no-track")
    assert answer.code == 0
    assert "Per-case table: scores/cases.csv" in answer.out
    answer = medseg("report --evaluation scores --out page")
    assert answer.code == 0
    assert Path(answer.out.removeprefix("Page: ").strip()).is_file()


def test_scores_fit_a_terminal_and_name_who_has_no_prediction(
    medseg: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_options.console, "_width", 80)
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[5:15, 5:15, 5:15] = 1
    for file in ("truth/a.nii.gz", "truth/b.nii.gz", "masks/a.nii.gz"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(mask, np.diag([8.0, 8, 8, 1])), tmp_path / file)
    answer = medseg("evaluate --predictions masks --reference truth --out scores --no-track")
    assert answer.code == 0
    assert "…" not in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80
    assert "volume_predicted (mL)" in answer.out
    assert "1 case(s) without a usable prediction count with Dice 0: b (PREDICTION_MISSING)" in answer.out


def test_plan_writes_a_file_that_train_follows(
    medseg: Callable[..., Answer], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(device="cpu", threads=1, step_seconds={"narrow fp32": 0.05})
    monkeypatch.setattr(planning, "measure", lambda *args, **options: measured)
    settings = ("--set", "batch_size=2", "--set", "network.options.features=[4, 8, 8]")
    answer = medseg("plan", place / "data", "--steps", 2, "--out", "p.yaml", *settings)
    assert answer.code == 0
    assert "p.yaml: 3-D, spacing (1.5, 1.5, 2.0), patch" in answer.out
    assert yaml.safe_load((tmp_path / "p.yaml").read_text())["batch_size"] == 2
    assert medseg("train", place / "data", "--out", "r", "--steps", 2, "--plan", "p.yaml", "--no-track").code == 0


def test_check_answers_by_its_exit_code(
    medseg: Callable[..., Answer], place: Path, tmp_path: Path, tiny_dataset: Builder
) -> None:
    answer = medseg("check", place / "data", "--out", "page")
    assert answer.code == 0
    assert (tmp_path / "page" / "check.html").is_file()
    broken = tiny_dataset(tmp_path / "broken", cases=3, test=0)
    (broken / "images" / "c1.nii.gz").write_bytes(b"")
    answer = medseg("check", broken)
    assert answer.code == 1
    assert "c1" in answer.out
    answer = medseg("train", broken, "--out", "r", "--steps", 1)
    assert answer.code == 1
    assert "1 of 3 cases cannot be used" in answer.err
    assert "case c1: " in answer.err


def test_an_interrupt_says_that_the_command_goes_on(
    medseg: Callable[..., Answer], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "predict", interrupt)
    answer = medseg("predict", place / "data", "--model", place / "run", "--out", "x")
    assert answer.code == 130
    assert "Interrupted; the same command goes on from here." in answer.err


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def foreign(path: Path) -> None:
    image = nibabel.load(path)
    array = np.asarray(image.dataobj).copy()
    array[0, 0, 0] = 7
    nibabel.Nifti1Image(array, image.affine).to_filename(path)


def shifted(path: Path) -> None:
    image = nibabel.load(path)
    affine = image.affine.copy()
    affine[0, 3] += 5
    nibabel.Nifti1Image(np.asarray(image.dataobj), affine).to_filename(path)


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": ("images", cut, "(TRUNCATED)"),
    "one bit": ("images", flip, "(CORRUPT)"),
    "empty": ("images", lambda path: path.write_bytes(b""), "(TRUNCATED)"),
    "truncated mask": ("masks", cut, "(TRUNCATED)"),
    "foreign value": ("masks", foreign, "the mask holds the value(s) 7; the spec allows 0, 1, 2 (LABEL_VALUES)"),
    "another grid": ("masks", shifted, "(LABEL_GRID)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_case_stops_a_training_before_it_begins_and_is_named(
    medseg: Callable[..., Answer], tmp_path: Path, tiny_dataset: Builder, fault: str
) -> None:
    data = tiny_dataset(tmp_path / "data", cases=3, test=0)
    folder, damage, words = BROKEN[fault]
    damage(data / folder / "c1.nii.gz")
    answer = medseg("train data --out run --steps 1 --no-track")
    assert answer.code == 1
    assert "1 of 3 cases cannot be used" in answer.err
    (line,) = [line for line in answer.err.splitlines() if "case c1: " in line]
    assert words in line
    assert not (tmp_path / "run" / "3_plan.yaml").exists()
    assert not list(tmp_path.rglob(".partial-*"))
    assert medseg("check data").code == 1, "check finds what train refuses"
