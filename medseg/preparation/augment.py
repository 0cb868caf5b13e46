"""Augmentation of whole batches on the training device: parameters are drawn first, then applied without chance.

Space: one affine map, mirror and elastic deformation per patch, all in one ``grid_sample`` that reads the larger
region and writes the patch. Intensity: rows of AUGMENTATIONS, each drawn per patch. Ranges follow nnU-Net's
(Isensee et al. 2021, supplement), which are proven on many datasets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from medseg.planning.plan import Augmentation, Triple
from medseg.registry import Registry

CONTROL_POINTS = 5
"""Of the elastic deformation, along each axis."""
FLAT = 3
"""A patch that is so many times longer than thick is turned within its slices only."""


@dataclass(frozen=True)
class Space:
    """Drawn geometry of a batch.

    Attributes
    ----------
    matrices : (B, 3, 3), patch voxel offset from the centre -> region voxel offset from its centre.
    control : (B, 3, a, b, c) displacement of control points in voxels; None for none.
    """

    matrices: Tensor
    control: Tensor | None


def thin_axis(size: Triple, dimensions: int) -> int | None:
    """Return the axis along which nothing is turned, scaled or bent: the slices' in 2-D, a patch's very short one.

    A flat patch that is tilted leaves its region; nnU-Net turns it within its slices too.
    """
    if dimensions == 2:
        return 2
    shortest = size.index(min(size))
    return shortest if max(size) > FLAT * size[shortest] else None


def draw_space(generator: Generator, batch: int, plan: Augmentation, *, size: Triple, dimensions: int) -> Space:
    """Draw rotation, scale, mirroring and elastic deformation for `batch` patches of `size`."""
    thin = thin_axis(size, dimensions)
    matrices = torch.eye(3).repeat(batch, 1, 1)
    moved = _chance(generator, batch, plan.spatial_probability)
    angles = (torch.rand((batch, 3), generator=generator) * 2 - 1) * plan.rotation * torch.pi / 180
    low, high = plan.scale
    zoom = low + (high - low) * torch.rand(batch, generator=generator)
    for axis in range(3) if thin is None else (thin,):
        matrices = matrices @ _rotation(angles[:, axis] * moved, axis)
    scale = torch.where(moved, zoom, torch.ones(batch))
    matrices = matrices * scale[:, None, None]
    if thin is not None:
        matrices[:, thin, :] = matrices[:, :, thin] = torch.eye(3)[thin]
    for axis in plan.mirror_axes:
        sign = 1 - 2 * _chance(generator, batch, 0.5).float()
        matrices[:, :, axis] *= sign[:, None]
    control = None
    if plan.elastic > 0 and plan.spatial_probability > 0:
        points = [1 if axis == thin else CONTROL_POINTS for axis in range(3)]
        # A fifth of the distance of control points at most: more would fold small patches.
        reach = torch.tensor([min(plan.elastic, (n - 1) / (CONTROL_POINTS - 1) / 5) for n in size])
        if thin is not None:
            reach[thin] = 0
        control = torch.randn((batch, 3, *points), generator=generator) * reach.reshape(1, 3, 1, 1, 1)
        control = control * moved[:, None, None, None, None]
    return Space(matrices, control)


def apply_space(images: Tensor, masks: Tensor, space: Space, size: Triple) -> tuple[Tensor, Tensor]:
    """Write patches of `size` from regions: images (B, C, *R) trilinear, masks (B, 1, *R) nearest neighbour.

    Outside of the region the image is 0 (the mean) and the mask 0. Patches that are only mirrored are cut out
    exactly.
    """
    image = images.new_empty((*images.shape[:2], *size))
    mask = masks.new_empty((*masks.shape[:2], *size))
    spare = [have - want for have, want in zip(images.shape[2:], size, strict=True)]
    exact = _only_mirrored(space) & all(n >= 0 and n % 2 == 0 for n in spare)
    box = (slice(None), *(slice(n // 2, n // 2 + want) for n, want in zip(spare, size, strict=True)))
    for number in exact.nonzero().flatten().tolist():
        mirrored = [axis + 1 for axis in range(3) if space.matrices[number, axis, axis] < 0]
        image[number] = images[number][box].flip(mirrored)
        mask[number] = masks[number][box].flip(mirrored)
    others = (~exact).nonzero().flatten()
    if len(others):
        control = None if space.control is None else space.control[others]
        moved = Space(space.matrices[others], control)
        others = others.to(images.device)
        image[others], mask[others] = _sampled(images[others], masks[others], moved, size)
    return image, mask


def _only_mirrored(space: Space) -> Tensor:
    """Return (B,) bool: no change of a patch beyond mirroring."""
    mirrored = (space.matrices.abs() == torch.eye(3)).all(dim=2).all(dim=1)
    return mirrored if space.control is None else mirrored & (space.control == 0).flatten(1).all(dim=1)


def _sampled(images: Tensor, masks: Tensor, space: Space, size: Triple) -> tuple[Tensor, Tensor]:
    """Sample patches at their places in the regions, on the device of the images."""
    device = images.device
    axes = [torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2 for n in size]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, -1, 3)
    points = (offsets @ space.matrices.to(device).transpose(1, 2)).reshape(-1, *size, 3)
    if space.control is not None:
        field = F.interpolate(space.control.to(device), size, mode="trilinear", align_corners=True)
        points = points + field.permute(0, 2, 3, 4, 1)
    half = torch.tensor([max(n - 1, 1) / 2 for n in images.shape[2:]], device=device)
    grid = (points / half).flip(-1)
    image = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    mask = F.grid_sample(masks.float(), grid, mode="nearest", padding_mode="zeros", align_corners=True)
    return image, mask.to(masks.dtype)


def _rotation(angles: Tensor, axis: int) -> Tensor:
    """Return (B, 3, 3) rotations about one axis."""
    first, second = [a for a in range(3) if a != axis]
    result = torch.eye(3).repeat(len(angles), 1, 1)
    result[:, first, first] = result[:, second, second] = angles.cos()
    result[:, first, second] = -angles.sin()
    result[:, second, first] = angles.sin()
    return result


def _chance(generator: Generator, batch: int, probability: float) -> Tensor:
    return torch.rand(batch, generator=generator) < probability


@dataclass(frozen=True)
class Intensity:
    """One kind of change of intensities.

    Attributes
    ----------
    draw : (generator, batch) -> one number per patch.
    apply : (image (C, *S), number) -> changed image, a pure function but for `noise`, whose number seeds it.
    """

    draw: Callable[[Generator, int], Tensor]
    apply: Callable[[Tensor, float], Tensor]


def _uniform(low: float, high: float) -> Callable[[Generator, int], Tensor]:
    return lambda generator, batch: low + (high - low) * torch.rand(batch, generator=generator, dtype=torch.float64)


def _noise(image: Tensor, number: float) -> Tensor:
    """Add Gaussian noise; the number holds its deviation (0 to 0.3) and, by its digits, the seed."""
    generator = torch.Generator(device=image.device).manual_seed(int(number * 2**40))
    return image + number * torch.randn(image.shape, generator=generator, device=image.device)


def _blur(image: Tensor, sigma: float) -> Tensor:
    radius = max(1, int(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(1, image.ndim):
        if image.shape[axis] > 1:
            rows = image.movedim(axis, -1)
            padded = F.pad(rows.reshape(-1, 1, rows.shape[-1]), (radius, radius), mode="replicate")
            image = F.conv1d(padded, kernel[None, None]).reshape(rows.shape).movedim(-1, axis)
    return image


def _contrast(image: Tensor, factor: float) -> Tensor:
    axes = tuple(range(1, image.ndim))
    mean = image.mean(dim=axes, keepdim=True)
    low, high = image.amin(dim=axes, keepdim=True), image.amax(dim=axes, keepdim=True)
    return ((image - mean) * factor + mean).clamp(low, high)


def _gamma(image: Tensor, exponent: float) -> Tensor:
    """Raise each channel to a power between its extremes, keeping mean and deviation (negative: inverted)."""
    axes = tuple(range(1, image.ndim))
    sign = -1.0 if exponent < 0 else 1.0
    x = image * sign
    low, high = x.amin(dim=axes, keepdim=True), x.amax(dim=axes, keepdim=True)
    mean, deviation = x.mean(dim=axes, keepdim=True), x.std(dim=axes, correction=0, keepdim=True)
    powered = ((x - low) / (high - low).clamp(min=1e-6)) ** abs(exponent)
    spread = powered.std(dim=axes, correction=0, keepdim=True).clamp(min=1e-6)
    return ((powered - powered.mean(dim=axes, keepdim=True)) / spread * deviation + mean) * sign


def _low_resolution(image: Tensor, factor: float) -> Tensor:
    size = tuple(image.shape[1:])
    small = tuple(max(1, round(n * factor)) for n in size)
    down = F.interpolate(image[None], small, mode="nearest")
    return F.interpolate(down, size, mode="trilinear")[0]


def _signed_gamma(generator: Generator, batch: int) -> Tensor:
    size = _uniform(0.7, 1.5)(generator, batch)
    inverted = torch.rand(batch, generator=generator) < 0.3
    return torch.where(inverted, -size, size)


AUGMENTATIONS: Registry[Intensity] = Registry(
    "augmentations",
    {
        "noise": Intensity(_uniform(0.0, 0.3), _noise),
        "blur": Intensity(_uniform(0.5, 1.0), _blur),
        "brightness": Intensity(_uniform(0.75, 1.25), lambda image, factor: image * factor),
        "contrast": Intensity(_uniform(0.75, 1.25), _contrast),
        "low_resolution": Intensity(_uniform(0.5, 1.0), _low_resolution),
        "gamma": Intensity(_signed_gamma, _gamma),
    },
)
"""In the order in which they are applied; the plan holds the probability of each under its name."""


def augment(
    images: Tensor,
    masks: Tensor,
    plan: Augmentation,
    size: Triple,
    *,
    seed: int,
    dimensions: int,
    whole: int | None = None,
    rows: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Turn regions into augmented patches; the same seed gives the same patches.

    Parameters
    ----------
    images : (B, C, *R) float32 on the training device.
    masks : (B, 1, *R) integers.
    size : (I, J, K) of the patches.
    whole, rows : size of a larger batch, and which of its rows `images` are: each is changed as in the whole batch.

    Returns
    -------
    images (B, C, *size), masks (B, 1, *size).
    """
    generator = torch.Generator().manual_seed(seed)
    batch = whole or images.shape[0]
    space = draw_space(generator, batch, plan, size=size, dimensions=dimensions)
    control = None if space.control is None else space.control[rows]
    space = Space(space.matrices[rows], control)
    images, masks = apply_space(images, masks, space, size)
    for name, row in AUGMENTATIONS.items():
        numbers = row.draw(generator, batch)[rows]
        chosen = _chance(generator, batch, getattr(plan, name, 0.0))[rows]
        if chosen.any():
            changed = [
                row.apply(image, float(number)) if use else image
                for image, number, use in zip(images, numbers, chosen, strict=True)
            ]
            images = torch.stack(changed)
    return images, masks
