"""Labels that are made plane by plane are those of the whole-volume computation, voxel for voxel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from medseg.inference import labels
from medseg.inference import predict as predict_module
from medseg.inference.predict import Model, predict_logits, predict_soft, predict_volume
from medseg.inference.sliding_window import joined, planes, slide
from medseg.inference.windows import importance, layout, window_size, window_starts
from medseg.preparation.prepare import target_size
from medseg.preparation.steps import Resampled, restore
from medseg.targets import decode, probabilities
from medseg.volume import Volume, reorient

Make = Callable[..., Any]
ORIENTATIONS = [
    "".join(letters) for pairs in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*pairs)
]
RULES = {"order": 1, "order_z": 0, "separate": None}
MOST_WINDOWS = 300
NNUNET = {"image": {**RULES, "order": 3}, "logits": RULES}


def same(model: Model, image: Volume, **options: Any) -> np.ndarray:
    """Predict both ways, compare, and return the labels."""
    found = predict_volume(model, image, **options)
    spec = model.bundle.info.spec
    logits = predict_logits(model, image, **options)
    whole = decode(spec, logits).numpy()
    assert found.array.dtype == whole.dtype
    assert found.affine.tobytes() == image.affine.tobytes()
    assert np.array_equal(found.array, whole)
    mask, soft = predict_soft(model, image, **options)
    assert np.array_equal(mask.array, whole)
    wanted = probabilities(spec, logits, temperature=model.bundle.info.temperature).numpy()
    np.testing.assert_allclose(soft.array, wanted, atol=2e-6)
    return found.array


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(*[st.integers(1, 19)] * 3),
    spacing=st.tuples(*[st.sampled_from([0.4, 0.7, 1.0, 1.3, 2.5, 6.0])] * 3),
    patch=st.tuples(*[st.sampled_from([4, 7, 8])] * 3),
    options=st.fixed_dictionaries(
        {
            "dimensions": st.sampled_from([2, 3]),
            "overlap": st.sampled_from([0.0, 0.25, 0.5, 0.8]),
            "orientation": st.sampled_from(ORIENTATIONS),
            "classes": st.sampled_from([2, 3, 12]),
            "regions": st.sampled_from([0, 0, 1, 3]),
            "networks": st.sampled_from([1, 2]),
            "channels": st.sampled_from([1, 2]),
            "steps": st.booleans(),
            "nnunet": st.sampled_from([None, None, NNUNET, {**NNUNET, "logits": {**RULES, "order_z": 1}}]),
            "seed": st.integers(0, 99),
        }
    ),
    mirror=st.booleans(),
    smooth=st.booleans(),
    scattered=st.sampled_from([0.0, labels.SCATTERED, np.inf]),
    pairs=st.sampled_from([20, labels.PAIRS]),
)
def test_streamed_labels_are_those_of_the_whole_volume(
    random_model: Callable[..., Model],
    picture: Callable[..., Volume],
    shape: Any,
    spacing: Any,
    patch: Any,
    options: Any,
    mirror: bool,
    smooth: bool,
    scattered: float,
    pairs: int,
) -> None:
    patch = (*patch[:2], 1) if options["dimensions"] == 2 else patch
    image = picture(shape, channels=options["channels"], seed=options["seed"], smooth=smooth, spacing=spacing)
    model = random_model(spacing=(1.1, 0.9, 1.0), patch_size=patch, **options)
    plan = model.bundle.info.plan
    where = layout(target_size(image.shape, image.affine, plan).after, plan)
    # Small windows that overlap much are hundreds of thousands in a large image, and find nothing more.
    assume(math.prod(map(len, where.starts)) <= MOST_WINDOWS)
    with pytest.MonkeyPatch.context() as patched:
        # Classes in boxes, picked out by themselves, or what is less work; in blocks and bands, or all at once.
        patched.setattr(labels, "SCATTERED", scattered)
        patched.setattr(labels, "PAIRS", pairs)
        patched.setattr(labels, "BLOCK", pairs)
        same(model, image, mirror=mirror)


@pytest.mark.parametrize("codes", ORIENTATIONS[::5])
@pytest.mark.parametrize("plan", ["RAS", "SLP", "AIR"])
def test_in_any_orientation(
    random_model: Callable[..., Model], picture: Callable[..., Volume], codes: str, plan: str
) -> None:
    image = reorient(picture((21, 18, 25), spacing=(0.7, 1.2, 0.6)), codes)
    assert len(np.unique(same(random_model(orientation=plan), image))) > 3


def test_of_a_cascade(random_model: Callable[..., Model], picture: Callable[..., Volume]) -> None:
    first = random_model(patch_size=(8, 8, 8), spacing=(2.0, 2.0, 2.0), seed=3)
    rules = {**NNUNET, "previous": {"order": 1, "order_z": 0}}
    model = random_model(previous=first, nnunet=rules, spacing=(1.4, 1.4, 1.4))
    assert len(np.unique(same(model, picture((20, 17, 23)), mirror=True))) > 3


def test_networks_of_a_cascade_get_a_channel_a_label_window_by_window(
    random_model: Callable[..., Model], picture: Callable[..., Volume]
) -> None:
    """The whole image has one channel for the first stage's mask, however many labels there are."""
    first = random_model(classes=9, spacing=(2.0, 2.0, 2.0), seed=3)
    rules = {**NNUNET, "previous": {"order": 1, "order_z": 0}}
    model = random_model(classes=9, previous=first, nnunet=rules, spacing=(1.4, 1.4, 1.4))
    image = picture((20, 17, 23))
    prepared, _ = predict_module._prepared(model, image, None, None)
    assert prepared.shape[0] == 2
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return model.networks[0](x)

    mask = predict_volume(replace(model, networks=[Spy()]), image)
    assert np.array_equal(mask.array, predict_volume(model, image).array)
    given = prepared[1].unique().tolist()
    assert len(given) > 3
    for window in seen:
        assert window.shape[1] == 1 + 8
        assert set(window[:, 1:].unique().tolist()) <= {0.0, 1.0}
        assert window[:, 1:].sum(1).max() <= 1
    assert max(float(window[:, int(given[-1])].max()) for window in seen) == 1


