"""Scores of cells: tiny cases computed by hand, scikit-image as another answer, and what must never change a score."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from skimage.metrics import adapted_rand_error as their_error
from skimage.metrics import variation_of_information
from skimage.segmentation import watershed

from medseg.evaluation.em import (
    Agreement,
    adapted_rand_error,
    em_scores,
    info_agreement,
    rand_agreement,
    segments,
    stack_scores,
    thinned,
)

LN2 = np.log(2)


def row(*values: int) -> NDArray[np.int32]:
    return np.array([values], np.int32)


BY_HAND = [
    # reference, proposed, Rand split and merge, information split and merge
    ((1, 1, 2, 2), (1, 1, 2, 2), (1, 1), (1, 1)),
    ((1, 1, 2, 2), (7, 7, 4, 4), (1, 1), (1, 1)),  # names of segments mean nothing
    ((1, 1, 2, 2), (1, 1, 1, 1), (1, 8 / 16), (1, 0)),  # merged: H(S) = 0, nothing shared
    ((1, 1, 1, 1), (1, 1, 2, 2), (8 / 16, 1), (0, 1)),  # split
    ((1, 1, 1, 1, 0), (1, 1, 1, 0, 5), (10 / 16, 1), (0, 1)),  # a border pixel of S is alone; beside T nothing counts
    ((1, 1, 2, 2, 0), (1, 1, 2, 0, 0), (6 / 8, 1), (LN2 / (1.5 * LN2), 1)),  # H(S) = ½ ln 2 + 2·¼ ln 4, shared ln 2
]


@pytest.mark.parametrize(("true", "found", "rand", "info"), BY_HAND)
def test_by_hand(
    true: tuple[int, ...], found: tuple[int, ...], rand: tuple[float, ...], info: tuple[float, ...]
) -> None:
    ours = rand_agreement(row(*true), row(*found))
    np.testing.assert_allclose((ours.split, ours.merge), rand, rtol=1e-12)
    ours = info_agreement(row(*true), row(*found))
    np.testing.assert_allclose((ours.split, ours.merge), info, atol=1e-12)


def test_the_score_is_the_harmonic_mean() -> None:
    assert Agreement(0.5, 1.0).score == pytest.approx(2 / 3)
    assert Agreement(0.0, 0.0).score == 0


def random_labels(seed: int, count: int, *, shape: tuple[int, int] = (40, 50)) -> NDArray[np.int32]:
    """Voronoi cells, numbered at random."""
    rng = np.random.default_rng(seed)
    seeds = rng.uniform((0, 0), shape, (count, 2))
    grid = np.stack(np.mgrid[: shape[0], : shape[1]], axis=-1)
    nearest = np.linalg.norm(grid[:, :, None] - seeds, axis=-1).argmin(-1)
    return (rng.permutation(count)[nearest] + 1).astype(np.int32)


@pytest.mark.parametrize("seed", range(8))
def test_scikit_image_agrees(seed: int) -> None:
    true, found = random_labels(seed, 12), random_labels(seed + 100, 9)
    true[np.random.default_rng(seed).random(true.shape) < 0.1] = 0
    assert adapted_rand_error(true, found) == pytest.approx(their_error(true, found)[0], abs=1e-12)
    inside = true > 0
    false_splits, false_merges = variation_of_information(true[inside], found[inside])  # H(S|T), H(T|S), in bits
    entropy_s, entropy_t = (entropy_bits(labels[inside]) for labels in (found, true))
    ours = info_agreement(true, found)
    assert ours.split == pytest.approx((entropy_s - false_splits) / entropy_s)
    assert ours.merge == pytest.approx((entropy_t - false_merges) / entropy_t)
    n = inside.sum()
    _, precision, recall = their_error(true, found)
    pairs = [float((np.unique(x[inside], return_counts=True)[1] ** 2).sum()) for x in (true, found)]
    # Theirs leave out the n pairs of a pixel with itself.
    rand = rand_agreement(true, found)
    both = sorted([(rand.split * pairs[0] - n) / (pairs[0] - n), (rand.merge * pairs[1] - n) / (pairs[1] - n)])
    np.testing.assert_allclose(both, sorted([precision, recall]), rtol=1e-9)


def entropy_bits(values: NDArray[np.integer]) -> float:
    shares = np.unique(values, return_counts=True)[1] / values.size
    return float(-(shares * np.log2(shares)).sum())


def test_what_s_labels_0_is_a_segment_for_the_adapted_error() -> None:
    true, found = random_labels(1, 7), random_labels(2, 7) - 1
    assert (found == 0).any()
    assert adapted_rand_error(true, found) == pytest.approx(their_error(true, found)[0])


def walls(width: int, *, gap: bool = False) -> NDArray[np.bool_]:
    """Two cells beside each other, a membrane of some width between them, with a hole in it or not."""
    cells = np.ones((21, 31), bool)
    cells[:, 15 - width // 2 : 16 + width // 2] = False
    if gap:
        cells[10, :] = True
    return cells


@pytest.mark.parametrize("width", [1, 3, 5, 9])
def test_thinning_leaves_one_pixel_in_the_middle(width: int) -> None:
    thin = thinned(walls(width))
    assert set(np.unique(thin)) == {0, 1, 2}
    np.testing.assert_array_equal(thin == 0, ~walls(1))


@pytest.mark.parametrize("width", [1, 3, 5, 9])
def test_the_width_of_a_border_does_not_matter_after_thinning(width: int) -> None:
    scores = em_scores(walls(width).astype(float), walls(3))
    assert scores.rand.score == 1
    assert scores.info.score == pytest.approx(1)
    assert scores.pixel_error == pytest.approx(abs(width - 3) / 31)


def test_a_hole_in_a_membrane_merges_cells() -> None:
    scores = em_scores(walls(3, gap=True).astype(float), walls(3))
    assert scores.rand.split == 1
    assert scores.rand.merge == pytest.approx(0.5, abs=0.01)
    assert scores.info.merge == pytest.approx(0, abs=1e-9)
    assert scores.pixel_error < 0.01


def test_a_membrane_that_ends_in_a_cell_is_gone() -> None:
    cells = np.ones((21, 31), bool)
    cells[:12, 15] = False
    assert (thinned(cells) == 1).all()


def test_thinning_is_a_watershed_as_that_of_scikit_image() -> None:
    """Which of two pixels a border takes is free; cells are the same up to it."""
    labels = random_labels(5, 15, shape=(64, 64))
    edges = ndimage.morphological_gradient(labels, size=(3, 3)) > 0
    cells = ~ndimage.binary_dilation(edges, iterations=1)
    ours = thinned(cells)
    theirs = watershed(~cells, segments(cells), watershed_line=True)
    assert set(np.unique(ours)) == set(np.unique(theirs))
    np.testing.assert_array_equal(ours[cells], segments(cells)[cells])
    inside = (ours > 0) & (theirs > 0)
    assert (ours == theirs)[inside].mean() > 0.97
    # No two cells touch but across a border, and the border is thin: nothing of it is two pixels deep.
    for first, second in ((ours[1:], ours[:-1]), (ours[:, 1:], ours[:, :-1])):
        assert not ((first != second) & (first > 0) & (second > 0)).any()
    assert not ndimage.binary_erosion(ours == 0, np.ones((3, 3))).any()


def test_extremes() -> None:
    cells = walls(3)
    nothing = em_scores(np.zeros(cells.shape), cells)  # all membrane: every pixel alone
    assert nothing.rand.merge == 1
    assert nothing.rand.score < 0.01
    everything = em_scores(np.ones(cells.shape), cells)
    assert everything.rand.split == 1
    assert everything.pixel_error == pytest.approx(3 / 31)
    with pytest.raises(ValueError, match="no cell"):
        em_scores(np.ones((4, 4)), np.zeros((4, 4), bool))
    with pytest.raises(ValueError, match="shape"):
        rand_agreement(row(1, 1), row(1, 1, 1))
    with pytest.raises(ValueError, match="two pixels"):
        adapted_rand_error(row(1, 2), row(1, 1))


def test_a_stack_is_the_mean_of_its_slices_at_each_threshold() -> None:
    pictures = [walls(3) * 0.55 + 0.2, walls(5) * 0.9]
    rows = stack_scores(pictures, [walls(3), walls(3)], thresholds=(0.5, 0.8))
    assert [r.threshold for r in rows] == [0.5, 0.8]
    assert rows[0].v_rand == 1
    alone = [em_scores(p, walls(3), threshold=0.8) for p in pictures]
    assert rows[1].v_info == pytest.approx(np.mean([score.info.score for score in alone]))
    assert rows[1].pixel_error == pytest.approx(np.mean([score.pixel_error for score in alone]))
