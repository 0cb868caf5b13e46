"""Geometry: nothing moves, and everything comes back to where it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from numpy.typing import NDArray

from medseg.planning.plan import Normalise
from medseg.preparation.path import prediction_path
from medseg.preparation.preprocess import (
    CropToContent,
    NormaliseIntensity,
    Orient,
    Resample,
    as_meta_tensor,
)
from medseg.preparation.steps import resampled_size, restore
from medseg.volume import Volume

Array = NDArray[Any]
SHAPE = (11, 9, 7)
SPACING = (0.9, 1.1, 2.5)
ORIENTATIONS = [
    "".join(letters) for pairs in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*pairs)
]


def affine_for(codes: str, *, degrees: float = 0.0, spacing: tuple[float, float, float] = SPACING) -> Array:
    """An affine whose axes point to `codes`, turned by `degrees` about an oblique axis."""
    columns = np.zeros((3, 3))
    for axis, letter in enumerate(codes):
        place, sign = next(
            (i, 1 - 2 * pair.index(letter)) for i, pair in enumerate(("RL", "AP", "SI")) if letter in pair
        )
        columns[place, axis] = sign * spacing[axis]
    direction = np.array([1.0, 2.0, -1.5]) / np.linalg.norm([1.0, 2.0, -1.5])
    cross = np.cross(np.eye(3), direction)
    angle = np.radians(degrees)
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    result = np.eye(4)
    result[:3, :3] = turn @ columns
    result[:3, 3] = (12.5, -31.25, 104.0)
    return result


def scene(shape: tuple[int, int, int] = SHAPE) -> tuple[Array, Array]:
    """An image that is 0 at its borders, and labels 3 and 7 in it; nothing is symmetric."""
    rng = np.random.default_rng(4)
    image = np.zeros((1, *shape), np.float32)
    image[0, 1:-2, 2:-1, 1:-1] = rng.uniform(1, 2, (shape[0] - 3, shape[1] - 3, shape[2] - 2))
    mask = np.zeros((1, *shape), np.uint8)
    mask[0, 2:5, 3:6, 2:4] = 3
    mask[0, 5:7, 4:8, 3:6] = 7
    return image, mask


def data_of(image: Array, mask: Array, affine: Array) -> dict[str, Any]:
    volume = Volume(image, affine)
    return {"image": as_meta_tensor(volume), "mask": as_meta_tensor(volume.with_array(mask)), "steps": ()}


def one_hot(mask: torch.Tensor, values: tuple[int, ...] = (0, 3, 7)) -> torch.Tensor:
    return torch.cat([(mask == value).float() for value in values])


def unhot(logits: torch.Tensor) -> Array:
    return np.array([0, 3, 7], np.uint8)[logits.argmax(0, keepdim=True).numpy()]


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("degrees", [0.0, 25.0])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_round_trip_is_exact_without_resampling(codes: str, degrees: float) -> None:
    image, mask = scene()
    data = data_of(image, mask, affine_for(codes, degrees=degrees))
    for target in ("RAS", "ASR", "LPI"):
        prepared = CropToContent()(Orient(target)(data))
        assert prepared["image"].shape[1:].numel() < image.size
        restored = restore(one_hot(prepared["mask"].as_tensor()), prepared["steps"], fill=torch.tensor([1.0, 0, 0]))
        assert np.array_equal(unhot(restored), mask)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_voxel_keeps_its_value_and_its_place(codes: str) -> None:
    """The affine says where each voxel is: value by place is the same before and after."""
    image, mask = scene()
    data = data_of(image, mask, affine_for(codes, degrees=25))
    data["image"] = MetaTensor(torch.arange(1.0, image.size + 1).reshape(1, *SHAPE), affine=data["image"].affine)
    prepared = CropToContent()(Orient("RAS")(data))
    flat = prepared["image"].as_tensor()[0]
    assert flat.numel() == image.size
    assert np.abs(places(prepared) - places(data)[flat.long().numpy().ravel() - 1]).max() < 1e-6
    assert torch.equal(prepared["image"].affine, prepared["mask"].affine)
    # Axes point as asked, and images that are the same in space are now the same array.
    assert np.diag(np.asarray(prepared["image"].affine))[:3].min() > 0


def places(data: dict[str, Any]) -> Array:
    """World positions (N, 3) of all voxels in the order of the array."""
    affine = np.asarray(data["image"].affine)
    index = np.indices(data["image"].shape[1:]).reshape(3, -1)
    return (affine[:3, :3] @ index).T + affine[:3, 3]


def test_cropping_keeps_places() -> None:
    image, mask = scene()
    data = data_of(image, mask, affine_for("LIP", degrees=10))
    before = {value: place for value, place in zip(image.ravel().tolist(), places(data), strict=True) if value}
    cropped = CropToContent()(data)
    assert cropped["image"].shape == (1, 8, 6, 5)
    assert cropped["image"].as_tensor().min() > 0
    for value, place in zip(cropped["image"].as_tensor().flatten().tolist(), places(cropped), strict=True):
        assert np.abs(place - before[value]).max() < 1e-6


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.45, 2.0, 1.3), (2.7, 0.6, 5.0)])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRP", "AIL"])
def test_resampling_keeps_places(codes: str, spacing: tuple[float, float, float]) -> None:
    """An image of a linear function of the place stays that function: interpolation and affine agree to 1e-6 mm."""
    direction = np.array([1.0, -2.0, 0.5])
    affine = affine_for(codes, degrees=17)
    values = places({"image": MetaTensor(torch.zeros(1, *SHAPE), affine=torch.from_numpy(affine))}) @ direction
    tensor = torch.from_numpy(values.reshape(1, *SHAPE))
    data = {"image": MetaTensor(tensor - tensor.mean(), affine=torch.from_numpy(affine)), "steps": ()}
    out = Resample(spacing)(data)
    expected = (places(out) @ direction - float(tensor.mean())).reshape(out["image"].shape)
    inner = interior(out["image"].shape[1:])
    # The values are float32; the places are compared in float64.
    assert np.abs(out["image"].as_tensor().numpy() - expected)[inner].max() < 1e-4
    new, old = extent(out["image"]), extent(data["image"])
    assert np.abs(new - old).max() < 1e-6


def interior(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where no voxel centre lies beyond the outermost centres of the source."""
    return (slice(None), *(slice(n // 4, n - n // 4) for n in shape))


def extent(image: MetaTensor) -> Array:
    """World positions of the outer corners of the grid."""
    corner = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in image.shape[1:]))))
    affine = np.asarray(image.affine)
    return corner @ affine[:3, :3].T + affine[:3, 3]


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    want=st.tuples(*[st.floats(0.3, 4)] * 3),
    seed=st.integers(0, 9),
)
def test_resample_is_scipy_s_zoom(shape: tuple[int, int, int], want: tuple[float, float, float], seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)
    image = MetaTensor(torch.from_numpy(values), affine=torch.diag(torch.tensor([*SPACING, 1.0])))
    found = Resample(want)({"image": image})["image"]
    factors = np.array(found.shape[1:]) / np.array(shape)
    oracle = scipy.ndimage.zoom(values[0].astype(np.float64), factors, order=1, grid_mode=True, mode="nearest")
    assert found.shape[1:] == oracle.shape
    assert np.abs(found.as_tensor()[0].numpy() - oracle).max() < 1e-5


