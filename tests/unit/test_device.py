"""Which arithmetic runs where."""

from __future__ import annotations

import pytest
import torch

from medseg.device import autocast, best_device, device_name, precisions

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
