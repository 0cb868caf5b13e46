"""Bring an image to the grid of another one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medseg.volume import Affine, Volume

EDGE = 1e-3
"""Voxels; what lies this far beyond the outer face of a voxel is still inside."""


def resample_to(volume: Volume, reference: Volume) -> tuple[Volume, float]:
    """Resample every channel linearly to the grid of `reference`, whatever its direction, spacing or shear.

    Between the centre and the outer face of a border voxel its value is kept; beyond it stands the lowest value of
    the channel. No low-pass filter is applied: of an image that is much finer than the reference, samples are taken.

    Returns
    -------
    tuple
        The volume (C, I, J, K) float32 with the reference's affine and unit, own notes and meta; and the share of the
        reference's voxels (0 to 1) whose centre lies in a voxel of `volume`.
    """
    from scipy.ndimage import affine_transform

    to_index = np.linalg.inv(volume.affine) @ reference.affine
    outside = _outside(to_index, reference.shape, volume.shape)
    array = np.empty((volume.array.shape[0], *reference.shape), np.float32)
    for channel, target in zip(volume.array, array, strict=True):
        affine_transform(
            np.asarray(channel, np.float32),
            to_index[:3, :3],
            to_index[:3, 3],
            output_shape=reference.shape,
            output=target,
            order=1,
            mode="nearest",
        )
        target[outside] = channel.min()
    moved = replace(volume, array=array, affine=reference.affine, unit=reference.unit)
    return moved, 1.0 - float(outside.mean())


def _outside(to_index: Affine, shape: tuple[int, int, int], inside: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Return which voxels of a grid lie in no voxel of another one of size `inside`."""
    i, j, k = np.ogrid[tuple(slice(0, size) for size in shape)]
    outside = np.zeros(shape, np.bool_)
    for axis, size in enumerate(inside):
        row = to_index[axis]
        place = row[0] * i + row[1] * j + row[2] * k + row[3]
        outside |= (place < -0.5 - EDGE) | (place > size - 0.5 + EDGE)
    return outside
