"""Signs of passes, images and labels: known answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from medseg.inference.sliding_window import slide, window_logits
from medseg.quality.closer import ZOOM, enlarge, zooms
from medseg.quality.image import GRID, image_signs, layout_numbers
from medseg.quality.model import SIGNS, logit
from medseg.quality.shape import label_shapes
from medseg.quality.witness import Witness
from medseg.volume import Volume

Make = Callable[..., Any]


def logits_of(mask: np.ndarray, sure: float, channels: int = 3) -> torch.Tensor:
    """Logits (1, K, *S) whose winner is the mask, by `sure`."""
    found = torch.zeros((1, channels, *mask.shape))
    for value in range(channels):
        found[0, value][torch.from_numpy(mask == value)] = sure
    return found


@pytest.fixture
def mask(rng: np.random.Generator) -> np.ndarray:
    found = np.zeros((8, 8, 8), np.int64)
    found[1:4, 1:5, 1:6], found[5:7, 5:7, 5:7] = 1, 2
    return found


def noting(spec: Any, *, networks: int = 1, passes: int = 1, zoom: float = 1.0) -> Witness:
    return Witness(spec, networks=networks, passes=passes, zoom=(zoom, zoom, zoom))


def seen(
    make_spec: Make, passes: list[torch.Tensor], *, networks: int = 1, labels: Any = None, image: Any = None
) -> Witness:
    """What is noted of an image (8, 8, 8) whose second look finds what the first has found."""
    spec = make_spec(labels or {"a": 1, "b": 2})
    witness = noting(spec, networks=networks, passes=len(passes) // networks)
    window = witness.window(torch.zeros((1, 1, *passes[0].shape[2:])) if image is None else image)
    for one in passes:
        window.add(one)
        if window.closer() is not None:
            window.compare(one)
    witness.take(window)
    return witness


def test_a_sure_network_expects_everything_of_its_mask(make_spec: Make, mask: np.ndarray) -> None:
    signs = seen(make_spec, [logits_of(mask, 30.0)]).signs()
    assert set(signs) == {"a", "b"}
    assert signs["a"]["confidence"] == pytest.approx(logit(1.0))
    assert signs["a"]["closer"] == pytest.approx(logit(1.0)), "the second look is the same"
    assert set(signs["a"]) == SIGNS


def test_an_even_network_expects_little(make_spec: Make, mask: np.ndarray) -> None:
    signs = seen(make_spec, [logits_of(mask, 1e-6)]).signs()["a"]
    expected = 2 * (60 / 3) / (60 + 512 / 3)
    assert signs["confidence"] == pytest.approx(logit(expected), abs=1e-4)


def test_a_second_look_that_differs_has_the_dice_with_the_first(make_spec: Make, mask: np.ndarray) -> None:
    other = mask.copy()
    other[1] = 0  # of the 60 voxels of a, 20 are missing
    witness = noting(make_spec({"a": 1, "b": 2}))
    window = witness.window(torch.zeros((1, 1, 8, 8, 8)))
    window.add(logits_of(mask, 40.0))
    assert window.closer() is not None
    window.compare(logits_of(other, 40.0))
    assert window.closer() is None, "once"
    witness.take(window)
    signs = witness.signs()
    assert signs["a"]["closer"] == pytest.approx(logit(2 * 40 / (60 + 40)))
    assert signs["b"]["closer"] == pytest.approx(logit(1.0))


def test_only_the_first_network_looks_twice_and_only_where_there_is_something(
    make_spec: Make, mask: np.ndarray
) -> None:
    window = noting(make_spec({"a": 1, "b": 2}), networks=2, passes=2).window(torch.zeros((1, 1, 8, 8, 8)))
    asked = []
    for _ in range(4):
        window.add(logits_of(mask, 9.0))
        asked.append(window.closer() is not None)
        if asked[-1]:
            window.compare(logits_of(mask, 9.0))
    assert asked == [False, True, False, False]
    empty = noting(make_spec({"a": 1, "b": 2})).window(torch.zeros((1, 1, 8, 8, 8)))
    empty.add(logits_of(np.zeros_like(mask), 9.0))
    assert empty.closer() is None


def test_the_edge_compares_steps_across_the_border_with_those_inside(make_spec: Make, mask: np.ndarray) -> None:
    image = np.where(mask == 1, 5.0, 0.0) + 0.5 * (np.indices(mask.shape)[0] % 2)
    windows = torch.from_numpy(image.astype(np.float32))[None, None]
    found = seen(make_spec, [logits_of(mask, 9.0)], image=windows).signs()["a"]["edge"]
    across, within = [], []
    for axis in range(3):  # the list of all pairs of neighbours is the oracle
        for place in np.argwhere(np.ones(mask.shape)):
            other = place + np.eye(3, dtype=int)[axis]
            if other[axis] < 8 and 1 in (mask[tuple(place)], mask[tuple(other)]):
                step = abs(image[tuple(place)] - image[tuple(other)])
                (within if mask[tuple(place)] == mask[tuple(other)] else across).append(step)
    assert found == pytest.approx(math.log(np.mean(across) / np.mean(within)), rel=1e-5)
    assert found > 2
    flat = seen(make_spec, [logits_of(mask, 9.0)]).signs()["a"]["edge"]
    assert flat == 0, "an image without any step"


def test_only_the_channels_of_the_image_have_edges(make_spec: Make, mask: np.ndarray) -> None:
    """The second stage of a cascade is given the first one's mask, too; that has edges wherever it likes."""
    image = torch.randn((1, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    before = torch.from_numpy((mask == 1).astype(np.float32))[None, None]
    first, second = (
        seen(make_spec, [logits_of(mask, 9.0)], image=windows).signs()
        for windows in (image, torch.cat([image, before], 1))
    )
    assert first == second


@pytest.mark.parametrize("size", [(9, 11), (9, 11, 13)])
def test_what_is_enlarged_lies_about_the_centre(size: tuple[int, ...]) -> None:
    ramps = torch.from_numpy(np.indices(size).astype(np.float32))[None]
    factors = (1.2, 1.0, 1.5)[: len(size)]
    found = enlarge(ramps, factors)[0]
    for axis, factor in enumerate(factors):
        middle = (size[axis] - 1) / 2
        expected = middle + (np.indices(size)[axis] - middle) / factor
        assert found[axis].numpy() == pytest.approx(expected, abs=1e-4)


def test_thick_slices_are_not_enlarged() -> None:
    assert zooms((1.0, 1.0, 1.5), 3) == (ZOOM, ZOOM, ZOOM)
    assert zooms((0.5, 0.5, 5.0), 3) == (ZOOM, ZOOM, 1.0)
    assert zooms((0.5, 0.5, 0.1), 2) == (ZOOM, ZOOM)


def test_networks_are_compared_with_each_other(make_spec: Make, mask: np.ndarray) -> None:
    other = mask.copy()
    other[1] = 0
    witness = seen(make_spec, [logits_of(mask, 10.0), logits_of(other, 10.0)], networks=2)
    assert witness.between_networks() == pytest.approx({"a": 2 * 40 / 100, "b": 1.0})
    assert seen(make_spec, [logits_of(mask, 10.0)]).between_networks() == {}


def test_a_label_that_none_found_has_no_signs(make_spec: Make) -> None:
    assert seen(make_spec, [logits_of(np.zeros((4, 4, 4), np.int64), 5.0)]).signs() == {}


def test_a_batch_that_is_tried_again_counts_once(make_spec: Make, mask: np.ndarray) -> None:
    witness = noting(make_spec({"a": 1, "b": 2}))
    image = torch.zeros((1, 1, 8, 8, 8))
    witness.window(image).add(logits_of(mask, 1.0))  # ran out of memory, say
    window = witness.window(image)
    window.add(logits_of(mask, 3.0))
    window.compare(logits_of(mask, 3.0))
    witness.take(window)
    assert witness.signs() == seen(make_spec, [logits_of(mask, 3.0)]).signs()


def test_regions_are_seen_as_they_are_painted(make_spec: Make, mask: np.ndarray) -> None:
    regions = {"whole": {"labels": ["a", "b"], "paint": "a"}, "core": {"labels": ["b"], "paint": "b"}}
    spec = make_spec({"a": 1, "b": 2}, regions=regions)
    witness = noting(spec)
    window = witness.window(torch.zeros((1, 1, 8, 8, 8)))
    whole, core = torch.from_numpy(mask > 0), torch.from_numpy(mask == 2)
    window.add(torch.stack([whole.float() * 40 - 20, core.float() * 40 - 20])[None])
    witness.take(window)
    assert witness.signs()["a"]["confidence"] == pytest.approx(logit(1.0))
    assert witness.signs()["b"]["confidence"] == pytest.approx(logit(1.0))


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(0, 1, x.shape[-1])
        return torch.cat([torch.zeros_like(x), x * 2 - ramp], 1)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_witness_does_not_change_the_answer(make_spec: Make, make_plan: Make, dimensions: int) -> None:
    spec = make_spec()
    changes = {"dimensions": 2, "patch_size": (16, 16, 1)} if dimensions == 2 else {}
    plan = make_plan(spec, **changes)
    passes = 2**dimensions
    image = torch.randn((1, 20, 18, 17), generator=torch.Generator().manual_seed(0))
    witness = Witness(spec, networks=2, passes=passes, zoom=zooms(plan.spacing, dimensions))
    with_it = slide(image, [Twice(), Twice()], plan, mirror=True, witness=witness)
    assert torch.equal(with_it, slide(image, [Twice(), Twice()], plan, mirror=True))
    assert 0 < witness.between_networks()["organ"] <= 1
    assert logit(0.3) < witness.signs()["organ"]["closer"] < logit(0.999)
    assert window_logits([Twice()], plan, mirror=False) is not None


def box(start: tuple[int, int, int], size: tuple[int, int, int], **grid: Any) -> Volume:
    array = np.zeros((1, 30, 30, 30), np.uint8)
    array[0][tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = 1
    return Volume(array, grid.get("affine", np.diag([1.0, 2.0, 3.0, 1.0])))


def test_the_numbers_of_a_box_are_those_of_a_box(make_spec: Make) -> None:
    found = label_shapes(box((3, 4, 5), (10, 8, 6)), make_spec())["organ"]
    x, y, z = 10.0, 16.0, 18.0
    assert found["volume"] == pytest.approx(math.log(x * y * z))
    assert found["objects"] == 0
    assert found["extent R"] == pytest.approx(math.log(x))
    assert found["extent S"] == pytest.approx(math.log(z))
    assert found["surface"] == pytest.approx(math.log(2 * (x * y + y * z + x * z) / (x * y * z) ** (2 / 3)))
    assert found["elongation"] == pytest.approx(math.log(z / y))
    assert found["place R"] == pytest.approx(8 / 30)
    assert found["at the border of the image"] == 0
    assert not any("offset" in name for name in found), "there is one label"


def test_the_numbers_do_not_depend_on_how_the_array_is_stored(make_spec: Make) -> None:
    mask = box((3, 4, 5), (10, 8, 6))
    affine = mask.affine @ np.array([[-1, 0, 0, 29], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    turned = Volume(mask.array[:, ::-1].copy(), affine)
    first, second = (label_shapes(one, make_spec())["organ"] for one in (mask, turned))
    assert first == pytest.approx(second)


def test_what_touches_the_border_is_told(make_spec: Make) -> None:
    assert label_shapes(box((0, 4, 5), (10, 8, 6)), make_spec())["organ"]["at the border of the image"] > 0


def test_no_label_no_numbers(make_spec: Make) -> None:
    assert label_shapes(box((0, 0, 0), (0, 0, 0)), make_spec()) == {}


def test_one_voxel_is_a_shape_too(make_spec: Make) -> None:
    found = label_shapes(box((3, 3, 3), (1, 1, 1)), make_spec())["organ"]
    assert all(math.isfinite(value) for value in found.values())


def described(array: np.ndarray) -> Any:
    volume = Volume(array[None].astype(np.float32), np.diag([1.0, 1.0, 2.0, 1.0]))
    return image_signs(torch.from_numpy(volume.array), volume.spacing, volume, ["t1"])


@pytest.fixture
def smooth(rng: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    found = gaussian_filter(rng.standard_normal((24, 24, 24)), 3)
    return np.asarray(found / found.std())


def test_noise_is_seen_in_differences_and_blur_too(smooth: np.ndarray, rng: np.random.Generator) -> None:
    from scipy.ndimage import gaussian_filter

    clean, noisy = described(smooth), described(smooth + 0.5 * rng.standard_normal(smooth.shape))
    blurred = described(gaussian_filter(smooth, 2))
    for axis in "RAS":
        assert noisy.numbers[f"noise {axis} of t1"] > clean.numbers[f"noise {axis} of t1"] + 0.3
        assert blurred.numbers[f"noise {axis} of t1"] < clean.numbers[f"noise {axis} of t1"] - 0.1
        assert noisy.numbers[f"sharpness {axis} of t1"] < clean.numbers[f"sharpness {axis} of t1"]


def test_a_flipped_image_is_unlike_its_own_layout(smooth: np.ndarray) -> None:
    whole = described(smooth)
    own = layout_numbers(whole.layout, whole.layout)
    assert own["layout"] == pytest.approx(1)
    flipped = layout_numbers(described(smooth[::-1].copy()).layout, whole.layout)
    assert flipped["direction R"] == pytest.approx(-own["direction R"])
    assert flipped["layout"] < 0.9


def test_images_without_contrast_and_pictures_have_numbers() -> None:
    for array in (np.zeros((8, 8, 8)), np.ones((9, 7, 1)), np.full((2, 2, 2), 5.0)):
        found = described(array)
        assert all(math.isfinite(value) for value in found.numbers.values())
        assert np.isfinite(found.layout).all()
        assert len(found.layout) == GRID**3
    assert set(described(np.ones((9, 7, 1))).numbers) == set(described(np.zeros((8, 8, 8))).numbers)


def test_place_and_slant_are_those_of_the_list_of_voxels(make_spec: Make, rng: np.random.Generator) -> None:
    """Moments are taken from shadows; the list of all voxels is the oracle."""
    for shape in ((9, 7, 5), (30, 2, 11), (6, 6, 6)):
        array = (rng.random((1, *shape)) < 0.2).astype(np.int32)
        array[0, 0, 0, 0] = array[0, -1, -1, -1] = 1
        found = label_shapes(Volume(array, np.diag([0.5, 2.0, 3.0, 1.0])), make_spec({"a": 1}))["a"]
        places = np.argwhere(array[0])
        spacing = np.array([0.5, 2.0, 3.0])
        spread = np.cov((places * spacing).T, bias=True) + np.diag(spacing**2 / 12)
        for n, axis in enumerate("RAS"):
            other = (n + 1) % 3
            slant = spread[n, other] / math.sqrt(spread[n, n] * spread[other, other])
            assert found[f"place {axis}"] == pytest.approx((places.mean(0)[n] + 0.5) / shape[n], abs=1e-12)
            assert found[f"slant {axis}"] == pytest.approx(slant, abs=1e-12)
        axes = np.sqrt(np.linalg.eigvalsh(spread))
        assert found["elongation"] == pytest.approx(math.log(axes[2] / axes[1]), abs=1e-9)
