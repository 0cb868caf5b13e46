"""Sliding window as in nnU-Net v2, for its models: where windows lie, and how much each of their voxels counts.

Source: nnunetv2.inference.sliding_window_prediction and predict_from_raw_data. Two differences of arithmetic: sums are
in single precision where nnU-Net has half, and slices of a 2-D network are predicted several at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

SLICES = 8
"""Slices of a 2-D network that are predicted together."""
PEAK = 10.0
"""Weight of a window's centre."""


def window_starts(size: int, window: int, step: float) -> list[int]:
    """Return where windows begin along an axis of `size` (at least `window`), at most `step` windows apart, evenly."""
    count = math.ceil((size - window) / (window * step)) + 1
    return [round((size - window) / (count - 1) * n) for n in range(count)] if count > 1 else [0]


def importance(window: Sequence[int]) -> Tensor:
    """Return the weights of a window: a Gaussian of an eighth of its size, rounded to half precision as nnU-Net's is.

    What is too small for half precision counts like the smallest number that is not.
    """
    total = np.ones(())
    for size in window:
        impulse = np.zeros(size)
        impulse[size // 2] = 1
        total = total[..., None] * ndimage.gaussian_filter1d(impulse, size / 8, mode="constant")
    weights = torch.from_numpy(total / total.max() * PEAK).half().float()
    return weights.clamp(min=float(weights[weights > 0].min()))


def pad_to_window(image: Tensor, window: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """Pad (C, I, J, K) with zeros on both sides to at least `window`; return it and where the image lies in it."""
    missing = [max(0, w - n) for w, n in zip(window, image.shape[1:], strict=True)]
    before = [m // 2 for m in missing]
    pads = [p for b, m in zip(before[::-1], missing[::-1], strict=True) for p in (b, m - b)]
    place = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    return (F.pad(image, pads) if any(pads) else image), place


def slide_evenly(
    image: Tensor, predict: Callable[[Tensor], Tensor], window: Sequence[int], *, overlap: float
) -> Tensor:
    """Return logits (K, I, J, K') of an image (C, I, J, K'): the weighted mean over evenly spaced windows.

    Parameters
    ----------
    predict : windows (B, C, *window) -> logits (B, K, *window).
    window : its size; of a 2-D network (*, *, 1).
    """
    padded, place = pad_to_window(image, window)
    flat = window[2] == 1
    weights = importance(window[:2])[..., None] if flat else importance(window)
    weights = weights.to(image.device)
    rows = [window_starts(n, w, 1 - overlap) for n, w in zip(padded.shape[1:], window, strict=True)]
    deep = SLICES if flat else 1
    total: Tensor | None = None
    seen = torch.zeros(padded.shape[1:], device=image.device)
    for i, j, k in itertools.product(rows[0], rows[1], rows[2][::deep]):
        depth = min(deep, padded.shape[3] - k) if flat else window[2]
        box = (slice(i, i + window[0]), slice(j, j + window[1]), slice(k, k + depth))
        part = padded[(slice(None), *box)]
        windows = part.permute(3, 0, 1, 2)[..., None] if flat else part[None]
        logits = predict(windows)
        # Slices stand where the batch was.
        logits = logits[..., 0].permute(1, 2, 3, 0) if flat else logits[0]
        if total is None:
            total = torch.zeros((logits.shape[0], *padded.shape[1:]), device=image.device)
        total[(slice(None), *box)] += logits * weights
        seen[box] += weights
    assert total is not None
    return (total / seen)[(slice(None), *place)]
