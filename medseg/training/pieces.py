"""The gradient of a batch's loss with only a part of the batch's activations in memory at once.

Losses here couple the patches of a batch (Dice takes them as one volume), so that the sum of the parts' losses is
another loss. The logits of all parts are few numbers, though; what fills the memory are the activations behind them. So
the parts are computed twice: first without activations, for the loss of the whole batch and its gradient by the logits;
then part after part with them, to carry that gradient on to the weights (Gao et al. 2021, arXiv 2101.06983, do this for
contrastive losses). The mathematics is that of the whole batch, up to rounding; a step takes about a third longer. Only
batch norm sees the difference: its statistics are those of each part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Levels = Callable[[Tensor], list[Tensor]]


def backward(levels: Levels, loss: Callable[[list[Tensor]], Tensor], images: Tensor, pieces: int) -> Tensor:
    """Add the gradient of ``loss(levels(images))`` to the weights and return the loss (a scalar, detached).

    Parameters
    ----------
    levels : (B, C, *S) -> logits, finest first, each (B, K, ...); the patches of a batch do not see each other in it.
    pieces : parts into which the batch is cut, 1 to B.
    """
    if pieces == 1:
        value = loss(levels(images))
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()
    parts = images.tensor_split(pieces)
    chances, rows = [], []
    for part in parts:
        chances.append(_chance(images.device))
        with torch.no_grad():
            rows.append(levels(part))
    whole = [torch.cat(level).requires_grad_() for level in zip(*rows, strict=True)]
    value = loss(whole)
    value.backward()  # type: ignore[no-untyped-call]
    slices = zip(*(level.grad.tensor_split(pieces) for level in whole if level.grad is not None), strict=True)
    for part, chance, gradients in zip(parts, chances, slices, strict=True):
        _set_chance(chance, images.device)  # what was dropped out the first time is dropped out again
        torch.autograd.backward(levels(part), list(gradients))
    return value.detach()


def _chance(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_chance(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