def test_label_values_above_a_byte(random_model: Callable[..., Model], picture: Callable[..., Volume]) -> None:
    found = same(random_model(high=300, spacing=(1.7, 1.7, 1.7)), picture((14, 15, 16)))
    assert found.dtype == np.int32
    assert found.max() > 300


def test_most_of_a_smooth_volume_is_not_interpolated(
    random_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes it fast: in cells whose corners agree no class is computed."""
    counted = []
    plain = labels._values
    monkeypatch.setattr(labels, "_values", lambda *a: counted.append(plain(*a)) or counted[-1])
    grid = np.indices((60, 60, 60)).astype(np.float32)
    image = Volume(np.linalg.norm(grid - 30, axis=0)[None], np.eye(4))

    class Ball(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x * 10, -x * 10, *[torch.full_like(x, -1e3)] * 40], 1)

    model = random_model(classes=42, spacing=(4.0, 4.0, 4.0), patch_size=(16, 16, 16))
    same(replace(model, networks=[Ball()]), image)
    assert sum(values.numel() for values in counted) < 2 * 60**3, "two of 42 classes, and not everywhere"


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(20, 9, 13), (5, 30, 12), (3, 4, 29)])
def test_windows_add_up_as_monai_s(random_model: Callable[..., Model], overlap: float, shape: Any) -> None:
    model = random_model(overlap=overlap, patch_size=(8, 6, 7))
    plan, network = model.bundle.info.plan, model.networks[0]
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    inferer = SlidingWindowInferer(window_size(shape, plan), overlap=overlap, mode="gaussian")
    with torch.inference_mode():
        wanted = inferer(image[None], network)[0]
        found = slide(image, [network], plan, mirror=False)
    assert torch.allclose(found, wanted, atol=1e-5)
    if layout(shape, plan).axis == 0:
        assert torch.equal(found, wanted), "the same sums in the same order"


def test_windows_add_up_as_nnunet_s(random_model: Callable[..., Model]) -> None:
    model = random_model(nnunet=NNUNET, patch_size=(8, 6, 7))
    network = model.networks[0]
    image = torch.randn(1, 29, 15, 5, generator=torch.Generator().manual_seed(0))
    padded = F.pad(image, (1, 1))
    total, seen = torch.zeros(5, 29, 15, 7), torch.zeros(29, 15, 7)
    weights = importance((8, 6, 7))
    with torch.inference_mode():
        for i, j in itertools.product(window_starts(29, 8, 0.5), window_starts(15, 6, 0.5)):
            box = (slice(i, i + 8), slice(j, j + 6), slice(0, 7))
            total[(slice(None), *box)] += network(padded[(slice(None), *box)][None])[0] * weights
            seen[box] += weights
        found = slide(image, [network], model.bundle.info.plan, mirror=False)
    assert torch.equal(found, (total / seen)[..., 1:6])


@pytest.mark.parametrize("shape", [(26, 19, 22), (9, 19, 40), (30, 30, 9)])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_tiles_have_the_very_values_of_the_whole(
    random_model: Callable[..., Model], shape: Any, dimensions: int
) -> None:
    patch = (8, 10, 8) if dimensions == 3 else (8, 10, 1)
    model = random_model(dimensions=dimensions, patch_size=patch, overlap=0.5)
    plan, network = model.bundle.info.plan, model.networks[0]
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    where = layout(shape, plan)
    a, b = (n for axis, n in enumerate(shape) if axis != where.axis)

    def predict(windows: Tensor) -> Tensor:
        return network(windows[..., 0])[..., None] if dimensions == 2 else network(windows)

    whole = torch.stack(list(planes(image, predict, where)))
    assert torch.equal(joined(planes(image, predict, where), where), slide(image, [network], plan, mirror=False))
    for rows, columns in (((0, a // 2), (0, b)), ((a // 2, a), (b // 3, b // 3 + 1)), ((a - 1, a), (0, b // 2))):
        part = torch.stack(list(planes(image, predict, where, tile=(rows, columns))))
        assert torch.equal(part, whole[:, :, slice(*rows), slice(*columns)])


@settings(deadline=None, max_examples=30)
@given(
    before=st.tuples(*[st.integers(1, 9)] * 3),
    after=st.tuples(*[st.integers(1, 25)] * 3),
    axis=st.sampled_from([0, 1, 2]),
)
def test_the_way_back_is_torch_s_trilinear_interpolation(before: Any, after: Any, axis: int) -> None:
    logits = torch.randn(3, *before, generator=torch.Generator().manual_seed(0))
    found = restore(logits, (Resampled(after),), fill=0.0, axis=axis)
    assert torch.allclose(found, F.interpolate(logits[None], after, mode="trilinear")[0], atol=1e-5)


def test_logits_of_the_whole_decode_to_the_mask(
    random_model: Callable[..., Model], picture: Callable[..., Volume]
) -> None:
    model, image = random_model(spacing=(1.5, 1.5, 2.0)), picture((18, 20, 16))
    classes = predict_logits(model, image).argmax(0).numpy()
    assert np.array_equal(predict_volume(model, image).array[0], classes)
