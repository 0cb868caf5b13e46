"""Windows in which there is nothing but air: no network needs to see them."""

from __future__ import annotations

import torch
from torch import Tensor

from medseg.inference.sliding_window import Predictor

SHARE = 0.05
"""Of the way from an image's darkest voxel to what is bright in it: what lies above is no air."""


def air_limits(image: Tensor) -> Tensor:
    """Return for each channel of a prepared image (C, I, J, K) the largest value that air may have: (C,).

    What is bright is the mean of the voxels above the mean, which a few extreme voxels hardly change: a limit by the
    maximum would take dark organs for air. Of a CT this is about 50 HU above air.
    """
    limits = []
    for channel in image:
        lowest, mean = channel.min(), channel.mean()
        total, count = torch.zeros((), dtype=torch.float64, device=image.device), 0
        for plane in channel:  # so that no second image is in memory
            above = plane[plane > mean]
            total, count = total + above.sum(dtype=torch.float64), count + above.numel()
        bright = (total / count).to(lowest.dtype) if count else lowest
        limits.append(lowest + SHARE * (bright - lowest))
    return torch.stack(limits)


def skipping_air(predict: Predictor, limits: Tensor, background: Tensor) -> Predictor:
    """Return a predictor that answers `background` (K,) for windows with all channels within `limits` (C,)."""

    def some(windows: Tensor) -> Tensor:
        brightest = windows.flatten(2).amax(2)
        seen = (brightest > limits).any(1)
        if bool(seen.all()):
            return predict(windows)
        shape = (len(windows), len(background), *windows.shape[2:])
        logits = background.reshape(1, -1, *[1] * (windows.ndim - 2)).expand(shape).clone()
        if bool(seen.any()):
            logits[seen] = predict(windows[seen])
        return logits

    return some
