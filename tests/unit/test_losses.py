"""Losses: hand values, minima, gradients, what does not count."""

from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DiceLoss
from torch import Tensor

from medseg.losses import LOSSES, cross_entropy_loss, deep_supervision, dice_ce_loss, dice_loss

EVERY = pytest.mark.parametrize("name", list(LOSSES))
KINDS = pytest.mark.parametrize("exclusive", [True, False], ids=["classes", "regions"])


def problem(exclusive: bool, *, batch: int = 2, size: tuple[int, ...] = (4, 5, 3)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(batch, 3, *size, generator=generator)
    if exclusive:
        classes = torch.randint(3, (batch, *size), generator=generator)
        target = torch.nn.functional.one_hot(classes, 3).movedim(-1, 1).float()
    else:
        target = (torch.rand(batch, 3, *size, generator=generator) < 0.4).float()
    return logits, target, torch.ones(batch, 1, *size, dtype=torch.bool)


def test_dice_by_hand() -> None:
    # Two voxels, foreground probabilities 0.5 and 0.75, reference 1 and 0: 2 * 0.5 / (1.25 + 1).
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)]]])
    target = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    assert float(dice_loss(logits, target, valid, True)) == pytest.approx(1 - 1 / 2.25, abs=1e-5)


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)]]])
    target = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    assert float(cross_entropy_loss(logits, target, valid, True)) == pytest.approx((math.log(2) + math.log(4)) / 2)
    each = [math.log(2), math.log(2), math.log(2), math.log(4)]
    assert float(cross_entropy_loss(logits, target, valid, False)) == pytest.approx(sum(each) / 4)


@KINDS
def test_dice_is_monai_s(exclusive: bool) -> None:
    logits, target, valid = problem(exclusive)
    oracle = DiceLoss(
        include_background=not exclusive,
        softmax=exclusive,
        sigmoid=not exclusive,
        batch=True,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )
    assert torch.allclose(dice_loss(logits, target, valid, exclusive), oracle(logits, target), atol=1e-6)


def test_cross_entropy_is_torch_s() -> None:
    logits, target, valid = problem(True)
    oracle = torch.nn.functional.cross_entropy(logits, target.argmax(1))
    assert torch.allclose(cross_entropy_loss(logits, target, valid, True), oracle)


def test_dice_ce_is_their_sum() -> None:
    values = problem(True)
    parts = dice_loss(*values, True) + cross_entropy_loss(*values, True)
    assert torch.equal(dice_ce_loss(*values, True), parts)


@EVERY
@KINDS
def test_truth_is_the_minimum(name: str, exclusive: bool) -> None:
    logits, target, valid = problem(exclusive)
    loss = LOSSES[name]
    at_truth = loss((target - 0.5) * 60, target, valid, exclusive)
    assert 0 <= float(at_truth) < 1e-4
    assert at_truth < loss((target - 0.5) * 4, target, valid, exclusive) < loss(logits, target, valid, exclusive)
    assert loss(logits, target, valid, exclusive) < loss((0.5 - target) * 60, target, valid, exclusive)


@EVERY
@KINDS
def test_following_the_gradient_leads_to_the_truth(name: str, exclusive: bool) -> None:
    logits, target, valid = problem(exclusive, batch=1, size=(3, 3))
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        LOSSES[name](logits, target, valid, exclusive).backward()
        optimizer.step()
    found = logits.argmax(1) == target.argmax(1) if exclusive else (logits > 0) == (target > 0)
    assert found.all()


@EVERY
@KINDS
def test_gradient_is_that_of_finite_differences(name: str, exclusive: bool) -> None:
    logits, target, valid = problem(exclusive, batch=1, size=(2, 2))
    valid[..., 0, 0] = False
    values = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, target.double(), valid, exclusive), (values,))


@EVERY
@KINDS
def test_voxels_that_do_not_count_change_nothing(name: str, exclusive: bool) -> None:
    logits, target, valid = problem(exclusive)
    valid[:, :, 1:3] = False
    first = logits.clone().requires_grad_()
    value = LOSSES[name](first, target, valid, exclusive)
    value.backward()
    ignored = (~valid).expand_as(logits)
    assert first.grad is not None
    assert (first.grad[ignored] == 0).all()
    assert (first.grad[~ignored] != 0).any()
    other, wrong = logits.clone(), target.clone()
    other[ignored], wrong[ignored] = 50.0, 1 - wrong[ignored]
    assert torch.equal(LOSSES[name](other, wrong, valid, exclusive), value)


