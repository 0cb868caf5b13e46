"""Imaginary scanners: the grids on which phantoms are taken, and what the machine adds to their signal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from medseg.volume import Affine

FIELD_OF_VIEW_MM = {"R": 280.0, "A": 200.0, "S": 160.0}
"""Extent of every acquisition along left-right, back-front and foot-head."""


@dataclass(frozen=True)
class Scanner:
    """A make of scanner, none that exists.

    Attributes
    ----------
    manufacturer : its name in the header.
    gain, offset : grey value = gain × signal + offset, fat having signal 1.
    noise : standard deviation of the complex noise, of fat's signal.
    shading : strength of the receive field: its brightest place over its darkest is about exp(2 × shading).
    """

    manufacturer: str
    gain: float
    offset: float
    noise: float
    shading: float


@dataclass(frozen=True)
class Protocol:
    """How the slices lie.

    Attributes
    ----------
    axes : direction in which columns, rows and slices are counted, as letters of Volume.axis_codes.
    spacing : mm between columns, rows and slices.
    tilt : degrees about the patient's x, y and z axis that the slices are oblique by.
    """

    axes: str
    spacing: tuple[float, float, float]
    tilt: tuple[float, float, float] = (0.0, 0.0, 0.0)


SCANNERS: tuple[Scanner, ...] = (
    Scanner("Northlight Imaging", gain=640.0, offset=0.0, noise=0.022, shading=0.10),
    Scanner("Kestrel Medical", gain=1800.0, offset=60.0, noise=0.026, shading=0.15),
    Scanner("Meridian Scanners", gain=265.0, offset=12.0, noise=0.030, shading=0.12),
)

PROTOCOLS: tuple[Protocol, ...] = (
    Protocol("LPS", (5.0, 5.0, 5.0)),
    Protocol("LIP", (5.0, 5.0, 5.0)),
    Protocol("LPI", (4.5, 4.5, 6.4), tilt=(8.0, 0.0, 0.0)),
    Protocol("PIR", (5.0, 5.0, 4.5)),
    Protocol("LPS", (5.5, 5.5, 4.0), tilt=(0.0, 5.0, -6.0)),
)
"""Spacings of about 5 mm keep a volume at 70 000 voxels, so that two cores learn the whole cohort in minutes."""


def grid(protocol: Protocol, centre: NDArray[np.float64]) -> tuple[tuple[int, int, int], Affine]:
    """Return size (I, J, K) and affine (index -> mm, RAS+) of a field of view around `centre` (mm)."""
    names = {"L": "R", "P": "A", "I": "S"}
    axes = np.zeros((3, 3))
    size = []
    for column, (letter, step) in enumerate(zip(protocol.axes, protocol.spacing, strict=True)):
        name = names.get(letter, letter)
        axes["RAS".index(name), column] = step if name == letter else -step
        size.append(round(FIELD_OF_VIEW_MM[name] / step))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", protocol.tilt, degrees=True).as_matrix() @ axes
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(size) - 1) / 2)
    return (size[0], size[1], size[2]), affine


def expose(
    signal: NDArray[np.float32], places: NDArray[np.float32], scanner: Scanner, rng: np.random.Generator
) -> NDArray[np.uint16]:
    """Return grey values of a signal: tissue texture, receive field, Rician noise, the scanner's scale.

    Parameters
    ----------
    signal : (I, J, K), fat = 1.
    places : (3, I * J * K) positions in mm from the middle of the field of view.
    """
    texture = gaussian_filter(rng.standard_normal(signal.shape, np.float32), 1.2)
    shaded = signal * (1 + 0.02 / texture.std() * texture) * _receive_field(places, scanner, rng).reshape(signal.shape)
    real, imaginary = scanner.noise * rng.standard_normal((2, *signal.shape), np.float32)
    magnitude = np.hypot(shaded + real, imaginary)
    return np.asarray(np.rint(scanner.gain * magnitude + scanner.offset).astype(np.uint16))


def _receive_field(places: NDArray[np.float32], scanner: Scanner, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a smooth positive field (second-order polynomial in space, exponentiated)."""
    x, y, z = places / 100
    terms = np.stack([x, y, z, x * x, y * y, z * z, x * y, y * z, x * z])
    field = np.tensordot(rng.standard_normal(len(terms)).astype(np.float32), terms, axes=1)
    field -= field.mean()
    return np.asarray(np.exp(scanner.shading * field / np.abs(field).max()), np.float32)
