"""Patches drawn through their transform: against scipy and torch, and without a border that is not the image's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.planning.plan import Augmentation, Triple
from medseg.preparation import warp
from medseg.preparation.augment import draw_changes
from medseg.preparation.sampling import patch_start, read_through
from medseg.preparation.space import Space, draw_space
from medseg.preparation.warp import Region, apply_space, linear_matrix

OFF = Augmentation(noise=0, blur=0, brightness=0, contrast=0, low_resolution=0, gamma=0, spatial_probability=1)
sizes = st.tuples(*[st.integers(1, 12)] * 3)


def drawn(seed: int, size: Triple, batch: int, dimensions: int = 3) -> Space:
    return draw_space(torch.Generator().manual_seed(seed), batch, OFF, size=size, dimensions=dimensions)


def places(space: Space, number: int, size: Triple) -> np.ndarray:
    """(3, *size) offsets in double precision, written out another way."""
    axes = [np.arange(n) - (n - 1) / 2 for n in size]
    points = np.einsum(
        "ij,jxyz->ixyz", space.matrices[number].double().numpy(), np.stack(np.meshgrid(*axes, indexing="ij"))
    )
    if space.control is not None:
        control = space.control[number].double().numpy()
        grid = np.meshgrid(
            *(np.linspace(0, p - 1, n) for p, n in zip(control.shape[1:], size, strict=True)), indexing="ij"
        )
        points = points + np.stack([ndimage.map_coordinates(c, grid, order=1, mode="nearest") for c in control])
    return points


@settings(max_examples=40, deadline=None)
@given(shape=sizes, size=sizes, place=sizes, seed=st.integers(0, 2**31))
def test_patches_are_those_of_scipy_on_the_whole_image(shape: Triple, size: Triple, place: Triple, seed: int) -> None:
    """Read by region and drawn here, or read from the whole image by scipy in double precision: the same."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(2, *shape)).astype(np.float32)
    mask = rng.integers(0, 4, size=(1, *shape)).astype(np.uint8)
    i, j, k = (p % n for p, n in zip(place, shape, strict=True))
    start = patch_start((i, j, k), size, shape)
    changes = draw_changes(OFF, size, seed=seed, batch=1, dimensions=3)
    (margin,) = changes.margins()
    region_image, centre = read_through(image, start, size, margin)
    region = Region(
        torch.from_numpy(region_image), torch.from_numpy(read_through(mask, start, size, margin)[0]), centre
    )
    found, found_mask = apply_space([region], changes.space, size)

    middle = np.array([s + (n - 1) / 2 for s, n in zip(start, size, strict=True)]).reshape(3, 1, 1, 1)
    points = places(changes.space, 0, size) + middle
    for channel in range(2):
        expected = ndimage.map_coordinates(image[channel].astype(float), points, order=1, mode="grid-constant", cval=0)
        assert np.abs(found[0, channel].numpy() - expected).max() < 2e-4
    sure = (np.abs(points - np.floor(points) - 0.5) > 1e-3).all(0)
    nearest = ndimage.map_coordinates(mask[0], points, order=0, mode="grid-constant", cval=0)
    assert np.array_equal(found_mask[0, 0].numpy()[sure], nearest[sure])


@pytest.mark.parametrize(("size", "shape", "dimensions"), [
    ((10, 8, 6), (14, 12, 10), 3), ((12, 10, 1), (20, 18, 1), 2), ((20, 16, 4), (24, 24, 6), 3),
])  # fmt: skip
def test_gathering_is_grid_sample(
    size: Triple, shape: Triple, dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both devices' ways on the processor: regions of several sizes in one batch, slabs smaller than a patch."""
    monkeypatch.setattr(warp, "SLAB", 100)
    generator = torch.Generator().manual_seed(0)
    regions = []
    for more in range(4):
        i, j, k = (n + more if n > 1 else n for n in shape)
        image = torch.randn(2, i, j, k, generator=generator)
        mask = torch.randint(4, (1, i, j, k), generator=generator, dtype=torch.int32)
        image[:, 0] = image[:, -1] = image[:, :, 0] = image[:, :, -1] = 0
        mask[:, 0] = mask[:, -1] = mask[:, :, 0] = mask[:, :, -1] = 0
        if k > 1:
            image[..., 0] = image[..., -1] = 0
            mask[..., 0] = mask[..., -1] = 0
        regions.append(Region(image, mask, ((i - 1) / 2 + 0.5 * more, (j - 1) / 2, (k - 1) / 2)))
    space = drawn(1, size, 4, dimensions)
    found, found_masks = apply_space(regions, space, size)
    expected, expected_masks = warp._sampled(regions, space, size)
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found_masks != expected_masks).float().mean() < 1e-3  # half way between two, by rounding
    assert found_masks.dtype == torch.int32


def test_no_black_corners() -> None:
    """Far from the border of an image of ones, every patch is ones, however it is turned, scaled and bent."""
    size = (16, 20, 12)
    image = np.ones((1, 90, 90, 90), np.float32)
    changes = draw_changes(OFF, size, seed=0, batch=50, dimensions=3)
    regions = []
    for margin in changes.margins():
        part, centre = read_through(image, (37, 35, 39), size, margin)
        regions.append(Region(torch.from_numpy(part), torch.ones(part.shape, dtype=torch.uint8), centre))
    found, masks = apply_space(regions, changes.space, size)
    assert torch.allclose(found, torch.ones_like(found), atol=1e-5)
    assert (masks == 1).all()


def test_nothing_is_read_beyond_what_is_needed() -> None:
    space = Space(torch.eye(3).repeat(3, 1, 1), None)
    space.matrices[1] *= 1.4
    space.matrices[2] = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])
    assert space.margins((11, 21, 1)) == [(0, 0, 0), (2, 4, 0), (5, 0, 0)]
    assert space.unmoved().tolist() == [True, False, False]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 7), (5, 5), (5, 12), (5, 1)])
def test_linear_matrix_is_that_of_numpy(before: int, after: int) -> None:
    values = np.random.default_rng(0).normal(size=before)
    places = np.linspace(0, before - 1, after) if after > 1 else np.zeros(1)
    expected = np.interp(places, np.arange(before), values)
    assert np.allclose(linear_matrix(before, after).double().numpy() @ values, expected, atol=1e-6)
