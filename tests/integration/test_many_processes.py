"""Two processes that train together learn what one learns; a process that is asked to stop goes on later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 6
STATE = "5_folds/0/checkpoint/state.safetensors"
MODEL = "6_model/fold_0.safetensors"
Builder = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder, tiny_plan: Builder) -> Path:
    """A folder with data/, plan.yaml and alone/, a run of one process."""
    root = tmp_path_factory.mktemp("many")
    tiny_dataset(root / "data", cases=5, test=0)
    tiny_plan(root / "data", root / "plan.yaml", steps=STEPS, settings=("batch_size=3", "precision=fp32"))
    run(root, "alone")
    return root


def words(out: str, *more: str) -> list[str]:
    return f"train data --out {out} --steps {STEPS} --plan plan.yaml --no-track".split() + list(more)


def run(root: Path, out: str, *, processes: int = 1, **options: str) -> subprocess.CompletedProcess[str]:
    start = ["-m", "medseg"]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *start]
    done = subprocess.run(
        [sys.executable, *start, *words(out)], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def distance(first: Path, second: Path) -> float:
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def test_two_processes_learn_what_one_learns(place: Path) -> None:
    """The batch of three is two patches for one process and one for the other; the arithmetic differs in its last bits.

    AdamW's first steps are the sign of the gradient times the rate, so that a gradient of rounding errors alone moves
    a weight by up to the rate, 0.005, per step: far more than is seen here, and far less than another batch moves it.
    """
    told = run(place, "together", processes=2)
    assert told.stdout.count(f"{STEPS} steps in") == 1, "one process speaks"
    assert distance(place / "alone" / MODEL, place / "together" / MODEL) < 2e-3
    draws = "5_folds/0/curves/draws.csv"
    assert (place / "alone" / draws).read_bytes() == (place / "together" / draws).read_bytes()
    names = lambda root: sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())  # noqa: E731
    assert names(place / "alone") == names(place / "together")


def test_first_step_is_that_of_the_whole_batch(place: Path, tmp_path: Path) -> None:
    """After one step the moments of AdamW are the gradient: equal to rounding in both runs."""
    moments = []
    for processes in (1, 2):
        start = ["-m", "medseg"]
        if processes > 1:
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *start]
        line = f"train data --out {tmp_path / str(processes)} --steps 1 --plan plan.yaml --no-track".split()
        subprocess.run([sys.executable, *start, *line], cwd=place, check=True, capture_output=True, timeout=300)
        found = load_file(tmp_path / str(processes) / STATE)
        moments.append({key: value for key, value in found.items() if key.endswith("/exp_avg")})
    one, two = moments
    scale = max(float(value.abs().max()) for value in one.values())
    assert scale > 0
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-4 * scale
    assert all(torch.isfinite(value).all() for value in two.values())


def test_together_and_then_alone_is_one_run(place: Path) -> None:
    """The checkpoint does not know how many processes wrote it."""
    assert "nothing to do" in run(place, "alone", processes=2).stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.soak)])
def test_a_stop_signal_ends_at_a_checkpoint(place: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "medseg", *words(str(out))],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    state = out / STATE
    while process.poll() is None and not state.exists():
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "the same command goes on" in said.replace("\n", " ")
    assert "Traceback" not in said
    done = subprocess.run(
        [sys.executable, "-m", "medseg", *words(str(out))], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (out / MODEL).read_bytes() == (place / "alone" / MODEL).read_bytes()


def test_two_processes_begin_with_the_same_weights_of_a_model(place: Path, tmp_path: Path) -> None:
    """Other labels than the model's: the rows of the new ones are random, and must be so alike in both processes."""
    spec = (place / "data" / "dataset.yaml").read_text()
    (place / "data" / "other.yaml").write_text(spec.replace("box:", "cube:"))
    moments = []
    for processes in (1, 2):
        start = ["-m", "medseg"]
        if processes > 1:
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *start]
        line = f"train data/other.yaml --out {tmp_path / str(processes)} --steps 1 --from alone --no-track".split()
        line += ["--set", "batch_size=3", "--set", "precision=fp32"]
        subprocess.run([sys.executable, *start, *line], cwd=place, check=True, capture_output=True, timeout=300)
        found = load_file(tmp_path / str(processes) / STATE)
        moments.append({key: value for key, value in found.items() if key.endswith("/exp_avg")})
    one, two = moments
    scale = max(float(value.abs().max()) for value in one.values())
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-4 * scale
