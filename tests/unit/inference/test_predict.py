"""From an image to its mask: on the grid of the image, whatever its orientation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg.errors import BundleError
from medseg.inference.predict import Model, load_model, predict_soft, predict_volume
from medseg.volume import Volume, reorient

Make = Callable[..., Any]
ORIENTATIONS = [
    "".join(letters) for pairs in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*pairs)
]
OBLIQUE = np.array([[-0.9, 0.1, 0.0, 12.0], [0.1, 0.9, 0.2, -7.0], [0.0, -0.2, 1.7, 33.0], [0, 0, 0, 1]])
SPACING = tuple(float(x) for x in np.linalg.norm(OBLIQUE[:3, :3], axis=0))


class Threshold(nn.Module):
    """Label 1 above 1.5, label 2 above 2.5."""

    def forward(self, image: Tensor) -> Tensor:
        x = image[:, :1]
        return 10 * torch.cat([1.5 - x, 1 - (x - 2).abs() * 2, x - 2.5], dim=1)


@pytest.fixture
def threshold(make_spec: Make, make_plan: Make) -> Callable[..., Model]:
    def make(network: nn.Module | None = None, **changes: Any) -> Model:
        spec = make_spec(labels={"two": 9, "three": 4})
        options = {"normalisation": {"t1": {"scheme": "none"}}, "patch_size": (8, 8, 8), **changes}
        plan = make_plan(spec, **options)
        info = SimpleNamespace(plan=plan, spec=spec, postprocess=(), temperature=1.0)
        return Model(SimpleNamespace(info=info), [network or Threshold()], torch.device("cpu"))

    return make


def scene() -> Volume:
    rng = np.random.default_rng(1)
    image = np.zeros((1, 17, 14, 11), np.float32)
    image[0, 2:-3, 1:-1, 2:] = rng.integers(1, 4, (12, 12, 9))
    return Volume(image, OBLIQUE)


def expected(image: Volume) -> Any:
    return np.select([image.array == 2, image.array == 3], [9, 4], 0)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_mask_lies_on_the_grid_of_its_image(threshold: Callable[..., Model], codes: str) -> None:
    image = reorient(scene(), codes)
    # The prepared grid has the spacing of the image along its own axes: nothing is resampled.
    spacing = reorient(scene(), "RAS").spacing
    mask = predict_volume(threshold(spacing=spacing), image)
    assert mask.array.dtype == np.uint8
    assert mask.affine.tobytes() == image.affine.tobytes()
    assert np.array_equal(mask.array, expected(image))


@pytest.mark.parametrize("orientation", ["RAS", "SLP", "AIR"])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("mirror", [None, False, True])
def test_neither_plan_nor_mirroring_moves_anything(
    threshold: Callable[..., Model], orientation: str, dimensions: int, mirror: bool | None
) -> None:
    turned = reorient(scene(), orientation)
    patch = (8, 8, 8 if dimensions == 3 else 1)
    model = threshold(orientation=orientation, spacing=turned.spacing, dimensions=dimensions, patch_size=patch)
    mask = predict_volume(model, scene(), mirror=mirror)
    assert np.array_equal(mask.array, expected(scene()))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SLP", "AIR"])
def test_probabilities_lie_on_the_grid_of_the_image(threshold: Callable[..., Model], codes: str) -> None:
    image = reorient(scene(), codes)
    model = threshold(spacing=reorient(scene(), "RAS").spacing)
    mask, soft = predict_soft(model, image)
    assert np.array_equal(mask.array, predict_volume(model, image).array)
    assert soft.array.shape == (2, *image.shape)
    assert soft.array.dtype == np.float32
    assert soft.affine.tobytes() == image.affine.tobytes()
    # in the logits of Threshold
    logits = 10 * np.concatenate([1.5 - image.array, 1 - abs(image.array - 2) * 2, image.array - 2.5])
    weights = np.exp(logits)
    wanted = np.where(image.array == 0, 0, weights[1:] / weights.sum(0))
    assert np.abs(soft.array - wanted).max() < 1e-5


def test_resampled_masks_fit(threshold: Callable[..., Model]) -> None:
    grid = np.indices((40, 36, 30)).astype(float)
    centre = np.array([20, 17, 14]).reshape(3, 1, 1, 1)
    distance = np.sqrt((((grid - centre) * np.array([1, 1, 1.6]).reshape(3, 1, 1, 1)) ** 2).sum(0))
    image = Volume(np.clip(4.2 - distance / 6, 0.1, 4)[None].astype(np.float32), np.diag([1, 1, 1.6, 1]))
    mask = predict_volume(threshold(spacing=(1.3, 0.8, 1.2)), image).array
    for value, inside in ((9, (image.array > 1.5) & (image.array <= 2.5)), (4, image.array > 2.5)):
        found = mask == value
        assert 2 * (found & inside).sum() / (found.sum() + inside.sum()) > 0.97


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_images_without_contrast(threshold: Callable[..., Model], value: float) -> None:
    image = Volume(np.full((1, 5, 4, 3), value, np.float32), np.eye(4))
    mask = predict_volume(threshold(), image)
    assert np.array_equal(mask.array, expected(image))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 2), (3, 3, 60)])
def test_images_of_any_size(threshold: Callable[..., Model], shape: tuple[int, int, int]) -> None:
    image = Volume(np.full((1, *shape), 3, np.int16), np.eye(4))
    assert (predict_volume(threshold(), image).array == 4).all()


def test_the_image_is_left_as_it_was(threshold: Callable[..., Model]) -> None:
    image = scene()
    image.array.flags.writeable = False
    before = image.array.copy()
    predict_volume(threshold(spacing=(0.7, 0.7, 0.7)), image)
    assert np.array_equal(image.array, before)


def test_unit_and_notes_of_the_image_stay_with_its_mask(threshold: Callable[..., Model]) -> None:
    image = Volume(np.ones((1, 8, 8, 1), np.float32), np.eye(4), unit="pixel")
    assert predict_volume(threshold(dimensions=2, patch_size=(8, 8, 1)), image).unit == "pixel"


def test_number_of_channels_must_fit(threshold: Callable[..., Model]) -> None:
    with pytest.raises(BundleError, match=r"the image has 2 channel\(s\), the model needs 1: t1") as caught:
        predict_volume(threshold(), Volume(np.ones((2, 4, 4, 4), np.float32), np.eye(4)))
    assert caught.value.code == "CHANNEL_COUNT"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_mask_is_made_of_nan(threshold: Callable[..., Model], value: float) -> None:
    class Broken(Threshold):
        def forward(self, image: Tensor) -> Tensor:
            logits = super().forward(image)
            logits[..., 0] = value
            return logits

    with pytest.raises(BundleError) as caught:
        predict_volume(threshold(Broken()), scene())
    assert caught.value.code == "NON_FINITE"


def test_regions_outside_of_the_content_are_background(make_spec: Make, make_plan: Make) -> None:
    """What is cropped away is seen by no network, also where one says yes everywhere."""

    class Always(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.full((image.shape[0], 1, *image.shape[2:]), 5.0)

    spec = make_spec(labels={"a": 3}, regions={"whole": {"labels": ["a"], "paint": "a"}})
    info = SimpleNamespace(plan=make_plan(spec), spec=spec, postprocess=(), temperature=1.0)
    image = np.zeros((1, 9, 9, 9), np.float32)
    image[0, 3:6, 3:6, 3:6] = 1
    model = Model(SimpleNamespace(info=info), [Always()], torch.device("cpu"))
    mask = predict_volume(model, Volume(image, np.eye(4))).array
    assert np.array_equal(mask, 3 * (image > 0))


def test_a_saved_model_predicts_after_loading(
    tmp_path: Path, make_spec: Make, make_plan: Make, make_bundle: Make
) -> None:
    spec = make_spec(labels={"z": 5, "a": 2}, channels=("t2", "t1"))
    make_bundle(tmp_path / "6_model", spec, make_plan(spec), folds=2)
    model = load_model(tmp_path, device=torch.device("cpu"))
    assert len(model.networks) == 2
    image = Volume(np.random.default_rng(0).normal(size=(2, 20, 9, 18)).astype(np.float32), OBLIQUE)
    first, second = (predict_volume(model, image) for _ in range(2))
    assert np.array_equal(first.array, second.array)
    assert set(np.unique(first.array)) <= {0, 2, 5}
