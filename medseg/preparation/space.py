"""Drawn geometry of patches: affine map, mirroring, elastic deformation, and how far from its centre a patch reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from medseg.planning.plan import Augmentation, Triple

CONTROL_POINTS = 5
"""Of the elastic deformation, along each axis."""
FLAT = 3
"""A patch that is so many times longer than thick is turned within its slices only."""


@dataclass(frozen=True)
class Space:
    """Drawn geometry of a batch.

    Attributes
    ----------
    matrices : (B, 3, 3), patch voxel offset from the centre -> offset in the image from the patch's centre there.
    control : (B, 3, a, b, c) displacement of control points in voxels; None for none.
    """

    matrices: Tensor
    control: Tensor | None

    def rows(self, which: slice) -> Space:
        """Return the geometry of some patches of the batch."""
        return Space(self.matrices[which], None if self.control is None else self.control[which])

    def unmoved(self) -> Tensor:
        """Return (B,) bool: no change of a patch beyond mirroring."""
        mirrored = (self.matrices.abs() == torch.eye(3)).flatten(1).all(dim=1)
        return mirrored if self.control is None else mirrored & (self.control == 0).flatten(1).all(dim=1)

    def margins(self, size: Triple) -> list[Triple]:
        """Return for each patch how many voxels beyond its own size, on each side of an axis, it reads."""
        half = (torch.tensor(size) - 1) / 2
        reach = self.matrices.abs() @ half
        if self.control is not None:
            reach = reach + self.control.abs().flatten(2).amax(2)  # between control points there is no more
        found = []
        for row in (reach - half).tolist():
            i, j, k = (max(0, math.ceil(x - 1e-3)) for x in row)
            found.append((i, j, k))
        return found


def thin_axis(size: Triple, dimensions: int) -> int | None:
    """Return the axis along which nothing is turned, scaled or bent: the slices' in 2-D, a patch's very short one.

    A flat patch that is tilted leaves its region; nnU-Net turns it within its slices too.
    """
    if dimensions == 2:
        return 2
    shortest = size.index(min(size))
    return shortest if max(size) > FLAT * size[shortest] else None


def draw_space(generator: Generator, batch: int, plan: Augmentation, *, size: Triple, dimensions: int) -> Space:
    """Draw rotation, scale, mirroring and elastic deformation for `batch` patches of `size`.

    What is drawn is small: NumPy's functions, which see the same memory, start in a fraction of torch's time.
    """
    thin = thin_axis(size, dimensions)
    moved = chance(generator, batch, plan.spatial_probability).numpy()
    turn = (torch.rand((batch, 3), generator=generator) * 2 - 1) * plan.rotation * torch.pi / 180
    low, high = plan.scale
    zoom = low + (high - low) * torch.rand(batch, generator=generator).numpy()
    matrices = _rotations(turn * torch.from_numpy(moved)[:, None], range(3) if thin is None else (thin,))
    matrices *= np.where(moved, zoom, np.float32(1))[:, None, None]
    if thin is not None:
        matrices[:, thin, :] = matrices[:, :, thin] = np.eye(3)[thin]
    for axis in plan.mirror_axes:
        mirrored = chance(generator, batch, 0.5).numpy()
        matrices[mirrored, :, axis] *= -1
    control = None
    if plan.elastic > 0 and plan.spatial_probability > 0:
        points = [1 if axis == thin else CONTROL_POINTS for axis in range(3)]
        # A fifth of the distance of control points at most: more would fold small patches.
        reach = [min(plan.elastic, (n - 1) / (CONTROL_POINTS - 1) / 5) for n in size]
        if thin is not None:
            reach[thin] = 0
        control = torch.randn((batch, 3, *points), generator=generator)
        control.numpy()[:] *= np.array(reach, np.float32).reshape(1, 3, 1, 1, 1)
        control.numpy()[~moved] *= 0
    return Space(torch.from_numpy(matrices), control)


def _rotations(angles: Tensor, axes: Iterable[int]) -> NDArray[np.float32]:
    """Return (B, 3, 3): for angles (B, 3), a rotation about each of `axes` in turn."""
    cosines, sines = angles.cos().numpy(), angles.sin().numpy()
    found: Tensor | None = None
    for axis in axes:
        first, second = [a for a in range(3) if a != axis]
        rotation = np.zeros((len(angles), 3, 3), np.float32)
        rotation[:, axis, axis] = 1
        rotation[:, first, first] = rotation[:, second, second] = cosines[:, axis]
        rotation[:, first, second] = -sines[:, axis]
        rotation[:, second, first] = sines[:, axis]
        found = torch.from_numpy(rotation) if found is None else found @ torch.from_numpy(rotation)
    assert found is not None
    return found.numpy()


def chance(generator: Generator, batch: int, probability: float) -> Tensor:
    """Return (batch,) bool, each True with this probability."""
    return torch.rand(batch, generator=generator) < probability
