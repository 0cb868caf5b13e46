"""One temperature for a model, so that its probabilities mean what they say (Guo et al., ICML 2017).

Logits are divided by it before they become probabilities. The winner stays the winner, so no mask changes. It is
fitted on voxels of cases that the network has not learnt from, drawn evenly from the box around what is there or was
found, widened by MARGIN_MM: outside of it a network is right and sure, which would hide how sure it is where it counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medseg.bundle import Calibration
from medseg.spec import Spec
from medseg.targets import channel_names, encode, exclusive, merge_unknown
from medseg.volume import Volume

LogitsAt = Callable[[NDArray[np.int64]], Tensor]
MARGIN_MM = 10.0
MAX_VOXELS, MAX_VALUES = 200_000, 4_000_000
"""Of the sample: voxels, and voxels times channels (16 MB)."""
MIN_VOXELS = 1000
BINS = 15
LOWEST, HIGHEST = 0.25, 4.0
GOLDEN = (math.sqrt(5) - 1) / 2


class VoxelSample:
    """Logits and truth of voxels, the same number from each case.

    Parameters
    ----------
    cases : how many will be added.
    """

    def __init__(self, spec: Spec, *, cases: int, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.share = max(1, min(MAX_VOXELS, MAX_VALUES // len(channel_names(spec))) // max(1, cases))
        self.logits: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.known: list[Tensor] = []

    def add(
        self, logits_at: LogitsAt, found: NDArray[Any], reference: Volume, known: Sequence[bool] | None = None
    ) -> None:
        """Draw voxels of one case.

        Parameters
        ----------
        logits_at : (indices in the flattened image) -> the logits (K, M) there.
        found, reference : label values (1, I, J, K'), predicted and true, on one grid.
        known : tells of each channel whether the reference knows it (all unless told).
        """
        truth = reference.array[0]
        box = _around(truth, found[0], reference, self.spec)
        values = torch.from_numpy(np.ascontiguousarray(truth[box]).astype(np.int32)).ravel()
        there = np.arange(len(values)) if self.spec.ignore is None else np.flatnonzero(values != self.spec.ignore)
        rng = np.random.default_rng((self.seed, 5, len(self.logits)))
        drawn = np.sort(rng.choice(there, min(self.share, len(there)), replace=False))
        index = np.unravel_index(drawn, truth[box].shape)
        voxels = np.ravel_multi_index([n + part.start for n, part in zip(index, box, strict=True)], truth.shape)
        self.logits.append(logits_at(voxels).float().T)
        target, _ = encode(self.spec, values[torch.from_numpy(drawn)].reshape(1, 1, -1, 1, 1))
        self.targets.append(target[0, :, :, 0, 0].T)
        row = torch.tensor([True] * len(channel_names(self.spec)) if known is None else list(known))
        self.known.append(row.expand(len(drawn), -1))

    def fit(self) -> Calibration | None:
        """Return the temperature with the lowest loss and what it changes; None for fewer than MIN_VOXELS."""
        if sum(map(len, self.logits)) < MIN_VOXELS:
            return None
        logits, targets = torch.cat(self.logits), torch.cat(self.targets)
        alone, rows = exclusive(self.spec), torch.cat(self.known)
        known = None if rows.all() else rows
        found = best_temperature(logits, targets, alone, known)
        return Calibration(
            temperature=found,
            ece_before=calibration_error(logits, targets, alone, known),
            ece_after=calibration_error(logits / found, targets, alone, known),
            nll_before=loss(logits, targets, alone, known),
            nll_after=loss(logits / found, targets, alone, known),
            voxels=len(logits),
            cases=len(self.logits),
        )


def _around(truth: NDArray[np.generic], found: NDArray[np.generic], grid: Volume, spec: Spec) -> tuple[slice, ...]:
    """Return the box around all labels, true and found; the whole image where there is none."""
    there = np.isin(truth, list(spec.foreground.values())) | (found != 0)
    if not there.any():
        return tuple(slice(0, n) for n in truth.shape)
    box = []
    for axis, size in enumerate(there.shape):
        hit = np.flatnonzero(there.any(tuple(n for n in range(3) if n != axis)))
        more = math.ceil(MARGIN_MM / grid.spacing[axis])
        box.append(slice(max(0, int(hit[0]) - more), min(size, int(hit[-1]) + 1 + more)))
    return tuple(box)


def _asked(logits: Tensor, targets: Tensor, alone: bool, known: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what of (N, K) can be judged: unknown labels as background, or without unknown regions."""
    if known is None:
        return logits, targets
    return (merge_unknown(logits, known, alone), targets) if alone else (logits[known], targets[known])


def loss(logits: Tensor, targets: Tensor, alone: bool, known: Tensor | None = None) -> float:
    """Return the mean negative log-likelihood in nats of (N, K) logits; of regions, per voxel and region.

    `alone`: whether classes exclude each other (softmax), else regions (sigmoid); targets are 0 or 1. `known`: which of
    them the truth knows (all unless told).
    """
    logits, targets = _asked(logits, targets, alone, known)
    if alone:
        return float(F.cross_entropy(logits, targets.argmax(1)))
    return float(F.binary_cross_entropy_with_logits(logits, targets))


def best_temperature(logits: Tensor, targets: Tensor, alone: bool, known: Tensor | None = None) -> float:
    """Return the temperature from LOWEST to HIGHEST with the lowest loss, by golden section on its logarithm.

    The loss is convex in 1 / temperature, so that there is one lowest point.
    """

    def at(x: float) -> float:
        return loss(logits / math.exp(x), targets, alone, known)

    low, high = math.log(LOWEST), math.log(HIGHEST)
    first, second = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    f_first, f_second = at(first), at(second)
    while high - low > 2e-3:
        if f_first <= f_second:
            high, second, f_second = second, first, f_first
            first = high - GOLDEN * (high - low)
            f_first = at(first)
        else:
            low, first, f_first = first, second, f_second
            second = low + GOLDEN * (high - low)
            f_second = at(second)
    return round(math.exp((low + high) / 2), 3)


def calibration_error(logits: Tensor, targets: Tensor, alone: bool, known: Tensor | None = None) -> float:
    """Return the expected calibration error: BINS bins of equal width of the probability of the winner.

    In each, the distance between the mean of that probability and the share of voxels in which the winner is right,
    weighted by its voxels. Of regions, each voxel and region is a decision between yes and no.
    """
    logits, targets = _asked(logits, targets, alone, known)
    if alone:
        confidence, winner = logits.softmax(1).max(1)
        right = targets.gather(1, winner[:, None])[:, 0]
    else:
        sure = logits.sigmoid().ravel()
        confidence = torch.maximum(sure, 1 - sure)
        right = ((logits > 0).float() == targets).float().ravel()
    number = (confidence * BINS).long().clamp(max=BINS - 1)
    difference = torch.zeros(BINS, dtype=torch.float64).index_add_(0, number, (confidence - right).double())
    return float(difference.abs().sum() / len(confidence))
