"""How far intensities alone go on a dataset: the yardstick that the demo prints beside a trained network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.errors import SpecError
from medseg.spec import Case, Dataset
from medseg.studies import read_study

Edges = NDArray[np.float64]
Counts = NDArray[np.int64]

BINS = 400
RANGE = (-3.0, 5.0)
"""Intensities are compared after each image got mean 0 and standard deviation 1; beyond this range they are clipped."""


@dataclass(frozen=True)
class _Histogram:
    """Voxels of one case per intensity bin: of all voxels, and of each label."""

    everything: Counts
    labels: dict[str, Counts]


def threshold_baseline(dataset: Dataset, *, channel: int = 0) -> dict[str, float]:
    """Return the Dice per label of the best classifier that knows nothing but the intensity of a voxel.

    For every label the one interval of intensity is taken that has the highest Dice over the pooled voxels of the
    training cases, chosen with their reference; its Dice is then measured on every test case that holds the label,
    and averaged. Images are standardised one by one first, so that a scanner's scale and offset do not count.

    Returns
    -------
    dict: label name -> mean Dice over the test cases, 0 to 1; a label that no test case holds is left out.

    Raises
    ------
    SpecError : a split has no case with a mask.
    MedsegError : a study cannot be read (see read_study).
    """
    train = [_histogram(dataset, case, channel) for case in dataset.select("train") if case.mask is not None]
    test = [_histogram(dataset, case, channel) for case in dataset.select("test") if case.mask is not None]
    if not train or not test:
        raise SpecError(
            f"{dataset.spec.name}: {len(train)} training and {len(test)} test cases have a mask; at least one of each "
            "is needed to choose thresholds and to score them: list test cases under `splits.test`"
        )
    result = {}
    for name in dataset.spec.foreground:
        pooled = np.sum([case.labels[name] for case in train], axis=0)
        interval = _best_interval(pooled, np.sum([case.everything for case in train], axis=0))
        scores = [_dice(case.labels[name], case.everything, interval) for case in test if case.labels[name].any()]
        if scores:
            result[name] = float(np.mean(scores))
    return result


def _histogram(dataset: Dataset, case: Case, channel: int) -> _Histogram:
    study = read_study(dataset.spec, case)
    if study.mask is None:
        raise SpecError(f"case {case.id}: its mask cannot be read", code="LABEL_MISSING")
    image = study.image.array[channel].astype(np.float64)
    spread = float(image.std()) or 1.0
    scaled = np.clip((image - image.mean()) / spread, *RANGE)
    mask = study.mask.array[0]
    labels = {name: _count(scaled[mask == value]) for name, value in dataset.spec.foreground.items()}
    return _Histogram(_count(scaled), labels)


def _count(values: NDArray[np.float64]) -> Counts:
    return np.asarray(np.histogram(values, BINS, RANGE)[0])


def _best_interval(label: Counts, everything: Counts) -> tuple[int, int]:
    """Return the bins [first, last) whose voxels have the highest Dice with the label; all intervals are tried."""
    hits = np.concatenate([[0], np.cumsum(label)])
    taken = np.concatenate([[0], np.cumsum(everything)])
    # [last, first]: differences of cumulative counts
    dice = 2 * (hits[:, None] - hits) / np.maximum(taken[:, None] - taken + hits[-1], 1)
    last, first = np.unravel_index(int(dice.argmax()), dice.shape)
    return int(first), int(last)


def _dice(label: Counts, everything: Counts, interval: tuple[int, int]) -> float:
    inside = slice(*interval)
    return float(2 * label[inside].sum() / (everything[inside].sum() + label.sum()))
