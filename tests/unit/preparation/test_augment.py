"""Augmentation: nothing where nothing is asked for, images and masks together, known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from medseg.planning.plan import Augmentation, Triple
from medseg.preparation.augment import augment as augment_regions
from medseg.preparation.augment import draw_changes
from medseg.preparation.intensity import AUGMENTATIONS
from medseg.preparation.space import Space, draw_space, thin_axis
from medseg.preparation.warp import Region
from medseg.preparation.warp import apply_space as warped

REGION, SIZE = (14, 12, 10), (10, 8, 6)
BOX = (slice(None), slice(None), slice(2, 12), slice(2, 10), slice(2, 8))
OFF: dict[str, Any] = dict.fromkeys(AUGMENTATIONS, 0.0)
NOTHING = Augmentation(spatial_probability=0, mirror_axes=(), elastic=0, **OFF)
STRONG = Augmentation(spatial_probability=1, **dict.fromkeys(AUGMENTATIONS, 1.0))


def batch(number: int = 3, channels: int = 2, size: tuple[int, ...] = REGION) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(number, channels, *size, generator=generator)
    return images, torch.randint(4, (number, 1, *size), generator=generator, dtype=torch.uint8)


def as_regions(images: Tensor, masks: Tensor) -> list[Region]:
    """Regions whose centre is that of their patch."""
    i, j, k = ((n - 1) / 2 for n in images.shape[2:])
    return [Region(image, mask, (i, j, k)) for image, mask in zip(images, masks, strict=True)]


def apply_space(images: Tensor, masks: Tensor, space: Space, size: Triple) -> tuple[Tensor, Tensor]:
    return warped(as_regions(images, masks), space, size)


def augment(
    images: Tensor, masks: Tensor, plan: Augmentation, size: Triple, *, seed: int, dimensions: int
) -> tuple[Tensor, Tensor]:
    changes = draw_changes(plan, size, seed=seed, batch=len(images), dimensions=dimensions)
    return augment_regions(as_regions(images, masks), changes)


def change(name: str, image: Tensor, number: float) -> Tensor:
    """One row on one image (C, I, J, K)."""
    return AUGMENTATIONS[name].apply(image[None], torch.tensor([number], dtype=torch.float64))[0]


def coordinates(number: int, size: tuple[int, ...] = REGION) -> Tensor:
    """(B, 3, *size): every voxel holds its offset from the centre of the region."""
    axes = [torch.arange(n) - (n - 1) / 2 for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).float().repeat(number, 1, 1, 1, 1)


def test_nothing_asked_for_is_exactly_the_centre() -> None:
    images, masks = batch()
    found, found_masks = augment(images, masks, NOTHING, SIZE, seed=0, dimensions=3)
    assert torch.equal(found, images[BOX])
    assert torch.equal(found_masks, masks[BOX])
    assert found_masks.dtype == torch.uint8


def test_rows_whose_probability_is_0_draw_nothing_visible() -> None:
    """Elastic deformation belongs to the spatial probability: without it there is none."""
    images, masks = batch()
    plan = NOTHING.model_copy(update={"elastic": 5.0})
    assert torch.equal(augment(images, masks, plan, SIZE, seed=0, dimensions=3)[0], images[BOX])


def test_mirroring_is_exact() -> None:
    images, masks = batch(16)
    plan = NOTHING.model_copy(update={"mirror_axes": (0, 2)})
    found, found_masks = augment(images, masks, plan, SIZE, seed=0, dimensions=3)
    kinds = set()
    for number in range(16):
        crop, crop_mask = images[BOX][number], masks[BOX][number]
        options = {dims: crop.flip(dims) for dims in ((), (1,), (3,), (1, 3))}
        fitting = [dims for dims, option in options.items() if torch.equal(found[number], option)]
        assert len(fitting) == 1
        assert torch.equal(found_masks[number], crop_mask.flip(fitting[0]))
        kinds.update(fitting)
    assert len(kinds) == 4, "each axis is mirrored in half of the patches"


@pytest.mark.parametrize(("axis", "plane"), [(0, (2, 3)), (1, (1, 3)), (2, (1, 2))])
def test_a_quarter_turn_is_rot90(axis: int, plane: tuple[int, int]) -> None:
    images, masks = batch(1, size=(9, 9, 9))
    first, second = [a for a in range(3) if a != axis]
    matrix = torch.eye(3)
    matrix[first, first] = matrix[second, second] = 0
    matrix[first, second], matrix[second, first] = -1, 1
    found, found_masks = apply_space(images, masks, Space(matrix[None], None), (9, 9, 9))
    turned = [k for k in (1, 3) if torch.allclose(found[0], images[0].rot90(k, plane), atol=1e-5)]
    assert len(turned) == 1
    assert torch.equal(found_masks[0], masks[0].rot90(turned[0], plane))


def test_matrices_say_where_each_voxel_comes_from() -> None:
    region = coordinates(4)
    plan = Augmentation(spatial_probability=1, rotation=20, scale=(0.8, 0.9), elastic=0)
    space = draw_space(torch.Generator().manual_seed(2), 4, plan, size=SIZE, dimensions=3)
    found, _ = apply_space(region, torch.zeros(4, 1, *REGION), space, SIZE)
    offsets = coordinates(4, SIZE)
    expected = torch.einsum("bij,bjxyz->bixyz", space.matrices, offsets)
    inside = (expected.abs() <= torch.tensor([(n - 1) / 2 for n in REGION]).reshape(1, 3, 1, 1, 1)).all(1)
    assert inside.float().mean() > 0.9
    assert ((found - expected).abs().amax(1)[inside]).max() < 1e-4


def test_elastic_displacement_moves_by_control_points() -> None:
    control = torch.full((1, 3, 5, 5, 5), 0.0)
    control[:, 1] = 1.0
    region = coordinates(1)
    found, _ = apply_space(region, torch.zeros(1, 1, *REGION), Space(torch.eye(3)[None], control), SIZE)
    expected = coordinates(1, SIZE) + torch.tensor([0.0, 1.0, 0.0]).reshape(1, 3, 1, 1, 1)
    assert (found - expected).abs().max() < 1e-4


def test_image_and_mask_stay_together() -> None:
    """A mask and its copy as an image are turned alike, up to half a voxel of interpolation."""
    masks = torch.zeros(8, 1, 24, 24, 24, dtype=torch.uint8)
    masks[:, :, 6:16, 8:18, 7:17] = 1
    plan = Augmentation(spatial_probability=1, elastic=2.0)
    space = draw_space(torch.Generator().manual_seed(0), 8, plan, size=(16, 16, 16), dimensions=3)
    images, found = apply_space(masks.float(), masks, space, (16, 16, 16))
    sure = (images < 0.2) | (images > 0.8)
    assert torch.equal((images > 0.5)[sure], (found > 0)[sure])
    overlap = 2 * ((images > 0.5) & (found > 0)).sum() / ((images > 0.5).sum() + (found > 0).sum())
    assert overlap > 0.95


@pytest.mark.parametrize("dimensions", [2, 3])
def test_same_seed_same_bits(dimensions: int) -> None:
    region, size = ((14, 12, 1), (10, 8, 1)) if dimensions == 2 else (REGION, SIZE)
    images, masks = batch(size=region)
    plan = STRONG.model_copy(update={"mirror_axes": tuple(range(dimensions))})
    first, again, other = (augment(images, masks, plan, size, seed=s, dimensions=dimensions) for s in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_input_is_left_as_it_was() -> None:
    images, masks = batch()
    before, before_masks = images.clone(), masks.clone()
    augment(images, masks, STRONG, SIZE, seed=0, dimensions=3)
    assert torch.equal(images, before)
    assert torch.equal(masks, before_masks)


def test_masks_keep_their_values() -> None:
    images, masks = batch()
    masks = masks.int() * 1000
    _, found = augment(images, masks, STRONG, SIZE, seed=0, dimensions=3)
    assert found.dtype == torch.int32
    assert set(found.unique().tolist()) <= {0, 1000, 2000, 3000}


def test_two_dimensions_stay_in_their_slice() -> None:
    plan = Augmentation(spatial_probability=1, mirror_axes=(0, 1))
    space = draw_space(torch.Generator().manual_seed(0), 50, plan, size=(16, 16, 1), dimensions=2)
    axis = torch.tensor([0.0, 0.0, 1.0])
    assert torch.equal(space.matrices[:, 2, :], axis.expand(50, 3))
    assert torch.equal(space.matrices[:, :, 2], axis.expand(50, 3))
    assert space.control is not None
    assert (space.control[:, 2] == 0).all()
    turned = space.matrices[:, :2, :2]
    assert not torch.allclose(turned, torch.eye(2).expand(50, 2, 2))


def test_flat_patches_are_turned_within_their_slices() -> None:
    assert thin_axis((64, 64, 64), 3) is None
    assert thin_axis((40, 56, 40), 3) is None
    assert thin_axis((128, 128, 16), 3) == 2
    assert thin_axis((16, 128, 128), 3) == 0
    assert thin_axis((64, 64, 1), 2) == 2
    plan = Augmentation(spatial_probability=1, mirror_axes=(0, 1, 2))
    space = draw_space(torch.Generator().manual_seed(0), 50, plan, size=(8, 64, 64), dimensions=3)
    across = space.matrices[:, 0, 0]
    assert set(across.tolist()) == {1.0, -1.0}, "mirrored, but neither turned nor scaled"
    assert (space.matrices[:, 0, 1:] == 0).all()
    assert (space.matrices[:, 1:, 0] == 0).all()
    assert space.control is not None
    assert (space.control[:, 0] == 0).all()


@pytest.mark.parametrize("size", [(8, 8, 8), (16, 24, 12), (64, 64, 64)])
def test_elastic_deformation_folds_nothing(size: tuple[int, int, int]) -> None:
    """Neighbours along an axis stay in order: the displacement between control points is below their distance."""
    plan = Augmentation(spatial_probability=1, elastic=2.0)
    space = draw_space(torch.Generator().manual_seed(0), 200, plan, size=size, dimensions=3)
    assert space.control is not None
    for axis, n in enumerate(size):
        step = space.control[:, axis].diff(dim=axis + 1)
        assert (step < -(n - 1) / 4).float().mean() < 1e-3


def test_probability_is_the_share_of_changed_patches() -> None:
    images, masks = batch(1, 1)
    plan = NOTHING.model_copy(update={"brightness": 0.25})
    results = [augment(images, masks, plan, SIZE, seed=s, dimensions=3)[0] for s in range(100)]
    changed = sum(not torch.equal(found, images[BOX]) for found in results)
    assert 8 <= changed <= 42  # four standard deviations around 25


def test_every_row_has_its_probability_in_the_plan() -> None:
    assert set(AUGMENTATIONS) <= set(Augmentation.model_fields)


rows = pytest.mark.parametrize("name", list(AUGMENTATIONS))


@rows
@pytest.mark.parametrize("value", [0.0, 2.5, -1e4])
@pytest.mark.parametrize("size", [(6, 5, 4), (6, 5, 1), (1, 1, 1)])
def test_constant_images_stay_finite(name: str, value: float, size: tuple[int, ...]) -> None:
    for number in AUGMENTATIONS[name].draw(torch.Generator().manual_seed(0), 10):
        found = change(name, torch.full((2, *size), value), float(number))
        assert found.shape == (2, *size)
        assert torch.isfinite(found).all()


@rows
def test_draws_are_one_number_a_patch_and_repeat(name: str) -> None:
    draw = AUGMENTATIONS[name].draw
    first, again = (draw(torch.Generator().manual_seed(3), 50) for _ in range(2))
    assert first.shape == (50,)
    assert torch.equal(first, again)
    assert len(set(first.tolist())) == 50


@rows
def test_channels_do_not_see_each_other(name: str) -> None:
    """A channel far away in intensity must not change what happens to its neighbour."""
    row = AUGMENTATIONS[name]
    image, _ = batch(1)
    other = image[0].clone()
    other[1] = other[1] * 100 + 1000
    for number in row.draw(torch.Generator().manual_seed(0), 5):
        found, beside = change(name, image[0], float(number)), change(name, other, float(number))
        assert torch.allclose(found[0], beside[0], atol=1e-5)


@rows
def test_slices_of_a_flat_patch_are_kept(name: str) -> None:
    row = AUGMENTATIONS[name]
    image = torch.randn(1, 12, 10, 1)
    for number in row.draw(torch.Generator().manual_seed(0), 3):
        assert change(name, image, float(number)).shape == image.shape


def test_intensities_by_hand() -> None:
    image = torch.tensor([0.0, 1.0, 2.0, 5.0]).reshape(1, 4, 1, 1)
    assert change("brightness", image, 0.5).flatten().tolist() == [0, 0.5, 1, 2.5]
    assert change("contrast", image, 0.5).flatten().tolist() == [1, 1.5, 2, 3.5]
    assert change("contrast", image, 2.0).flatten().tolist() == [0, 0, 2, 5], "within the old range"
    assert torch.allclose(change("gamma", image, 1.0), image, atol=1e-5)
    assert torch.allclose(change("gamma", image, -1.0), image, atol=1e-5)


@pytest.mark.parametrize("exponent", [0.7, 1.5, -0.7, -1.5])
def test_gamma_keeps_mean_deviation_and_order(exponent: float) -> None:
    image = torch.randn(1, 8, 8, 8)
    found = change("gamma", image, exponent)
    assert torch.allclose(found.mean(), image.mean(), atol=1e-5)
    assert torch.allclose(found.std(), image.std(), atol=1e-5)
    assert torch.equal(found.flatten().argsort(), image.flatten().argsort())


def test_blur_is_a_gaussian_that_keeps_the_sum() -> None:
    image = torch.zeros(1, 11, 11, 11)
    image[0, 5, 5, 5] = 1
    found = change("blur", image, 1.0)
    assert torch.allclose(found.sum(), torch.tensor(1.0), atol=1e-5)
    assert torch.allclose(found[0, 6, 5, 5] / found[0, 5, 5, 5], torch.tensor(-0.5).exp(), atol=1e-5)
    assert torch.allclose(found, found.transpose(1, 3), atol=1e-7)


def test_noise_has_its_deviation() -> None:
    found = change("noise", torch.zeros(1, 30, 30, 30), 0.2)
    assert abs(float(found.std()) - 0.2) < 0.01
    assert abs(float(found.mean())) < 0.01


@rows
def test_patches_of_a_batch_do_not_see_each_other(name: str) -> None:
    """All at once is what each alone is."""
    images, _ = batch(6)
    numbers = AUGMENTATIONS[name].draw(torch.Generator().manual_seed(0), 6)
    found = AUGMENTATIONS[name].apply(images, numbers)
    for number in range(6):
        assert torch.allclose(found[number], change(name, images[number], float(numbers[number])), atol=1e-6)


def test_rows_of_a_batch_are_changed_as_in_the_whole() -> None:
    """Two processes that share a batch make the patches that one makes."""
    images, masks = batch(6)
    changes = draw_changes(STRONG, SIZE, seed=3, batch=6, dimensions=3)
    regions = as_regions(images, masks)
    whole, whole_masks = augment_regions(regions, changes)
    for rank in range(2):
        share = slice(rank, None, 2)
        found, found_masks = augment_regions(regions[share], changes.rows(share))
        assert torch.allclose(found, whole[share], atol=1e-6)
        assert torch.equal(found_masks, whole_masks[share])


@pytest.mark.parametrize("sigma", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("size", [(9, 7, 5), (12, 2, 1)])
def test_blur_is_that_of_scipy(sigma: float, size: tuple[int, ...]) -> None:
    image = torch.randn(1, *size)
    radius = max(1, int(3 * sigma))
    expected = image[0].double().numpy()
    for axis, n in enumerate(size):
        if n > 1:
            expected = ndimage.gaussian_filter1d(expected, sigma, axis, mode="nearest", radius=radius)
    assert np.abs(change("blur", image, sigma)[0].numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("factor", [0.5, 0.63, 0.99])
def test_low_resolution_is_that_of_torch(factor: float) -> None:
    image = torch.randn(2, 12, 9, 5)
    small = tuple(round(n * factor) for n in image.shape[1:])
    expected = F.interpolate(F.interpolate(image[None], small, mode="nearest"), image.shape[1:], mode="trilinear")
    assert torch.allclose(change("low_resolution", image, factor), expected[0], atol=1e-5)
