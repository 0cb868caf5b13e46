"""Step times: measured for every candidate that the time allows, never for none."""

from __future__ import annotations

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


def test_without_time_the_cheapest_width_is_measured_alone(spec: Spec, sketch: Draft) -> None:
    rows = measure(spec, sketch, CPU, longest=0, training_seconds=1e9).step_seconds
    assert list(rows) == ["narrow fp32", "narrow bf16"], "how busy the machine is must not choose the precision"


def test_widths_that_cannot_be_chosen_cost_nothing(spec: Spec, sketch: Draft) -> None:
    assert {row.split()[0] for row in measure(spec, sketch, CPU, longest=60).step_seconds} == {"narrow"}
    few = measure(spec, sketch, CPU, longest=60, training_seconds=1e-3)
    assert {row.split()[0] for row in few.step_seconds} == {"narrow"}


def test_times_are_recalled_and_need_no_time(spec: Spec, sketch: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(spec, sketch, CPU, longest=60, training_seconds=1e9)
    monkeypatch.setattr(calibrate, "_step_seconds", lambda *args, **_: pytest.fail("measured again"))
    assert measure(spec, sketch, CPU, longest=0, training_seconds=1e9) == first


@pytest.mark.parametrize("change", ["patch", "batch", "threads"])
def test_another_step_is_measured_anew(spec: Spec, sketch: Draft, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(spec, sketch, CPU, longest=60)
    asked: list[str] = []
    monkeypatch.setattr(calibrate, "_step_seconds", lambda *args, **_: asked.append(args[3]) or 1.0)
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    changed = {"patch": {"patch_size": (8, 8, 16)}, "batch": {"batch_size": 3}}.get(change, {})
    measure(spec, replace(sketch, **changed), CPU, longest=60)
    assert asked == ["fp32", "bf16"]


class Shared:
    """Clocks of a machine on which a step takes `wall` seconds and its leading thread works `own` seconds of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, wall: float, own: float, alone: float) -> None:
        self.wall, self.own, self.alone, self.threads = wall, own, alone, 4
        self.now = self.worked = 0.0
        clock = SimpleNamespace(monotonic=lambda: self.now, thread_time=lambda: self.worked, time=time.time)
        monkeypatch.setattr(calibrate, "time", clock)
        monkeypatch.setattr(calibrate, "_stepper", lambda *args: self.step)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda number: setattr(self, "threads", number))

    def step(self) -> None:
        self.now += self.wall if self.threads > 1 else 10 * self.alone
        self.worked += self.own if self.threads > 1 else self.alone


@pytest.mark.parametrize(
    ("wall", "own", "expected"),
    [
        (0.2, 0.19, 0.2),  # quiet: the wall's time
        (5.0, 3.0, 0.2),  # busy, and threads that wait for each other burn time: 0.64 / 4 / 0.8
        (0.21, 0.1, 0.1 / 0.9),  # a little busy: never more than what was seen
        (0.15, 0.13, 0.13 / 0.9),
    ],
)
def test_the_time_of_other_programs_does_not_count(
    spec: Spec, sketch: Draft, monkeypatch: pytest.MonkeyPatch, wall: float, own: float, expected: float
) -> None:
    shared = Shared(monkeypatch, wall=wall, own=own, alone=0.64)
    assert calibrate._step_seconds(spec, sketch, sketch.network("narrow"), "fp32", CPU) == pytest.approx(expected)
    assert shared.threads == 4, "the number of threads is as before"


def test_a_processor_that_waits_for_its_gpu_is_not_busy(
    spec: Spec, sketch: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    Shared(monkeypatch, wall=5.0, own=0.1, alone=0.1)
    network = sketch.network("narrow")
    assert calibrate._step_seconds(spec, sketch, network, "fp32", torch.device("cuda")) == 5.0


def test_a_step_that_takes_long_is_not_repeated(spec: Spec, sketch: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared(monkeypatch, wall=5.0, own=5.0, alone=5.0)
    assert calibrate._step_seconds(spec, sketch, sketch.network("narrow"), "fp32", CPU, longest=1.0) == 5.0
    assert shared.now == 10.0, "one to warm up, one that is timed"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 9")]
)
def test_candidates_that_the_memory_does_not_hold_are_left_out(
    spec: Spec, sketch: Draft, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(spec: Spec, sketch: Draft, plan: Any, precision: str, device: torch.device, **_: Any) -> float:
        if precision == "fp32":
            raise error
        return 0.5

    monkeypatch.setattr(calibrate, "recall", lambda *args: None)
    monkeypatch.setattr(calibrate, "_step_seconds", fails)
    assert measure(spec, sketch, CPU, longest=60).step_seconds == {"narrow bf16": 0.5}


def test_other_errors_are_not_hidden(spec: Spec, sketch: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **_: Any) -> float:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(calibrate, "recall", lambda *args: None)
    monkeypatch.setattr(calibrate, "_step_seconds", fails)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure(spec, sketch, CPU, longest=60)
