"""Losses that know the shape of the reference: distances to its surface, its skeleton, the gaps between its parts.

Distances are in voxels of the patch (spacings of a plan differ little along the axes of a patch) and are computed on
the processor from the reference alone; see medseg.losses for what the losses take.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from medseg.losses.entropy import each_voxel, mean_of_valid
from medseg.losses.overlap import SMOOTH
from medseg.parallel import total

BORDER_WEIGHT, BORDER_VOXELS = 10.0, 5.0
"""w0 and sigma of Ronneberger 2015, equation 2."""
THINNINGS = 5
"""Steps of the soft skeleton: structures up to about ten voxels wide become lines."""


def boundary_loss(logits: Tensor, target: Tensor, valid: Tensor, exclusive: bool) -> Tensor:
    """Mean of (p - g) φ over voxels and foreground channels, φ the signed distance to the reference's surface.

    Kervadec 2019 (arXiv 1812.07032), with two changes that move no gradient's direction: φ is divided by the diagonal
    of the patch, and the constant of the reference is subtracted, so that the truth costs 0. A channel that the
    patch does not hold has φ = 1 everywhere, one that fills it -1. For use beside an overlap loss.
    """
    probability = logits.softmax(1) if exclusive else logits.sigmoid()
    first = 1 if exclusive else 0
    probability, truth = probability[:, first:], target[:, first:] * valid.to(target.dtype)
    distance = signed_distances(truth)
    each = ((probability - truth) * distance).mean(1, keepdim=True)
    return mean_of_valid(each, valid)


def signed_distances(target: Tensor) -> Tensor:
    """Return distances (B, K, *S) to the surface of each channel, negative inside, in diagonals of the patch."""
    inside = (target.detach() > 0.5).cpu().numpy()
    diagonal = math.dist((0,) * (inside.ndim - 2), inside.shape[2:])
    result = np.empty(inside.shape, np.float32)
    for place in np.ndindex(inside.shape[:2]):
        mask = inside[place]
        if mask.all() or not mask.any():
            result[place] = -1.0 if mask.all() else 1.0
            continue
        outer, inner = ndimage.distance_transform_edt(~mask), ndimage.distance_transform_edt(mask)
        result[place] = (outer - inner) / diagonal
    return torch.from_numpy(result).to(target)


def border_ce_loss(logits: Tensor, target: Tensor, valid: Tensor, exclusive: bool) -> Tensor:
    """Cross-entropy weighted by 1 + 10 exp(-(d1 + d2)² / 2·5²) between the parts of the foreground.

    d1 and d2 are the distances to the nearest and second nearest part, so that narrow gaps between touching cells are
    learnt (Ronneberger 2015, arXiv 1505.04597, equation 2; its balancing of class frequencies is left to sampling).
    """
    truth = target * valid.to(target.dtype)
    foreground = (truth[:, 1:] if exclusive else truth).detach().amax(1) > 0.5
    weights = np.stack([border_weights(mask) for mask in foreground.cpu().numpy()])[:, None]
    each = each_voxel(logits, target, exclusive) * torch.from_numpy(weights).to(target)
    return mean_of_valid(each, valid)


def border_weights(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the weight of each voxel of one patch (*S); 1 everywhere where there are fewer than two parts."""
    parts, count = ndimage.label(mask)
    if count < 2:
        return np.ones(mask.shape, np.float32)
    nearest = np.full((2, *mask.shape), np.inf, np.float32)
    for number in range(1, count + 1):
        distance = ndimage.distance_transform_edt(parts != number).astype(np.float32)
        nearest = np.sort(np.concatenate([nearest, distance[None]]), axis=0)[:2]
    weights = BORDER_WEIGHT * np.exp(-((nearest.sum(0) / BORDER_VOXELS) ** 2) / 2) * ~mask
    return np.asarray(1 + weights, np.float32)


def cl_dice_loss(logits: Tensor, target: Tensor, valid: Tensor, exclusive: bool) -> Tensor:
    """1 - soft centre-line Dice, over the whole batch, mean over the foreground channels (Shit 2021, arXiv 2003.07311).

    For vessels and other tubes: what counts is that lines are found and not broken. For use beside an overlap loss.
    """
    probability = logits.softmax(1) if exclusive else logits.sigmoid()
    first = 1 if exclusive else 0
    mask = valid.to(probability.dtype)
    probability, truth = probability[:, first:] * mask, target[:, first:] * mask
    axes = [0, *range(2, logits.ndim)]
    found, wanted = soft_skeleton(probability), soft_skeleton(truth)
    precision = (total((found * truth).sum(axes)) + SMOOTH) / (total(found.sum(axes)) + SMOOTH)
    sensitivity = (total((wanted * probability).sum(axes)) + SMOOTH) / (total(wanted.sum(axes)) + SMOOTH)
    return 1 - (2 * precision * sensitivity / (precision + sensitivity)).mean()


def soft_skeleton(image: Tensor) -> Tensor:
    """Return what repeated soft erosion and opening leave of (B, K, *S) in [0, 1]: its centre lines."""
    skeleton = F.relu(image - _open(image))
    for _ in range(THINNINGS):
        image = _erode(image)
        rest = F.relu(image - _open(image))
        skeleton = skeleton + F.relu(rest - skeleton * rest)
    return skeleton


def _erode(image: Tensor) -> Tensor:
    if image.ndim == 4:
        rows = [-F.max_pool2d(-image, size, 1, pad) for size, pad in (((3, 1), (1, 0)), ((1, 3), (0, 1)))]
    else:
        shapes = (((3, 1, 1), (1, 0, 0)), ((1, 3, 1), (0, 1, 0)), ((1, 1, 3), (0, 0, 1)))
        rows = [-F.max_pool3d(-image, size, 1, pad) for size, pad in shapes]
    return torch.stack(rows).amin(0)


def _open(image: Tensor) -> Tensor:
    pool = F.max_pool2d if image.ndim == 4 else F.max_pool3d
    return pool(_erode(image), 3, 1, 1)
