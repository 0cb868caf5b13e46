"""Windows as nnU-Net lays them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map
from scipy import ndimage
from torch import Tensor

from medseg.inference.sliding_window import joined, planes
from medseg.inference.windows import Layout, gaussian, importance, layout, window_starts

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("size", "window", "expected"),
    [
        (64, 64, [0]),
        (65, 64, [0, 1]),
        (96, 64, [0, 32]),
        (97, 64, [0, 16, 33]),  # 16.5 rounds to the even number, as numpy does
        (110, 32, [0, 16, 31, 47, 62, 78]),
    ],
)
def test_windows_lie_evenly(size: int, window: int, expected: list[int]) -> None:
    assert window_starts(size, window, 0.5) == expected


@pytest.mark.parametrize("size", range(16, 90, 7))
@pytest.mark.parametrize("step", [0.25, 0.5, 1.0])
def test_windows_cover_everything_and_end_at_the_end(size: int, step: float) -> None:
    starts = window_starts(size, 16, step)
    assert starts[0] == 0
    assert starts[-1] == size - 16
    assert max(np.diff(starts), default=0) <= 16 * step + 0.5


@pytest.mark.parametrize("window", [(16, 16), (32, 20, 48), (40, 56, 40), (5, 7, 9)])
def test_importance_is_nnunet_s_gaussian_in_half_precision(window: tuple[int, ...]) -> None:
    impulse = np.zeros(window)
    impulse[tuple(n // 2 for n in window)] = 1
    wanted = ndimage.gaussian_filter(impulse, [n / 8 for n in window], mode="constant", cval=0)
    wanted = (wanted / wanted.max() * 10).astype(np.float16)
    wanted[wanted == 0] = wanted[wanted > 0].min()
    found = importance(window).numpy()
    assert found.min() > 0
    assert np.abs(found - wanted.astype(np.float32)).max() <= 2**-8  # one unit in the last place of 10
    assert np.mean(found == wanted) > 0.99


@pytest.fixture
def laid(make_spec: Make, make_plan: Make) -> Callable[..., Layout]:
    rules = {"order": 1, "order_z": 0, "separate": None}

    def lay(shape: tuple[int, int, int], window: tuple[int, int, int]) -> Layout:
        plan = make_plan(
            make_spec(),
            patch_size=window,
            overlap=0.5,
            dimensions=2 if window[2] == 1 else 3,
            nnunet={"image": rules, "logits": rules},
        )
        return layout(shape, plan)

    return lay


def test_small_images_lie_in_the_middle_of_the_window(laid: Callable[..., Layout]) -> None:
    where = laid((3, 6, 9), (8, 6, 4))
    padded = where.pad(torch.ones(1, 3, 6, 9))
    assert padded.shape == (1, 8, 6, 9)
    assert where.before == (2, 0, 0)
    assert padded.sum() == padded[:, 2:5].sum() == 3 * 6 * 9


@pytest.mark.parametrize("window", [(8, 8, 8), (16, 8, 1), (40, 8, 4)])
def test_what_depends_on_a_voxel_alone_is_given_back_as_it_is(
    rng: np.random.Generator, laid: Callable[..., Layout], window: tuple[int, int, int]
) -> None:
    image = torch.from_numpy(rng.normal(size=(2, 21, 17, 19)).astype(np.float32))
    seen = []

    def predict(windows: Tensor) -> Tensor:
        assert windows.shape[1:] == (2, *window)
        seen.append(len(windows))
        return torch.cat([windows, windows[:, :1] * 2], 1)

    where = laid((21, 17, 19), window)
    logits = joined(planes(image, predict, where), where)
    assert torch.allclose(logits, torch.cat([image, image[:1] * 2]), atol=1e-5)
    assert (max(seen) > 1) == (window[2] == 1)


@pytest.mark.parametrize("window", [(16, 16, 1), (32, 20, 48), (1, 9, 2)])
def test_weights_are_monai_s(window: tuple[int, int, int]) -> None:
    assert torch.equal(gaussian(window), compute_importance_map(window, mode="gaussian", sigma_scale=0.125))