def test_size_is_nearest_to_the_wanted_spacing_and_never_nothing() -> None:
    assert resampled_size((10, 10, 10), (1.0, 1.0, 1.0), (2.0, 0.5, 3.0)) == (5, 20, 3)
    assert resampled_size((1, 2, 3), (1.0, 1.0, 1.0), (50.0, 50.0, 50.0)) == (1, 1, 1)


def ball(shape: tuple[int, int, int], affine: Array) -> tuple[Array, Array]:
    """Two touching half-balls (labels 3 and 7) of 12 mm in the middle of a grid."""
    index = np.indices(shape).reshape(3, -1).T
    world = index @ affine[:3, :3].T + affine[:3, 3]
    centre = (np.array(shape) - 1) / 2 @ affine[:3, :3].T + affine[:3, 3]
    inside = (np.linalg.norm(world - centre, axis=1) < 12).reshape(shape)
    first = (world[:, 0] < centre[0]).reshape(shape)
    mask = np.where(inside, np.where(first, 3, 7), 0).astype(np.uint8)[None]
    return (mask > 0).astype(np.float32) + 1, mask


def dice(first: Array, second: Array, value: int) -> float:
    a, b = first == value, second == value
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 0.7), (1.0, 0.9, 1.2)])
@pytest.mark.parametrize("codes", ["RAS", "LSA", "PIR", "IAL"])
def test_round_trip_with_resampling(codes: str, spacing: tuple[float, float, float]) -> None:
    affine = affine_for(codes, degrees=12, spacing=(0.8, 0.8, 1.1))
    image, mask = ball((40, 38, 31), affine)
    prepared = Resample(spacing)(CropToContent()(Orient("RAS")(data_of(image, mask, affine))))
    assert prepared["image"].shape == prepared["mask"].shape != image.shape
    assert prepared["mask"].dtype == torch.uint8
    assert set(prepared["mask"].unique().tolist()) == {0, 3, 7}
    restored = unhot(restore(one_hot(prepared["mask"].as_tensor()), prepared["steps"], fill=0.0))
    assert restored.shape == mask.shape
    assert min(dice(restored, mask, 3), dice(restored, mask, 7)) > 0.97


