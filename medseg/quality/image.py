"""What an image is like, in numbers by which one that was taken, or damaged, in another way stands out.

All are of the prepared image (turned, cropped to content, resampled, normalised), so that they are what the networks
see: grey values on the scale of the training, noise and sharpness per voxel of one size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel.orientations as orientations
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medseg.volume import Volume

GRID = 5
"""The layout is the image averaged over this many boxes along each axis."""
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
MOST_VOXELS = 1_000_000
"""Of larger images lines that are left out thin them to about this many for the statistics."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ImageSigns:
    """What an image is like.

    Attributes
    ----------
    numbers : name -> value, the same names for all images of a model.
    layout : (channels * GRID³) coarse image, each channel with mean 0 and length 1.
    """

    numbers: dict[str, float]
    layout: Floats


def image_signs(prepared: Tensor, spacing: Sequence[float], source: Volume, names: Sequence[str]) -> ImageSigns:
    """Describe a prepared image (C, I, J, K) float32 on the CPU; `spacing` is its own, `names` those of its channels.

    Cost: some passes over at most MOST_VOXELS voxels a channel and one over all of them.
    """
    numbers = _sizes(prepared, spacing, source)
    for name, channel in zip(names, prepared, strict=True):
        numbers |= {f"{key} of {name}": value for key, value in _channel(channel).items()}
    return ImageSigns(numbers, _layout(prepared))


def _sizes(prepared: Tensor, spacing: Sequence[float], source: Volume) -> dict[str, float]:
    axes = orientations.io_orientation(source.affine)[:, 0].astype(int)
    steps = [source.spacing[list(axes).index(world)] for world in range(3)]
    lengths = [n * s for n, s in zip(prepared.shape[1:], spacing, strict=True)]
    return {f"extent {axis}": math.log(length) for axis, length in zip("RAS", lengths, strict=True)} | {
        f"spacing {axis}": math.log(step) for axis, step in zip("RAS", steps, strict=True)
    }


def _channel(channel: Tensor) -> dict[str, float]:
    flat = _thinned(channel, keep=None).flatten().double().numpy()
    spread = float(flat.std()) or 1.0
    numbers = {
        f"grey p{percent}": float(value)
        for percent, value in zip(PERCENTILES, np.percentile(flat, PERCENTILES), strict=True)
    }
    for axis, letter in enumerate("RAS"):
        if channel.shape[axis] < 4:  # a picture, or too few slices to tell
            numbers |= {f"noise {letter}": 0.0, f"sharpness {letter}": 0.0}
            continue
        lines = _thinned(channel, keep=axis)
        near, far = (_step(lines, axis, lag) for lag in (1, 2))
        numbers[f"noise {letter}"] = math.log(max(near, 1e-6 * spread) / spread)
        numbers[f"sharpness {letter}"] = math.log(max(far, 1e-6 * spread) / max(near, 1e-6 * spread))
    return numbers


def _step(lines: Tensor, axis: int, lag: int) -> float:
    """Return the root of the mean square of differences between voxels `lag` apart along an axis."""
    size = lines.shape[axis]
    difference = lines.narrow(axis, lag, size - lag) - lines.narrow(axis, 0, size - lag)
    return math.sqrt(float(difference.square().mean(dtype=torch.float64)))


def _thinned(channel: Tensor, *, keep: int | None) -> Tensor:
    """Leave out lines of a large (I, J, K) so that about MOST_VOXELS stay; along axis `keep` none."""
    axes = [axis for axis in range(3) if axis != keep and channel.shape[axis] > 1]
    stride = max(1, round((channel.numel() / MOST_VOXELS) ** (1 / max(1, len(axes)))))
    return channel[tuple(slice(None, None, stride if axis in axes else 1) for axis in range(3))]


def _layout(prepared: Tensor) -> Floats:
    coarse = F.adaptive_avg_pool3d(prepared[None].float(), GRID)[0].flatten(1).double().numpy()
    coarse = coarse - coarse.mean(1, keepdims=True)
    length = np.linalg.norm(coarse, axis=1, keepdims=True)
    return np.asarray((coarse / np.where(length > 1e-9, length, 1.0)).ravel())


def layout_numbers(layout: Floats, template: Floats) -> dict[str, float]:
    """Return how much a layout is like another, and how much more so than when it is flipped along each axis."""
    like = _likeness(layout, template)
    boxes = layout.reshape(-1, GRID, GRID, GRID)
    numbers = {"layout": like}
    for axis, letter in enumerate("RAS"):
        numbers[f"direction {letter}"] = like - _likeness(np.flip(boxes, axis + 1).ravel(), template)
    return numbers


def _likeness(layout: Floats, template: Floats) -> float:
    length = float(np.linalg.norm(layout) * np.linalg.norm(template))
    return float(layout @ template) / length if length > 1e-9 else 0.0
