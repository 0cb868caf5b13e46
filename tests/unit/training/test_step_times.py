"""Kept step times: recalled by those they fit, absent when damaged, silent where nothing can be written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from medseg.training import step_times
from medseg.training.step_times import cache_folder, keep, machine, recall

CPU = torch.device("cpu")
STEP = {"network": {"name": "unet"}, "patch": [8, 8, 8], "precision": "fp32"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "step_times"


def the_file(place: Path) -> Path:
    (file,) = place.iterdir()
    return file


def test_what_is_kept_is_recalled_for_the_same_step_only(place: Path) -> None:
    assert recall(CPU, STEP) is None
    keep(CPU, STEP, 0.25)
    assert recall(CPU, STEP) == 0.25
    assert recall(CPU, {**STEP, "precision": "bf16"}) is None
    keep(CPU, STEP, 0.5)
    assert recall(CPU, STEP) == 0.5
    assert len(list(place.iterdir())) == 1


@pytest.mark.parametrize("key", list(machine(CPU)))
def test_another_machine_recalls_nothing(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(CPU, STEP, 0.25)
    other = {**machine(CPU), key: "another"}
    monkeypatch.setattr(step_times, "machine", lambda device: other)
    assert recall(CPU, STEP) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"seconds": 1}', b'{"measured": 1}'],
)
def test_a_damaged_file_counts_as_none(place: Path, content: bytes) -> None:
    keep(CPU, STEP, 0.25)
    the_file(place).write_bytes(content)
    assert recall(CPU, STEP) is None
    keep(CPU, STEP, 0.5)
    assert recall(CPU, STEP) == 0.5


@pytest.mark.parametrize("seconds", [0, -1, "NaN", "Infinity", '"soon"', "null", "[1]"])
def test_a_time_that_is_none_counts_as_none(place: Path, seconds: object) -> None:
    keep(CPU, STEP, 0.25)
    file = the_file(place)
    file.write_text(f'{{"seconds": {seconds}, "measured": {json.loads(file.read_text())["measured"]}}}')
    assert recall(CPU, STEP) is None


def test_old_times_and_those_of_the_future_count_as_none(place: Path) -> None:
    keep(CPU, STEP, 0.25)
    told = json.loads(the_file(place).read_text())
    for shift in (-2, 2):
        changed = {**told, "measured": told["measured"] + shift * step_times.KEPT_SECONDS}
        the_file(place).write_text(json.dumps(changed))
        assert recall(CPU, STEP) is None


def test_a_folder_that_cannot_be_written_or_read_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "file"))
    keep(CPU, STEP, 0.25)
    assert recall(CPU, STEP) is None


def test_nothing_is_kept_but_two_numbers(place: Path) -> None:
    keep(CPU, STEP, 0.25)
    file = the_file(place)
    assert set(json.loads(file.read_text())) == {"seconds", "measured"}
    assert len(file.stem) == 32
    assert int(file.stem, 16) >= 0
    assert os.uname().nodename not in json.dumps(machine(CPU)) or len(os.uname().nodename) < 4


def test_the_place_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MEDSEG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "medseg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    places = {"linux": (".cache",), "darwin": ("Library", "Caches"), "win32": ("AppData", "Local")}
    for platform, parts in places.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_folder() == tmp_path.joinpath(*parts, "medseg")
