"""Presets of quality: what is given up is what the table says, and "exact" gives up nothing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medseg import api
from medseg.batch.job import recipe
from medseg.bundle import BundleInfo, open_bundle
from medseg.errors import ConfigError
from medseg.inference.air import air_limits, skipping_air
from medseg.inference.predict import load_model, predict_volume
from medseg.inference.presets import EXACT, LONGEST, QUALITY, Preset, at_quality
from medseg.inference.windows import layout, window_size
from medseg.readers.nifti import read_nifti

Make = Callable[..., Any]
RULES = {"order": 1, "order_z": 0, "separate": None}
BACKGROUND = torch.tensor([20.0, -20.0])


def test_exact_is_the_bundle_itself(model: Path) -> None:
    bundle = open_bundle(model)
    assert at_quality(bundle, "exact") is bundle
    assert bundle.info.provenance(None)["quality"] == "exact"


@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_a_preset_changes_what_results_are_made_by(model: Path, name: str) -> None:
    info = open_bundle(model).info
    planned = info.model_copy(update={"plan": info.plan.model_copy(update={"overlap": 0.5, "test_mirroring": True})})
    used = at_quality(replace(open_bundle(model), info=planned), name).info
    assert recipe(used, None) != recipe(planned, None)
    assert used.digest != planned.digest
    assert used.provenance(None)["quality"] == name
    assert used.plan.overlap == QUALITY[name].overlap
    assert used.plan.test_mirroring == (name == "balanced")
    assert used.quality is None
    # What a command asks for comes first.
    assert used.provenance(True)["tta"] is True
    assert recipe(used, True).endswith("+mirror")
    assert recipe(used, False) != recipe(used, True)
    # A worker gets it as text.
    assert BundleInfo.model_validate_json(used.model_dump_json()).digest == used.digest


def test_presets_never_add_overlap_or_mirroring(model: Path) -> None:
    bundle = open_bundle(model)
    plan = bundle.info.plan.model_copy(update={"overlap": 0.0, "test_mirroring": False})
    bundle = replace(bundle, info=bundle.info.model_copy(update={"plan": plan}))
    for name in QUALITY:
        assert at_quality(bundle, name).info.plan == plan


def test_unknown_presets_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exact, balanced, fast"):
        api.predict(tmp_path, model=model, out=tmp_path / "out", quality="best")


@given(
    shape=st.tuples(*[st.integers(1, 100)] * 3),
    patch=st.tuples(*[st.integers(1, 60)] * 3),
    name=st.sampled_from(sorted(QUALITY)),
    foreign=st.booleans(),
)
def test_windows_grow_as_far_as_the_row_says(
    make_spec: Make, make_plan: Make, shape: tuple[int, ...], patch: tuple[int, ...], name: str, foreign: bool
) -> None:
    nnunet = {"nnunet": {"image": {**RULES, "order": 3}, "logits": RULES}} if foreign else {}
    plan, row = make_plan(make_spec(), patch_size=patch, **nnunet), QUALITY[name]
    window = window_size(shape, plan, row)
    limit = row.longest or (1.0 if foreign else LONGEST)
    for n, p, w in zip(shape, patch, window, strict=True):
        assert w in (p, n)
        assert p <= w <= limit * p
    assert math.prod(window) <= row.room * math.prod(patch)
    assert all(w <= wide for w, wide in zip(window_size(shape, plan), window, strict=True)) or row.room < LONGEST**3


def test_a_fast_model_asks_its_network_less_often(model: Path) -> None:
    image = read_nifti(model.parent / "data" / "images" / "c0.nii.gz")
    bundle, asked = open_bundle(model), {}
    plan = bundle.info.plan.model_copy(update={"patch_size": (8, 8, 8), "overlap": 0.5, "test_mirroring": True})
    bundle = replace(bundle, info=bundle.info.model_copy(update={"plan": plan}))
    for name in QUALITY:
        used = load_model(at_quality(bundle, name))
        assert used.preset is QUALITY[name]
        seen: list[int] = []
        used.networks[0].register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].numel()))
        mask = predict_volume(used, image)
        assert mask.shape == image.shape
        asked[name] = sum(seen)
    assert asked["exact"] > asked["balanced"] > asked["fast"] > 0


def test_parts_of_a_model_follow_its_preset(model: Path) -> None:
    whole = open_bundle(model)
    cascade = replace(whole, previous=whole, members=(whole, whole))
    loaded = load_model(at_quality(cascade, "fast"))
    assert loaded.previous is not None
    assert {part.preset for part in (loaded.previous, *loaded.members)} == {QUALITY["fast"]}
    assert load_model(cascade).members[0].preset is EXACT


def test_another_preset_does_all_again_and_exact_is_the_default(model: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    shutil.copyfile(model.parent / "data" / "images" / "c0.nii.gz", images / "a.nii.gz")

    def attempts() -> int:
        return int(json.loads((out / "journal" / "a.json").read_text())["attempts"])

    for count, quality in enumerate(("fast", "fast", "balanced", "exact"), start=1):
        assert api.predict(images, model=model, out=out, quality=quality).complete
        assert attempts() == {1: 1, 2: 1, 3: 2, 4: 3}[count]
        assert json.loads((out / "predictions.json").read_text())["quality"] == quality
    mask = (out / "a.nii.gz").read_bytes()
    api.predict(images, model=model, out=out)
    assert attempts() == 3
    assert (out / "a.nii.gz").read_bytes() == mask


def test_workers_use_the_preset(model: Path, tmp_path: Path) -> None:
    image = model.parent / "data" / "images" / "c0.nii.gz"
    here = api.predict(image, model=model, out=tmp_path / "here", quality="fast")
    there = api.predict(image, model=model, out=tmp_path / "there", quality="fast", workers=1)
    assert here.entries == there.entries
    assert here.complete


def body() -> Tensor:
    """An image of noise about -1, with a bright ball in the middle and one voxel that is far brighter."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(32.0) - 16] * 3, indexing="ij"))
    image = torch.randn((1, 32, 32, 32), generator=torch.Generator().manual_seed(0)) * 0.005 - 1
    image[0][grid.norm(dim=0) < 8] += 1.5
    image[0, 16, 16, 16] = 500
    return image


