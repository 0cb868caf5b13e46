"""Windows that there is no memory for together are done in smaller batches, with the same answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg.inference.predict import Model, predict_case, predict_volume
from medseg.inference.sliding_window import sparing
from medseg.volume import Volume

Make = Callable[..., Any]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{str(error)[:12]}")
def test_batches_are_halved_until_they_fit(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []

    def predict(windows: Tensor) -> Tensor:
        sizes.append(len(windows))
        if len(windows) > 2:
            raise error
        return windows * 2

    windows = torch.arange(14.0).reshape(7, 2)
    spared = sparing(predict)
    with caplog.at_level(logging.WARNING, "medseg.inference"):
        assert torch.equal(spared(windows), windows * 2)
        assert torch.equal(spared(windows[:5]), windows[:5] * 2)
    assert sizes == [7, 4, 2, 2, 2, 1, 2, 2, 1], "what does not fit is not tried again"
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ["batches of 4", "batches of 2"]


@pytest.mark.parametrize("error", ERRORS)
def test_a_single_window_that_does_not_fit_is_an_error(error: Exception) -> None:
    def predict(windows: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error)):
        sparing(predict)(torch.zeros(2, 1))


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    sizes: list[int] = []

    def predict(windows: Tensor) -> Tensor:
        sizes.append(len(windows))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        sparing(predict)(torch.zeros(4, 1))
    assert sizes == [4]


class Cramped(nn.Module):
    """A network on a device that has memory for `most` slices at a time."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.seen = most, 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise RuntimeError("CUDA error: out of memory")
        self.seen += len(x)
        return torch.cat([x, x**2 - 1, x**3], 1)


@pytest.mark.parametrize("most", [1, 3, 7])
def test_the_mask_of_a_cramped_device_is_that_of_a_roomy_one(
    make_spec: Make, make_plan: Make, caplog: pytest.LogCaptureFixture, most: int
) -> None:
    spec = make_spec(labels={"a": 1, "b": 2})
    plan = make_plan(spec, dimensions=2, patch_size=(8, 8, 1), overlap=0.5)
    info = SimpleNamespace(plan=plan, spec=spec, postprocess=(), temperature=1.0)
    image = Volume(np.random.default_rng(0).normal(size=(1, 13, 11, 21)).astype(np.float32), np.eye(4))

    def mask(network: Cramped) -> np.ndarray:
        return predict_volume(Model(SimpleNamespace(info=info), [network], torch.device("cpu")), image).array

    roomy, cramped = Cramped(99), Cramped(most)
    with caplog.at_level(logging.WARNING, "medseg.inference"):
        wanted = mask(roomy)
        assert not caplog.records
        assert np.array_equal(mask(cramped), wanted)
    assert "no memory for 8 windows at once on cpu" in caplog.text
    info.quality = None
    models = [Model(SimpleNamespace(info=info), [Cramped(n)], torch.device("cpu")) for n in (99, most)]
    found = [predict_case(model, image) for model in models]
    assert [each.windows for each in found] == [0, {1: 1, 3: 2, 7: 4}[most]]
    assert cramped.seen == roomy.seen, "nothing is done twice"
