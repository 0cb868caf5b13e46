"""Logits of a whole volume from overlapping windows, by MONAI's sliding window with Gaussian weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from medseg.device import autocast
from medseg.inference.windows import slide_evenly
from medseg.planning.plan import Plan

LARGEST = 1.5
"""Axes up to this many patches long are predicted in one window."""
Predictor = Callable[[Tensor], Tensor]


def window_logits(networks: Sequence[nn.Module], plan: Plan, *, mirror: bool) -> Predictor:
    """Return windows (B, C, *patch) -> logits (B, K, *patch): the mean over networks and mirrorings."""
    flat = plan.dimensions == 2
    axes = plan.augmentation.mirror_axes if mirror else ()
    flips = [f for n in range(len(axes) + 1) for f in itertools.combinations(axes, n)]

    def predict(windows: Tensor) -> Tensor:
        if flat:
            windows = windows[..., 0]
        total: Tensor | None = None
        for network, flip in itertools.product(networks, flips):
            dims = [axis + 2 for axis in flip]
            with autocast(windows.device.type, plan.precision):
                logits = network(windows.flip(dims) if dims else windows)
            logits = logits.float().flip(dims) if dims else logits.float()
            # Not in place: a network may hand back a tensor that is still in use.
            total = logits if total is None else total + logits
        assert total is not None
        total = total / (len(networks) * len(flips))
        return total[..., None] if flat else total

    return predict


def window_size(shape: tuple[int, ...], plan: Plan) -> tuple[int, ...]:
    """Return the window: the patch, but along an axis that is hardly longer than it the whole axis.

    A convolutional network takes any size, and one window of 1.4 patches costs less than two that overlap.
    """
    return tuple(n if 1 < p < n <= LARGEST * p else p for n, p in zip(shape, plan.patch_size, strict=True))


def sparing(predict: Predictor) -> Predictor:
    """Return a predictor that halves its batch of windows, and each half again, while the GPU has no memory for it.

    Raises
    ------
    torch.OutOfMemoryError : there is none for a single window.
    """

    def halved(windows: Tensor) -> Tensor:
        try:
            return predict(windows)
        except torch.OutOfMemoryError:
            if len(windows) == 1:
                raise
        torch.cuda.empty_cache()  # what the failed attempt took, now that nothing refers to it
        return torch.cat([halved(part) for part in windows.chunk(2)])

    return halved


@torch.inference_mode()
def slide(image: Tensor, networks: Sequence[nn.Module], plan: Plan, *, mirror: bool) -> Tensor:
    """Return logits (K, I, J, K') of a prepared image (C, I, J, K').

    For models of nnU-Net's the windows lie and weigh as there (medseg.inference.windows).
    Peak memory is about (K + 1) * 4 bytes a voxel for logits and weights, and one batch of windows.
    """
    predict = sparing(window_logits(networks, plan, mirror=mirror))
    if plan.nnunet is not None:
        return slide_evenly(image, predict, plan.patch_size, overlap=plan.overlap)
    inferer = SlidingWindowInferer(
        roi_size=window_size(tuple(image.shape[1:]), plan),
        sw_batch_size=8 if plan.dimensions == 2 else 1,
        overlap=[plan.overlap if n > 1 else 0.0 for n in plan.patch_size],
        mode="gaussian",
    )
    logits = inferer(image[None], predict)
    return torch.as_tensor(logits)[0]
