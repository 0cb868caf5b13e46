"""Temperature: known answers, and masks that do not know of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medseg.targets import decode, probabilities
from medseg.training.temperature import (
    HIGHEST,
    LOWEST,
    MIN_VOXELS,
    VoxelSample,
    best_temperature,
    calibration_error,
    loss,
)
from medseg.volume import Volume

Make = Callable[..., Any]


def drawn(n: int, k: int, *, alone: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and truth drawn from their own probabilities: they are calibrated."""
    made = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn((n, k), generator=made)
    if alone:
        return logits, F.one_hot(torch.multinomial(logits.softmax(1), 1, generator=made)[:, 0], k).float()
    return logits, torch.bernoulli(logits.sigmoid(), generator=made)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_the_factor_that_was_put_on_the_logits_is_found(alone: bool, factor: float) -> None:
    logits, targets = drawn(60_000, 4, alone=alone)
    found = best_temperature(logits * factor, targets, alone)
    assert found == pytest.approx(factor, rel=0.03)
    assert calibration_error(logits * factor / found, targets, alone) < 0.01
    if factor != 1:
        assert calibration_error(logits * factor, targets, alone) > 0.05


@pytest.mark.parametrize("alone", [True, False])
def test_the_temperature_is_that_of_a_fine_search(alone: bool) -> None:
    logits, targets = drawn(3000, 3, alone=alone, seed=3)
    grid = np.exp(np.linspace(np.log(LOWEST), np.log(HIGHEST), 2000))
    losses = [loss(logits * 1.7 / t, targets, alone) for t in grid]
    assert best_temperature(logits * 1.7, targets, alone) == pytest.approx(grid[np.argmin(losses)], rel=5e-3)


def test_networks_that_are_always_right_and_never_right_meet_the_bounds() -> None:
    logits = torch.tensor([[3.0, 0.0]]).repeat(2000, 1)
    right, wrong = F.one_hot(torch.zeros(2000, dtype=torch.long), 2), F.one_hot(torch.ones(2000, dtype=torch.long), 2)
    assert best_temperature(logits, right.float(), True) == pytest.approx(LOWEST, rel=0.01)
    assert best_temperature(logits, wrong.float(), True) == pytest.approx(HIGHEST, rel=0.01)


def test_the_calibration_error_by_hand() -> None:
    # 80 % sure in ten voxels of which six are right; 50 % sure (the first wins) in ten of which five are right
    sure = torch.log(torch.tensor([[0.8, 0.2]])).repeat(10, 1)
    unsure = torch.zeros((10, 2))
    truth = torch.tensor([0] * 6 + [1] * 4 + [0] * 5 + [1] * 5)
    found = calibration_error(torch.cat([sure, unsure]), F.one_hot(truth, 2).float(), True)
    assert found == pytest.approx(0.5 * 0.2, abs=1e-6)
    # of a region: no with 80 % in ten voxels, of which three hold it
    logits = torch.full((10, 1), float(np.log(0.25)))
    assert calibration_error(logits, torch.tensor([[1.0]] * 3 + [[0.0]] * 7), False) == pytest.approx(0.1, abs=1e-6)


@pytest.fixture
def scene(make_spec: Make) -> Any:
    """A spec, logits of a large image and the reference: a block in a corner."""
    spec = make_spec(labels={"a": 4, "b": 2}, ignore=9)
    truth = np.zeros((1, 60, 50, 40), np.uint8)
    truth[0, 5:15, 5:15, 5:15], truth[0, 5:15, 5:15, 20:24], truth[0, 5:15, 15:17, 5:15] = 4, 2, 9
    rng = torch.Generator().manual_seed(0)
    channels = [truth[0] == 0, truth[0] == 4, truth[0] == 2]
    logits = 3 * torch.from_numpy(np.stack(channels)).float() + torch.randn((3, 60, 50, 40), generator=rng)
    return spec, logits, Volume(truth, np.diag([1, 1, 2, 1.0]))


def add(sample: VoxelSample, logits: torch.Tensor, reference: Volume) -> None:
    """Add a case whose logits (K, I, J, K') are at hand."""
    sample.add(lambda voxels: logits.flatten(1)[:, voxels], decode(sample.spec, logits).numpy(), reference)


