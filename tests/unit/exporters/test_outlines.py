"""Outlines of masks and back: exact for anything, holes, islands and touching corners included."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.path import Path as Polygon

from medseg.exporters.outlines import filled, outlines


def by_matplotlib(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Another way to fill: one polygon at a time, then the union."""
    centres = np.argwhere(np.ones(shape, bool))
    inside = np.zeros(shape, bool)
    for points in polygons:
        inside |= Polygon(points).contains_points(centres).reshape(shape)
    return inside


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_any_mask_comes_back(seed: int, share: float) -> None:
    rng = np.random.default_rng((seed, int(share * 10)))
    mask = rng.random(tuple(rng.integers(1, 14, 2))) < share
    polygons = outlines(mask)
    assert np.array_equal(filled(polygons, mask.shape), mask)
    separate = np.sum([filled([points], mask.shape) for points in polygons], axis=0) if polygons else 0
    assert np.array_equal(np.broadcast_to(separate, mask.shape), mask.astype(int)), "each polygon stands alone"


def test_nested_rings_by_other_means() -> None:
    mask = np.zeros((15, 17), bool)
    mask[1:14, 1:16] = True
    mask[3:12, 3:8] = mask[3:12, 10:14] = False
    mask[5:10, 4:6] = True
    polygons = outlines(mask)
    assert len(polygons) == 2
    assert np.array_equal(by_matplotlib(polygons, mask.shape), mask)


def test_a_pixel_is_a_square_around_its_centre() -> None:
    mask = np.zeros((4, 5), bool)
    mask[2, 3] = True
    (points,) = outlines(mask)
    assert sorted(points.tolist()) == [[1.5, 2.5], [1.5, 3.5], [2.5, 2.5], [2.5, 3.5]]


def test_nothing_has_no_outline() -> None:
    assert outlines(np.zeros((3, 4), bool)) == []
    assert not filled([], (3, 4)).any()
