"""An ensemble of configurations: the mean of its members' probabilities, or it is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.batch.job import recipe
from medseg.bundle import (
    MODEL_FILE,
    Bundle,
    Calibration,
    Member,
    PostStep,
    member_folder,
    open_bundle,
    save_bundle,
)
from medseg.errors import BundleError
from medseg.inference.predict import load_model, predict_soft, predict_volume
from medseg.spec import Spec
from medseg.targets import decode, mean_logits, probabilities
from medseg.volume import Volume

Make = Callable[..., Any]
LABELS = {"zebra": 3, "ant": 7}
REGIONS = {"whole": {"labels": ["zebra", "ant"], "paint": "zebra"}, "core": {"labels": ["ant"], "paint": "ant"}}


def temperature(value: float) -> Calibration:
    return Calibration(temperature=value, ece_before=0, ece_after=0, nll_before=0, nll_after=0, voxels=1000, cases=1)


def make_members(folder: Path, spec: Spec, make_plan: Make, make_bundle: Make) -> list[Bundle]:
    """Two models with different plans: 3-D at 1 mm with temperature 2, 2-D at 1.5 mm with two folds."""
    found = make_bundle(folder / "deep", spec, make_plan(spec))
    deep = save_bundle(
        folder / "deep",
        found.info.model_copy(update={"calibration": temperature(2.0)}),
        {name: _state(found.folder / name) for name in found.info.weights},
    )
    flat = make_plan(spec, dimensions=2, spacing=(1.5, 1.5, 1.5), seed=3)
    return [deep, make_bundle(folder / "flat", spec, flat, folds=2)]


def _state(file: Path) -> Any:
    import safetensors.torch

    return safetensors.torch.load_file(file)


def join(folder: Path, members: list[Bundle], **changes: Any) -> Bundle:
    rows = []
    for number, member in enumerate(members):
        shutil.copytree(member.folder, folder / member_folder(number))
        rows.append(Member(name=f"m{number}", digest=member.info.digest, networks=len(member.info.weights)))
    info = members[0].info.model_copy(update={"members": tuple(rows), "calibration": None, **changes})
    save_bundle(folder, info, {})
    return open_bundle(folder)


@pytest.fixture
def image() -> Volume:
    affine = np.diag([1.2, 0.9, 2.0, 1.0])
    return Volume(np.random.default_rng(0).normal(size=(1, 21, 18, 9)).astype(np.float32), affine)


@pytest.fixture(params=["labels", "regions"])
def spec(request: pytest.FixtureRequest, make_spec: Make) -> Spec:
    found: Spec = make_spec(labels=LABELS, regions=REGIONS if request.param == "regions" else {})
    return found


def test_ensemble_is_the_mean_of_what_its_members_say(
    tmp_path: Path, spec: Spec, image: Volume, make_plan: Make, make_bundle: Make
) -> None:
    """Each member alone, with its grid, folds and temperature, as `predict_soft` gives it; then their plain mean."""
    members = make_members(tmp_path, spec, make_plan, make_bundle)
    mask, soft = predict_soft(load_model(join(tmp_path / "both", members)), image)
    alone = [predict_soft(load_model(member), image)[1].array for member in members]
    mean = (alone[0] + alone[1]) / 2
    np.testing.assert_allclose(soft.array, mean, atol=2e-6)
    assert np.abs(alone[0] - alone[1]).max() > 0.01  # else the mean would be anything
    if spec.regions:
        expected = np.where(mean[1] > 0.5, 7, np.where(mean[0] > 0.5, 3, 0))
        sure = np.abs(mean - 0.5).min(0) > 1e-5
    else:
        whole = np.stack([1 - mean.sum(0), *mean])
        expected = np.array([0, 3, 7])[whole.argmax(0)]
        sure = np.diff(np.sort(whole, 0)[-2:], axis=0)[0] > 1e-5
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(mask.array[0][sure], expected[sure])
    assert mask.affine.tobytes() == image.affine.tobytes()


def test_ensemble_has_its_own_steps_and_temperature(
    tmp_path: Path, make_spec: Make, image: Volume, make_plan: Make, make_bundle: Make
) -> None:
    spec = make_spec(labels=LABELS)
    members = make_members(tmp_path, spec, make_plan, make_bundle)
    plain = predict_soft(load_model(join(tmp_path / "plain", members)), image)
    step = PostStep(kind="min_volume", labels=("zebra", "ant"), size=1e9)
    changed = join(tmp_path / "changed", members, postprocess=(step,), calibration=temperature(0.5))
    mask, soft = predict_soft(load_model(changed), image)
    assert plain[0].array.any()
    assert not mask.array.any()
    sharp = np.stack([1 - plain[1].array.sum(0), *plain[1].array]) ** 2
    np.testing.assert_allclose(soft.array, (sharp / sharp.sum(0))[1:], atol=1e-5)


def test_digest_and_provenance_tell_the_members(
    tmp_path: Path, make_spec: Make, make_plan: Make, make_bundle: Make
) -> None:
    members = make_members(tmp_path, make_spec(labels=LABELS), make_plan, make_bundle)
    both, other = join(tmp_path / "both", members), join(tmp_path / "other", members[::-1], plan=members[0].info.plan)
    assert len({both.info.digest, other.info.digest, *(member.info.digest for member in members)}) == 4
    assert both.info.provenance(None)["folds"] == 3
    assert len({recipe(both.info, mirror) for mirror in (None, True, False)}) == 3


def test_a_replaced_or_missing_member_is_refused(
    tmp_path: Path, make_spec: Make, make_plan: Make, make_bundle: Make
) -> None:
    spec = make_spec(labels=LABELS)
    both = join(tmp_path / "both", make_members(tmp_path, spec, make_plan, make_bundle))
    part = both.folder / member_folder(1)
    content = (part / MODEL_FILE).read_text()
    make_bundle(part, spec, make_plan(spec, seed=9))
    with pytest.raises(BundleError, match="not the member that"):
        open_bundle(both.folder)
    (part / MODEL_FILE).write_text(content)
    (part / "fold_1.safetensors").unlink()
    with pytest.raises(BundleError, match=r"fold_1.safetensors: missing|fold_0.safetensors: damaged"):
        open_bundle(both.folder)
    shutil.rmtree(part)
    with pytest.raises(BundleError, match="member_1"):
        open_bundle(both.folder)


def test_a_model_that_was_replaced_while_in_use_is_noticed(
    tmp_path: Path, make_spec: Make, make_plan: Make, make_bundle: Make
) -> None:
    members = make_members(tmp_path, make_spec(labels=LABELS), make_plan, make_bundle)
    both, other = join(tmp_path / "both", members), join(tmp_path / "other", members[::-1])
    with pytest.raises(BundleError, match="replaced while it was in use"):
        load_model(other, info=both.info)


def test_one_member_alone_is_that_member(
    tmp_path: Path, make_spec: Make, image: Volume, make_plan: Make, make_bundle: Make
) -> None:
    member = make_members(tmp_path, make_spec(labels=LABELS), make_plan, make_bundle)[1]
    whole, alone = load_model(join(tmp_path / "whole", [member])), load_model(member)
    np.testing.assert_array_equal(predict_volume(whole, image).array, predict_volume(alone, image).array)


@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_mean_logits_stand_for_the_mean(make_spec: Make, kind: str) -> None:
    spec = make_spec(labels=LABELS, regions=REGIONS if kind == "regions" else {})
    torch.manual_seed(1)
    parts = [torch.randn(2 if spec.regions else 3, 4, 5, 6) * 3 for _ in range(3)]
    kept = [part.clone() for part in parts]
    mean = mean_logits(spec, parts)
    expected = torch.stack([probabilities(spec, part) for part in kept]).mean(0)
    torch.testing.assert_close(probabilities(spec, mean), expected, atol=1e-6, rtol=0)
    assert all(torch.equal(part, before) for part, before in zip(parts, kept, strict=True))


def test_mean_of_certain_logits_stays_finite(make_spec: Make) -> None:
    for regions in ({}, REGIONS):
        spec = make_spec(labels=LABELS, regions=regions)
        sure = torch.tensor([20.0, -20.0, -20.0]) if not regions else torch.tensor([-200.0, 200.0])
        mean = mean_logits(spec, [10 * sure.reshape(-1, 1, 1, 1)] * 2)
        assert torch.isfinite(mean).all()
        assert int(decode(spec, mean)) == (7 if regions else 0)
    with pytest.raises(ValueError, match="no logits"):
        mean_logits(spec, [])