def test_air_is_not_shown_to_networks_and_everything_else_is() -> None:
    image, seen = body(), []

    def predict(windows: Tensor) -> Tensor:
        seen.append(len(windows))
        return torch.cat([-windows, windows], dim=1)

    limits = air_limits(image)
    assert limits.shape == (1,)
    assert -1 < limits[0] < -0.9
    some = skipping_air(predict, limits, BACKGROUND)
    air, ball = image[None, :, :4, :4, :4], image[None, :, 14:18, 14:18, 14:18]
    both = some(torch.cat([air, ball, air]))
    assert seen == [1]
    assert torch.equal(both[1:2], predict(ball))
    assert torch.equal(both[0], BACKGROUND.reshape(2, 1, 1, 1).expand(2, 4, 4, 4))
    assert torch.equal(some(air), both[2:])
    assert torch.equal(some(ball), predict(ball))


def test_a_channel_with_something_in_it_is_no_air() -> None:
    image = torch.cat([body(), body().flip(0).roll(12, 1)])
    limits = air_limits(image)
    window = image[None, :, 26:30, 14:18, 14:18]  # dark in the first channel, in the ball of the second
    assert bool((window[0, 0] <= limits[0]).all())
    assert not bool((window[0, 1] <= limits[1]).any())
    calls: list[int] = []
    skipping_air(lambda windows: calls.append(1) or windows, limits, BACKGROUND)(window)
    assert calls == [1]


def test_a_channel_of_one_value_is_air_and_an_image_without_air_has_none() -> None:
    assert air_limits(torch.zeros(1, 4, 4, 4)).tolist() == [0.0]
    image = torch.rand((1, 16, 16, 16), generator=torch.Generator().manual_seed(1)) + 3
    image[0, 0, 0, 0] = 0
    low = air_limits(image)
    assert not bool((image[:, :4, 4:8, :4] <= low[:, None, None, None]).any())


def test_no_preset_is_the_layout_of_before(make_spec: Make, make_plan: Make) -> None:
    plan = make_plan(make_spec(), patch_size=(16, 16, 16), overlap=0.5)
    assert layout((40, 20, 30), plan).starts == layout((40, 20, 30), plan, Preset()).starts
    assert layout((40, 20, 30), plan).window == (16, 20, 16)
