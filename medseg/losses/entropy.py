"""Losses on each voxel's probability; see medseg.losses for what they take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.parallel import total

FOCUS = 2.0
"""Exponent of the focal loss, the paper's choice."""
HARDEST = 0.1
"""Share of the voxels that the top-k loss looks at (nnU-Net's "topk10")."""


def each_voxel(logits: Tensor, target: Tensor, exclusive: bool) -> Tensor:
    """Return the cross-entropy of each voxel (B, 1, *S); for regions the mean over their channels."""
    if exclusive:
        return -(target * logits.log_softmax(1)).sum(1, keepdim=True)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1, keepdim=True)


def mean_of_valid(each: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of (B, 1, *S) over the voxels that count; 0 where none does."""
    return total(torch.where(valid, each, each.new_zeros(())).sum()) / total(valid.sum()).clamp(min=1)


def cross_entropy_loss(logits: Tensor, target: Tensor, valid: Tensor, exclusive: bool) -> Tensor:
    """Cross-entropy (binary for regions), mean over the voxels that count; 0 where none does."""
    return mean_of_valid(each_voxel(logits, target, exclusive), valid)


def focal_loss(logits: Tensor, target: Tensor, valid: Tensor, exclusive: bool) -> Tensor:
    """Cross-entropy times (1 - p)², p the probability of the truth (Lin 2017, arXiv 1708.02002).

    Voxels that are right already fade, those that are wrong stay. Without the paper's class weights.
    """
    if exclusive:
        log = logits.log_softmax(1)
        each = -(target * (1 - log.exp()) ** FOCUS * log).sum(1, keepdim=True)
    else:
        right, wrong = F.logsigmoid(logits), F.logsigmoid(-logits)
        each = -(target * (1 - right.exp()) ** FOCUS * right + (1 - target) * (1 - wrong.exp()) ** FOCUS * wrong)
        each = each.mean(1, keepdim=True)
    return mean_of_valid(each, valid)


def top_k_loss(logits: Tensor, target: Tensor, valid: Tensor, exclusive: bool) -> Tensor:
    """Cross-entropy of the hardest tenth of the voxels that count (Wu 2016, arXiv 1605.06885)."""
    each = each_voxel(logits, target, exclusive)
    hardest = each[valid]
    if not hardest.numel():
        return (each * 0).sum()
    return hardest.topk(max(1, int(HARDEST * hardest.numel()))).values.mean()
