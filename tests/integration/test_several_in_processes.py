"""Several datasets in two processes, and after a kill: what one undisturbed process learns."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from medseg import api
from medseg.errors import TrainingError

STEPS = 6
STATE = "5_folds/0/checkpoint/state.safetensors"
MODEL = "6_model/fold_0.safetensors"
ALONE = ["-m", "medseg"]
TOGETHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *ALONE]
Builder = Callable[..., Path]


def write(root: Path, tiny: SimpleNamespace, label: str, value: int, numbers: range) -> None:
    """Write a dataset that annotates only one of ball and box, under its own value."""
    for number in numbers:
        image, truth = tiny.case(number)
        tiny.save(root / "images" / f"c{number}.nii.gz", image)
        tiny.save(root / "masks" / f"c{number}.nii.gz", (truth == {"ball": 1, "box": 2}[label]) * np.uint8(value))
    spec = {
        "name": root.name,
        "images": "images/{case}.nii.gz",
        "masks": "masks/{case}.nii.gz",
        "channels": {"mr": {"modality": "MR"}},
        "labels": {label: value},
    }
    (root / "dataset.yaml").write_text(yaml.safe_dump(spec))


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny: SimpleNamespace, tiny_dataset: Builder, tiny_plan: Builder
) -> Path:
    """A folder with balls/ (6 cases), boxes/ (4, two of them with images of balls/), plan.yaml and alone/, a run."""
    root = tmp_path_factory.mktemp("several")
    write(root / "balls", tiny, "ball", 1, range(6))
    write(root / "boxes", tiny, "box", 1, range(4, 8))
    settings = ("batch_size=3", "precision=fp32", f"validations={STEPS}")
    tiny_plan(tiny_dataset(root / "like"), root / "plan.yaml", steps=STEPS, settings=settings)
    run(root, root / "alone")
    return root


def command(out: Path, *, steps: int = STEPS, start: list[str] = ALONE, datasets: str = "balls boxes") -> list[str]:
    words = f"train {datasets} --out {out} --steps {steps} --plan plan.yaml --no-track"
    return [sys.executable, *start, *words.split()]


def run(place: Path, out: Path, *, steps: int = STEPS, start: list[str] = ALONE) -> str:
    done = subprocess.run(
        command(out, steps=steps, start=start), cwd=place, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def moments(run: Path) -> dict[str, torch.Tensor]:
    """Return AdamW's first moments: after one step the gradient, up to a factor."""
    return {key: value for key, value in load_file(run / STATE).items() if key.endswith("/exp_avg")}


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def test_the_first_step_of_two_processes_is_that_of_one(place: Path, tmp_path: Path) -> None:
    """A process whose patches are of one dataset only must leave out the channels that the whole batch leaves out."""
    for name, start in (("one", ALONE), ("two", TOGETHER)):
        run(place, tmp_path / name, steps=1, start=start)
    one, two = moments(tmp_path / "one"), moments(tmp_path / "two")
    scale = max(float(value.abs().max()) for value in one.values())
    assert scale > 0
    assert apart(one, two) < 1e-4 * scale


def test_two_processes_learn_what_one_learns(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    told = run(place, out, start=TOGETHER)
    assert told.count(f"{STEPS} steps in") == 1, "one process speaks"
    # AdamW's first steps may differ by rounding of gradients that are nearly zero, by up to the rate of 0.005 a step.
    assert apart(load_file(place / "alone" / MODEL), load_file(out / MODEL)) < 2e-3
    for name in ("5_folds/0/curves/draws.csv", "1_dataset.json", "3_plan.yaml", "7_report/folds.csv"):
        assert (place / "alone" / name).read_bytes() == (out / name).read_bytes(), name


def killed(place: Path, out: Path, start: list[str]) -> None:
    """Kill a run (its first process, and torchrun with it) once it has written a checkpoint."""
    process = subprocess.Popen(
        command(out, start=start), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and not (out / STATE).exists():
            time.sleep(0.002)
        assert process.poll() is None, "it was still at work"
    finally:
        import psutil

        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in (process, *children):
            one.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(children, timeout=60)
    assert not (out / "done.json").exists()


@pytest.mark.soak  # of one dataset in make test: test_kill_training.py, test_many_processes.py
def test_a_killed_run_goes_on_and_ends_in_the_same_model(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed(place, out, ALONE)
    run(place, out)
    assert (out / MODEL).read_bytes() == (place / "alone" / MODEL).read_bytes()
    first, second = (json.loads((folder / "6_model" / "model.json").read_text()) for folder in (place / "alone", out))
    for info in (first, second):
        info["training"].pop("seconds")
    assert first == second
    assert "nothing to do" in run(place, out)


@pytest.mark.soak  # of one dataset in make test: test_kill_training.py, test_many_processes.py
def test_two_killed_processes_go_on_as_one(place: Path, tmp_path: Path) -> None:
    """The checkpoint does not know how many processes wrote it."""
    out = tmp_path / "run"
    killed(place, out, TOGETHER)
    run(place, out)
    assert apart(load_file(place / "alone" / MODEL), load_file(out / MODEL)) < 2e-3


@pytest.mark.parametrize("names", ["boxes balls", "balls"])
def test_other_datasets_or_another_order_are_another_run(place: Path, names: str) -> None:
    """Values and names depend on the order: a run that goes on with other ones would mix up labels."""
    datasets = [place / name for name in names.split()]
    with pytest.raises(TrainingError) as caught:
        api.train(datasets, out=place / "alone", steps=STEPS, plan=place / "plan.yaml")
    assert caught.value.code == "RUN_DIFFERS"
