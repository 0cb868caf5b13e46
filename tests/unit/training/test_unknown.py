"""Labels that a case does not annotate: what every loss asks of its patches, and of the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg.joined import JoinedCase
from medseg.losses import LOSSES, deep_supervision
from medseg.losses.overlap import dice_loss
from medseg.planning.plan import read_plan
from medseg.preparation.cache import CaseCache, prepare_cases
from medseg.preparation.path import training_path, up_to_cache
from medseg.spec import Case, Spec, load_dataset
from medseg.targets import known_channels, merge_unknown
from medseg.training.folds import make_folds
from medseg.training.loop import Job, fit
from medseg.training.schedule import BySteps
from medseg.training.state import LoopState
from medseg.training.unknown import known_in_batch, only_known

EVERY = pytest.mark.parametrize("name", list(LOSSES))
KINDS = pytest.mark.parametrize("alone", [True, False], ids=["classes", "regions"])
SIZE = (6, 4, 4)
Known = list[list[bool]]


def problem(alone: bool, known: Known) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return two levels of logits, a target that holds what `known` allows, valid, and known."""
    generator = torch.Generator().manual_seed(4)
    here = torch.tensor(known)
    batch, count = here.shape
    levels = [torch.randn(batch, count, *(n // f for n in SIZE), generator=generator) for f in (1, 2)]
    if alone:
        classes = torch.randint(count, (batch, *SIZE), generator=generator)
        allowed = here[torch.arange(batch)[:, None], classes.flatten(1)].reshape(classes.shape)
        target = torch.nn.functional.one_hot(classes * allowed, count).movedim(-1, 1).float()
    else:
        target = (torch.rand(batch, count, *SIZE, generator=generator) < 0.4).float()
        target *= here.reshape(batch, count, 1, 1, 1)
    return levels, target, torch.ones(batch, 1, *SIZE, dtype=torch.bool), here


def loss_of(name: str, levels: list[Tensor], target: Tensor, valid: Tensor, known: Tensor, alone: bool) -> Tensor:
    return deep_supervision(LOSSES[name], *only_known(levels, target, known, alone), valid, alone)


MIXED: Known = [[True, True, False, True], [True, False, True, True]]
NEVER: Known = [[True, True, False, True], [True, False, False, True]]


@KINDS
@EVERY
def test_where_all_is_known_the_loss_is_what_it_was_to_the_bit(name: str, alone: bool) -> None:
    levels, target, valid, known = problem(alone, [[True] * 4] * 2)
    plain = deep_supervision(LOSSES[name], levels, target, valid, alone)
    assert torch.equal(loss_of(name, levels, target, valid, known, alone), plain)


@KINDS
@EVERY
@pytest.mark.parametrize("table", [MIXED, NEVER], ids=["mixed", "never"])
def test_unknown_channels_are_asked_through_the_background_only(name: str, alone: bool, table: Known) -> None:
    levels, target, valid, known = problem(alone, table)
    for level in levels:
        level.requires_grad_()
    loss = loss_of(name, levels, target, valid, known, alone)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    for level in levels:
        assert level.grad is not None
        assert torch.isfinite(level.grad).all()
        for patch, row in enumerate(table):
            for channel in np.flatnonzero(~np.array(row)):
                gradient = level.grad[patch, channel]
                if not alone:
                    assert not gradient.any()
                    continue
                # The share of the merged background that the label holds: softmax over background and unknown.
                members = [0, *np.flatnonzero(~np.array(row))]
                shares = level.detach()[patch, members].softmax(0)
                merged = level.grad[patch, members].sum(0)
                torch.testing.assert_close(gradient, merged * shares[members.index(channel)], atol=1e-7, rtol=1e-3)


@EVERY
def test_the_loss_is_that_of_added_probabilities(name: str) -> None:
    """Shift logits so that background and unknown labels exchange probability: nothing changes."""
    levels, target, valid, known = problem(True, NEVER)
    moved = []
    for level in levels:
        other = level.clone()
        both = torch.logaddexp(level[:, 0], level[:, 2])
        other[:, 0] = both + np.log(0.3)
        other[:, 2] = both + np.log(0.7)
        moved.append(other)
    before, after = (loss_of(name, each, target, valid, known, True) for each in (levels, moved))
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


@KINDS
@EVERY
def test_a_channel_that_no_patch_knows_is_not_averaged_in(name: str, alone: bool) -> None:
    levels, target, valid, known = problem(alone, NEVER)
    merged = [merge_unknown(level, known, alone) for level in levels]
    rest = [0, 1, 3]
    without = deep_supervision(LOSSES[name], [m[:, rest] for m in merged], target[:, rest], valid, alone)
    assert torch.equal(loss_of(name, levels, target, valid, known, alone), without)


@KINDS
def test_the_dice_of_a_label_is_that_of_the_patches_that_know_it(alone: bool) -> None:
    levels, target, valid, known = problem(alone, MIXED)
    (logits,), wanted = only_known(levels[:1], target, known, alone)
    own = []
    for channel in range(1 if alone else 0, 4):
        there = known[:, channel]
        probability = (logits.softmax(1) if alone else logits.sigmoid())[there][:, channel]
        truth = target[there][:, channel]
        own.append(float(2 * (probability * truth).sum() / (probability.sum() + truth.sum())))
    assert float(dice_loss(logits, wanted, valid, alone)) == pytest.approx(1 - np.mean(own), abs=1e-5)


def test_a_region_with_an_unknown_label_is_not_asked_where_a_known_one_lies(make_spec: Callable[..., Spec]) -> None:
    regions = {"whole": {"labels": ["a", "b"], "paint": "a"}, "core": {"labels": ["b"], "paint": "b"}}
    union = make_spec({"a": 1, "b": 2}, name="u", regions=regions)
    own = make_spec({"b": 1}, name="b", regions={"core": {"labels": ["b"], "paint": "b"}})
    case = JoinedCase("c", (), None, "p", own=own, own_id="c", own_patient="p")
    assert known_channels(union, case) == [False, True]
    known = torch.tensor([[False, True]])
    (logits,), target = only_known([torch.zeros(1, 2, 2, 2)], torch.ones(1, 2, 2, 2), known, False)
    assert logits.shape == target.shape == (1, 1, 2, 2)
    both = torch.tensor([[False, True], [True, True]])
    _, target = only_known([torch.zeros(2, 2, 2, 2)], torch.ones(2, 2, 2, 2), both, False)
    assert target[:, :, 0, 0].tolist() == [[0, 1], [1, 1]]


@pytest.fixture(scope="module")
def make_job(tmp_path_factory: Any, tiny_dataset: Callable[..., Path], tiny_plan: Callable[..., Path]) -> Any:
    """Return a maker of jobs of a few steps whose cases went through a function."""
    root = tmp_path_factory.mktemp("unknown")
    dataset = load_dataset(tiny_dataset(root / "data", cases=5, test=0))
    plan = read_plan(tiny_plan(root / "data", root / "plan.yaml", steps=3))

    def make(name: str, change: Callable[[Case], Case]) -> Job:
        cases = tuple(change(case) for case in dataset.cases)
        cache = CaseCache(root / f"cache {name}", dataset.spec, plan)
        path = training_path(dataset.spec, plan, cache)
        prepare_cases(up_to_cache(path), cache, cases)
        fold = make_folds(cases, folds=None, seed=0)[0]
        place = root / name / "state.safetensors"
        cpu = torch.device("cpu")
        return Job(dataset.spec, plan, path, cache, fold.train, fold.validation, place, "job", cpu)

    return make


def joined(case: Case, own: Spec) -> JoinedCase:
    return JoinedCase(**vars(case), own=own, own_id=case.id, own_patient=case.patient)


def run(job: Job) -> LoopState:
    plan = job.plan
    return fit(job, lambda state: BySteps(plan.steps, validations=plan.validations, warmup=plan.warmup))


def test_cases_that_annotate_everything_are_learnt_from_as_if_there_were_one_dataset(make_job: Any) -> None:
    plain = make_job("plain", lambda case: case)
    all_known = make_job("all", lambda case: joined(case, plain.spec))
    assert known_in_batch(plain.spec, plain.plan, plain.train, 0) is None
    assert known_in_batch(all_known.spec, all_known.plan, all_known.train, 0) is None
    first, second = run(plain), run(all_known)
    assert first.losses == second.losses
    assert all(torch.equal(first.best[key], second.best[key]) for key in first.best)


def test_what_a_batch_knows_follows_its_draws(make_job: Any, tmp_path: Path, tiny: SimpleNamespace) -> None:
    spec = make_job("plain", lambda case: case).spec
    ball = spec.model_copy(update={"labels": {"ball": spec.labels["ball"]}})

    def without_box(case: Case) -> Case:
        if case.id not in ("c0", "c1"):
            return joined(case, spec)
        mask = tiny.case(int(case.id[1:]))[1]
        tiny.save(tmp_path / f"{case.id}.nii.gz", mask * (mask == 1))
        return joined(replace(case, mask=tmp_path / f"{case.id}.nii.gz"), ball)

    job = make_job("part", without_box)
    plan = job.plan.model_copy(update={"batch_size": len(job.train)})
    rows = known_in_batch(job.spec, plan, job.train, 0)
    assert rows is not None
    part = sum(case.id in ("c0", "c1") for case in job.train)
    assert sorted(rows.tolist()) == sorted([[True, True, False]] * part + [[True, True, True]] * (len(rows) - part))
    assert np.isfinite(run(job).losses).all()