def test_voxels_are_drawn_around_what_matters(scene: Any) -> None:
    spec, logits, reference = scene
    # what was found lies everywhere: the noise wins now and then
    sample = VoxelSample(spec, cases=1, seed=0)
    add(sample, logits, reference)
    assert len(sample.logits[0]) == (reference.array != 9).sum(), "there are fewer voxels than the share"
    quiet = logits.clone()
    quiet[0] += 20 * torch.from_numpy(reference.array[0] == 0)
    small = VoxelSample(spec, cases=1, seed=0)
    add(small, quiet, reference)
    box = (slice(0, 25), slice(0, 27), slice(0, 29))  # 10 mm around what is there, and found where nobody looked
    assert len(small.logits[0]) == (reference.array[0][box] != 9).sum()
    assert small.targets[0].sum(0).tolist() == [(reference.array[0][box] == value).sum() for value in (0, 4, 2)]


def test_the_share_of_a_case_is_drawn_without_repeating_and_the_same_again(scene: Any) -> None:
    spec, logits, reference = scene
    samples = [VoxelSample(spec, cases=100, seed=seed) for seed in (0, 0, 1)]
    for sample in samples:
        add(sample, logits, reference)
        add(sample, logits, reference)
    first, second, third = (torch.cat(sample.logits) for sample in samples)
    assert len(first) == 2 * 2000
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(samples[0].logits[0], samples[0].logits[1])
    assert len(torch.unique(samples[0].logits[0], dim=0)) == 2000


def test_what_is_kept_in_the_bundle(scene: Any) -> None:
    spec, logits, reference = scene
    sample = VoxelSample(spec, cases=1, seed=0)
    add(sample, 10 * logits, reference)
    found = sample.fit()
    assert found is not None
    assert found.temperature > 1.5
    assert found.nll_after < found.nll_before
    assert found.ece_after < found.ece_before
    assert found.cases == 1
    soft = probabilities(spec, logits, temperature=found.temperature)
    assert torch.allclose(soft, (logits / found.temperature).softmax(0)[1:])
    assert torch.equal(decode(spec, logits), decode(spec, logits / found.temperature))


def test_regions_are_calibrated_each(make_spec: Make) -> None:
    spec = make_spec(
        labels={"a": 1, "b": 2},
        regions={"whole": {"labels": ["a", "b"], "paint": "a"}, "core": {"labels": ["b"], "paint": "b"}},
    )
    truth = np.random.default_rng(0).integers(0, 3, (1, 20, 20, 20)).astype(np.uint8)
    wanted = np.stack([truth[0] > 0, truth[0] == 2])
    logits = torch.from_numpy(np.where(wanted, 4.0, -4.0)) + 3 * torch.randn((2, 20, 20, 20))
    sample = VoxelSample(spec, cases=1, seed=0)
    add(sample, logits, Volume(truth, np.eye(4)))
    assert np.array_equal(sample.targets[0].numpy(), wanted.reshape(2, -1).T)
    found = sample.fit()
    assert found is not None
    assert found.nll_after <= found.nll_before + 1e-9
    assert torch.equal(decode(spec, logits), decode(spec, logits / found.temperature))


def test_empty_references_and_too_few_voxels(make_spec: Make) -> None:
    spec = make_spec(labels={"a": 4}, ignore=9)
    sample = VoxelSample(spec, cases=2, seed=0)
    logits = torch.stack([torch.full((9, 9, 9), 5.0), torch.zeros((9, 9, 9))])
    add(sample, logits, Volume(np.full((1, 9, 9, 9), 9, np.uint8), np.eye(4)))
    assert sample.fit() is None, "all is ignored"
    add(sample, logits, Volume(np.zeros((1, 9, 9, 9), np.uint8), np.eye(4)))
    assert MIN_VOXELS > 9**3
    assert sample.fit() is None


def test_unknown_labels_are_judged_as_background() -> None:
    """Where the truth knows no label 2, a voxel called background is right if background or 2 is found."""
    logits = torch.tensor([[0.0, -9.0, 9.0], [9.0, -9.0, 0.0], [-9.0, 9.0, -9.0]]).repeat(50, 1)
    targets = F.one_hot(torch.tensor([0, 0, 1]), 3).float().repeat(50, 1)
    known = torch.tensor([[True, True, False]]).expand(150, -1)
    assert loss(logits, targets, True, known) < 1e-3 < 1 < loss(logits, targets, True)
    assert calibration_error(logits, targets, True, known) < 1e-3


def test_unknown_regions_are_not_judged() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(90, 2, generator=generator)
    targets = (torch.rand(90, 2, generator=generator) < 0.5).float()
    known = torch.tensor([[True, False]]).expand(90, -1)
    assert loss(logits, targets, False, known) == pytest.approx(loss(logits[:, :1], targets[:, :1], False))
    alone = calibration_error(logits[:, :1], targets[:, :1], False)
    assert calibration_error(logits, targets, False, known) == pytest.approx(alone)
