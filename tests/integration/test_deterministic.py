"""The same command twice, in processes of their own: the same bytes; also after a stop, and repeated by record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medseg.files import file_digest

Builder = Callable[..., Path]
MODEL = "6_model/fold_0.safetensors"
STATE = "5_folds/0/checkpoint/state.safetensors"
TINY = "--set batch_size=2 --set validations=6 --set test_mirroring=false --set network.options.features=[4,8,8]"
BASE = f"train data --no-track {TINY} --deterministic"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder) -> Path:
    """A folder with data/ and first/, a finished run."""
    root = tmp_path_factory.mktemp("deterministic")
    tiny_dataset(root / "data", cases=4, test=0)
    run(root, f"{BASE} --steps 6 --out first")
    return root


def run(root: Path, words: str, *, expected: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "medseg", *words.split()], cwd=root, capture_output=True, text=True, timeout=300,
        check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


def test_two_processes_write_the_same_bytes(place: Path) -> None:
    run(place, f"{BASE} --steps 6 --out second")
    for name in ("3_plan.yaml", MODEL, "5_folds/0/curves/draws.csv", "7_report/cases.csv"):
        assert file_digest(place / "first" / name) == file_digest(place / "second" / name), name
    first, second = (json.loads((place / name / "manifest.json").read_text()) for name in ("first", "second"))
    assert first["model"] == second["model"]


def test_stopped_and_resumed_writes_the_same_bytes(place: Path) -> None:
    words = [sys.executable, "-m", "medseg", *f"{BASE} --steps 6 --out stopped".split()]
    process = subprocess.Popen(words, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    while process.poll() is None and not (place / "stopped" / STATE).exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(place, f"{BASE} --steps 6 --out stopped")
    assert file_digest(place / "stopped" / MODEL) == file_digest(place / "first" / MODEL)


def test_a_repetition_is_identical_and_another_seed_is_found(place: Path) -> None:
    told = run(place, "train data --no-track --replay first --out repeated")
    assert "all weights are identical" in told.replace("\n", " ")
    assert file_digest(place / "first" / MODEL) == file_digest(place / "repeated" / MODEL)
    run(place, f"{BASE} --steps 6 --seed 1 --out other")
    told = run(place, "train data --no-track --replay other --out found")
    assert "all weights are identical" in told.replace("\n", " ")
    assert file_digest(place / "first" / MODEL) != file_digest(place / "found" / MODEL)
