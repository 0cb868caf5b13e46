"""Soft bodies in millimetres: what the anatomy of a phantom is drawn from.

A shape is a smooth union of ellipsoids, less some others, and answers with a distance: negative inside, positive
outside, about one per mm near its surface. Points are (3, N) float32 in mm, x to the patient's right, y to
anterior, z to superior (RAS+).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

Points = NDArray[np.float32]
Distance = NDArray[np.float32]

ENDLESS = float("inf")


@dataclass(frozen=True)
class Blob:
    """An ellipsoid.

    Attributes
    ----------
    centre : (x, y, z) in mm.
    radii : semi-axes in mm; ENDLESS makes a cylinder along that axis.
    turn : degrees about the x, y and z axis.
    endless_below : below its centre it goes on as a cylinder (a dome).
    """

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    turn: tuple[float, float, float] = (0.0, 0.0, 0.0)
    endless_below: bool = False


@dataclass(frozen=True)
class Shape:
    """A smooth union of blobs without the blobs in `minus`; `blend` is how far (mm) neighbours melt together."""

    blobs: tuple[Blob, ...]
    minus: tuple[Blob, ...] = ()
    blend: float = 12.0


@dataclass(frozen=True)
class Jitter:
    """How one patient's organ differs from the template's: moved (mm), turned (degrees) and scaled about `pivot`."""

    pivot: NDArray[np.float64]
    shift: NDArray[np.float64]
    turn: NDArray[np.float64]
    scale: NDArray[np.float64]

    def undo(self, points: Points) -> Points:
        """Bring points of the patient to the template."""
        matrix = np.diag(1 / self.scale) @ _rotation(self.turn).T
        moved = points - (self.pivot + self.shift)[:, None].astype(np.float32)
        return np.asarray(matrix.astype(np.float32) @ moved + self.pivot[:, None].astype(np.float32))


def jitter(shape: Shape, rng: np.random.Generator, *, amount: float) -> Jitter:
    """Draw a Jitter: shift sigma 4 mm, turn sigma 4 degrees, scale sigma 5 % along each axis, times `amount`."""
    draws = np.clip(rng.standard_normal((3, 3)), -2, 2) * amount
    pivot = np.mean([blob.centre for blob in shape.blobs], axis=0)
    return Jitter(pivot, shift=4.0 * draws[0], turn=4.0 * draws[1], scale=1 + 0.05 * draws[2])


def distance(shape: Shape, points: Points) -> Distance:
    """Return the distance (mm, N values) of `points` from the surface of `shape`, negative inside."""
    result = _distance_to_blob(shape.blobs[0], points)
    for blob in shape.blobs[1:]:
        result = _smooth_minimum(result, _distance_to_blob(blob, points), shape.blend)
    for blob in shape.minus:
        result = -_smooth_minimum(-result, _distance_to_blob(blob, points), shape.blend / 2)
    return result


def _distance_to_blob(blob: Blob, points: Points) -> Distance:
    """Return the first-order distance to an ellipsoid: k0 (k0 - 1) / |gradient of k0²/2| with k0 = |p / radii|."""
    local = points - np.array(blob.centre, np.float32)[:, None]
    if any(blob.turn):
        local = _rotation(np.array(blob.turn)).T.astype(np.float32) @ local
    if blob.endless_below:
        local[2] = np.maximum(local[2], 0)
    inverse = 1 / np.array(blob.radii, np.float32)[:, None]
    scaled = local * inverse
    # 1e-3 on both keeps the quotient right at the centre, where it is 0/0.
    k0 = np.sqrt((scaled**2).sum(axis=0)) + np.float32(1e-3)
    k1 = np.sqrt(((scaled * inverse) ** 2).sum(axis=0)) + np.float32(1e-3) * inverse.max()
    return np.asarray(k0 * (k0 - 1) / k1)


def _smooth_minimum(first: Distance, second: Distance, blend: float) -> Distance:
    """Return the minimum of two distances, rounded where they differ by less than `blend` mm."""
    near = np.maximum(blend - np.abs(first - second), 0)
    return np.asarray(np.minimum(first, second) - near * near / (4 * blend))


def _rotation(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(Rotation.from_euler("xyz", degrees, degrees=True).as_matrix())


@dataclass(frozen=True)
class Warp:
    """A smooth displacement: cubic B-splines over a regular grid of control points.

    Attributes
    ----------
    controls : (3, G, G, G) displacements in mm.
    reach : the grid spans -reach to +reach mm along every axis.
    """

    controls: NDArray[np.float64]
    reach: float

    def __call__(self, points: Points) -> Points:
        """Return the displaced points, (3, N)."""
        size = self.controls.shape[1]
        place = (points / self.reach + 1) * ((size - 1) / 2)
        moved = [map_coordinates(c, place, order=3, mode="nearest", prefilter=False) for c in self.controls]
        return points + np.asarray(moved, np.float32)


def random_warp(rng: np.random.Generator, *, step: float, sigma: float, reach: float = 180.0) -> Warp:
    """Draw a Warp with control points every `step` mm; `sigma` (mm) is the spread of the control displacements."""
    size = round(2 * reach / step) + 1
    controls = np.clip(rng.standard_normal((3, size, size, size)), -2, 2) * sigma
    return Warp(controls, reach)
