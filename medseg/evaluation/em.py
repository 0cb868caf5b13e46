"""Scores for cells that are told apart by their membranes, as in the ISBI 2012 challenge.

Source: Arganda-Carreras et al. 2015, "Crowdsourcing the creation of image segmentation algorithms for connectomics",
doi 10.3389/fnana.2015.00142: foreground-restricted Rand and information theoretic scores after border thinning, the
two that the challenge ranks by, and its pixel error. A picture is 2-D; scores of a stack are means over its slices.

Definitions. S is the proposed segmentation, T the reference; only pixels inside the cells of T count (N of them).
Of these, p_ij is the share that lies in segment i of S and j of T, s_i and t_j its sums. A pixel on a border of S is a
segment of its own. Both score 1 for S = T, less for cells that were split (split) or merged (merge):

    Rand         split  Σp² / Σt²       merge  Σp² / Σs²
    information  split  I(S;T) / H(S)   merge  I(S;T) / H(T)

and the score is the harmonic mean of the two. Segments are 4-connected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Labels = NDArray[np.integer]
Mask = NDArray[np.bool_]
THRESHOLDS = tuple(number / 10 for number in range(11))
"""Of the challenge's script: 0 to 1 in steps of 0.1."""


@dataclass(frozen=True)
class Agreement:
    """One kind of score: each from 0 to 1, best 1."""

    split: float
    merge: float

    @property
    def score(self) -> float:
        """Harmonic mean of the two."""
        total = self.split + self.merge
        return 2 * self.split * self.merge / total if total else 0.0


@dataclass(frozen=True)
class EmScores:
    """Scores of one picture at one threshold.

    Attributes
    ----------
    pixel_error : share of pixels on the wrong side (cell or membrane); no thinning, best 0.
    rand, info : V_rand and V_info after thinning.
    """

    pixel_error: float
    rand: Agreement
    info: Agreement


@dataclass(frozen=True)
class _Table:
    """Counts of the pixels inside the reference: of pairs of segments, of segments; and of pixels on borders of S."""

    pairs: NDArray[np.float64]
    proposed: NDArray[np.float64]
    reference: NDArray[np.float64]
    alone: int

    @property
    def pixels(self) -> float:
        return float(self.reference.sum())


def segments(cells: Mask) -> Labels:
    """Return the 4-connected components of the cells, numbered from 1; borders are 0."""
    return np.asarray(ndimage.label(cells)[0], dtype=np.int32)


def thinned(cells: Mask) -> Labels:
    """Grow the cells until the borders between them are one pixel wide; number them as `segments` does.

    By a watershed of the binary picture: no cell appears, vanishes, is split or merged, and a membrane that ends
    inside a cell is gone. A picture without a cell is all border.
    """
    import SimpleITK

    found = segments(cells)
    if found.max() <= 1:
        return np.full_like(found, found.max())
    markers = SimpleITK.GetImageFromArray(found)
    flat = SimpleITK.GetImageFromArray(np.zeros(found.shape, np.uint8))
    watershed: Any = SimpleITK.MorphologicalWatershedFromMarkers
    grown = watershed(flat, markers, markWatershedLine=True, fullyConnected=False)
    return np.asarray(SimpleITK.GetArrayFromImage(grown), dtype=np.int32)


def rand_agreement(reference: Labels, proposed: Labels) -> Agreement:
    """Return the foreground-restricted Rand scores of label maps (0 is border) of one shape.

    Raises
    ------
    ValueError : the shapes differ, or the reference has no cell.
    """
    table = _count(reference, proposed)
    both = (table.pairs**2).sum() + table.alone
    return Agreement(
        split=float(both / (table.reference**2).sum()),
        merge=float(both / ((table.proposed**2).sum() + table.alone)),
    )