@pytest.mark.parametrize("codes", ["RAS", "LSA", "PIR"])
def test_the_whole_path_comes_back(codes: str, make_spec: Callable[..., Any], make_plan: Callable[..., Any]) -> None:
    affine = affine_for(codes, spacing=(0.8, 0.8, 1.1))
    image, mask = ball((40, 38, 31), affine)
    image[:, :4] = 0
    plan = make_plan(make_spec(), orientation="PRS", spacing=(0.9, 0.9, 0.9))
    out = prediction_path(plan)(data_of(image, mask, affine))
    assert len(out["steps"]) == 3
    restored = unhot(restore(one_hot(out["mask"].as_tensor()), out["steps"], fill=torch.tensor([1.0, 0.0, 0.0])))
    assert restored.shape == mask.shape
    assert min(dice(restored, mask, 3), dice(restored, mask, 7)) > 0.97


def test_labels_of_any_value_are_resampled_without_mixing() -> None:
    mask = np.zeros((1, 6, 6, 6), np.int32)
    mask[:, :3], mask[:, 3:] = 7, 1_000_000
    data = data_of(np.ones((1, 6, 6, 6), np.float32), mask, np.eye(4))
    found = Resample((0.4, 0.4, 0.4))(data)["mask"]
    assert set(found.unique().tolist()) == {7, 1_000_000}
    assert found.dtype == torch.int32


@pytest.mark.parametrize("fill", [0.0, 3])
def test_an_image_without_content_is_kept_whole(fill: float) -> None:
    data = data_of(np.full((2, 4, 5, 6), fill, np.float32), np.zeros((1, 4, 5, 6), np.uint8), np.eye(4))
    out = CropToContent()(data)
    assert out["image"].shape == (2, 4, 5, 6)
    assert torch.equal(out["image"].affine, data["image"].affine)


def test_content_of_any_channel_counts() -> None:
    image = np.zeros((2, 5, 5, 5), np.float32)
    image[0, 1, 2, 2] = image[1, 3, 2, 4] = -1
    out = CropToContent()(data_of(image, np.zeros((1, 5, 5, 5), np.uint8), np.eye(4)))
    assert out["image"].shape == (2, 3, 1, 3)


