from __future__ import annotations

import numpy as np
import pytest

from medseg.phantom.shapes import ENDLESS, Blob, Shape, distance, jitter, random_warp


def points(*rows: tuple[float, float, float]) -> np.ndarray:
    return np.array(rows, np.float32).T


def test_the_distance_of_a_sphere_is_exact() -> None:
    sphere = Shape((Blob((1, 2, 3), (10, 10, 10)),))
    found = distance(sphere, points((1, 2, 3), (6, 2, 3), (1, 12, 3), (1, 2, 33)))
    np.testing.assert_allclose(found, [-10, -5, 0, 20], atol=0.05)


def test_a_distance_is_negative_exactly_inside(rng: np.random.Generator) -> None:
    place = rng.uniform(-60, 60, (3, 5000)).astype(np.float32)
    found = distance(Shape((Blob((0, 5, 0), (20, 30, 45)),)), place)
    value = (place[0] / 20) ** 2 + ((place[1] - 5) / 30) ** 2 + (place[2] / 45) ** 2
    clear = np.abs(value - 1) > 0.02
    np.testing.assert_array_equal((found < 0)[clear], (value < 1)[clear])


def test_an_endless_radius_makes_a_cylinder() -> None:
    tube = Shape((Blob((0, 0, 0), (10, 10, ENDLESS)),))
    np.testing.assert_allclose(distance(tube, points((15, 0, -500), (15, 0, 900))), [5, 5], rtol=0.35)


def test_a_dome_goes_on_below_its_centre() -> None:
    dome = Shape((Blob((0, 0, 0), (10, 10, 10), endless_below=True),))
    assert (distance(dome, points((0, 0, -400), (0, 0, 9))) < 0).all()
    assert distance(dome, points((0, 0, 11)))[0] > 0


@pytest.mark.parametrize(
    ("turn", "inside"), [((90, 0, 0), (0, 0, 28)), ((0, 0, 90), (-28, 0, 0)), ((0, 0, 0), (0, 28, 0))]
)
def test_turn_moves_the_long_axis(turn: tuple[float, float, float], inside: tuple[float, float, float]) -> None:
    long = Shape((Blob((0, 0, 0), (10, 30, 10), turn),))
    assert distance(long, points(inside))[0] < 0
    assert (distance(long, points((0, 28, 0), (28, 0, 0), (0, 0, 28))) < 0).sum() == 1


def test_minus_takes_away() -> None:
    bitten = Shape((Blob((0, 0, 0), (20, 20, 20)),), minus=(Blob((20, 0, 0), (10, 10, 10)),), blend=2)
    assert distance(bitten, points((15, 0, 0)))[0] > 0
    assert distance(bitten, points((-15, 0, 0)))[0] < 0


def test_a_jitter_moves_the_pivot_by_its_shift(rng: np.random.Generator) -> None:
    shape = Shape((Blob((50, -40, 10), (20, 20, 30)),))
    move = jitter(shape, rng, amount=1.0)
    moved = (move.pivot + move.shift)[:, None].astype(np.float32)
    np.testing.assert_allclose(move.undo(moved)[:, 0], (50, -40, 10), atol=1e-4)
    assert 0 < np.linalg.norm(move.shift) < 14


def test_a_warp_is_smooth_and_does_not_fold(rng: np.random.Generator) -> None:
    axis = np.arange(-120, 121, 10, dtype=np.float32)
    place = np.stack(np.meshgrid(axis, axis, axis, indexing="ij")).reshape(3, -1)
    warped = random_warp(rng, step=60.0, sigma=9.0)(place).reshape(3, 25, 25, 25)
    assert 1 < np.abs(warped.reshape(3, -1) - place).max() < 20
    for part in range(3):
        assert (np.diff(warped[part], axis=part) > 0).all()
