"""Degradations change what they say, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.phantom.degrade import DEGRADATIONS
from medseg.volume import Volume


@pytest.fixture
def image(rng: np.random.Generator) -> Volume:
    array = rng.integers(0, 200, (2, 16, 14, 12)).astype(np.uint8)
    return Volume(array, np.diag([1.0, 2.0, 3.0, 1.0]))


@pytest.mark.parametrize("kind", sorted(DEGRADATIONS))
def test_each_makes_another_valid_image_the_same_for_the_same_seed(kind: str, image: Volume) -> None:
    before = image.array.copy()
    first, second = (DEGRADATIONS[kind](image, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(first.array, second.array)
    assert not np.array_equal(first.array, image.array)
    assert np.array_equal(image.array, before)
    assert first.array.dtype == image.array.dtype
    assert len(first.array) == 2


def test_contrast_keeps_the_range_and_turns_it(image: Volume) -> None:
    found = DEGRADATIONS["contrast"](image, np.random.default_rng(0)).array[0].astype(int)
    assert (found.min(), found.max()) == (image.array[0].min(), image.array[0].max())
    assert np.corrcoef(found.ravel(), image.array[0].ravel())[0, 1] == pytest.approx(-1)


def test_cropped_voxels_stay_at_their_place(image: Volume) -> None:
    for seed in range(6):
        found = DEGRADATIONS["cropped"](image, np.random.default_rng(seed))
        start = np.rint(np.linalg.inv(image.affine) @ found.affine[:, 3])[:3].astype(int)
        part = image.array[(slice(None), *(slice(a, a + n) for a, n in zip(start, found.shape, strict=True)))]
        assert np.array_equal(found.array, part)


def test_swapped_holds_the_same_values_under_the_old_header(image: Volume) -> None:
    found = DEGRADATIONS["swapped"](image, np.random.default_rng(0))
    assert np.array_equal(found.affine, image.affine)
    assert np.array_equal(np.sort(found.array, axis=None), np.sort(image.array, axis=None))
