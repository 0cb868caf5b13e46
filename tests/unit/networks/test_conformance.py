"""Every row of NETWORKS keeps the contract; a new row is tested by being in the table."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import NETWORKS, build_network
from medseg.networks.unet import UNet

ISOTROPIC = {"features": [4, 6, 8], "strides": [[2, 2, 2], [2, 2, 2]], "kernels": [[3, 3, 3]] * 3}
FLAT = {"features": [4, 6, 8], "strides": [[2, 2, 1], [2, 2, 2]], "kernels": [[3, 3, 1], [3, 3, 3], [3, 3, 3]]}
PLANE = {"features": [4, 6], "strides": [[2, 2]], "kernels": [[3, 3]] * 2, "convolutions": 1}
OPTIONS: dict[str, list[tuple[int, dict[str, Any]]]] = {"unet": [(3, ISOTROPIC), (3, FLAT), (2, PLANE)]}
"""Name -> (spatial_dims, options) to test it with; a row that is not listed is built without options."""

CASES = [
    pytest.param(name, dims, options, id=f"{name}-{dims}d-{number}")
    for name in NETWORKS
    for number, (dims, options) in enumerate(OPTIONS.get(name, [(2, {}), (3, {})]))
]
SIZES = {2: [(16, 16), (13, 7), (5, 31), (1, 1)], 3: [(16, 16, 16), (13, 7, 9), (5, 17, 1), (1, 1, 1)]}

conformance = pytest.mark.parametrize(("name", "dims", "options"), CASES)


def build(name: str, dims: int, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return build_network(name, spatial_dims=dims, in_channels=2, out_channels=3, options=options)


@conformance
def test_any_size_goes_in_and_comes_out(name: str, dims: int, options: dict[str, Any]) -> None:
    network = build(name, dims, options).eval()
    for size in SIZES[dims]:
        logits = network(torch.randn(1, 2, *size))
        assert logits.shape == (1, 3, *size)
        assert torch.isfinite(logits).all()


@conformance
def test_forward_is_the_finest_level_cropped(name: str, dims: int, options: dict[str, Any]) -> None:
    network = build(name, dims, options).eval()
    for size in SIZES[dims]:
        image = torch.randn(2, 2, *size)
        levels = network.forward_levels(image)
        crop = (slice(None), slice(None), *(slice(0, n) for n in size))
        assert torch.equal(network(image), levels[0][crop])


@conformance
def test_levels_halve_evenly_from_fine_to_coarse(name: str, dims: int, options: dict[str, Any]) -> None:
    levels = build(name, dims, options).forward_levels(torch.randn(1, 2, *SIZES[dims][1]))
    for fine, coarse in itertools.pairwise(levels):
        assert fine.shape[:2] == coarse.shape[:2] == (1, 3)
        assert all(a % b == 0 for a, b in zip(fine.shape[2:], coarse.shape[2:], strict=True))
        assert fine.numel() > coarse.numel()


@conformance
def test_every_weight_gets_a_finite_gradient(name: str, dims: int, options: dict[str, Any]) -> None:
    network = build(name, dims, options).train()
    levels = network.forward_levels(torch.randn(2, 2, *SIZES[dims][1]))
    sum(level.square().mean() for level in levels).backward()
    for key, weight in network.named_parameters():
        assert weight.grad is not None, key
        assert torch.isfinite(weight.grad).all(), key


@conformance
def test_bf16_is_close_to_fp32(name: str, dims: int, options: dict[str, Any]) -> None:
    network = build(name, dims, options).eval()
    image = torch.randn(1, 2, *SIZES[dims][1])
    exact = network(image)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(image).float()
    assert torch.isfinite(rough).all()
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


@conformance
def test_state_dict_round_trip(name: str, dims: int, options: dict[str, Any]) -> None:
    first, second = build(name, dims, options), build(name, dims, options)
    with torch.no_grad():
        for weight in first.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    second.load_state_dict(first.state_dict())
    image = torch.randn(1, 2, *SIZES[dims][0])
    assert torch.equal(first.eval()(image), second.eval()(image))


@conformance
def test_cases_of_a_batch_do_not_see_each_other(name: str, dims: int, options: dict[str, Any]) -> None:
    network = build(name, dims, options).eval()
    images = torch.randn(2, 2, *SIZES[dims][0])
    together = network(images)
    alone = torch.cat([network(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)


def test_unknown_network() -> None:
    with pytest.raises(ConfigError, match=r"'unett' is not one of the networks: unet.*did you mean 'unet'"):
        build("unett", 3, ISOTROPIC)


def test_divisor_is_the_total_stride() -> None:
    network = UNet(spatial_dims=3, in_channels=1, out_channels=2, **FLAT)
    assert network.divisor == (4, 4, 2)


def test_input_is_padded_at_its_end_only() -> None:
    """A voxel keeps its index: the logits of an input and of the input padded by hand agree."""
    network = build("unet", 2, PLANE).eval()
    image = torch.randn(1, 2, 7, 5)
    padded = torch.nn.functional.pad(image, (0, 1, 0, 1))
    assert torch.equal(network(image), network(padded)[:, :, :7, :5])


@pytest.mark.parametrize(
    "wrong",
    [
        {"features": [4]},
        {"features": [4], "strides": [], "kernels": [[3, 3, 3]]},
        {"strides": [[2, 2], [2, 2]]},
        {"kernels": [[3, 3]] * 3},
        {"featurs": [4, 6, 8]},
        {"features": [4, 6, 0]},
        {"strides": [[0, 2, 2], [2, 2, 2]]},
        {"kernels": [[3, 3, 3], [3, 3, 2], [3, 3, 3]]},
        {"convolutions": 0},
    ],
)
def test_options_that_do_not_fit_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"network unet: its options .* do not fit"):
        build("unet", 3, {**ISOTROPIC, **wrong})
