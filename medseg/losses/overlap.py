"""Losses on the overlap of prediction and reference; see medseg.losses for what they take."""

from __future__ import annotations

from torch import Tensor

from medseg.parallel import total as over_all

SMOOTH = 1e-5
"""Keeps a channel that is empty in prediction and reference from dividing by nothing: it costs nothing."""


def _parts(
    logits: Tensor, target: Tensor, valid: Tensor, exclusive: bool, *, background: bool
) -> tuple[Tensor, Tensor]:
    """Return probabilities and target of the channels that count, 0 where the mask says "ignore"."""
    probability = logits.softmax(1) if exclusive else logits.sigmoid()
    first = 1 if exclusive and not background else 0
    mask = valid.to(probability.dtype)
    return probability[:, first:] * mask, target[:, first:] * mask


def _space(logits: Tensor) -> list[int]:
    return list(range(2, logits.ndim))


def dice_loss(logits: Tensor, target: Tensor, valid: Tensor, exclusive: bool) -> Tensor:
    """1 - soft Dice, over the whole batch as one volume, mean over the foreground channels (Drozdzal 2016).

    Empty-safe: a channel without reference and prediction costs nothing.
    """
    probability, target = _parts(logits, target, valid, exclusive, background=False)
    axes = [0, *_space(logits)]
    overlap = over_all((probability * target).sum(axes))
    total = over_all(probability.sum(axes) + target.sum(axes))
    return 1 - ((2 * overlap + SMOOTH) / (total + SMOOTH)).mean()


def dice_sample_loss(logits: Tensor, target: Tensor, valid: Tensor, exclusive: bool) -> Tensor:
    """1 - soft Dice of each patch, mean over patches and foreground channels (Milletari 2016, arXiv 1606.04797).

    A patch without a label asks for none of it as loudly as another asks for all of it: for labels that are rare or
    small the batch form, `dice_loss`, is steadier.
    """
    probability, target = _parts(logits, target, valid, exclusive, background=False)
    axes = _space(logits)
    overlap = (probability * target).sum(axes)
    total = probability.sum(axes) + target.sum(axes)
    return 1 - ((2 * overlap + SMOOTH) / (total + SMOOTH)).mean()


def tversky_loss(
    logits: Tensor, target: Tensor, valid: Tensor, exclusive: bool, *, false_positive: float = 0.3
) -> Tensor:
    """1 - Tversky index, over the whole batch, mean over the foreground channels (Salehi 2017, arXiv 1706.05721).

    Missed voxels weigh 0.7 and voxels too many 0.3, the paper's best for small lesions; 0.5 would be Dice.
    """
    probability, target = _parts(logits, target, valid, exclusive, background=False)
    axes = [0, *_space(logits)]
    overlap = over_all((probability * target).sum(axes))
    mask = valid.to(probability.dtype)
    extra = over_all((probability * (1 - target) * mask).sum(axes))
    missed = over_all(((1 - probability) * target * mask).sum(axes))
    index = (overlap + SMOOTH) / (overlap + false_positive * extra + (1 - false_positive) * missed + SMOOTH)
    return 1 - index.mean()


def generalized_dice_loss(logits: Tensor, target: Tensor, valid: Tensor, exclusive: bool) -> Tensor:
    """1 - Dice of all channels together, each weighted by 1 / volume² (Sudre 2017, arXiv 1707.03237).

    The background counts as a channel. One that the batch does not hold gets the weight of a single voxel.
    """
    probability, target = _parts(logits, target, valid, exclusive, background=True)
    axes = [0, *_space(logits)]
    weight = over_all(target.sum(axes)).clamp(min=1) ** -2
    overlap = (weight * over_all((probability * target).sum(axes))).sum()
    total = (weight * over_all(probability.sum(axes) + target.sum(axes))).sum()
    return 1 - (2 * overlap + SMOOTH) / (total + SMOOTH)
