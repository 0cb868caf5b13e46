"""A second look from closer by: windows enlarged, and what of two answers to them agrees.

A network that is sure of what it sees gives the same answer when the patient is a little larger; where it does not,
its mask hangs on chance. Of all changes of the image that were tried (shifts, turns, noise, blur, gamma, mirrors,
smaller and larger, docs/explanation/quality-estimate.md) this one tells most of the Dice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ZOOM = 1.2
"""Within what a training augments (0.7 to 1.4), and enough to move every border by voxels."""
THICK = 2.0
"""Axes with voxels this many times longer than the shortest are not enlarged: between their slices is no image."""


def zooms(spacing: Sequence[float], dimensions: int) -> tuple[float, ...]:
    """Return by how much to enlarge along each axis of a window (of a 2-D network its two)."""
    own = spacing[:dimensions]
    return tuple(ZOOM if step <= THICK * min(own) else 1.0 for step in own)


def enlarge(windows: Tensor, factors: Sequence[float]) -> Tensor:
    """Enlarge (B, C, *S) linearly about its centre, in float32; the shape stays, so the outermost part is lost."""
    size = len(factors)
    # The rows of the matrix are in the order of the last axis first.
    matrix = torch.zeros((size, size + 1), device=windows.device)
    for row, factor in enumerate(reversed(factors)):
        matrix[row, row] = 1 / factor
    grid = F.affine_grid(matrix.expand(len(windows), -1, -1), list(windows.shape), align_corners=False)
    return F.grid_sample(windows.float(), grid, padding_mode="border", align_corners=False)


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Return (2, K): the smaller of two probabilities, and their sum, over all voxels of (B, K, *S), doubled and not.

    The first row over the second is the Dice of the two answers (soft: no voxel counts more for being at a threshold).
    """
    # Class by class: in double precision all at once they would take six times the memory of an answer.
    pairs = list(zip(first.unbind(1), second.unbind(1), strict=True))
    shared = [2 * torch.minimum(one, other).sum(dtype=torch.float64) for one, other in pairs]
    both = [(one + other).sum(dtype=torch.float64) for one, other in pairs]
    return torch.stack([torch.stack(shared), torch.stack(both)])