@EVERY
@KINDS
def test_nothing_that_counts_costs_nothing(name: str, exclusive: bool) -> None:
    logits, target, valid = problem(exclusive)
    logits.requires_grad_()
    value = LOSSES[name](logits, target, torch.zeros_like(valid), exclusive)
    value.backward()
    assert value == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@EVERY
@KINDS
def test_empty_reference_and_prediction_cost_nothing(name: str, exclusive: bool) -> None:
    logits = torch.full((1, 3, 4, 4), -200.0)
    target = torch.zeros(1, 3, 4, 4)
    if exclusive:
        logits[:, 0], target[:, 0] = 200.0, 1.0
    value = LOSSES[name](logits, target, torch.ones(1, 1, 4, 4, dtype=torch.bool), exclusive)
    assert float(value) == pytest.approx(0, abs=1e-6)


@EVERY
def test_extreme_logits_stay_finite(name: str) -> None:
    logits, target, valid = problem(True)
    logits = (logits * 1e4).requires_grad_()
    value = LOSSES[name](logits, target, valid, True)
    value.backward()
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def levels_of(size: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, 3, *(n // f for n in size), generator=generator) for f in (1, 2, 4)]


def test_deep_supervision_of_one_level_is_the_loss() -> None:
    logits, target, valid = problem(True)
    assert torch.allclose(
        deep_supervision(dice_ce_loss, [logits], target, valid, True), dice_ce_loss(logits, target, valid, True)
    )


def test_deep_supervision_by_hand() -> None:
    levels = levels_of((8, 8))
    _, target, valid = problem(True, batch=1, size=(8, 8))
    half, quarter = (torch.nn.functional.avg_pool2d(target, f) for f in (2, 4))
    every = [torch.ones(1, 1, n, n, dtype=torch.bool) for n in (4, 2)]
    parts = [
        dice_ce_loss(levels[0], target, valid, True),
        dice_ce_loss(levels[1], half, every[0], True),
        dice_ce_loss(levels[2], quarter, every[1], True),
    ]
    expected = (parts[0] + parts[1] / 2 + parts[2] / 4) / 1.75
    assert torch.allclose(deep_supervision(dice_ce_loss, levels, target, valid, True), expected)


@KINDS
def test_deep_supervision_of_odd_sizes_ignores_the_padding(exclusive: bool) -> None:
    levels = [level.requires_grad_() for level in levels_of((8, 8, 8))]
    _, target, valid = problem(exclusive, batch=1, size=(7, 5, 3))
    deep_supervision(dice_ce_loss, levels, target, valid, exclusive).backward()
    finest = levels[0].grad
    assert finest is not None
    assert (finest[:, :, 7:] == 0).all()
    assert (finest[:, :, :, 5:] == 0).all()
    assert (finest[:, :, :, :, 3:] == 0).all()
    assert (finest[:, :, :7, :5, :3] != 0).any()
    coarse = levels[2].grad
    assert coarse is not None
    assert (coarse[..., 1] == 0).all()
    assert (coarse[..., 0] != 0).any()


@KINDS
def test_a_coarse_voxel_learns_only_from_what_counts(exclusive: bool) -> None:
    """Three of four voxels are unannotated, the fourth is label 1: the coarse voxel is label 1, not a quarter of it."""
    target = torch.zeros(1, 2, 2, 2)
    target[0, 1, 0, 0] = 1
    valid = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    valid[..., 0, 0] = True
    sure = torch.tensor([-30.0, 30.0]).reshape(1, 2, 1, 1)
    levels = [sure.expand(1, 2, 2, 2), sure]
    assert float(deep_supervision(cross_entropy_loss, levels, target, valid, exclusive)) == pytest.approx(0, abs=1e-6)


@KINDS
def test_ignored_targets_have_no_say_at_any_level(exclusive: bool) -> None:
    levels = levels_of((8, 8))
    _, target, valid = problem(exclusive, batch=1, size=(8, 8))
    valid[..., :3, :] = False
    other = torch.where(valid, target, 1 - target)
    first, second = (deep_supervision(dice_ce_loss, levels, t, valid, exclusive) for t in (target, other))
    assert torch.equal(first, second)


def test_deep_supervision_accepts_half_precision() -> None:
    _, target, valid = problem(True, batch=1, size=(8, 8))
    value = deep_supervision(dice_ce_loss, [x.bfloat16() for x in levels_of((8, 8))], target, valid, True)
    assert value.dtype == torch.float32
