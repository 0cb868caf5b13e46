"""The random part of the path from case to patch: which piece of which case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Randomizable, Transform
from monai.utils import MAX_SEED
from numpy.typing import NDArray

from medseg.planning.plan import Triple


class SamplePatch(Randomizable, Transform):
    """Read a random patch of an opened case, and around it as much as its transform needs.

    Parameters
    ----------
    size : (I, J, K) of the patch; what lies outside of the image is 0 in the image and in the mask. The patch lies
        inside an image that is large enough for it, so that no border is left out.

    Given {"image", "mask", "locations", "foreground"} as memory maps, "foreground" True demands a patch that holds
    a voxel of a label, at its centre where the image is large enough (label by label with equal probability, then
    voxel); False any place. A case without foreground is sampled anywhere. "margin" (I, J, K), if there, is how many
    voxels beyond the patch are read on both sides, as `read_through` does. Randomness comes from
    ``set_random_state``, as with MONAI's own; a seed sets one generator anew, for making one takes longer than reading.
    """

    def __init__(self, size: Triple) -> None:
        self.size = size
        self.centre = (0, 0, 0)
        self._generator = np.random.RandomState(0)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> SamplePatch:
        """Draw from now on as a new ``RandomState(seed)`` does, or from `state`."""
        if seed is None:
            super().set_random_state(state=state)
        else:
            self._generator.seed(seed % MAX_SEED)
            self.R = self._generator
        return self

    def randomize(self, data: Mapping[str, Any]) -> None:
        """Draw the centre."""
        locations = data["locations"]
        shape = data["image"].shape[1:]
        if data["foreground"] and len(locations):
            labels = np.ascontiguousarray(locations[:, 0])
            present = np.unique(labels)
            rows = np.flatnonzero(labels == present[self.R.randint(len(present))])
            i, j, k = (int(x) for x in locations[rows[self.R.randint(len(rows))], 1:])
        else:
            i, j, k = (int(self.R.randint(n)) for n in shape)
        self.centre = (i, j, k)

    def read(self, data: Mapping[str, Any]) -> tuple[NDArray[Any], NDArray[Any], tuple[float, float, float]]:
        """Draw and read: image (C, *R), mask (1, *R), and where the patch's centre lies in them."""
        self.randomize(data)
        image = data["image"]
        start = patch_start(self.centre, self.size, image.shape[1:])
        margin = data.get("margin", (0, 0, 0))
        region, centre = read_through(image, start, self.size, margin)
        return region, read_through(data["mask"], start, self.size, margin)[0], centre

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Draw and read: {"case", "image" (C, *R), "mask" (1, *R), "centre"}, the patch's centre in the region."""
        image, mask, centre = self.read(data)
        return {
            "case": data["case"],
            "image": MetaTensor(torch.from_numpy(image)),
            "mask": MetaTensor(torch.from_numpy(mask)),
            "centre": centre,
        }


def read_through(
    array: NDArray[Any], start: Triple, size: Triple, margin: Triple
) -> tuple[NDArray[Any], tuple[float, float, float]]:
    """Return what a patch with a margin on both sides reads of (C, I, J, K), and where its centre lies in it.

    Without a margin that is the patch itself, 0 where it lies outside of the image. With one, all of the outside but
    one voxel is left out along each axis: who reads beyond the border of the region takes the border's 0.
    """
    if margin == (0, 0, 0):
        i, j, k = ((n - 1) / 2 for n in size)
        return read_region(array, start, size), (i, j, k)
    begin, stop = [], []
    for s, n, m, whole in zip(start, size, margin, array.shape[1:], strict=True):
        begin.append(max(s - m, -1))
        stop.append(min(s + n + m, whole + 1))
    i, j, k = (s - b + (n - 1) / 2 for s, b, n in zip(start, begin, size, strict=True))
    first, second, third = (t - b for b, t in zip(begin, stop, strict=True))
    return read_region(array, (begin[0], begin[1], begin[2]), (first, second, third)), (i, j, k)


def patch_start(centre: Triple, size: Triple, shape: tuple[int, ...]) -> Triple:
    """Return the first voxel of a patch: centred, but inside an image that is larger and around one that is not."""
    start = []
    for c, n, s in zip(centre, size, shape, strict=True):
        start.append(min(max(c - n // 2, min(0, s - n)), max(0, s - n)))
    return start[0], start[1], start[2]


def read_region(array: NDArray[Any], start: Triple, size: Triple) -> NDArray[Any]:
    """Return a copy of (C, *size) from (C, I, J, K), 0 where the region lies outside."""
    result = np.zeros((array.shape[0], *size), dtype=array.dtype)
    inside = [(min(max(0, s), m), max(0, min(s + n, m))) for s, n, m in zip(start, size, array.shape[1:], strict=True)]
    if any(a >= b for a, b in inside):
        return result
    source = tuple(slice(a, b) for a, b in inside)
    target = tuple(slice(a - s, b - s) for (a, b), s in zip(inside, start, strict=True))
    result[(slice(None), *target)] = array[(slice(None), *source)]
    return result


@dataclass(frozen=True)
class Draw:
    """Which case a place in a batch gets: position `slot` of step `step`."""

    case_index: int
    foreground: bool
    seed: int


def draws(*, seed: int, step: int, batch_size: int, cases: int, foreground_share: float) -> list[Draw]:
    """Return what step `step` (from 0) draws: a pure function, so that resuming needs no state of a generator.

    Cases follow one random permutation after another, so that all are seen equally often; the first
    ``ceil(foreground_share * batch_size)`` places of a batch are guaranteed to hold foreground.
    """
    forced = forced_places(batch_size, foreground_share)
    indices = drawn_cases(seed=seed, step=step, batch_size=batch_size, cases=cases)
    rows = []
    for slot, index in enumerate(indices):
        patch_seed = int(np.random.default_rng((seed, 2, step * batch_size + slot)).integers(2**31))
        rows.append(Draw(index, slot < forced, patch_seed))
    return rows


def forced_places(batch_size: int, foreground_share: float) -> int:
    """Return how many places of a batch, the first ones, are guaranteed to hold foreground."""
    return int(np.ceil(foreground_share * batch_size - 1e-9))


def drawn_cases(*, seed: int, step: int, batch_size: int, cases: int) -> list[int]:
    """Return the index of the case at each place of a step's batch."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_order(seed, position // cases, cases)[position % cases]) for position in positions]


@lru_cache(maxsize=4)
def _order(seed: int, passing: int, cases: int) -> NDArray[np.int64]:
    """Return the order of the cases in one pass over them."""
    return np.random.default_rng((seed, 1, passing)).permutation(cases)


def tally(
    *, seed: int, steps: int, batch_size: int, cases: int, foreground_share: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how often each case was drawn in the first `steps` steps, and how often with foreground guaranteed.

    Two arrays (cases,); the same as counting the rows of `draws`, without drawing the patches.
    """
    forced = forced_places(batch_size, foreground_share)
    total = np.zeros(cases, np.int64)
    guaranteed = np.zeros(cases, np.int64)
    positions = steps * batch_size
    for passing in range(-(-positions // cases)):
        first = passing * cases
        order = _order(seed, passing, cases)[: positions - first]
        total[order] += 1
        guaranteed[order[np.arange(first, first + len(order)) % batch_size < forced]] += 1
    return total, guaranteed
