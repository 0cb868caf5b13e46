"""Patches drawn through their transform: each voxel is read where it comes from, once, with nothing in between.

On a GPU that is ``grid_sample`` over the batch. On the CPU torch's volumetric ``grid_sample`` is not vectorised; here
the eight neighbours are gathered from the flat image, slab by slab, which takes a fraction of its time and is more
exact: coordinates are voxels, not shares of the image's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.planning.plan import Triple
from medseg.preparation.space import Space

SLAB = 2**17
"""Voxels that are sampled at once on the CPU: what is needed of them stays near a core."""
ROUNDING = 1e-3
"""Voxels: far more than coordinates in single precision are off by."""


@dataclass(frozen=True)
class Region:
    """What is read of a case for one patch.

    Attributes
    ----------
    image, mask : (C, *R) float32 and (1, *R) integers; outside of them is what their border holds
        (see `sampling.read_through`).
    centre : voxel of the region, not always a whole one, at which the patch's centre lies.
    """

    image: Tensor
    mask: Tensor
    centre: tuple[float, float, float]

    def to(self, device: torch.device) -> Region:
        """Return the region on a device."""
        return Region(self.image.to(device), self.mask.to(device), self.centre)


def apply_space(regions: Sequence[Region], space: Space, size: Triple) -> tuple[Tensor, Tensor]:
    """Return patches of `size`, one per region: images (B, C, *size) trilinear, masks (B, 1, *size) nearest neighbour.

    Patches that are only mirrored are cut out exactly; their regions are the patch itself or larger by whole voxels on
    both sides.
    """
    first = regions[0]
    images = first.image.new_empty((len(regions), first.image.shape[0], *size))
    masks = first.mask.new_empty((len(regions), 1, *size))
    moved = []
    for number, unmoved in enumerate(space.unmoved().tolist()):
        region = regions[number]
        start = [c - (n - 1) / 2 for c, n in zip(region.centre, size, strict=True)]
        stop = [s + n for s, n in zip(start, size, strict=True)]
        inside = all(s >= 0 and t <= n for s, t, n in zip(start, stop, region.image.shape[1:], strict=True))
        if unmoved and inside and all(s == int(s) for s in start):
            box = (slice(None), *(slice(int(s), int(t)) for s, t in zip(start, stop, strict=True)))
            mirrored = [axis + 1 for axis in range(3) if space.matrices[number, axis, axis] < 0]
            images[number] = region.image[box].flip(mirrored)
            masks[number] = region.mask[box].flip(mirrored)
        else:
            moved.append(number)
    if moved and first.image.device.type == "cpu":
        for number in moved:
            _gathered(regions[number], _Points(space, number, size), images[number], masks[number])
    elif moved:
        control = None if space.control is None else space.control[moved]
        found = _sampled([regions[n] for n in moved], Space(space.matrices[moved], control), size)
        images[moved], masks[moved] = found
    return images, masks


@lru_cache(maxsize=64)
def linear_matrix(before: int, after: int) -> Tensor:
    """Return the matrix (after, before) of linear interpolation from first to last point along one axis."""
    columns: Tensor = F.interpolate(torch.eye(before)[None], after, mode="linear", align_corners=True)[0]
    return columns.t().contiguous()


class _Points:
    """Where the voxels of one patch come from, as offsets from its centre in the image, slab by slab."""

    def __init__(self, space: Space, number: int, size: Triple) -> None:
        self.matrix = space.matrices[number].tolist()
        self.axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in size]
        self.last = linear_matrix(1, 1)
        self.field: Tensor | None = None
        self.bend = [0.0, 0.0, 0.0]
        if space.control is not None and bool((space.control[number] != 0).any()):
            control = space.control[number]
            first, second, self.last = (linear_matrix(p, n) for p, n in zip(control.shape[1:], size, strict=True))
            self.field = torch.einsum("xa,yb,dabc->dxyc", first, second, control)
            self.bend = control.abs().flatten(1).amax(1).tolist()

    def slab(self, axis: int, rows: slice, centre: float, out: Tensor) -> None:
        """Fill `out` (rows, J, K) with coordinates along an axis."""
        a, b, c = (m * x for m, x in zip(self.matrix[axis], self.axes, strict=True))
        plane = (a[rows] + centre)[:, None] + b
        torch.add(plane[:, :, None], c, out=out)
        if self.field is not None:
            out.add_(self.field[axis, rows] @ self.last.t())

    def within(self, axis: int, rows: slice, centre: float, size: int) -> bool:
        """Tell whether all coordinates of a slab surely lie between the first and the last of `size` voxels."""
        m = self.matrix[axis]
        half = [(len(a) - 1) / 2 for a in self.axes]
        ends = [m[0] * (end - half[0]) + centre for end in (rows.start, rows.stop - 1)]
        reach = abs(m[1]) * half[1] + abs(m[2]) * half[2] + self.bend[axis] + ROUNDING
        return bool(min(ends) - reach > 0 and max(ends) + reach < size - 1)


def _gathered(region: Region, points: _Points, image: Tensor, mask: Tensor) -> None:
    """Fill one patch, image (C, *size) and mask (1, *size), on the CPU.

    The index of a voxel is put together in floating point, where it is exact: that saves conversions.
    """
    shape = region.image.shape[1:]
    strides = (shape[1] * shape[2], shape[2], 1)
    flat_image, flat_mask = region.image.flatten(1), region.mask.flatten()
    exact = torch.float32 if flat_mask.numel() <= 2**24 else torch.float64
    depth = min(image.shape[1], max(1, SLAB // (image.shape[2] * image.shape[3])))
    for begin in range(0, image.shape[1], depth):
        rows = slice(begin, begin + depth)
        target = image[:, rows]
        low = torch.empty(target.shape[1:])
        base, nearest = torch.zeros((2, *low.shape), dtype=exact)
        shares = []
        for axis, (n, stride) in enumerate(zip(shape, strides, strict=True)):
            x = torch.empty_like(low)
            points.slab(axis, rows, region.centre[axis], x)
            within = points.within(axis, rows, region.centre[axis], n)
            if not within:
                x.clamp_(0, n - 1)
            nearest.add_(torch.round(x, out=low), alpha=stride)
            torch.floor(x, out=low)
            if not within:
                low.clamp_(max=max(n - 2, 0))
            base.add_(low, alpha=stride)
            if n > 1:  # an axis of one voxel has no neighbours
                shares.append((x.sub_(low).flatten(), stride))
        places = base.int().flatten()
        for channel, values in enumerate(flat_image):
            target[channel] = _lerped(values, places, shares).reshape(low.shape)
        mask[0, rows] = flat_mask.index_select(0, nearest.int().flatten()).reshape(low.shape)


def _lerped(values: Tensor, base: Tensor, shares: list[tuple[Tensor, int]]) -> Tensor:
    """Return (N,) trilinear values from eight gathers, at `base` and its neighbours."""
    steps = [(0, stride) for _, stride in shares]
    found = [values[sum(step) :].index_select(0, base) for step in product(*steps)]
    for weight, _ in reversed(shares):
        found = [low.lerp_(high, weight) for low, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def _sampled(regions: Sequence[Region], space: Space, size: Triple) -> tuple[Tensor, Tensor]:
    """Return patches of all regions from one ``grid_sample``, on their device."""
    device = regions[0].image.device
    whole = [max(r.image.shape[axis + 1] for r in regions) for axis in range(3)]
    images = regions[0].image.new_zeros((len(regions), regions[0].image.shape[0], *whole))
    masks = images.new_zeros((len(regions), 1, *whole))
    for number, region in enumerate(regions):
        i, j, k = region.image.shape[1:]
        images[number, :, :i, :j, :k] = region.image
        masks[number, :, :i, :j, :k] = region.mask.to(masks.dtype)
    axes = [torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2 for n in size]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, -1, 3)
    points = (offsets @ space.matrices.to(device).transpose(1, 2)).reshape(-1, *size, 3)
    if space.control is not None:
        field = F.interpolate(space.control.to(device), size, mode="trilinear", align_corners=True)
        points = points + field.permute(0, 2, 3, 4, 1)
    points = points + torch.tensor([r.centre for r in regions], device=device)[:, None, None, None]
    half = torch.tensor([max(n - 1, 1) / 2 for n in whole], device=device)
    middle = torch.tensor([(n - 1) / 2 for n in whole], device=device)
    grid = ((points - middle) / half).flip(-1)
    image = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    mask = F.grid_sample(masks, grid, mode="nearest", padding_mode="zeros", align_corners=True)
    return image, mask.to(regions[0].mask.dtype)
