"""Losses: hand values, minima, gradients, what does not count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss, FocalLoss, TverskyLoss
from torch import Tensor

from medseg.losses import LOSSES, deep_supervision, dice_ce_loss
from medseg.losses.entropy import cross_entropy_loss, focal_loss, top_k_loss
from medseg.losses.overlap import dice_loss, dice_sample_loss, generalized_dice_loss, tversky_loss
from medseg.losses.shape import (
    border_weights,
    boundary_loss,
    cl_dice_loss,
    signed_distances,
    soft_skeleton,
)

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


def test_dice_of_each_sample_is_monai_s() -> None:
    logits, target, _ = problem(True, batch=3)
    valid = torch.ones(3, 1, 4, 5, 3, dtype=torch.bool)
    oracle = DiceLoss(include_background=False, softmax=True, smooth_nr=1e-5, smooth_dr=1e-5)
    assert torch.allclose(dice_sample_loss(logits, target, valid, True), oracle(logits, target), atol=1e-6)


def test_tversky_is_monai_s_and_half_is_dice() -> None:
    logits, target, valid = problem(True)
    oracle = TverskyLoss(
        include_background=False, softmax=True, alpha=0.3, beta=0.7, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
    )
    assert torch.allclose(tversky_loss(logits, target, valid, True), oracle(logits, target), atol=1e-6)
    half = tversky_loss(logits, target, valid, True, false_positive=0.5)
    assert torch.allclose(half, dice_loss(logits, target, valid, True), atol=1e-5)


def test_generalized_dice_by_hand() -> None:
    # Three voxels; background p 1/2 1/2 1/4, reference 1 1 0 (weight 1/4); label p 1/2 1/2 3/4, reference 0 0 1.
    logits = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, math.log(3)]]])
    target = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    overlap, total = 1 / 4 * 1 + 3 / 4, 1 / 4 * (1.25 + 2) + (1.75 + 1)
    value = generalized_dice_loss(logits, target, torch.ones(1, 1, 3, dtype=torch.bool), True)
    assert float(value) == pytest.approx(1 - 2 * overlap / total, abs=1e-5)


@KINDS
def test_focal_is_monai_s(exclusive: bool) -> None:
    logits, target, valid = problem(exclusive)
    oracle = FocalLoss(include_background=True, gamma=2.0, use_softmax=exclusive, reduction="none")(logits, target)
    expected = oracle.sum(1).mean() if exclusive else oracle.mean()
    assert torch.allclose(focal_loss(logits, target, valid, exclusive), expected, atol=1e-6)


def test_top_k_is_the_mean_of_the_hardest_tenth() -> None:
    logits, target, valid = problem(True)
    valid[:, :, 0] = False
    each = torch.nn.functional.cross_entropy(logits, target.argmax(1), reduction="none")[valid[:, 0]]
    expected = sum(sorted(each.tolist())[-9:]) / 9  # of 90 voxels
    assert float(top_k_loss(logits, target, valid, True)) == pytest.approx(expected, abs=1e-6)


def test_signed_distances_by_hand() -> None:
    target = torch.tensor([0.0, 0, 1, 1, 1, 0, 0, 0]).reshape(1, 1, 8, 1)
    found = signed_distances(target)[0, 0, :, 0] * math.hypot(8, 1)
    assert torch.allclose(found, torch.tensor([2.0, 1, -1, -2, -1, 1, 2, 3]))
    assert (signed_distances(torch.zeros(1, 1, 4, 4)) == 1).all()
    assert (signed_distances(torch.ones(1, 1, 4, 4)) == -1).all()


def test_boundary_costs_more_the_farther_a_mistake_lies() -> None:
    target = torch.zeros(1, 2, 12, 12)
    target[0, 1, 4:7, 4:7] = 1
    target[0, 0] = 1 - target[0, 1]
    valid = torch.ones(1, 1, 12, 12, dtype=torch.bool)

    def cost(row: int) -> float:
        wrong = target.clone()
        wrong[0, :, row, 5] = torch.tensor([0.0, 1.0])
        return float(boundary_loss((wrong - 0.5) * 60, target, valid, True))

    costs = [cost(row) for row in (7, 8, 9, 10, 11)]
    assert costs == sorted(costs)
    assert 0 < costs[0] < costs[-1] / 3


def test_border_weights_are_the_paper_s() -> None:
    mask = np.zeros((9, 14), bool)
    mask[2:7, 1:5], mask[2:7, 8:12], mask[8, 13] = True, True, True
    cells = [np.argwhere(mask & region) for region in _thirds(mask.shape)]
    found = border_weights(mask)
    for place in np.ndindex(mask.shape):
        near = sorted(float(np.linalg.norm(cell - place, axis=1).min()) for cell in cells)
        expected = 1.0 if mask[place] else 1 + 10 * math.exp(-((near[0] + near[1]) ** 2) / 50)
        assert found[place] == pytest.approx(expected, rel=1e-5)
    assert (border_weights(mask & _thirds(mask.shape)[0]) == 1).all()


def _thirds(shape: tuple[int, int]) -> np.ndarray:
    """Masks (3, *shape) of where each of the three cells lies."""
    rows, columns = np.indices(shape)
    return np.stack([columns < 6, (columns >= 6) & (rows < 8), (columns >= 6) & (rows == 8)])


@pytest.mark.parametrize("dims", [2, 3])
def test_soft_skeleton_of_a_bar_is_its_middle(dims: int) -> None:
    bar = torch.zeros(1, 1, *(15,) * dims)
    middle: tuple[slice | int, ...] = (slice(None), *(7,) * (dims - 1))
    bar[(0, 0, slice(2, 13), *(slice(6, 9),) * (dims - 1))] = 1
    skeleton = soft_skeleton(bar)[0, 0]
    assert skeleton[middle][4:11].min() > 0.99
    away = skeleton.clone()
    away[middle] = 0
    assert away[4:11].max() == 0


def test_cl_dice_sees_a_broken_line_that_dice_hardly_sees() -> None:
    target = torch.zeros(1, 2, 16, 32)
    target[0, 1, 7:10] = 1
    target[0, 0] = 1 - target[0, 1]
    broken, thin = target.clone(), target.clone()
    broken[0, :, 7:10, 15:17] = torch.tensor([1.0, 0.0])[:, None, None]
    thin[0, :, 9, :6] = torch.tensor([1.0, 0.0])[:, None]  # as many voxels, but the line holds
    valid = torch.ones(1, 1, 16, 32, dtype=torch.bool)
    values = {
        name: [float(loss((wrong - 0.5) * 60, target, valid, True)) for wrong in (broken, thin)]
        for name, loss in (("dice", dice_loss), ("cldice", cl_dice_loss))
    }
    assert values["dice"][0] == pytest.approx(values["dice"][1], abs=1e-6)
    assert values["cldice"][0] > 1.5 * values["cldice"][1]
