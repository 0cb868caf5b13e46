"""What is made of an answer that lies in a file is what is made of all logits at once."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import ExportError
from medseg.inference import answer as module
from medseg.inference.answer import averaged, kept, logits_at, painted
from medseg.inference.memory import Case
from medseg.inference.predict import Model, answer_of, predict_logits, predict_volume
from medseg.inference.sliding_window import slide
from medseg.targets import decode
from medseg.volume import Volume, reorient

Models = Callable[..., Model]
Pictures = Callable[..., Volume]
RULES = {"order": 1, "order_z": 0, "separate": None}
NNUNET = {"image": {**RULES, "order": 3}, "logits": RULES}
OPTIONS = st.fixed_dictionaries(
    {
        "dimensions": st.sampled_from([2, 3]),
        "orientation": st.sampled_from(["RAS", "SLP", "AIR", "LPI"]),
        "spacing": st.tuples(*[st.sampled_from([0.8, 1.0, 1.7])] * 3),
        "nnunet": st.sampled_from([None, None, NNUNET]),
        "steps": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def made(random_model: Models, options: dict[str, Any], **more: Any) -> Model:
    patch = (8, 6, 1) if options["dimensions"] == 2 else (8, 7, 6)
    return random_model(patch_size=patch, **options, **more)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 17)] * 3),
    options=OPTIONS,
    classes=st.sampled_from([2, 3, 12]),
    regions=st.sampled_from([0, 0, 1, 3]),
    codes=st.sampled_from(["RAS", "PSL", "IRA"]),
)
def test_one_model_to_the_last_bit(
    random_model: Models,
    picture: Pictures,
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    options: dict[str, Any],
    classes: int,
    regions: int,
    codes: str,
) -> None:
    """Labels, and logits at single voxels: cropped borders, both kinds of network, classes and regions, ties."""
    model = made(random_model, options, classes=classes, regions=regions)
    image = reorient(picture(shape, seed=options["seed"]), codes)
    logits = predict_logits(model, image)
    found = kept(answer_of(model, image), tmp_path_factory.getbasetemp() / "kept")
    mask = painted(found)
    wanted = decode(model.bundle.info.spec, logits).numpy()
    assert mask.dtype == wanted.dtype
    assert np.array_equal(mask, wanted)
    assert np.array_equal(averaged([found]), wanted)
    voxels = np.random.default_rng(0).integers(0, wanted.size, 200)
    assert torch.equal(logits_at(found, voxels), logits.flatten(1)[:, voxels])
    assert logits_at(found, voxels[:0]).shape == (len(logits), 0)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(*[st.integers(2, 17)] * 3),
    options=st.lists(OPTIONS, min_size=2, max_size=3),
    regions=st.sampled_from([0, 0, 2]),
    block=st.sampled_from([1, 3, 8]),
    codes=st.sampled_from(["RAS", "PSL", "IRA"]),
)
def test_several_models_as_an_ensemble_of_them_but_for_rounding(
    random_model: Models,
    picture: Pictures,
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    options: list[dict[str, Any]],
    regions: int,
    block: int,
    codes: str,
) -> None:
    """A file holds planes across the axis of one model; together they are read across one of the source.

    The ensemble asks networks along that axis from the start, which adds windows up in another order.
    """
    models = [made(random_model, {**each, "steps": False}, regions=regions) for each in options]
    for number, model in enumerate(models):
        model.bundle.info.temperature = (1.0, 0.7, 1.6)[number]
    image = reorient(picture(shape, seed=options[0]["seed"]), codes)
    ensemble = replace(models[0], members=tuple(models))
    wanted = predict_volume(ensemble, image).array
    place = tmp_path_factory.getbasetemp() / "kept"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "BLOCK", block)
        found = averaged([kept(answer_of(model, image), place) for model in models])
    assert found.dtype == wanted.dtype
    assert (found != wanted).mean() <= 2e-3, "no more than a voxel or two that is undecided"


def test_planes_of_a_file_across_any_axis(tmp_path: Path, random_model: Models, picture: Pictures) -> None:
    model = random_model(overlap=0.5)
    answer = answer_of(model, picture((19, 23, 17)))
    there = kept(answer, tmp_path)
    whole = torch.stack(list(there.planes(there.where, None, False)), there.where.axis + 1)
    direct = torch.stack(list(answer.planes(answer.where, None, False)), answer.where.axis + 1)
    assert torch.equal(whole, direct)
    for axis in range(3):
        where = replace(there.where, along=axis)
        one, two = (size for other, size in enumerate(where.shape) if other != axis)
        for tile in (None, ((2, one - 1), (1, two))):
            part = whole if tile is None else np.moveaxis(whole.numpy(), axis + 1, 1)[:, :, 2 : one - 1, 1:two]
            part = np.moveaxis(whole.numpy(), axis + 1, 1) if tile is None else part
            for backwards in (False, True):
                planes = [plane.numpy() for plane in there.planes(where, tile, backwards)]
                assert np.array_equal(np.stack(planes[::-1] if backwards else planes, 1), part)


def test_the_file_has_no_name_and_goes_with_the_answer(tmp_path: Path, random_model: Models, picture: Pictures) -> None:
    before = len(os.listdir("/proc/self/fd"))
    found = kept(answer_of(random_model(), picture((12, 12, 12))), tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before + 1
    painted(found)
    del found
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_told(tmp_path: Path, random_model: Models, picture: Pictures) -> None:
    answer = answer_of(random_model(), picture((12, 12, 12)))

    unheard: list[Any] = []

    class Full:
        def __init__(self, **options: Any) -> None: ...

        def write(self, content: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")  # what is left in its buffer

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module.tempfile, "TemporaryFile", Full)
        patched.setattr("sys.unraisablehook", unheard.append)
        with pytest.raises(ExportError, match="No space left") as caught:
            kept(answer, tmp_path)
        assert caught.value.code == "DISK_FULL"
        del caught
        gc.collect()
    assert unheard == [], "no traceback on the terminal"
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError) as caught:
        kept(answer, tmp_path / "file" / "folder")
    assert caught.value.code == "NOT_WRITABLE"


def test_no_term_is_classes_times_volume(case: Callable[..., Case], measured: Callable[..., Any]) -> None:
    """As a training scores a case, and a selection two runs: labels, and logits at voxels everywhere."""
    plans = [case(classes=24, spacing=(mm,) * 3, patch_size=(16, 48, 48)) for mm in (1.5, 2.0)]
    few, many = (measured(plans, depth, kept=True) for depth in (72, 120))
    voxels = (120 - 72) * 192 * 192
    assert many["peak"] - few["peak"] < 15 * voxels, "the files hold 40 bytes a voxel of the source, all logits 192"


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(*[st.integers(1, 17)] * 3),
    options=OPTIONS,
    classes=st.sampled_from([2, 3, 12]),
    regions=st.sampled_from([0, 1, 3]),
)
def test_labels_plane_by_plane_on_the_grid_of_the_network(
    random_model: Models, shape: tuple[int, int, int], options: dict[str, Any], classes: int, regions: int
) -> None:
    """As the validation within a training does; ties are decided alike."""
    model = made(random_model, options, classes=classes, regions=regions)
    spec, plan = model.bundle.info.spec, model.bundle.info.plan
    image = torch.randn((1, *shape), generator=torch.Generator().manual_seed(options["seed"]))
    logits = slide(image, model.networks, plan, mirror=False)
    labels = slide(image, model.networks, plan, mirror=False, made=partial(decode, spec))
    assert labels.dtype == decode(spec, logits).dtype
    assert torch.equal(labels, decode(spec, logits))
