"""Every row of NETWORKS keeps the contract; a new row is tested by being in the table."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import NETWORKS, build_network, planned_options
from medseg.networks.classic import ClassicUNet
from medseg.networks.fcn import bilinear_upsampling
from medseg.networks.unet import UNet

ISOTROPIC = {"features": [4, 6, 8], "strides": [[2, 2, 2], [2, 2, 2]], "kernels": [[3, 3, 3]] * 3}
FLAT = {"features": [4, 6, 8], "strides": [[2, 2, 1], [2, 2, 2]], "kernels": [[3, 3, 1], [3, 3, 3], [3, 3, 3]]}
PLANE = {"features": [4, 6], "strides": [[2, 2]], "kernels": [[3, 3]] * 2, "convolutions": 1}
DEEP_PLANE = {"features": [4, 6, 8], "strides": [[2, 2], [2, 2]], "kernels": [[3, 3]] * 3}
STAGES = [(3, ISOTROPIC), (3, FLAT), (2, DEEP_PLANE)]
"""What a planner decides: the stages of a U-Net."""
OPTIONS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "unet": [(3, ISOTROPIC), (3, FLAT), (2, PLANE), (2, {**DEEP_PLANE, "convolutions": [1, 2, 3], "bias": True})],
    "resunet": [(3, {**FLAT, "convolutions": [1, 2, 2]}), (2, {**DEEP_PLANE, "decoder_convolutions": 2})],
    "dynunet": [*STAGES, (2, {**DEEP_PLANE, "residual": True})],
    "unet++": [(2, {"width": 4}), (3, {"width": 4})],
    "segresnet": [(2, {"width": 4}), (3, {"width": 4})],
    "mednext": [(2, {"width": 4}), (3, {"width": 4})],
}
"""Name -> (spatial_dims, options) to test it with; for a row that is not listed, what it makes of the planned ones."""


def _planned(name: str) -> list[tuple[int, dict[str, Any]]]:
    kinds = [(dims, planned_options(name, stages)) for dims, stages in STAGES if dims in NETWORKS[name].spatial_dims]
    return [kind for number, kind in enumerate(kinds) if kind not in kinds[:number]]


CASES = [
    pytest.param(name, dims, options, id=f"{name}-{dims}d-{number}")
    for name in NETWORKS
    for number, (dims, options) in enumerate(OPTIONS.get(name) or _planned(name))
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
        assert fine.numel() >= coarse.numel()


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


def test_a_network_of_another_dimension_is_named() -> None:
    with pytest.raises(ConfigError, match="network unet3d: it exists in 3D, the plan is 2D"):
        build("unet3d", 2, {})


@pytest.mark.parametrize("factors", [(2, 2), (3, 1), (4, 5), (2, 2, 2), (1, 2, 3)])
def test_upsampling_starts_as_linear_interpolation(factors: tuple[int, ...]) -> None:
    dims = len(factors)
    layer = bilinear_upsampling(dims, 2, factors)
    image = torch.randn(1, 2, *(6,) * dims)
    size = [6 * f for f in factors]
    mode = {2: "bilinear", 3: "trilinear"}[dims]
    expected = torch.nn.functional.interpolate(image, size=size, mode=mode, align_corners=False)
    found = layer(image)
    assert found.shape == expected.shape
    inside = (..., *(slice(f, -f) for f in factors))
    assert torch.allclose(found[inside], expected[inside], atol=1e-5)


def test_fcn_starts_from_its_coarsest_score() -> None:
    """The skips' scores are zero at first, so that FCN-8s begins as FCN-32s."""
    options = {"features": [4, 4, 6, 6], "strides": [[2, 2]] * 3}
    coarse, fine = build("fcn32s", 2, options).eval(), build("fcn8s", 2, {**options, "skips": 2}).eval()
    missing, unexpected = fine.load_state_dict(coarse.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith(("scores", "ups")) for key in missing)
    inside = (..., slice(8, -8), slice(8, -8))
    image = torch.randn(1, 2, 32, 32)
    for score in list(fine.scores)[1:]:
        torch.nn.init.zeros_(score.bias)
    # Twice two and once two is nearly eight at once.
    pair = torch.stack([network(image)[inside].flatten() for network in (coarse, fine)])
    assert torch.corrcoef(pair)[0, 1] > 0.98


def test_tile_of_the_paper() -> None:
    network = ClassicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(2,) * 5, convolutions="valid")
    assert network.tile(388) == (572, 388)
    assert network.tile(389) == (588, 404)
    assert network.tile(1) == (188, 4)


def test_unpadded_convolutions_see_the_mirrored_surroundings() -> None:
    """What is right of the border is its mirror image: an image that is mirrored by hand gives the same logits."""
    network = build("unet2015_valid", 2, {"features": [4, 6]}).eval()
    image = torch.randn(1, 2, 20, 12)
    larger = torch.nn.functional.pad(image, (8, 8, 8, 8), mode="reflect")
    assert torch.allclose(network(image), network(larger)[..., 8:-8, 8:-8], atol=1e-5)


def test_valid_and_same_agree_far_from_the_border() -> None:
    valid = build("unet2015_valid", 2, {"features": [4, 6]}).eval()
    same = build("unet2015", 2, {"features": [4, 6]}).eval()
    same.load_state_dict(valid.state_dict())
    image = torch.randn(1, 2, 64, 64)
    assert torch.allclose(valid(image)[..., 12:-12, 12:-12], same(image)[..., 12:-12, 12:-12], atol=1e-5)


@pytest.mark.parametrize(("name", "millions"), [("unet2015", 31.0), ("unet3d", 19.07)])
def test_parameters_are_those_of_the_papers(name: str, millions: float) -> None:
    """Ronneberger's 2D network has 31.0 million (with one input channel and two classes), Çiçek's 19,069,955."""
    kind = NETWORKS[name]
    if name == "unet3d":
        network = kind.build(spatial_dims=3, in_channels=3, out_channels=3, features=(64, 128, 256, 512))
    else:
        network = kind.build(spatial_dims=2, in_channels=1, out_channels=2)
    count = sum(weight.numel() for weight in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
