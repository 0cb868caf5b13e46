"""The decision log: a chain that shows every change."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medseg.errors import ExportError, RetrainingError
from medseg.retraining.decisions import FIRST, LOG, append_decision, locked, read_decisions


def fill(store: Path, lines: int = 4) -> bytes:
    for number in range(lines):
        append_decision(store, {"event": "test", "model": "m", "value": number / 7})
    return (store / LOG).read_bytes()


def test_nothing_was_ever_decided(tmp_path: Path) -> None:
    assert read_decisions(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_each_line_holds_the_digest_of_the_one_before(tmp_path: Path) -> None:
    raw = fill(tmp_path)
    previous = FIRST
    for line in raw.splitlines():
        assert json.loads(line)["previous"] == previous
        previous = hashlib.sha256(line).hexdigest()
    assert [d.number for d in read_decisions(tmp_path)] == [1, 2, 3, 4]
    assert read_decisions(tmp_path)[-1].sha256 == previous


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_changed_byte_of_any_line_but_the_last_is_found(tmp_path: Path, share: float, flip: int) -> None:
    store = tmp_path / "store"
    if not store.exists():
        fill(store)
        (tmp_path / "kept").write_bytes((store / LOG).read_bytes())
    raw = bytearray((tmp_path / "kept").read_bytes())
    inside = raw.rfind(b"\n", 0, len(raw) - 1)  # the last line is sealed by the next one only
    raw[int(share * inside)] ^= flip
    (store / LOG).write_bytes(raw)
    with pytest.raises(RetrainingError) as caught:
        read_decisions(store)
    assert caught.value.code == "LOG_TAMPERED"


@pytest.mark.parametrize("order", [[1, 2, 3], [0, 2, 3], [1, 0, 2, 3], [0, 1, 1, 2, 3], [3, 2, 1, 0]])
def test_removed_moved_and_repeated_lines_are_found(tmp_path: Path, order: list[int]) -> None:
    lines = fill(tmp_path).splitlines(keepends=True)
    (tmp_path / LOG).write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(RetrainingError, match="does not follow"):
        append_decision(tmp_path, {"event": "test", "model": "m"})


def test_a_line_cut_off_by_a_crash_does_not_count_and_is_replaced(tmp_path: Path) -> None:
    raw = fill(tmp_path)
    (tmp_path / LOG).write_bytes(raw + b'{"event":"tick","half')
    assert len(read_decisions(tmp_path)) == 4
    append_decision(tmp_path, {"event": "test", "model": "m"})
    assert (tmp_path / LOG).read_bytes().startswith(raw)
    assert len(read_decisions(tmp_path)) == 5


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = fill(tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ExportError) as caught:
            append_decision(tmp_path, {"event": "test", "model": "m"})
    assert caught.value.code == "DISK_FULL"
    assert (tmp_path / LOG).read_bytes() == raw


def test_nan_is_no_number_for_a_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        append_decision(tmp_path, {"value": float("nan")})
    assert read_decisions(tmp_path) == []


def die_holding(file: Path) -> None:
    with locked(file, seconds=0, what="holding"):
        os._exit(9)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=die_holding, args=(tmp_path / "x.lock",))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    with locked(tmp_path / "x.lock", seconds=0, what="testing"):
        pass


def test_a_held_lock_is_told(tmp_path: Path) -> None:
    def lock() -> Any:
        return locked(tmp_path / "x.lock", seconds=0, what="doing a tick")

    with lock(), pytest.raises(RetrainingError, match="doing a tick") as caught, lock():
        pass
    assert caught.value.code == "LOCKED"
