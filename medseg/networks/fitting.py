"""Any input size for networks whose strides divide only some: pad at the end of each axis, crop the answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(image: Tensor, divisor: Sequence[int]) -> Tensor:
    """Pad (B, C, *S) with zeros (the mean after normalisation) to a multiple of the total stride along each axis.

    A single voxel at the coarsest stage has no deviation to be normalised by, so there are at least two of them.
    A program that is exported (medseg.exchange) takes multiples only, and nothing in it pads.
    """
    if torch.compiler.is_exporting():
        return image
    sizes = [-(-n // d) * d for n, d in zip(image.shape[2:], divisor, strict=True)]
    if sizes == list(divisor):
        sizes[-1] *= 2
    return pad_to(image, sizes)


def pad_to(image: Tensor, sizes: Sequence[int]) -> Tensor:
    """Pad (B, C, *S) with zeros at the end of each axis up to `sizes`."""
    padding: list[int] = []
    for have, want in zip(reversed(image.shape[2:]), reversed(sizes), strict=True):
        padding += [0, want - have]
    return F.pad(image, padding) if any(padding) else image


def crop_to(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Keep the first `size` voxels along each spatial axis (exported: all, see `pad_to_multiple`)."""
    if torch.compiler.is_exporting():
        return logits
    for axis, length in enumerate(size, start=2):
        logits = logits.narrow(axis, 0, length)
    return logits
