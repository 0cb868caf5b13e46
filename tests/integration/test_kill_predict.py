"""SIGKILL during a batch, then the same command: the same tree of files, and nothing done twice."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medseg import api

Builder = Callable[..., Path]
STUDIES = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder, tiny_plan: Builder) -> Path:
    """A folder with run/, a tree of images (one of them broken) and undisturbed/."""
    root = tmp_path_factory.mktemp("kill")
    data = tiny_dataset(root / "data", cases=STUDIES, test=0)
    api.train(data, out=root / "run", steps=2, plan=tiny_plan(data, root / "plan.yaml", steps=2))
    shutil.copytree(data / "images", root / "tree")
    (root / "tree" / "c5.nii.gz").write_bytes(b"\x1f\x8b broken")
    api.predict(root / "tree", model=root / "run", out=root / "undisturbed")
    return root


def command(place: Path, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "medseg",
        "predict",
        str(place / "tree"),
        "--model",
        str(place / "run"),
        "--out",
        str(out),
    ]


def tree(out: Path) -> dict[str, bytes]:
    """All that is not said to differ from run to run."""
    files = [p for p in out.rglob("*") if p.is_file() and p.parent.name != "journal"]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}


def attempts(out: Path) -> dict[str, int]:
    return {p.stem: json.loads(p.read_text())["attempts"] for p in (out / "journal").glob("*.json")}


def kill_when(words: list[str], reached: Callable[[], bool]) -> None:
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not reached():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def finished_ends_alike(place: Path, out: Path) -> None:
    done = subprocess.run(command(place, out), capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert f"{STUDIES - 1} of {STUDIES} studies done" in done.stdout
    assert "c5 (" in done.stderr
    assert tree(out) == tree(place / "undisturbed")


def test_killed_in_the_middle(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_when(command(place, out), lambda: len(list(out.glob("c*.nii.gz"))) >= 4)
    before = {p.stem for p in (out / "ledger").glob("c*.json")}
    assert before
    finished_ends_alike(place, out)
    assert {name: attempts(out)[name] for name in before} == dict.fromkeys(before, 1), "what was done was left alone"


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(place: Path, tmp_path: Path, seed: int) -> None:
    chance, out = random.Random(seed), tmp_path / "out"
    for _ in range(7):
        end = time.monotonic() + chance.uniform(1, 8)
        kill_when(command(place, out), lambda end=end: time.monotonic() > end)
    finished_ends_alike(place, out)
