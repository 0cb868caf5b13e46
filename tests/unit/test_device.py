"""Which arithmetic runs where."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from medseg.device import Stopwatch, autocast, best_device, device_name, hardware, precisions, repeatable
from medseg.errors import TrainingError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_on_a_processor(precision: str, expected: torch.dtype) -> None:
    with autocast("cpu", precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_the_plain_precision_is_measured_first() -> None:
    assert precisions(CPU) == ("fp32", "bf16")


def test_a_gpu_without_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert precisions(torch.device("cuda")) == ("fp32",)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert precisions(torch.device("cuda")) == ("fp32", "bf16")


@pytest.mark.parametrize(("there", "kind"), [(True, "cuda"), (False, "cpu")])
def test_the_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool, kind: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert best_device().type == kind


def test_name_of_the_processor() -> None:
    assert device_name(CPU) == "cpu"


def test_repeatable_holds_within_its_block_only() -> None:
    threads, workspace = torch.get_num_threads(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    with repeatable(True, threads=threads + 1):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == threads + 1
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == workspace
    with repeatable(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_does_not_repeat_is_named() -> None:
    words = "max_pool3d_with_indices_backward_cuda does not have a deterministic implementation, but you set. More."
    with (
        pytest.raises(TrainingError, match=r"max_pool3d.* implementation.*leave the option out") as caught,
        repeatable(True),
    ):
        raise RuntimeError(words)
    assert caught.value.code == "NOT_REPEATABLE"
    with pytest.raises(RuntimeError, match="something else"), repeatable(True):
        raise RuntimeError("something else")
    with pytest.raises(RuntimeError, match="deterministic"), repeatable(False):
        raise RuntimeError(words)


def test_a_stopwatch_on_a_processor() -> None:
    with Stopwatch(CPU) as watch:
        pass
    assert 0 <= watch.seconds() < 60


def test_hardware_names_nobody() -> None:
    facts = hardware(CPU)
    assert facts["threads"] == torch.get_num_threads()
    assert socket.gethostname() not in str(facts)
    assert facts["cuda"] is None
