"""The loop: stopped anywhere and begun again, it does what it would have done undisturbed, to the bit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.errors import TrainingError
from medseg.planning.plan import override, read_plan
from medseg.preparation.cache import CaseCache, prepare_cases
from medseg.preparation.path import training_path, up_to_cache
from medseg.spec import load_dataset
from medseg.training import loop
from medseg.training.folds import make_folds
from medseg.training.loop import Job, Learner, fit
from medseg.training.schedule import ByClock, ByRecord, BySteps
from medseg.training.state import LoopState, load_state

STEPS = 7
Maker = Callable[..., Job]


@pytest.fixture(scope="module")
def make_job(tmp_path_factory, tiny_dataset, tiny_plan) -> Maker:
    """Return a maker of jobs on one prepared dataset, each with its own checkpoint."""
    root = tmp_path_factory.mktemp("loop")
    dataset = load_dataset(tiny_dataset(root / "data", cases=5, test=0))
    file = tiny_plan(root / "data", root / "plan.yaml", steps=STEPS)
    made: list[Job] = []

    def make(*settings: str) -> Job:
        plan = override(read_plan(file), settings)
        cache = CaseCache(root / "cache", dataset.spec, plan)
        path = training_path(dataset.spec, plan, cache)
        prepare_cases(up_to_cache(path), cache, dataset.cases)
        fold = make_folds(dataset.cases, folds=None, seed=0)[0]
        checkpoint = root / "checkpoints" / str(len(made)) / "state.safetensors"
        job = Job(
            spec=dataset.spec,
            plan=plan,
            path=path,
            cache=cache,
            train=fold.train,
            validation=fold.validation,
            checkpoint=checkpoint,
            digest="job",
            device=torch.device("cpu"),
        )
        made.append(job)
        return job

    return make


def by_steps(job: Job) -> Callable[[LoopState], BySteps]:
    plan = job.plan
    return lambda state: BySteps(plan.steps, validations=plan.validations, warmup=plan.warmup)


class KilledError(Exception):
    """Stands for the end of the process."""


def fit_with_stops(job: Job, stops: set[int]) -> LoopState:
    """Fit, with the process ending just after each step in `stops` (and whatever was not saved lost)."""
    left = set(stops)

    def watch(state: LoopState, schedule: object, seconds: float) -> None:
        if state.step in left and seconds:
            left.discard(state.step)
            raise KilledError

    while True:
        try:
            return fit(job, by_steps(job), watch=watch)
        except KilledError:
            continue


def same(first: LoopState, second: LoopState) -> None:
    """Every bit that decides about the model is equal."""
    for group in ("weights", "average", "best", "moments"):
        a, b = getattr(first, group), getattr(second, group)
        assert a.keys() == b.keys(), group
        for key in a:
            assert torch.equal(a[key], b[key]), f"{group} {key}"
    assert (first.step, first.factors, first.losses) == (second.step, second.factors, second.losses)
    assert [(row["step"], row["dice"]) for row in first.validations] == [
        (row["step"], row["dice"]) for row in second.validations
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stops", [{1}, {3}, {7}, {1, 2, 3, 4, 5, 6, 7}])
def test_interrupted_and_undisturbed_end_in_the_same_bits(make_job: Maker, precision: str, stops: set[int]) -> None:
    settings = (f"precision={precision}",)
    undisturbed, interrupted = make_job(*settings), make_job(*settings)
    whole = fit(undisturbed, by_steps(undisturbed))
    same(fit_with_stops(interrupted, stops), whole)
    assert undisturbed.checkpoint.exists()


def test_interrupted_with_a_checkpoint_after_every_step(make_job: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    undisturbed, interrupted = make_job(), make_job()
    same(fit_with_stops(interrupted, set(range(1, STEPS + 1))), fit(undisturbed, by_steps(undisturbed)))


def test_what_the_checkpoint_holds_is_the_final_state(make_job: Maker) -> None:
    job = make_job()
    state = fit(job, by_steps(job))
    same(load_state(job.checkpoint, job="job"), state)
    assert state.step == len(state.losses) == len(state.factors) == STEPS
    assert [row["step"] for row in state.validations] == [3, 5, 7]


def test_a_finished_checkpoint_trains_no_further(make_job: Maker) -> None:
    job = make_job()
    first = fit(job, by_steps(job))
    again = fit(job, by_steps(job))
    same(again, first)
    assert len(again.validations) == 3, "it is not validated twice"


def test_validations_never_change_what_is_learnt(make_job: Maker) -> None:
    rare, often = make_job("validations=1"), make_job("validations=7")
    a, b = fit(rare, by_steps(rare)), fit(often, by_steps(often))
    assert all(torch.equal(a.weights[key], b.weights[key]) for key in a.weights)
    assert a.losses == b.losses


class Ticks:
    """A clock that advances by a second whenever it is asked."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_run_by_the_clock_is_repeated_by_its_record_to_the_bit(make_job: Maker) -> None:
    timed, replayed = make_job(), make_job()
    state = fit(timed, lambda state: ByClock(23, spent=0, validations=4, warmup=0.1, clock=Ticks()))
    assert 3 < state.step < 23
    assert len(state.validations) > 1
    record = load_state(timed.checkpoint, job="job")
    steps = [row["step"] - 1 for row in record.validations]
    same(fit(replayed, lambda _: ByRecord(record.factors, steps)), state)