ROWS = (
    Normalise(scheme="zscore"),
    Normalise(scheme="ct", low=-100, high=200, mean=50, deviation=25),
    Normalise(scheme="none"),
)


def test_normalisation_by_hand() -> None:
    image = np.array([[1, 2, 3, 6], [-500, 50, 75, 900], [1, 2, 3, 4]], np.float32).reshape(3, 4, 1, 1)
    out = NormaliseIntensity(ROWS)(data_of(image, np.zeros((1, 4, 1, 1), np.uint8), np.eye(4)))["image"]
    deviation = np.std([1, 2, 3, 6])
    assert np.allclose(out[0].flatten(), (np.array([1, 2, 3, 6]) - 3) / deviation, atol=1e-6)
    assert out[1].flatten().tolist() == [-6, 0, 1, 6]
    assert out[2].flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [0.0, 1e-8, 0.1, 1000.1, -7e5, 1e9])
def test_a_constant_image_becomes_nothing_special(value: float) -> None:
    image = np.full((1, 7, 5, 3), value, np.float32)
    out = NormaliseIntensity(ROWS[:1])(data_of(image, np.zeros((1, 7, 5, 3), np.uint8), np.eye(4)))["image"]
    assert out.abs().max() < 2


def test_number_of_rows_must_be_that_of_the_channels() -> None:
    with pytest.raises(ValueError, match="zip"):
        NormaliseIntensity(ROWS)(data_of(np.ones((1, 2, 2, 2), np.float32), np.zeros((1, 2, 2, 2)), np.eye(4)))


def test_steps_do_not_change_what_they_are_given() -> None:
    image, mask = scene()
    array = image.copy()
    array.flags.writeable = False
    data = data_of(array, mask.copy(), affine_for("LPS"))
    data["image"] = MetaTensor(data["image"].as_tensor().clone(), affine=data["image"].affine)
    before = data["image"].clone()
    for step in (Orient("RAS"), CropToContent(), Resample((1, 1, 1)), NormaliseIntensity(ROWS[:1])):
        step(data)
    assert torch.equal(data["image"].as_tensor(), before.as_tensor())
    assert data["steps"] == ()


def test_a_read_only_volume_is_copied() -> None:
    array = np.zeros((1, 2, 2, 2), np.float32)
    array.flags.writeable = False
    tensor = as_meta_tensor(Volume(array, np.eye(4)))
    tensor += 1
    assert array.max() == 0


@pytest.mark.parametrize("place", ["hippocampus", "ct_body"])
def test_real_studies_come_back(
    data: Any, make_spec: Callable[..., Any], make_plan: Callable[..., Any], place: str
) -> None:
    """A label made of the brightest tenth of a real image goes through the whole path and comes back."""
    from medseg.readers import read_image

    if place == "hippocampus":
        file = sorted((data / place / "imagesTr").glob("hippocampus_*.nii.gz"))[0]
    else:
        file = data / place / "ct_3mm_112.nii.gz"
    image = read_image(file)
    smooth = scipy.ndimage.gaussian_filter(image.array[0].astype(np.float32), 2)
    mask = np.where(smooth > np.quantile(smooth, 0.9), 7, 0).astype(np.uint8)[None]
    # CropToContent must not cut the label: its voxels hold something.
    array = image.array.astype(np.float32)
    array[(mask > 0) & (array == 0)] = 1
    for spacing, least in ((image.spacing, 1.0), (tuple(0.8 * s for s in image.spacing), 0.97)):
        turned = tuple(spacing[axis] for axis in np.argmax(np.abs(image.affine[:3, :3]), axis=1))
        path = prediction_path(make_plan(make_spec(), spacing=turned))
        out = path(data_of(array, mask, image.affine))
        restored = unhot(restore(one_hot(out["mask"].as_tensor()), out["steps"], fill=torch.tensor([1.0, 0.0, 0.0])))
        assert restored.shape == mask.shape
        assert dice(restored, mask, 7) >= least
