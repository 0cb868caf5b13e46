"""SIGKILL at any moment, then the same command: the weights are those of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from medseg.files import PARTIAL_PREFIX

STEPS = 12
Builder = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder, tiny_plan: Builder) -> Path:
    """A folder with data/, plan.yaml and undisturbed/, a finished run."""
    root = tmp_path_factory.mktemp("kill")
    tiny_dataset(root / "data", cases=5, test=0)
    tiny_plan(root / "data", root / "plan.yaml", steps=STEPS, settings=(f"validations={STEPS}", "precision=bf16"))
    finish(root, root / "undisturbed")
    return root


def command(place: Path, run: Path) -> list[str]:
    words = f"train data --out {run} --steps {STEPS} --plan plan.yaml --no-track".split()
    return [sys.executable, "-m", "medseg", *words]


def finish(place: Path, run: Path) -> str:
    done = subprocess.run(command(place, run), cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_when(place: Path, run: Path, reached: Callable[[], bool]) -> bool:
    """Start the command and kill it with SIGKILL once `reached`; tells whether it was alive until then."""
    process = subprocess.Popen(
        command(place, run), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    try:
        while process.poll() is None and not reached():
            time.sleep(0.002)
        alive = process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return alive


def same_model(place: Path, run: Path) -> None:
    expected, found = (p / "6_model" / "fold_0.safetensors" for p in (place / "undisturbed", run))
    assert found.read_bytes() == expected.read_bytes()
    # the state differs in the seconds that it took, not in any number of the training
    state = "5_folds/0/checkpoint/state.safetensors"
    a, b = load_file(place / "undisturbed" / state), load_file(run / state)
    assert a.keys() == b.keys()
    assert all(a[key].equal(b[key]) for key in a)
    assert not list(run.rglob(f"{PARTIAL_PREFIX}*")), "nothing half written is left"


def checkpoints(run: Path) -> Callable[[], bool]:
    """Return a condition: a checkpoint has been written since now."""
    file = run / "5_folds" / "0" / "checkpoint" / "state.safetensors"

    def stamp() -> int:
        return file.stat().st_mtime_ns if file.exists() else 0

    before = stamp()
    return lambda: stamp() != before


def test_killed_at_one_stage_after_another(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    moments: list[Callable[[], bool]] = [
        (run / "1_dataset.json").exists,
        lambda: any(run.glob("4_cache/*/image.npy")),
        (run / "5_folds" / "0" / "checkpoint" / "state.safetensors").exists,
        (run / "6_model" / "model.json").exists,
    ]
    assert kill_when(place, run, moments[0])
    assert kill_when(place, run, moments[1])
    assert kill_when(place, run, moments[2])
    again = checkpoints(run)
    assert kill_when(place, run, again)
    assert kill_when(place, run, moments[3])
    output = finish(place, run)
    assert f"{STEPS} steps" in output
    same_model(place, run)
    assert "nothing to do" in finish(place, run)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(place: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    run = tmp_path / "run"
    for _ in range(5):
        end = time.monotonic() + chance.uniform(0.5, 12)
        kill_when(place, run, lambda end=end: time.monotonic() > end)
    finish(place, run)
    same_model(place, run)
