"""Ensembles and probabilities are made slice by slice: they are those of the whole volume, to the last bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg.inference import answer, joint
from medseg.inference import predict as module
from medseg.inference.joint_memory import forecast_joint
from medseg.inference.predict import Model, predict_soft, predict_volume
from medseg.inference.sliding_window import joined
from medseg.inference.way import axis_of, shared_axis
from medseg.inference.windows import layout
from medseg.preparation.steps import restore
from medseg.targets import background_logits
from medseg.volume import Volume, reorient

Models = Callable[..., Model]
Pictures = Callable[..., Volume]
ORIENTATIONS = [
    "".join(letters) for pairs in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*pairs)
]
RULES = {"order": 1, "order_z": 0, "separate": None}
NNUNET = {"image": {**RULES, "order": 3}, "logits": RULES}


def together(members: Sequence[Model], temperature: float = 1.0) -> Model:
    """Return an ensemble; its first member's spec is that of all."""
    info = SimpleNamespace(**{**vars(members[0].bundle.info), "temperature": temperature})
    return Model(SimpleNamespace(info=info), [], torch.device("cpu"), members=tuple(members))


def chances(x: Tensor, regions: bool) -> Tensor:
    """What a softmax or a sigmoid is, rounded value by value."""
    if regions:
        return 1 / ((-x).exp() + 1)
    x = (x - x.max(0).values).exp()
    total = torch.zeros_like(x[0])
    for row in x:
        total = total + row
    return x / total


@torch.inference_mode()
def whole(model: Model, image: Volume, mirror: bool) -> tuple[np.ndarray, Tensor]:
    """Return label values (I, J, K) and probabilities, all of a volume at once."""
    spec, grids = model.bundle.info.spec, []
    members = model.members or (model,)
    for member in members:
        prepared, steps = module._prepared(member, image, mirror, None)
        grids.append((prepared, steps, layout(prepared.shape[1:], member.bundle.info.plan)))
    axis = shared_axis([(steps, where) for _, steps, where in grids])
    falling = axis_of(grids[0][1], axis)[1]
    total: Any = 0
    for member, (prepared, steps, where) in zip(members, grids, strict=True):
        own, turned = axis_of(steps, axis)
        where = replace(where, along=own)
        found = joined(module._planes(member, prepared, where, mirror, None, backwards=turned != falling), where)
        found = found.flip(own + 1) if turned != falling else found
        logits = restore(found, steps, fill=background_logits(spec), axis=own)
        total = total + chances(logits / member.bundle.info.temperature, bool(spec.regions))
    mean = total / len(members)
    several = len(members) > 1  # one alone decides by its logits: probabilities may be equal where they are not
    decided = mean if several else logits
    if spec.regions:
        mask = np.zeros(image.shape, np.int64)
        for row, region in zip(decided, spec.regions.values(), strict=True):
            mask[(row > (0.5 if several else 0)).numpy()] = spec.foreground[region.paint]
        return mask, mean
    return np.array([0, *spec.foreground.values()])[decided.argmax(0).numpy()], mean[1:]


ONE = st.fixed_dictionaries(
    {
        "dimensions": st.sampled_from([2, 3, 3]),
        "patch": st.tuples(*[st.sampled_from([4, 7, 8])] * 3),
        "spacing": st.tuples(*[st.sampled_from([0.8, 1.0, 1.6])] * 3),
        "overlap": st.sampled_from([0.0, 0.5, 0.8]),
        "orientation": st.sampled_from(ORIENTATIONS),
        "networks": st.sampled_from([1, 2]),
        "nnunet": st.sampled_from([None, None, NNUNET, {**NNUNET, "logits": {**RULES, "order_z": 1}}]),
        "temperature": st.sampled_from([1.0, 0.5, 3.0]),
        "seed": st.integers(0, 99),
    }
)


def made(random_model: Models, shared: dict[str, Any], options: dict[str, Any]) -> Model:
    options = dict(options)
    temperature, patch = options.pop("temperature"), options.pop("patch")
    patch = (*patch[:2], 1) if options["dimensions"] == 2 else patch
    model = random_model(patch_size=patch, **shared, **options)
    model.bundle.info.temperature = temperature
    return model


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 19)] * 3),
    spacing=st.tuples(*[st.sampled_from([0.7, 1.0, 2.5])] * 3),
    shared=st.fixed_dictionaries(
        {
            "classes": st.sampled_from([2, 3, 9]),
            "regions": st.sampled_from([0, 0, 1, 3]),
            "channels": st.sampled_from([1, 2]),
            "steps": st.booleans(),
        }
    ),
    options=st.lists(ONE, min_size=1, max_size=3),
    mirror=st.booleans(),
    smooth=st.booleans(),
    values=st.sampled_from([1, 50, joint.VALUES]),
    tiles=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_streamed_ensembles_are_those_of_the_whole_volume(
    random_model: Models,
    picture: Pictures,
    shape: Any,
    spacing: Any,
    shared: Any,
    options: Any,
    mirror: bool,
    smooth: bool,
    values: int,
    tiles: Any,
) -> None:
    image = picture(shape, channels=shared["channels"], seed=options[0]["seed"], smooth=smooth, spacing=spacing)
    model = together([made(random_model, shared, each) for each in options])
    wanted, chances = whole(model, image, mirror)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(joint, "VALUES", values)
        found = predict_volume(model, image, mirror=mirror)
        assert np.array_equal(found.array[0], wanted)
        patched.setattr(module, "forecast_joint", lambda *args, **rest: SimpleNamespace(tiles=tiles))
        mask, soft = predict_soft(model, image, mirror=mirror, max_memory=1)
        assert np.array_equal(mask.array[0], wanted)
        assert np.array_equal(soft.array, chances.numpy())
        _, steps = predict_soft(model, image, mirror=mirror, room=lambda size: np.zeros(size, np.uint8))
        assert np.array_equal(steps.array, np.rint(soft.array * np.float32(255)))


