"""One synthetic patient: the template body, deformed at random, painted on a scanner's grid.

The same seed and index give the same voxels to the last bit (on one machine; another processor may round a grey
value the other way, since its exponential function may).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial.transform import Rotation

from medseg.phantom import scanners, template
from medseg.phantom.shapes import Blob, Distance, Jitter, Points, Shape, distance, jitter, random_warp
from medseg.phantom.template import LABELS, PARTS, Part
from medseg.volume import Volume


@dataclass(frozen=True)
class PhantomPatient:
    """What a synthetic study consists of.

    Attributes
    ----------
    image : (1, I, J, K) uint16 grey values.
    mask : (1, I, J, K) uint8 values of LABELS, on the grid of the image.
    modality : DICOM modality of the image.
    manufacturer : make of the imaginary scanner.
    """

    image: Volume
    mask: Volume
    modality: Literal["MR"]
    manufacturer: str


def make_patient(seed: int, *, index: int) -> PhantomPatient:
    """Make patient number `index` of the cohort `seed`.

    Scanner and protocol follow from the index, so that twenty patients show them all; the anatomy is random.
    """
    rng = np.random.default_rng([seed, index])
    scanner = scanners.SCANNERS[index % len(scanners.SCANNERS)]
    protocol = scanners.PROTOCOLS[index % len(scanners.PROTOCOLS)]
    origin = rng.uniform(-25, 25, 3)
    shape, affine = scanners.grid(protocol, origin)
    index_grid = np.indices(shape, np.float32).reshape(3, -1)
    places = (affine[:3, :3] @ index_grid + (affine[:3, 3] - origin)[:, None]).astype(np.float32)
    points = _into_template(places, rng)
    canvas = _paint(points, rng, softness=float(np.mean(protocol.spacing)))
    labels = canvas.labels.reshape(shape)
    signal = _add_lesion(canvas, points, labels, protocol.spacing, rng)
    grey = scanners.expose(signal.reshape(shape), places, scanner, rng)
    return PhantomPatient(
        image=Volume(grey[None], affine),
        mask=Volume(labels[None], affine),
        modality="MR",
        manufacturer=scanner.manufacturer,
    )


def _into_template(places: Points, rng: np.random.Generator) -> Points:
    """Bring places (mm from the middle of the field of view) to the template: pose, size, then smooth deformation."""
    turn = Rotation.from_euler("xyz", rng.uniform(-5, 5, 3), degrees=True).as_matrix()
    scale = rng.uniform(0.95, 1.06) * rng.uniform(0.97, 1.03, 3)
    shift = rng.uniform(-4, 4, 3)
    posed = (turn / scale[:, None]).astype(np.float32) @ (places - shift[:, None].astype(np.float32))
    return random_warp(rng, step=60.0, sigma=8.0)(posed)


@dataclass
class _Canvas:
    """What has been painted: brightness and label value of every point (N)."""

    signal: NDArray[np.float32]
    labels: NDArray[np.uint8]
    softness: float

    def paint(self, depth: Distance, brightness: float, label: int) -> None:
        """Cover where `depth` (mm, negative inside) is negative; the border is as soft as a voxel is wide."""
        cover = np.clip(0.5 - depth / self.softness, 0, 1)
        self.signal += cover * (np.float32(brightness) - self.signal)
        self.labels[depth < 0] = label


def _paint(points: Points, rng: np.random.Generator, *, softness: float) -> _Canvas:
    """Paint every part of the template as this patient has it."""
    count = points.shape[1]
    canvas = _Canvas(np.full(count, 0.01, np.float32), np.zeros(count, np.uint8), softness)
    spaces = _spaces(points, fat=rng.uniform(7, 15))
    moves = {name: jitter(part.shape, rng, amount=1.0) for name, part in PARTS.items() if part.shape}
    contrast = rng.normal(1.0, 0.03)
    for name, part in PARTS.items():
        brightness = contrast * (part.signal[0] + part.signal[1] * np.clip(rng.standard_normal(), -2, 2))
        depth = _depth(part, points, spaces, moves.get(part.follows or name))
        canvas.paint(depth, brightness, LABELS.get(part.label or "", 0))
    return canvas


def _spaces(points: Points, *, fat: float) -> dict[str, Distance]:
    """Return the distance from the border of every Space; `fat` is how thick (mm) it lies under the skin."""
    body = distance(template.BODY, points)
    cavity = body + np.float32(fat + 10)
    dome = distance(template.DIAPHRAGM, points)
    return {
        "body": body,
        "torso": body + np.float32(fat),
        "cavity": cavity,
        "abdomen": np.maximum(cavity, dome),
        "chest": np.maximum(cavity, -dome),
    }


def _depth(part: Part, points: Points, spaces: dict[str, Distance], move: Jitter | None) -> Distance:
    """Return the distance from the border of `part`, cut to its space."""
    bound = spaces[part.space] + np.float32(part.margin)
    if part.shape is None or move is None:
        return bound
    return np.asarray(np.maximum(distance(part.shape, move.undo(points)) - np.float32(part.grow), bound))


def _add_lesion(
    canvas: _Canvas,
    points: Points,
    labels: NDArray[np.uint8],
    spacing: tuple[float, float, float],
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Paint a lumpy round lesion where the liver has room for it; change `labels` and return the signal.

    Its centre is one of the deepest places of the liver, else a third of the lesions would stick out of it.
    """
    room = distance_transform_edt(labels == LABELS["liver"], sampling=spacing).ravel()
    radius = min(rng.uniform(*template.LESION_RADIUS_MM), 1.1 * float(room.max()))
    candidates = np.flatnonzero(room >= 0.9 * radius)
    centre = points[:, rng.choice(candidates)]
    shape = Shape(tuple(_bump(centre, radius, rng) for _ in range(4)), blend=radius / 2)
    inside = np.where(labels.ravel() == LABELS["liver"], np.float32(-1e3), np.float32(1e3))
    depth = np.maximum(distance(shape, points), inside)
    mean, spread = template.LESION_SIGNAL
    canvas.paint(depth, float(rng.normal(mean, spread)), LABELS["lesion"])
    return canvas.signal


def _bump(centre: Points, radius: float, rng: np.random.Generator) -> Blob:
    """Draw one of the lumps of a lesion."""
    x, y, z = (centre + rng.uniform(-0.35, 0.35, 3) * radius).tolist()
    a, b, c = (rng.uniform(0.65, 0.85, 3) * radius).tolist()
    return Blob((x, y, z), (a, b, c))
