"""Where the windows of a sliding window lie, and how much each of their voxels counts.

Models of nnU-Net's have evenly spaced windows as there (nnunetv2.inference.sliding_window_prediction and
predict_from_raw_data), with two differences of arithmetic: sums are in single precision where nnU-Net has half, and
slices of a 2-D network are predicted several at a time. All others have those of MONAI's SlidingWindowInferer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from medseg.inference.presets import EXACT, LONGEST, Preset
from medseg.planning.plan import Plan, Triple

SLICES = 8
"""Slices of a 2-D network that are predicted together."""
PEAK = 10.0
"""Weight of the centre of a window of nnU-Net's."""


@dataclass(frozen=True)
class Layout:
    """The windows over an image.

    Attributes
    ----------
    shape, padded : of the image, and with the zeros that make it as large as a window.
    before : zeros before the image along each axis.
    window : its size; of a 2-D network (*, *, 1).
    starts : along each axis, where windows begin in the padded image.
    weights : (window), how much each voxel of a window counts.
    along : the axis along which the image is done plane by plane; None: the one that takes least memory.
    """

    shape: Triple
    padded: Triple
    before: Triple
    window: Triple
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    weights: Tensor
    along: int | None = None

    @property
    def flat(self) -> bool:
        """Whether windows are slices along the last axis."""
        return self.window[2] == 1

    @property
    def deep(self) -> Triple:
        """What is predicted at once: a window, of a 2-D network several slices."""
        i, j, k = self.window
        return (i, j, min(SLICES, self.padded[2])) if self.flat else (i, j, k)

    @property
    def axis(self) -> int:
        """Along which the image is done plane by plane: the one that is the most windows long, slices where flat."""
        if self.along is not None:
            return self.along
        if self.flat:
            return 2
        return max(range(3), key=lambda axis: (self.padded[axis] / self.window[axis], -axis))

    @property
    def turned(self) -> Layout:
        """The same windows over the image that is turned around along its axis."""
        axis = self.axis
        behind = self.padded[axis] - self.shape[axis] - self.before[axis]
        if self.flat and axis == 2:  # slices are by themselves, so that it does not matter which are done together
            starts = self.starts[2]
        else:
            starts = tuple(self.padded[axis] - self.window[axis] - start for start in reversed(self.starts[axis]))
        i, j, k = (starts if other == axis else self.starts[other] for other in range(3))
        before = _triple([behind if other == axis else self.before[other] for other in range(3)])
        return replace(self, before=before, starts=(i, j, k), weights=self.weights.flip(axis))

    def pad(self, image: Tensor) -> Tensor:
        """Return (C, *padded) with the image (C, *shape) in it."""
        pads = [
            p
            for axis in (2, 1, 0)
            for p in (self.before[axis], self.padded[axis] - self.shape[axis] - self.before[axis])
        ]
        return F.pad(image, pads) if any(pads) else image


def layout(shape: Sequence[int], plan: Plan, preset: Preset = EXACT) -> Layout:
    """Return the windows of a plan over a prepared image of size `shape` (I, J, K).

    The overlap is the plan's: a preset has changed it already (medseg.inference.presets.at_quality).
    """
    image = _triple(shape)
    window = window_size(image, plan, preset)
    padded = _triple([max(n, w) for n, w in zip(image, window, strict=True)])
    before = _triple([(p - n) // 2 for p, n in zip(padded, image, strict=True)])
    find = window_starts if plan.nnunet is not None else dense_starts
    i, j, k = (tuple(range(p) if w == 1 else find(p, w, 1 - plan.overlap)) for p, w in zip(padded, window, strict=True))
    if window[2] == 1:
        k = tuple(range(0, padded[2], SLICES))
    return Layout(image, padded, before, window, (i, j, k), _weights(window, plan))


def window_size(shape: Sequence[int], plan: Plan, preset: Preset = EXACT) -> Triple:
    """Return the window: the patch, but along an axis that is hardly longer than it the whole axis.

    A convolutional network takes any size, and one window of 1.4 patches costs less than two that overlap. Models of
    nnU-Net's have its windows unless the preset says otherwise; those of MONAI bundles, whose networks need not take
    another size, always have theirs.
    """
    if plan.monai is not None:
        return plan.patch_size
    longest = preset.longest or (LONGEST if plan.nnunet is None else 1.0)
    window = [n if 1 < p < n <= longest * p else p for n, p in zip(shape, plan.patch_size, strict=True)]
    while math.prod(window) > preset.room * math.prod(plan.patch_size):
        # The axis that grows most gains least: it is the nearest to needing a second window anyway.
        axis = max(range(3), key=lambda each: window[each] / plan.patch_size[each])
        window[axis] = plan.patch_size[axis]
    return _triple(window)


def window_starts(size: int, window: int, step: float) -> list[int]:
    """Return where windows begin along an axis of `size` (at least `window`), at most `step` windows apart, evenly."""
    count = math.ceil((size - window) / (window * step)) + 1
    return [round((size - window) / (count - 1) * n) for n in range(count)] if count > 1 else [0]


def dense_starts(size: int, window: int, step: float) -> list[int]:
    """Return where MONAI's windows begin along an axis: `step` windows apart, the last one at the end."""
    interval = max(1, int(window * step))
    count = math.ceil((size - window) / interval) + 1
    return [min(n * interval, size - window) for n in range(count)]


def _weights(window: Triple, plan: Plan) -> Tensor:
    if plan.monai is not None and plan.monai.window == "constant":
        return torch.ones(window)
    if plan.nnunet is None:
        return gaussian(window)
    return importance(window[:2])[..., None] if window[2] == 1 else importance(window)


def gaussian(window: Sequence[int]) -> Tensor:
    """Return MONAI's weights of a window: a Gaussian of an eighth of its size, nowhere below a thousandth.

    Source: monai.data.utils.compute_importance_map, whose import takes seconds and 280 MiB.
    """
    total = torch.ones(())
    for size in window:
        places = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        total = total[..., None] * torch.exp(places**2 / (-2 * (0.125 * size) ** 2))
    return total.clamp(min=max(float(total.min()), 1e-3))


def importance(window: Sequence[int]) -> Tensor:
    """Return nnU-Net's weights of a window: a Gaussian of an eighth of its size, rounded to half precision as there.

    What is too small for half precision counts like the smallest number that is not.
    """
    total = np.ones(())
    for size in window:
        impulse = np.zeros(size)
        impulse[size // 2] = 1
        total = total[..., None] * ndimage.gaussian_filter1d(impulse, size / 8, mode="constant")
    weights = torch.from_numpy(total / total.max() * PEAK).half().float()
    return weights.clamp(min=float(weights[weights > 0].min()))


def _triple(numbers: Sequence[int]) -> Triple:
    i, j, k = (int(n) for n in numbers)
    return i, j, k
