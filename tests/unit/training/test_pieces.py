"""Batches in pieces have the gradient of the whole batch, whatever couples its patches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medseg.losses import LOSSES, deep_supervision
from medseg.networks import build_network
from medseg.training.pieces import backward

OPTIONS = {"features": [4, 8, 8], "strides": [[2, 2], [2, 2]], "kernels": [[3, 3]] * 3, "convolutions": 1}


def problem(loss: str, classes: int = 3) -> tuple[nn.Module, Tensor, object]:
    torch.manual_seed(3)
    network = build_network("unet", spatial_dims=2, in_channels=1, out_channels=classes, options=OPTIONS).double()
    images = torch.randn(5, 1, 16, 16, dtype=torch.float64)
    target = nn.functional.one_hot(torch.randint(0, classes, (5, 16, 16)), classes).movedim(-1, 1).double()
    target[1] = 0
    target[1, 0] = 1  # a patch without foreground: the batch's Dice couples the others
    valid = torch.ones(5, 1, 16, 16, dtype=torch.bool)
    valid[2, :, :8] = False
    return network, images, lambda levels: deep_supervision(LOSSES[loss], levels, target, valid, True)


def gradients(network: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_every_loss_has_the_gradient_of_the_whole_batch(loss: str, pieces: int) -> None:
    network, images, loss_of = problem(loss)
    whole = backward(network.forward_levels, loss_of, images, 1)
    expected = gradients(network)
    network.zero_grad()
    value = backward(network.forward_levels, loss_of, images, pieces)
    assert value == pytest.approx(float(whole), rel=1e-6)
    found = gradients(network)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()) + 1e-9)


def test_what_is_dropped_out_is_dropped_out_again() -> None:
    torch.manual_seed(0)
    drop = nn.Dropout(0.5)
    weight = nn.Parameter(torch.ones(64, dtype=torch.float64))
    seen: list[Tensor] = []

    def levels(images: Tensor) -> list[Tensor]:
        found = drop(images * weight)
        seen.append(found.detach())
        return [found]

    backward(levels, lambda rows: rows[0].square().sum(), torch.rand(4, 64, dtype=torch.float64), 2)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0] == 0, seen[1] == 0)
    total = torch.cat(seen[:2])
    assert torch.allclose(weight.grad, 2 * total.square().sum(0))