def test_a_timed_run_that_was_interrupted_is_repeated_too(make_job: Maker) -> None:
    timed, replayed = make_job(), make_job()
    schedules = iter([12.0, 0.0])

    def choose(state: LoopState) -> ByClock:
        return ByClock(23, spent=next(schedules), validations=4, warmup=0.1, clock=Ticks())

    def watch(state: LoopState, schedule: object, seconds: float) -> None:
        if len(state.validations) == 1 and seconds and state.step not in (0, state.validations[0]["step"]):
            schedule_stop.append(state.step)
            if len(schedule_stop) == 1:
                raise KilledError

    schedule_stop: list[int] = []
    with pytest.raises(KilledError):
        fit(timed, choose, watch=watch)
    state = fit(timed, choose, watch=watch)
    steps = [row["step"] - 1 for row in state.validations]
    same(fit(replayed, lambda _: ByRecord(state.factors, steps)), state)


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(
    make_job: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("precision=bf16")
    with pytest.raises(KilledError):
        fit(job, by_steps(job), watch=stop_after(4))
    kept = job.checkpoint.read_bytes()
    real = loop.deep_supervision
    monkeypatch.setattr(loop, "deep_supervision", lambda *args: real(*args) * math.nan)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3.*--set precision=fp32"):
        fit(job, by_steps(job))
    assert job.checkpoint.read_bytes() == kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_no_number_never_reaches_the_weights(
    make_job: Maker, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The loss is sound, its gradient is not: clipping would turn it into NaN in every weight."""
    job = make_job(f"precision={precision}")
    with pytest.raises(KilledError):
        fit(job, by_steps(job), watch=stop_after(4))
    kept = job.checkpoint.read_bytes()
    real = loop.deep_supervision

    def steep(*args: Any) -> torch.Tensor:
        loss = real(*args)
        return loss + (loss - loss.detach()).clamp(min=0).sqrt()  # the root's slope at 0 is infinite

    monkeypatch.setattr(loop, "deep_supervision", steep)
    with pytest.raises(TrainingError, match=r"the gradient of the loss \([\d.]+\) is (nan|inf) at step 3") as caught:
        fit(job, by_steps(job))
    assert caught.value.code == "LOSS_NOT_FINITE"
    assert ("precision=fp32" in str(caught.value)) == (precision == "bf16")
    assert job.checkpoint.read_bytes() == kept
    monkeypatch.undo()
    undisturbed = make_job(f"precision={precision}")
    same(fit(job, by_steps(job)), fit(undisturbed, by_steps(undisturbed)))


def test_a_loss_that_explodes_keeps_the_checkpoint_from_before(
    make_job: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, it comes to the same end: the checkpoint is sound, what follows it is not."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    job = make_job("steps=80", "validations=1", "augmentation.spatial_probability=0")
    real = loop.deep_supervision
    done: list[int] = []

    def explodes(*args: Any) -> torch.Tensor:
        done.append(len(done))
        return real(*args) * (1 if len(done) <= 45 else 100)

    monkeypatch.setattr(loop, "deep_supervision", explodes)
    with pytest.raises(TrainingError, match=r"the training diverged\. The last checkpoint from before") as caught:
        fit(job, by_steps(job))
    assert caught.value.code == "DIVERGED"
    assert load_state(job.checkpoint, job="job").step == 45
    assert len(done) < 60


# Memory


class Memory:
    """Holds batches of up to `patches` patches; more are refused as the allocator `error` would."""

    def __init__(self, patches: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patches, self.error, self.refused = patches, error, 0
        self.real = Learner.__init__
        monkeypatch.setattr(Learner, "__init__", lambda learner, job: self.watched(learner, job))

    def watched(self, learner: Learner, job: Job) -> None:
        self.real(learner, job)
        levels = learner.levels

        def limited(images: torch.Tensor) -> list[torch.Tensor]:
            if len(images) > self.patches and torch.is_grad_enabled():
                self.refused += 1
                raise self.error
            return levels(images)

        learner.levels = limited


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["gpu", "cpu", "python"])
def test_too_little_memory_cuts_the_batch_and_learns_the_same(
    make_job: Maker, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plain, short = make_job("steps=2", "batch_size=4"), make_job("steps=2", "batch_size=4")
    expected = fit(plain, by_steps(plain))
    memory = Memory(1, error, monkeypatch)
    state = fit(short, by_steps(short))
    assert (state.pieces, memory.refused) == (4, 2), "in two, then in four, and no more is asked for"
    assert state.losses == pytest.approx(expected.losses, rel=1e-4)
    assert load_state(short.checkpoint, job="job").pieces == 4
    for key, value in expected.average.items():
        assert torch.allclose(state.average[key], value, atol=2e-3), key


def test_a_resumed_training_keeps_its_pieces_and_its_bits(make_job: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, interrupted = make_job(), make_job()
    memory = Memory(1, MemoryError(), monkeypatch)
    whole = fit(undisturbed, by_steps(undisturbed))
    assert memory.refused == 1
    same(fit_with_stops(interrupted, {4}), whole)
    assert memory.refused == 2, "the resumed process knows it"


def test_no_memory_for_a_single_patch_says_what_to_lower(make_job: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    with pytest.raises(KilledError):
        fit(job, by_steps(job), watch=stop_after(4))
    kept = job.checkpoint.read_bytes()
    with monkeypatch.context() as patch:
        Memory(0, NO_MEMORY[1], patch)
        with pytest.raises(TrainingError, match=r"out of memory: .* one patch of .*--set patch_size=\[") as caught:
            fit(job, by_steps(job))
    assert caught.value.code == "OUT_OF_MEMORY"
    assert job.checkpoint.read_bytes() == kept
    undisturbed = make_job()
    same(fit(job, by_steps(job)), fit(undisturbed, by_steps(undisturbed)))


def test_no_memory_for_a_validation_is_no_traceback(make_job: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()

    def fails(*args: Any, **options: Any) -> torch.Tensor:
        raise NO_MEMORY[1]

    monkeypatch.setattr(loop, "slide", fails)
    with pytest.raises(TrainingError, match="out of memory"):
        fit(job, by_steps(job))


def test_other_errors_of_torch_are_not_taken_for_memory(make_job: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    memory = Memory(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), monkeypatch)
    with pytest.raises(RuntimeError, match="mat1"):
        fit(job, by_steps(job))
    assert memory.refused == 1


def stop_after(step: int) -> Callable[..., None]:
    def watch(state: LoopState, schedule: object, seconds: float) -> None:
        if state.step == step and seconds:
            raise KilledError

    return watch


def test_a_checkpoint_of_another_job_is_refused(make_job: Maker) -> None:
    job = make_job()
    fit(job, by_steps(job))
    other = Job(**{**job.__dict__, "digest": "another"})
    with pytest.raises(TrainingError, match="belongs to another plan or other data"):
        fit(other, by_steps(other))


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(make_job: Maker, place: float) -> None:
    job = make_job("steps=2", "validations=1")
    fit(job, by_steps(job))
    raw = bytearray(job.checkpoint.read_bytes())
    raw[int(place * len(raw))] ^= 0x10
    job.checkpoint.write_bytes(raw)
    with pytest.raises(TrainingError, match=r"state\.safetensors: the checkpoint is damaged .*delete it"):
        load_state(job.checkpoint, job="job")


@pytest.mark.parametrize("size", [0, 4, 8, 200, 3000])
def test_a_checkpoint_cut_short_is_noticed(make_job: Maker, size: int) -> None:
    job = make_job("steps=2", "validations=1")
    fit(job, by_steps(job))
    job.checkpoint.write_bytes(job.checkpoint.read_bytes()[:size])
    with pytest.raises(TrainingError, match="the checkpoint is damaged"):
        load_state(job.checkpoint, job="job")


def test_a_file_of_tensors_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "state.safetensors"
    save_file({"weights/x": torch.ones(2)}, file)
    with pytest.raises(TrainingError, match="the checkpoint is damaged"):
        load_state(file, job="job")


def test_validation_cases_without_any_label_keep_the_last_weights(make_job: Maker) -> None:
    job = make_job()
    job.cache.open(job.validation[0])
    opened = job.cache._open[job.validation[0].id]
    job.cache._open[job.validation[0].id] = {**opened, "mask": np.zeros_like(opened["mask"])}
    try:
        state = fit(job, by_steps(job))
    finally:
        job.cache._open[job.validation[0].id] = opened
    assert state.validations[-1]["dice"] == {}
    assert all(torch.equal(state.best[key], state.average[key]) for key in state.best)


def test_random_moments(make_job: Maker, rng: np.random.Generator) -> None:
    undisturbed = make_job()
    whole = fit(undisturbed, by_steps(undisturbed))
    for _ in range(4):
        job = make_job()
        same(fit_with_stops(job, set(rng.integers(1, STEPS + 1, 2).tolist())), whole)
        shutil.rmtree(job.checkpoint.parent)


def test_the_record_is_plain_json(make_job: Maker) -> None:
    job = make_job("steps=3")
    state = fit(job, by_steps(job))
    json.dumps([state.factors, state.losses, state.validations], allow_nan=False)


def test_what_was_drawn_is_counted_and_survives_a_stop(make_job: Maker) -> None:
    """An oracle of its own: the patches of every step again, from the same pure functions."""
    whole, stopped = make_job(), make_job()
    seen: list[tuple[int, torch.Tensor]] = []
    real = loop.encode

    def remember(spec: object, masks: torch.Tensor) -> object:
        seen.extend((number, mask) for number, mask in enumerate(masks))
        return real(spec, masks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "encode", remember)
        state = fit(whole, by_steps(whole))
    plan, labels = whole.plan, list(whole.spec.foreground.values())
    expected = torch.zeros((len(whole.train), len(labels), 2), dtype=torch.int64)
    for number, (slot, mask) in enumerate(seen):
        step = number // plan.batch_size
        row = loop.draws(
            seed=plan.seed, step=step, batch_size=plan.batch_size, cases=len(whole.train), foreground_share=0.5
        )[slot]
        for at, value in enumerate(labels):
            expected[row.case_index, at, 0] += bool((mask == value).any())
            expected[row.case_index, at, 1] += int((mask == value).sum())
    assert len(seen) == plan.steps * plan.batch_size
    assert expected.sum() > 0
    assert torch.equal(state.seen, expected)
    assert torch.equal(fit_with_stops(stopped, {2, 5}).seen, expected)
    assert 0 < state.pace.data_share < 1
    assert load_state(whole.checkpoint, job="job").pace == state.pace
