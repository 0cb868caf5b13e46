"""Windows that the GPU has no memory for together are done in smaller batches, with the same answer."""

from __future__ import annotations

import pytest
import torch

from medseg.inference.sliding_window import sparing


def test_batches_are_halved_until_they_fit() -> None:
    sizes: list[int] = []

    def predict(windows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(windows))
        if len(windows) > 2:
            raise torch.OutOfMemoryError("full")
        return windows * 2

    windows = torch.arange(14.0).reshape(7, 2)
    assert torch.equal(sparing(predict)(windows), windows * 2)
    assert sizes == [7, 4, 2, 2, 3, 2, 1]


def test_a_single_window_that_does_not_fit_is_an_error() -> None:
    def predict(windows: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        sparing(predict)(torch.zeros(2, 1))
