"""Losses on logits; one row of LOSSES each.

A loss takes ``logits`` (B, K, *S), ``target`` (B, K, *S) float with one channel per class (one-hot) or per region
(overlapping), ``valid`` (B, 1, *S) bool (False where the mask says "ignore"), and ``exclusive`` (True: softmax over
classes, channel 0 is background; False: a sigmoid per region). It returns a scalar. Where several processes train
together each holds a part of the batch: sums over the batch are taken over all of them (medseg.parallel), so that the
loss is that of the whole batch; losses of single patches (dice_sample) and top_k are those of the own part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.losses.entropy import cross_entropy_loss, focal_loss, top_k_loss
from medseg.losses.overlap import dice_loss, dice_sample_loss, generalized_dice_loss, tversky_loss
from medseg.losses.shape import border_ce_loss, boundary_loss, cl_dice_loss
from medseg.registry import Registry

Loss = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def compound(*losses: Loss) -> Loss:
    """Return the sum of losses."""

    def total(logits: Tensor, target: Tensor, valid: Tensor, exclusive: bool) -> Tensor:
        return torch.stack([loss(logits, target, valid, exclusive) for loss in losses]).sum()

    return total


dice_ce_loss = compound(dice_loss, cross_entropy_loss)
"""Isensee et al. 2021."""

LOSSES: Registry[Loss] = Registry(
    "losses",
    {
        "dice_ce": dice_ce_loss,
        "dice": dice_loss,
        "dice_sample": dice_sample_loss,
        "ce": cross_entropy_loss,
        "focal": focal_loss,
        "tversky": tversky_loss,
        "generalized_dice": generalized_dice_loss,
        "top_k": top_k_loss,
        "border_ce": border_ce_loss,
        "dice_focal": compound(dice_loss, focal_loss),
        "dice_top_k": compound(dice_loss, top_k_loss),
        "dice_ce_boundary": compound(dice_loss, cross_entropy_loss, boundary_loss),
        "dice_ce_cldice": compound(dice_loss, cross_entropy_loss, cl_dice_loss),
        "tversky_ce": compound(tversky_loss, cross_entropy_loss),
    },
)


def deep_supervision(loss: Loss, levels: list[Tensor], target: Tensor, valid: Tensor, exclusive: bool) -> Tensor:
    """Weighted sum of a loss over the levels of a decoder, finest first: weights 1, 1/2, 1/4, ... to a sum of 1.

    The target (B, K, *S) is averaged down to the resolution of each level, so that a coarse voxel is learnt as the
    share of each class among its voxels that count; it counts itself where any of them does.
    """
    weights = [0.5**i for i in range(len(levels))]
    size = levels[0].shape[2:]
    share = _pad_to(valid.to(target.dtype), size)
    target = _pad_to(target, size) * share
    total = levels[0].new_zeros((), dtype=torch.float32)
    for weight, logits in zip(weights, levels, strict=True):
        if logits.shape[2:] != target.shape[2:]:
            factor = [a // b for a, b in zip(target.shape[2:], logits.shape[2:], strict=True)]
            pool = F.avg_pool3d if logits.ndim == 5 else F.avg_pool2d
            target, share = pool(target, factor), pool(share, factor)
        # Divided by the share: voxels that do not count must not pull a coarse one towards "nothing here".
        total = total + weight * loss(logits.float(), target / share.clamp(min=1e-6), share > 0, exclusive)
    return total / sum(weights)


def _pad_to(tensor: Tensor, size: torch.Size) -> Tensor:
    """Pad with zeros at the end of each axis: padded voxels have no target and are not valid."""
    padding: list[int] = []
    for have, want in zip(reversed(tensor.shape[2:]), reversed(size), strict=True):
        padding += [0, want - have]
    return F.pad(tensor, padding) if any(padding) else tensor