def info_agreement(reference: Labels, proposed: Labels) -> Agreement:
    """Return the foreground-restricted information theoretic scores; a ratio 0/0 (one segment) is 1.

    Raises
    ------
    ValueError : as `rand_agreement`.
    """
    table = _count(reference, proposed)
    n = table.pixels
    alone = table.alone * np.log(n) / n
    of_reference = _entropy(table.reference / n)
    of_proposed = _entropy(table.proposed / n) + alone
    shared = of_reference + of_proposed - _entropy(table.pairs / n) - alone
    return Agreement(split=_ratio(shared, of_proposed), merge=_ratio(shared, of_reference))


def adapted_rand_error(reference: Labels, proposed: Labels) -> float:
    """Return the adapted Rand error: 1 - F of pairs of pixels inside the reference (SNEMI3D's; best 0).

    Unlike in `rand_agreement` a pixel makes no pair with itself, and what S labels 0 is one segment.

    Raises
    ------
    ValueError : as `rand_agreement`; no two pixels of the reference lie in one cell.
    """
    table = _count(reference, proposed + 1)
    both, true, found = (
        float((counts * (counts - 1)).sum()) for counts in (table.pairs, table.reference, table.proposed)
    )
    if true == 0:
        raise ValueError("no cell of the reference has two pixels: there is no pair that could be found")
    return 1 - 2 * both / (true + found)


def em_scores(probability: NDArray[np.floating], cells: Mask, *, threshold: float = 0.5) -> EmScores:
    """Score one picture.

    Parameters
    ----------
    probability : (rows, columns) of being inside a cell, 0 to 1; or the mask itself.
    cells : (rows, columns) of the reference.
    threshold : what is above it is cell.
    """
    proposed = np.asarray(probability > threshold)
    reference, thin = segments(cells), thinned(proposed)
    return EmScores(float(np.mean(proposed != cells)), rand_agreement(reference, thin), info_agreement(reference, thin))


@dataclass(frozen=True)
class StackScores:
    """Means over the slices of a stack at one threshold; V_rand and V_info are means of the slices' scores."""

    threshold: float
    pixel_error: float
    v_rand: float
    v_info: float


def stack_scores(
    probabilities: Sequence[NDArray[np.floating]],
    cells: Sequence[Mask],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[StackScores]:
    """Score slices at each threshold; raises ValueError as `rand_agreement` does.

    The challenge reports the best over the thresholds, which it chooses on the slices that it scores: on slices kept
    for testing that is an optimistic figure, to be shown beside the one at 0.5.
    """
    rows = []
    for threshold in thresholds:
        scores = [em_scores(p, c, threshold=threshold) for p, c in zip(probabilities, cells, strict=True)]
        rows.append(
            StackScores(
                threshold,
                float(np.mean([score.pixel_error for score in scores])),
                float(np.mean([score.rand.score for score in scores])),
                float(np.mean([score.info.score for score in scores])),
            )
        )
    return rows


def _count(reference: Labels, proposed: Labels) -> _Table:
    if reference.shape != proposed.shape:
        raise ValueError(f"the reference is of shape {reference.shape}, the proposed segmentation {proposed.shape}")
    inside = reference > 0
    if not inside.any():
        raise ValueError("the reference has no cell: there is nothing to score")
    true, found = reference[inside].astype(np.int64), proposed[inside].astype(np.int64)
    known = found > 0
    pairs = np.unique(true[known] * (int(found.max()) + 1) + found[known], return_counts=True)[1]
    return _Table(
        pairs.astype(np.float64),
        np.unique(found[known], return_counts=True)[1].astype(np.float64),
        np.unique(true, return_counts=True)[1].astype(np.float64),
        int(np.count_nonzero(~known)),
    )


def _entropy(shares: NDArray[np.float64]) -> float:
    return float(-(shares * np.log(shares)).sum())


def _ratio(part: float, whole: float) -> float:
    # An entropy that should be 0 is some 1e-16.
    return 1.0 if whole < 1e-12 else float(np.clip(part / whole, 0, 1))
