"""Resampling to another grid puts every point where it is in the patient."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.regrid import resample_to
from medseg.volume import Volume

OBLIQUE = np.array([[0.9, -0.3, 0.4, -12.0], [0.28, 0.95, -0.6, 7.0], [-0.1, 0.35, 2.4, -30.0], [0, 0, 0, 1]])
"""Neither upright nor at right angles."""


def points(volume: Volume) -> np.ndarray:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in volume.shape), indexing="ij"))
    return np.einsum("ab,bijk->aijk", volume.affine[:3, :3], index) + volume.affine[:3, 3].reshape(3, 1, 1, 1)


def linear(affine: np.ndarray, shape: tuple[int, int, int]) -> Volume:
    """An image whose value is a linear function of the place in mm: trilinear interpolation is exact for it."""
    volume = Volume(np.zeros((1, *shape), np.float32), affine)
    x, y, z = points(volume)
    return volume.with_array((3 * x - 2 * y + 0.5 * z)[None])


@pytest.mark.parametrize("affine", [np.diag([-1.5, -1.5, 3, 1]), OBLIQUE])
def test_a_linear_field_is_resampled_exactly(affine: np.ndarray) -> None:
    source = linear(OBLIQUE if affine is not OBLIQUE else np.diag([1.0, 1, 1, 1]), (60, 60, 40))
    reference = Volume(np.zeros((1, 7, 8, 5)), affine.copy())
    centre = points(source)[:, 30, 30, 20]
    move = reference.affine.copy()
    move[:3, 3] = centre - reference.affine[:3, :3] @ (3, 4, 2)
    reference = Volume(reference.array, move)
    moved, covered = resample_to(source, reference)
    assert covered == 1
    assert np.array_equal(moved.affine, reference.affine)
    np.testing.assert_allclose(moved.array, linear(move, (7, 8, 5)).array, atol=1e-3)


def test_a_landmark_stays_at_its_place_in_mm() -> None:
    source = Volume(np.zeros((1, 50, 60, 30), np.float32), OBLIQUE)
    landmark = points(source)[:, 21, 33, 14]
    distance = np.linalg.norm(points(source) - landmark.reshape(3, 1, 1, 1), axis=0)
    source = source.with_array(np.exp(-((distance / 4) ** 2))[None].astype(np.float32))
    affine = np.diag([-0.7, 0.8, -1.1, 1.0])
    affine[:3, 3] = landmark - affine[:3, :3] @ (20.3, 19.8, 15.6)
    reference = Volume(np.zeros((1, 40, 40, 32)), affine)
    moved, _ = resample_to(source, reference)
    weight = moved.array[0].astype(np.float64)
    found = (points(moved) * weight).sum((1, 2, 3)) / weight.sum()
    np.testing.assert_allclose(found, landmark, atol=0.1)


def test_beyond_the_image_stands_its_lowest_value() -> None:
    source = Volume(np.full((2, 4, 4, 4), 5.0), np.eye(4))
    source.array[1] = 9
    source.array[:, 2, 2, 2] = -7, 1
    reference = Volume(np.zeros((1, 12, 4, 4)), np.eye(4))
    moved, covered = resample_to(source, reference)
    assert covered == pytest.approx(1 / 3)
    assert (moved.array[0, 4:] == -7).all()
    assert (moved.array[1, 4:] == 1).all()
    np.testing.assert_array_equal(moved.array[:, :4], source.array)


def test_half_a_voxel_beyond_the_last_centre_still_belongs_to_it() -> None:
    source = Volume(np.arange(1.0, 4).reshape(1, 1, 1, 3), np.diag([1.0, 1, 5, 1]))
    reference = Volume(np.zeros((1, 1, 1, 18)), np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -3.5], [0, 0, 0, 1]]))
    moved, covered = resample_to(source, reference)
    assert moved.array[0, 0, 0, 1:3].tolist() == [1, 1]  # -2.5 mm is the outer face, -1.5 mm inside
    assert moved.array[0, 0, 0, 15] == 3  # 11.5 mm
    assert moved.array[0, 0, 0, 17] == 1  # 13.5 mm: beyond, the lowest value
    assert covered == pytest.approx(16 / 18)


def test_the_same_grid_changes_nothing(rng: np.random.Generator) -> None:
    source = Volume(rng.normal(size=(2, 6, 7, 8)).astype(np.float32), OBLIQUE, notes=("DERIVED",))
    moved, covered = resample_to(source, source)
    assert covered == 1
    assert moved.notes == ("DERIVED",)
    np.testing.assert_allclose(moved.array, source.array, atol=1e-5)
