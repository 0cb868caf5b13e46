"""Random changes of intensities, each on all patches at once that were drawn for it.

Ranges follow nnU-Net's (Isensee et al. 2021, supplement), which are proven on many datasets. Blurring and a lower
resolution are one small matrix along each axis and patch, which is fast on every device. What is given is left as it
is; after the first step a change works in place, as fresh memory costs more than most of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from medseg.registry import Registry

WIDEST = 3
"""Voxels that a blur reaches, at its largest deviation of 1."""


@dataclass(frozen=True)
class Intensity:
    """One kind of change of intensities.

    Attributes
    ----------
    draw : (generator, batch) -> one number per patch, float64 on the CPU.
    apply : (images (N, C, I, J, K), numbers (N,) on the CPU) -> changed images, a pure function but for `noise`, whose
        numbers seed it.
    """

    draw: Callable[[Generator, int], Tensor]
    apply: Callable[[Tensor, Tensor], Tensor]


def _uniform(low: float, high: float) -> Callable[[Generator, int], Tensor]:
    return lambda generator, batch: low + (high - low) * torch.rand(batch, generator=generator, dtype=torch.float64)


def _per_patch(numbers: Tensor, images: Tensor) -> Tensor:
    return numbers.to(images).reshape(-1, 1, 1, 1, 1)


def _noise(images: Tensor, numbers: Tensor) -> Tensor:
    """Add Gaussian noise; a number holds its deviation (0 to 0.3) and, by its digits, the seed."""
    noise = torch.empty_like(images)
    for patch, number in zip(noise, numbers.tolist(), strict=True):
        patch.normal_(generator=torch.Generator(device=images.device).manual_seed(int(number * 2**40)))
    return noise.mul_(_per_patch(numbers, images)).add_(images)


def _blur(images: Tensor, sigmas: Tensor) -> Tensor:
    reach = torch.arange(-WIDEST, WIDEST + 1)
    kernels = torch.exp(-0.5 * (reach / sigmas[:, None]) ** 2)
    kernels = kernels * (reach.abs() <= (3 * sigmas).int().clamp(min=1)[:, None])
    kernels = (kernels / kernels.sum(1, keepdim=True)).float()
    banded = {n: _banded(kernels, n) for n in set(images.shape[2:]) if n > 1}
    return _along_axes(images, [banded.get(n) for n in images.shape[2:]])


@lru_cache(maxsize=64)
def _reached(size: int) -> Tensor:
    """Return (size, 2 WIDEST + 1): what a blur reads for each voxel, the borders continued by their last voxel."""
    places = torch.arange(size)[:, None] + torch.arange(-WIDEST, WIDEST + 1)
    return places.clamp_(0, size - 1)


def _banded(kernels: Tensor, size: int) -> Tensor:
    """Return (N, size, size): convolution with (N, 2 WIDEST + 1)."""
    places = _reached(size).expand(len(kernels), size, -1)
    weights = kernels[:, None].expand(-1, size, -1)
    return torch.zeros(len(kernels), size, size).scatter_add_(2, places, weights)


def _along_axes(images: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Multiply each axis of (N, C, I, J, K) by matrices (N, n, n); None leaves it alone."""
    first, second, third = (None if m is None else m.to(images) for m in matrices)
    if first is not None:
        images = (first[:, None] @ images.flatten(3)).reshape(images.shape)
    if second is not None:
        images = second[:, None, None] @ images
    if third is not None:
        images = (images.flatten(1, 3) @ third.transpose(1, 2)).reshape(images.shape)
    return images


def _contrast(images: Tensor, factors: Tensor) -> Tensor:
    axes = (2, 3, 4)
    mean = images.mean(dim=axes, keepdim=True)
    low, high = images.amin(dim=axes, keepdim=True), images.amax(dim=axes, keepdim=True)
    return (images - mean).mul_(_per_patch(factors, images)).add_(mean).clamp_(low, high)


def _gamma(images: Tensor, exponents: Tensor) -> Tensor:
    """Raise each channel to a power between its extremes, keeping mean and deviation (negative: inverted)."""
    axes = (2, 3, 4)
    exponent = _per_patch(exponents, images)
    sign = exponent.sign()
    x = images * sign
    low, high = x.amin(dim=axes, keepdim=True), x.amax(dim=axes, keepdim=True)
    mean, deviation = x.mean(dim=axes, keepdim=True), x.std(dim=axes, correction=0, keepdim=True)
    powered = x.sub_(low).div_((high - low).clamp_(min=1e-6)).pow_(exponent.abs())
    spread = powered.std(dim=axes, correction=0, keepdim=True).clamp(min=1e-6)
    powered.sub_(powered.mean(dim=axes, keepdim=True)).div_(spread)
    return powered.mul_(deviation).add_(mean).mul_(sign)


def _low_resolution(images: Tensor, factors: Tensor) -> Tensor:
    shares = factors.tolist()
    size = images.shape[2:]
    return _along_axes(images, [torch.stack([_coarse(n, max(1, round(n * f))) for f in shares]) for n in size])


@lru_cache(maxsize=1024)
def _coarse(size: int, small: int) -> Tensor:
    """Return (size, size): `size` voxels brought to `small` by nearest neighbour and back linearly."""
    down = F.interpolate(torch.eye(size)[None], small, mode="nearest")
    return F.interpolate(down, size, mode="linear")[0].T.contiguous()


def _signed_gamma(generator: Generator, batch: int) -> Tensor:
    size = _uniform(0.7, 1.5)(generator, batch)
    inverted = torch.rand(batch, generator=generator) < 0.3
    return torch.where(inverted, -size, size)


AUGMENTATIONS: Registry[Intensity] = Registry(
    "augmentations",
    {
        "noise": Intensity(_uniform(0.0, 0.3), _noise),
        "blur": Intensity(_uniform(0.5, 1.0), _blur),
        "brightness": Intensity(_uniform(0.75, 1.25), lambda images, factors: images * _per_patch(factors, images)),
        "contrast": Intensity(_uniform(0.75, 1.25), _contrast),
        "low_resolution": Intensity(_uniform(0.5, 1.0), _low_resolution),
        "gamma": Intensity(_signed_gamma, _gamma),
    },
)
"""In the order in which they are applied; the plan holds the probability of each under its name."""
