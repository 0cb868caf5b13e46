"""Resampling of nnU-Net's models: scipy's and scikit-image's, by matrices."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.transform import resize as skimage_resize

from medseg.planning.plan import Interpolation
from medseg.preparation import splines
from medseg.preparation.interpolate import nearest_slices
from medseg.preparation.splines import coarse_axis, header_spacing, resize, resize_labels, spline_matrix
from medseg.preparation.steps import Resampled, restore

SIZES = [((13, 20, 17), (7, 31, 17)), ((6, 9, 30), (12, 4, 10)), ((5, 5, 1), (9, 4, 1)), ((4, 5, 6), (1, 1, 1))]


@pytest.mark.parametrize(("before", "after"), SIZES)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_resize_is_scikit_image_s(rng: np.random.Generator, before: Any, after: Any, order: int) -> None:
    image = rng.normal(100, 40, (2, *before)).astype(np.float32)
    found = resize(torch.from_numpy(image), after, Interpolation(order=order, order_z=0), None).numpy()
    for channel, expected in zip(found, image.astype(np.float64), strict=True):
        wanted = skimage_resize(expected, after, order, mode="edge", anti_aliasing=False)
        assert np.abs(channel - wanted).max() < 1e-3  # of 40


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order_z", [0, 1, 3])
def test_coarse_axis_is_resampled_apart(rng: np.random.Generator, axis: int, order_z: int) -> None:
    before, after = [14, 12, 10], [20, 9, 13]
    before[axis], after[axis] = 6, 15
    image = rng.normal(size=(1, *before)).astype(np.float32)
    found = resize(torch.from_numpy(image), after, Interpolation(order=3, order_z=order_z), axis).numpy()[0]
    slices = np.moveaxis(image[0].astype(np.float64), axis, 0)
    plane = [n for a, n in enumerate(after) if a != axis]
    slices = np.stack([skimage_resize(part, plane, 3, mode="edge", anti_aliasing=False) for part in slices])
    grid = np.mgrid[:15, : plane[0], : plane[1]].astype(float)
    grid[0] = 6 / 15 * (grid[0] + 0.5) - 0.5
    wanted = np.moveaxis(ndimage.map_coordinates(slices, grid, order=order_z, mode="nearest"), 0, axis)
    assert np.abs(found - wanted).max() < 1e-5


def test_nothing_goes_beyond_the_range_of_the_image() -> None:
    edge = torch.zeros(1, 4, 4, 8)
    edge[..., 4:] = 1
    found = resize(edge, (4, 4, 21), Interpolation(order=3, order_z=0), None)
    assert found.min() == 0
    assert found.max() == 1
    overshoot = spline_matrix(8, 21, 3) @ edge[0, 0, 0].double().numpy()
    assert overshoot.max() > 1.01


def test_matrices_hold_no_denormal_numbers_and_miss_nothing() -> None:
    exact = ndimage.zoom(np.eye(200), (450 / 200, 1.0), order=3, mode="nearest", grid_mode=True)
    found = spline_matrix(200, 450, 3)
    assert np.abs(found[found != 0]).min() > np.finfo(np.float32).tiny
    assert np.abs(exact[exact != 0]).min() < np.finfo(np.float32).tiny
    assert np.abs(found - exact).max() < 1e-19


@pytest.mark.parametrize(("before", "after"), [(7, 3), (3, 7), (26, 7), (5, 5), (1, 4), (4, 1), (10, 20), (9, 27)])
def test_nearest_slices_are_those_of_scipy(before: int, after: int) -> None:
    assert nearest_slices(before, after).tolist() == np.argmax(spline_matrix(before, after, 0), axis=1).tolist()


def test_logits_come_back_by_the_nearest_slice(rng: np.random.Generator) -> None:
    logits = torch.from_numpy(rng.normal(size=(3, 5, 9, 8)).astype(np.float32))
    found = restore(logits, (Resampled((12, 14, 8), nearest=0),), fill=0.0)
    flat = restore(logits, (Resampled((5, 14, 8)),), fill=0.0)
    assert torch.equal(found, flat[:, nearest_slices(5, 12)])


@pytest.mark.parametrize(
    ("before", "after", "separate", "expected"),
    [
        ((1, 1, 1), (2, 1, 1), None, None),
        ((5, 1, 1), (1, 1, 1), None, 0),
        ((1, 1, 1), (1, 4, 1), None, 1),
        ((3, 1, 1), (1, 1, 1), None, None),  # three times is not over three times
        ((5, 5, 1), (1, 1, 1), None, None),  # two coarse axes
        ((1, 6, 1), (9, 1, 1), None, 1),  # what it has goes before what it gets
        ((5, 5, 1), (9, 1, 1), None, None),
        ((5, 1, 1), (1, 1, 1), False, None),
        ((1.5, 1, 1), (1, 1, 1), True, 0),
        ((1, 1, 1), (5, 1, 1), True, None),
    ],
)
def test_coarse_axis_by_nnunet_s_rule(before: Any, after: Any, separate: Any, expected: int | None) -> None:
    assert coarse_axis(Interpolation(order=3, order_z=0, separate=separate), before, after) == expected


def test_spacing_is_what_a_header_says() -> None:
    turn = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0], [0.48, 0.64, 0.6]])
    affine = np.eye(4)
    affine[:3, :3] = (turn @ np.diag([3.0, 1.0, 0.9765625])).astype(np.float32)
    found = header_spacing(affine)
    assert found == [3.0, 1.0, 0.9765625]
    assert coarse_axis(Interpolation(order=3, order_z=0), [found[0], 1, 1], [1, 1, 1]) is None


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("lowest", [-1, 0, 1])
@pytest.mark.parametrize("at_once", [1, 50, splines.AT_ONCE])
def test_labels_are_scipy_s_whatever_is_done_at_once(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, order: int, lowest: int, at_once: int
) -> None:
    """Sizes in small ratios, so that many shares are exactly one half."""
    monkeypatch.setattr(splines, "AT_ONCE", at_once)
    for _ in range(15):
        before, after = rng.integers(1, 9, 3), rng.integers(1, 9, 3)
        coarse = rng.integers(lowest, 5, -(-before // 2)).astype(np.int8)
        mask = coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2)[tuple(slice(n) for n in before)]
        wanted = np.zeros(after, np.int8)
        for label in np.unique(mask):
            share = ndimage.zoom(
                (mask == label).astype(float), after / before, order=order, mode="nearest", grid_mode=True
            )
            wanted[share >= 0.5] = label
        found = resize_labels(mask, tuple(after), Interpolation(order=order, order_z=0), None)
        assert found.dtype == np.int8
        assert np.array_equal(found, wanted)


def test_a_label_map_is_resampled_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In double precision at once it would take 8 bytes a voxel, beside what goes in and comes out."""
    monkeypatch.setattr(splines, "AT_ONCE", 1 << 17)
    mask = np.zeros((64, 128, 128), np.uint8)
    mask[4:60, 4:120, 4:120] = 1
    size = (128, 192, 192)
    tracemalloc.start()
    try:
        resize_labels(mask, size, Interpolation(order=1, order_z=0), None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < math.prod(size) + 3 * mask.size + 40 * splines.AT_ONCE < 3 * math.prod(size)


def test_labels_need_half_of_a_voxel_and_the_last_wins() -> None:
    mask = np.zeros((4, 1, 1), np.uint8)
    mask[:, 0, 0] = [2, 0, 5, 2]
    rule = Interpolation(order=1, order_z=0)
    # Two voxels become one: each has half of it, and the larger value wins.
    assert resize_labels(mask, (2, 1, 1), rule, None).ravel().tolist() == [2, 5]
    assert resize_labels(mask, (4, 1, 1), rule, None).ravel().tolist() == [2, 0, 5, 2]
    assert resize_labels(mask, (8, 1, 1), rule, 0).ravel().tolist() == [2, 2, 0, 0, 5, 5, 2, 2]
