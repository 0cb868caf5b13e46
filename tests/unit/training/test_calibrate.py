"""Step times: measured for every candidate that the time allows, never for none."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medseg.planning.fingerprint import take_fingerprint
from medseg.planning.planner import Draft, draft
from medseg.spec import Spec, load_dataset
from medseg.training import calibrate
from medseg.training.calibrate import measure

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Any) -> Spec:
    return load_dataset(tiny_dataset(tmp_path_factory.mktemp("measure"), cases=2, test=0)).spec


@pytest.fixture(scope="module")
def sketch(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Any) -> Draft:
    folder: Path = tiny_dataset(tmp_path_factory.mktemp("measure"), cases=2, test=0)
    found = load_dataset(folder)
    made = draft(found.spec, take_fingerprint(found.spec, found.cases), device="cpu")
    widths = {"narrow": (2, 4, 4), "wide": (4, 8, 8)}
    return replace(made, patch_size=(8, 8, 8), batch_size=2, widths=widths)


def test_every_width_and_precision_is_measured(spec: Spec, sketch: Draft) -> None:
    measured = measure(spec, sketch, CPU, longest=60, training_seconds=1e9)
    assert set(measured.step_seconds) == {f"{w} {p}" for w in ("narrow", "wide") for p in ("fp32", "bf16")}
    assert all(seconds > 0 for seconds in measured.step_seconds.values())
    assert measured.device == "cpu"
    assert measured.threads == torch.get_num_threads()


def test_without_time_the_cheapest_is_measured_alone(spec: Spec, sketch: Draft) -> None:
    assert list(measure(spec, sketch, CPU, longest=0, training_seconds=1e9).step_seconds) == ["narrow fp32"]


def test_widths_that_cannot_be_chosen_cost_nothing(spec: Spec, sketch: Draft) -> None:
    assert {row.split()[0] for row in measure(spec, sketch, CPU, longest=60).step_seconds} == {"narrow"}
    few = measure(spec, sketch, CPU, longest=60, training_seconds=1e-3)
    assert {row.split()[0] for row in few.step_seconds} == {"narrow"}


def test_times_are_recalled_and_need_no_time(spec: Spec, sketch: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(spec, sketch, CPU, longest=60, training_seconds=1e9)
    monkeypatch.setattr(calibrate, "_step_seconds", lambda *args: pytest.fail("measured again"))
    assert measure(spec, sketch, CPU, longest=0, training_seconds=1e9) == first


@pytest.mark.parametrize("change", ["patch", "batch", "threads"])
def test_another_step_is_measured_anew(spec: Spec, sketch: Draft, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(spec, sketch, CPU, longest=60)
    asked: list[str] = []
    monkeypatch.setattr(calibrate, "_step_seconds", lambda *args: asked.append(args[3]) or 1.0)
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    changed = {"patch": {"patch_size": (8, 8, 16)}, "batch": {"batch_size": 3}}.get(change, {})
    measure(spec, replace(sketch, **changed), CPU, longest=60)
    assert asked == ["fp32", "bf16"]


def test_the_time_of_other_programs_does_not_count(spec: Spec, sketch: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrate.undisturbed(1.0, 0.97, CPU) == 1.0, "what a quiet machine shows is the wall time"
    assert calibrate.undisturbed(8.0, 0.9, CPU) == pytest.approx(1.0)
    assert calibrate.undisturbed(8.0, 0.9, torch.device("cuda")) == 8.0, "a processor waits for its GPU"
    # Each reading of the wall clock finds 5 more seconds gone, each of the thread's own clock 0.09.
    walls, own = itertools.count(0, 5.0), itertools.count(0, 0.09)
    clock = SimpleNamespace(monotonic=lambda: next(walls), thread_time=lambda: next(own), time=time.time)
    monkeypatch.setattr(calibrate, "time", clock)
    assert calibrate._step_seconds(spec, sketch, sketch.network("narrow"), "fp32", CPU) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 9")]
)
def test_candidates_that_the_memory_does_not_hold_are_left_out(
    spec: Spec, sketch: Draft, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(spec: Spec, sketch: Draft, plan: Any, precision: str, device: torch.device) -> float:
        if precision == "fp32":
            raise error
        return 0.5

    monkeypatch.setattr(calibrate, "recall", lambda *args: None)
    monkeypatch.setattr(calibrate, "_step_seconds", fails)
    assert measure(spec, sketch, CPU, longest=60).step_seconds == {"narrow bf16": 0.5}


def test_other_errors_are_not_hidden(spec: Spec, sketch: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> float:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(calibrate, "recall", lambda *args: None)
    monkeypatch.setattr(calibrate, "_step_seconds", fails)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure(spec, sketch, CPU, longest=60)
