"""Networks as files of other programs: what they answer, and what is never left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medseg.bundle import load_networks
from medseg.errors import ConfigError, ExportError
from medseg.exchange import program
from medseg.exchange.export import export_model, require_single
from medseg.exchange.program import SAID, window_of
from medseg.networks import build_network

Make = Callable[..., Any]


@pytest.fixture
def bundle(tmp_path: Path, make_spec: Make, make_plan: Make, make_bundle: Make) -> Any:
    spec = make_spec(labels={"two": 9, "three": 4})
    return make_bundle(tmp_path / "model", spec, make_plan(spec, patch_size=(8, 10, 7)), folds=2)


def mean_logits(bundle: Any, image: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack([network(image) for network in load_networks(bundle)]).mean(0)


def test_program_is_the_mean_of_the_folds_at_any_multiple_of_the_stride(tmp_path: Path, bundle: Any, tiny: Any) -> None:
    image = tiny.save(tmp_path / "image.nii.gz", tiny.case(1)[0])
    found = export_model(bundle.folder, to="torch", out=tmp_path / "m.pt2", check=(image,))
    assert (found.networks, found.real, found.window.dynamic) == (2, True, True)
    assert found.window.size == (8, 10, 8), "enlarged to a multiple of the stride"
    assert found.agreement.difference <= found.agreement.allowed
    assert found.agreement.same > 0.9999
    extra = {SAID: ""}
    loaded = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    facts = json.loads(extra[SAID])
    assert (facts["outputs"], facts["labels"]) == (["background", "two", "three"], {"two": 9, "three": 4})
    assert (facts["window"], facts["multiple_of"]) == ([8, 10, 8], [2, 2, 2])
    for shape in [(1, 1, 8, 10, 8), (3, 1, 4, 14, 6), (1, 1, 4, 4, 10)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(loaded(x), mean_logits(bundle, x), atol=1e-5)
    with pytest.raises(ConfigError, match=r"m\.pt2 exists already"):
        export_model(bundle.folder, to="torch", out=tmp_path / "m.pt2")


def test_onnx_answers_as_the_network_in_another_runtime(
    tmp_path: Path, make_spec: Make, make_plan: Make, make_bundle: Make
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    spec = make_spec()
    bundle = make_bundle(tmp_path / "flat", spec, make_plan(spec, dimensions=2))
    found = export_model(bundle.folder, to="onnx", out=tmp_path / "m.onnx")
    assert not found.real
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map[SAID])["dimensions"] == 2
    for shape in [(1, 1, 16, 16), (3, 1, 24, 10)]:
        x = np.random.default_rng(2).standard_normal(shape, np.float32)
        answer = session.run(None, {"image": x})[0]
        assert np.allclose(answer, mean_logits(bundle, torch.from_numpy(x)).numpy(), atol=1e-4)


def test_file_that_differs_is_not_left_behind(tmp_path: Path, bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.expand(-1, 3, -1, -1, -1) * 1.5

    captured = program._captured
    monkeypatch.setattr(program, "_captured", lambda network, window, patch: captured(Wrong(), window, patch))
    with pytest.raises(ExportError, match=r"differs from its network by up to .* nothing was left behind") as raised:
        export_model(bundle.folder, to="torch", out=tmp_path / "out" / "m.pt2")
    assert raised.value.code == "EXPORT_DIFFERS"
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_names_are_told(tmp_path: Path, bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--to tensorrt: allowed are torch, onnx"):
        export_model(bundle.folder, to="tensorrt", out=tmp_path / "m.trt")
    with pytest.raises(ConfigError, match=r"for --to onnx the name ends in \.onnx"):
        export_model(bundle.folder, to="onnx", out=tmp_path / "m.pt2")
    monkeypatch.setattr(program, "NEEDED", ("onnx_of_another_world",))
    with pytest.raises(ConfigError, match=r"needs onnx_of_another_world: pip install 'medseg\[onnx\]'"):
        export_model(bundle.folder, to="onnx", out=tmp_path / "m.onnx")


def test_axis_of_one_stride_keeps_its_size() -> None:
    assert program.Window((4, 8), (4, 4), dynamic=True).steps == (None, 4)
    assert program.Window((4, 8), (4, 4), dynamic=False).steps == (None, None)


def test_sizes_that_a_network_takes() -> None:
    options = {"features": [4, 8], "strides": [[2, 2]]}
    free = build_network("fcn32s", spatial_dims=2, in_channels=1, out_channels=2, options=options)
    assert window_of([free], (9, 8)) == program.Window((10, 8), (2, 2), dynamic=True)
    fixed = build_network("vnet", spatial_dims=2, in_channels=1, out_channels=2, options={})
    assert window_of([fixed], (20, 16)) == program.Window((32, 16), (16, 16), dynamic=False)


def test_ensembles_and_cascades_are_refused(bundle: Any) -> None:
    with pytest.raises(ExportError, match="export its folders member_0"):
        require_single(replace(bundle, members=(bundle, bundle)))
    with pytest.raises(ExportError, match="second stage of a cascade"):
        require_single(replace(bundle, previous=bundle))