@pytest.mark.parametrize("codes", ORIENTATIONS[::7])
def test_members_in_any_orientation(random_model: Models, picture: Pictures, codes: str) -> None:
    """Two that see the same axis from either end, and one of slices along another axis."""
    members = [
        random_model(orientation="RAS", spacing=(0.9, 0.9, 0.9)),
        random_model(orientation="LPI", spacing=(1.5, 1.5, 1.5), seed=1),
        random_model(orientation="SRA", dimensions=2, patch_size=(8, 8, 1), seed=2),
    ]
    image = reorient(picture((21, 18, 25), spacing=(0.7, 1.2, 0.6)), codes)
    for order in (members, members[::-1]):
        model = together(order, temperature=0.7)
        wanted, _ = whole(model, image, mirror=False)
        assert len(np.unique(wanted)) > 3
        assert np.array_equal(predict_volume(model, image).array[0], wanted)


def test_backwards_are_the_same_logits_but_for_rounding(random_model: Models, picture: Pictures) -> None:
    for options in ({}, {"dimensions": 2, "patch_size": (8, 8, 1)}, {"nnunet": NNUNET, "patch_size": (8, 6, 7)}):
        model = random_model(overlap=0.5, **options)
        prepared, _ = module._prepared(model, picture((30, 21, 27)), None, None)
        for axis in range(3):
            where = replace(layout(prepared.shape[1:], model.bundle.info.plan), along=axis)
            with torch.inference_mode():
                there = joined(module._planes(model, prepared, where, False, None), where)
                back = joined(module._planes(model, prepared, where, False, None, backwards=True), where)
            assert torch.allclose(there, back.flip(axis + 1), atol=1e-5)
            usual = layout(prepared.shape[1:], model.bundle.info.plan)
            with torch.inference_mode():
                plain = joined(module._planes(model, prepared, usual, False, None), usual)
            assert torch.allclose(there, plain, atol=1e-5)


class Ball(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x * 10, -x * 10, *[torch.full_like(x, -1e3)] * 40], 1)


def test_most_of_a_smooth_volume_is_not_interpolated(random_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    plain = joint._Brush._mean
    monkeypatch.setattr(
        joint._Brush, "_mean", lambda self, here, voxels: counted.append(len(voxels)) or plain(self, here, voxels)
    )
    grid = np.indices((60, 60, 60)).astype(np.float32)
    image = Volume(np.linalg.norm(grid - 30, axis=0)[None], np.eye(4))
    members = [random_model(classes=42, spacing=(mm,) * 3, patch_size=(16, 16, 16)) for mm in (4.0, 3.0)]
    model = together([replace(member, networks=[Ball()]) for member in members])
    wanted, _ = whole(model, image, mirror=False)
    assert np.array_equal(predict_volume(model, image).array[0], wanted)
    assert len(np.unique(wanted)) == 2
    assert sum(counted) < 0.5 * 60**3


def test_members_that_prepare_alike_share_the_image(
    random_model: Models, picture: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    plain = module.prepare
    monkeypatch.setattr(module, "prepare", lambda *args: calls.append(args) or plain(*args))
    members = [random_model(seed=seed, patch_size=(8, 8, 8 - seed), overlap=0.2 * seed) for seed in range(3)]
    predict_volume(together([*members, random_model(spacing=(1.3, 1.3, 1.3))]), picture((12, 12, 12)))
    assert len(calls) == 2


def test_less_memory_means_more_tiles_with_the_same_mask(
    random_model: Models, picture: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [random_model(spacing=(mm, 1.2, 0.9), seed=n, classes=30) for n, mm in enumerate((1.1, 0.8))]
    model, image = together(members), picture((40, 37, 21))
    wanted = predict_volume(model, image).array
    cases = [module.case_of(member, image) for member in members]
    need = forecast_joint(cases, held=0)
    monkeypatch.setattr(module, "resident", lambda: 0)
    used: list[Any] = []
    plain = answer.cut_plane
    monkeypatch.setattr(answer, "cut_plane", lambda *args: used.append(args[2]) or plain(*args))
    for limit in (need.total, need.total - need.slab // 2):
        assert np.array_equal(predict_volume(model, image, max_memory=limit).array, wanted)
    assert used[0] == (1, 1)
    assert max(used[1]) > 1
