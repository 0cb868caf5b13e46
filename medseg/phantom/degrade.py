"""DEGRADATIONS: good images made worse in the ways of scanners and exports, to test whether that is noticed.

Each takes an image (C, I, J, K) and a random generator and returns another; the header (affine) is left as it was,
as with real accidents. Strengths are those at which a person sees at once that something is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medseg.volume import Volume

Degrade = Callable[[Volume, np.random.Generator], Volume]
Array = NDArray[np.float32]


def noise(image: Volume, rng: np.random.Generator) -> Volume:
    """Add Gaussian noise with the standard deviation of the image itself."""
    return _each(image, lambda channel: channel + rng.standard_normal(channel.shape, np.float32) * channel.std())


def motion(image: Volume, rng: np.random.Generator) -> Volume:
    """Move the patient during the scan: half of the lines of k-space along J are of a place 4 to 8 voxels further."""
    far = int(rng.integers(4, 9))

    def moved(channel: Array) -> Array:
        step = min(far, max(1, channel.shape[0] // 4))
        still, other = (np.fft.fft(one, axis=1) for one in (channel, np.roll(channel, step, axis=0)))
        lines = np.array(rng.random(channel.shape[1]) < 0.5).reshape(1, -1, 1)
        return np.asarray(np.abs(np.fft.ifft(np.where(lines, other, still), axis=1)), np.float32)

    return _each(image, moved)


def contrast(image: Volume, rng: np.random.Generator) -> Volume:
    """Take another sequence: what was bright is dark, within the same range."""
    return _each(image, lambda channel: channel.max() + channel.min() - channel)


def cropped(image: Volume, rng: np.random.Generator) -> Volume:
    """Scan only 55 % of the patient along one axis; the rest is not in the image."""
    axis = int(rng.choice([n for n in range(3) if image.shape[n] > 3]))
    size, first = round(0.55 * image.shape[axis]), bool(rng.integers(2))
    start = 0 if first else image.shape[axis] - size
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, axis] * start
    return Volume(image.array.take(range(start, start + size), axis + 1), affine, image.unit, image.notes, image.meta)


def swapped(image: Volume, rng: np.random.Generator) -> Volume:
    """Lose the orientation: two axes are exchanged and one is flipped, and the header does not know."""
    return image_of(image, np.flip(np.swapaxes(image.array, 1, 2), 2))


def image_of(image: Volume, array: NDArray[np.generic]) -> Volume:
    """Return an array with the header of an image, whatever its shape."""
    return Volume(np.ascontiguousarray(array), image.affine, image.unit, image.notes, image.meta)


DEGRADATIONS: dict[str, Degrade] = {
    "noise": noise,
    "motion": motion,
    "contrast": contrast,
    "cropped": cropped,
    "swapped": swapped,
}


def _each(image: Volume, change: Callable[[Array], Array]) -> Volume:
    """Change each channel; whole numbers stay whole, within the range of their kind."""
    made = np.stack([change(channel.astype(np.float32)) for channel in image.array])
    if np.issubdtype(image.array.dtype, np.integer):
        kind = np.iinfo(image.array.dtype)
        made = np.clip(np.rint(made), kind.min, kind.max)
    return image.with_array(made.astype(image.array.dtype))
