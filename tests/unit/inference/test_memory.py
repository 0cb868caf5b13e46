"""What a prediction takes is known before: tiles give the same mask, and the formula holds in a real process."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medseg.batch.memory import memory_text
from medseg.device import resident
from medseg.errors import BatchError
from medseg.inference import answer
from medseg.inference import predict as module
from medseg.inference.memory import Case, _Live, forecast, tiles_of
from medseg.inference.predict import Model, predict_volume
from medseg.preparation.interpolate import linear_line
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume

Make = Callable[..., Any]


def test_only_arrays_grow_with_the_length_of_an_image(case: Callable[..., Case]) -> None:
    options = {"classes": 118, "spacing": (3.0, 3.0, 3.0), "patch_size": (32, 64, 64)}
    needs = [forecast(case((length, 256, 256), **options)) for length in (256, 512, 2048)]
    rest = [need.total - need.image - need.mask - need.prepared for need in needs]
    assert len({need.slab + need.planes + need.window for need in needs}) == 1
    assert max(rest) <= 1.1 * min(rest)


def test_less_memory_means_more_tiles(case: Callable[..., Case]) -> None:
    wide = case((64, 256, 256), classes=100)
    whole = forecast(wide)
    cut = forecast(wide, limit=whole.total - whole.slab // 2)
    assert whole.tiles == (1, 1)
    assert math.prod(cut.tiles) > 1
    assert cut.total < whole.total
    assert f"in {cut.tiles[0]} × {cut.tiles[1]} tiles" in cut.text
    with pytest.raises(BatchError, match=r"takes at least .* --max-memory allows 1.0 MiB: allow more") as caught:
        forecast(wide, limit=1 << 20)
    assert caught.value.code == "MAX_MEMORY"


@pytest.mark.parametrize("dimensions", [2, 3])
def test_tiles_give_the_very_mask(
    make_spec: Make, make_plan: Make, monkeypatch: pytest.MonkeyPatch, dimensions: int
) -> None:
    spec = make_spec(labels={f"l{n}": n for n in range(1, 6)})
    plan = make_plan(
        spec,
        dimensions=dimensions,
        patch_size=(8, 8, 8 if dimensions == 3 else 1),
        spacing=(1.7, 1.4, 0.8),
        overlap=0.5,
    )
    network = (nn.Conv3d if dimensions == 3 else nn.Conv2d)(1, 6, 3, padding=1)
    info = SimpleNamespace(plan=plan, spec=spec, postprocess=(), temperature=1.0)
    model = Model(SimpleNamespace(info=info), [network], torch.device("cpu"))
    image = Volume(np.random.default_rng(0).normal(size=(1, 40, 37, 21)).astype(np.float32), np.eye(4))
    whole = predict_volume(model, image).array
    monkeypatch.setattr(module, "resident", lambda: 0)
    need = forecast(module.case_of(model, image), held=0)
    tiles = []
    plain = tiles_of
    monkeypatch.setattr(answer, "tiles_of", lambda lines, count: tiles.append(count) or plain(lines, count))
    limits = [need.total, need.total - need.slab // 3, need.total - need.slab // 2]
    for limit in limits:
        assert np.array_equal(predict_volume(model, image, max_memory=limit).array, whole)
    assert tiles[0] == (1, 1)
    assert math.prod(tiles[2]) >= math.prod(tiles[1]) > 1


@pytest.mark.parametrize("sizes", [(5, 17), (17, 5), (9, 9), (1, 4), (4, 1)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_tiles_make_every_voxel_once(sizes: tuple[int, int], count: int) -> None:
    line = linear_line(*sizes)
    seen = np.zeros((sizes[1], sizes[1]), int)
    for (a, b), lines, place in tiles_of((line, line, line), (count, count)):
        seen[place] += 1
        assert lines[1].before == a[1] - a[0] <= sizes[0]
        assert lines[2].before == b[1] - b[0] <= sizes[0]
        assert seen[place].shape == (lines[1].after, lines[2].after)
    assert (seen == 1).all()


def test_layers_are_counted_while_they_live() -> None:
    live = _Live()
    with torch.no_grad(), live:
        x = torch.empty(1000, device="meta")
        y = x + 1
        del x
        z = y.view(10, 100) * 2
        del y
    assert live.peak == 8000
    assert z.shape == (10, 100)


def test_a_run_is_told_before_it_begins(tmp_path: Any, case: Callable[..., Case], tiny: Any) -> None:
    found = case()
    file = tmp_path / "a.nii.gz"
    tiny.save(file, np.zeros((30, 20, 10), np.int16))
    study = SimpleNamespace(series=None, refusal=None, images=(file,))
    info = SimpleNamespace(plan=found.plan, spec=found.spec, preset="exact")
    info.weights, info.members, info.quality = {"a": ""}, (), None
    text = memory_text([study], [info], 1 << 40)
    assert "the largest image (30×20×10) needs about" in text
    assert "allows 1.0 KiB" in memory_text([study], [info], 1024)
    assert "the largest image (30×20×10) needs about" in memory_text([study], [info, info], 1 << 40, soft=True)
    assert "allows 1.0 KiB" in memory_text([study], [info, info], 1024)
    tiny.save(tmp_path / "large.nii.gz", np.zeros((20, 20, 10), np.int16), np.diag([9.0, 9.0, 9.0, 1.0]))
    large = SimpleNamespace(series=None, refusal=None, images=(tmp_path / "large.nii.gz",))
    assert "the largest image (20×20×10) needs about" in memory_text([study, large], [info], 1 << 40)
    assert "not known" in memory_text(
        [SimpleNamespace(series=None, refusal=None, images=(tmp_path / "b.mha",))], [info], 9
    )


def test_a_series_is_weighed_with_its_slices_apart(
    tmp_path: Any, case: Callable[..., Case], dicom_result: Callable[..., Any]
) -> None:
    series = dicom_result(tmp_path).series
    found = case()
    info = SimpleNamespace(
        plan=found.plan, spec=found.spec, preset="exact", weights={"a": ""}, members=(), quality=None
    )
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medseg.batch.memory.foretold", lambda question: asked.append(question) or "")
        memory_text([SimpleNamespace(series=series, refusal=None, images=())], [info], 9)
    image = read_series(series)
    assert asked[0].shape == image.shape
    assert np.allclose(asked[0].affine, image.affine)


def test_the_formula_holds_in_a_real_process(case: Callable[..., Case], measured: Callable[..., Any]) -> None:
    """Random logits of 40 classes: every cell is mixed."""
    found = case(classes=40, spacing=(3.0, 3.0, 3.0), patch_size=(16, 48, 48))
    runs = [measured([found], depth) for depth in (72, 216)]
    rest = [run["peak"] - run["arrays"] for run in runs]
    assert max(rest) < 1.1 * min(rest), "only image, prepared image and mask grow"
    for run in runs:
        assert run["peak"] <= run["need"] * 1.02
        assert run["need"] < 1.5 * run["peak"], "it is no empty promise"


def test_what_was_freed_does_not_count_as_held() -> None:
    """Pieces too small to go back to the system by themselves, below one that stays."""
    pieces = [bytearray(b"x") * (100 << 10) for _ in range(2000)]
    last, full = pieces.pop(), resident()
    pieces.clear()
    assert full - resident() > 150 << 20
    assert len(last) == 100 << 10
