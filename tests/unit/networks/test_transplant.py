"""Every network keeps what it says of a class when others come, go and change places, and channels change places."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import NETWORKS, build_network, planned_options
from medseg.networks.transplant import axes_of, transplant


def builder(name: str) -> tuple[int, Any]:
    dims = min(NETWORKS[name].spatial_dims)
    stages = {"features": [4, 6, 8], "strides": [[2] * dims] * 2, "kernels": [[3] * dims] * 3}
    options = planned_options(name, stages)

    def build(channels: int, classes: int) -> nn.Module:
        return build_network(name, spatial_dims=dims, in_channels=channels, out_channels=classes, options=options)

    return dims, build


def moved(build: Any, classes: tuple[int | None, ...], channels: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """An old network of 3 classes and the new one that got its weights."""
    torch.manual_seed(1)
    old, new = build(len(channels), 3).eval(), build(len(channels), len(classes)).eval()
    axes = axes_of(build, len(channels), len(classes), reordered=channels != tuple(range(len(channels))))
    new.load_state_dict(transplant(old.state_dict(), new.state_dict(), axes, classes=classes, channels=channels))
    return old, new


@pytest.mark.parametrize("name", list(NETWORKS))
@torch.no_grad()
def test_kept_classes_have_the_logits_that_they_had(name: str) -> None:
    dims, build = builder(name)
    channels = (0,) if name == "vnet" else (2, 0, 1)
    # A third class is left out, but by the V-Net: its last layer makes each logit of those of all classes.
    classes = (0, 2, None, 1) if name == "vnet" else (0, 2, None)
    old, new = moved(build, classes, channels)
    image = torch.randn(1, len(channels), *[32] * dims)
    order = [channels.index(number) for number in range(len(channels))]
    before, after = old(image), new(image[:, [order.index(n) for n in range(len(channels))]])
    scale = float(before.abs().max())
    assert torch.allclose(after[:, :2], before[:, [0, 2]], atol=1e-4 * scale)
    assert float((after[:, 2] - before[:, 1]).abs().max()) > 1e-3 * scale, (
        "a new class knows nothing of the one left out"
    )


def test_a_network_that_takes_only_some_numbers_of_channels_says_so() -> None:
    _, build = builder("vnet")
    with pytest.raises(ConfigError, match="vnet"):
        axes_of(build, 2, 3, reordered=True)


def test_the_rows_of_a_layer_are_known_answers() -> None:
    build = partial(_Linear)
    old, fresh = build(2, 3).state_dict(), build(2, 4).state_dict()
    old["last.weight"] = torch.arange(6.0).reshape(3, 2)
    old["last.bias"] = torch.tensor([10.0, 20.0, 30.0])
    axes = axes_of(build, 2, 4)
    assert axes == {"first.weight": ("", "channel"), "last.weight": ("class", ""), "last.bias": ("class",)}
    found = transplant(old, fresh, axes, classes=(0, None, 2, 1), channels=(1, 0))
    assert found["last.bias"][[0, 2, 3]].tolist() == [10, 30, 20]
    assert found["last.weight"][2].tolist() == [4, 5]
    assert torch.equal(found["last.weight"][1], fresh["last.weight"][1])
    assert torch.equal(found["first.weight"], old["first.weight"][:, [1, 0]])


def test_looking_draws_no_random_numbers() -> None:
    torch.manual_seed(5)
    axes_of(_Linear, 2, 3)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)


def test_weights_of_another_architecture_are_refused() -> None:
    weights = _Linear(2, 3).state_dict()
    axes = axes_of(_Linear, 2, 3)
    with pytest.raises(ValueError, match="do not have the same layers: more"):
        transplant({**weights, "more": torch.zeros(1)}, weights, axes, classes=(0, 1, 2), channels=(0, 1))
    plain = {name: ("",) * tensor.ndim for name, tensor in weights.items()}
    with pytest.raises(ValueError, match=r"first.weight: \(2, 5\) there, \(2, 2\) here"):
        transplant({**weights, "first.weight": torch.zeros(2, 5)}, weights, plain, classes=(0, 1, 2), channels=(0, 1))


class _Linear(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, 2, bias=False)
        self.last = nn.Linear(2, classes)
