"""Windows: as one forward pass where a network sees only one voxel, mirrored as by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg.inference.presets import LONGEST
from medseg.inference.sliding_window import slide, window_logits
from medseg.inference.windows import window_size
from medseg.planning.plan import Plan

Make = Callable[..., Any]


class Pointwise(nn.Module):
    """Logits that depend on one voxel only: (x, -x, x²) of the first channel."""

    def forward(self, image: Tensor) -> Tensor:
        first = image[:, :1]
        return torch.cat([first, -first, first**2], dim=1)


class Lopsided(nn.Module):
    """Looks one voxel ahead along the first axis: not the same in the mirror."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([image, image.roll(1, dims=2)], dim=1)


@pytest.fixture
def plan(make_spec: Make, make_plan: Make) -> Callable[..., Plan]:
    return lambda **changes: make_plan(make_spec(), **changes)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(*[st.integers(1, 30)] * 3),
    patch=st.tuples(*[st.integers(2, 12)] * 3),
    overlap=st.floats(0, 0.95),
    mirror=st.booleans(),
    dimensions=st.sampled_from([2, 3]),
)
def test_windows_of_a_pointwise_network_are_one_forward_pass(
    make_spec: Make, make_plan: Make, shape: Any, patch: Any, overlap: float, mirror: bool, dimensions: int
) -> None:
    patch = patch if dimensions == 3 else (*patch[:2], 1)
    plan = make_plan(make_spec(), dimensions=dimensions, patch_size=patch, overlap=overlap)
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    found = slide(image, [Pointwise()], plan, mirror=mirror)
    assert found.shape == (3, *shape)
    assert torch.allclose(found, Pointwise()(image[None])[0], atol=1e-4)


@given(shape=st.tuples(*[st.integers(1, 200)] * 3), patch=st.tuples(*[st.integers(1, 100)] * 3))
def test_window_is_the_patch_or_the_whole_of_a_short_axis(
    make_spec: Make, make_plan: Make, shape: tuple[int, ...], patch: tuple[int, ...]
) -> None:
    plan = make_plan(make_spec(), patch_size=patch)
    for n, p, w in zip(shape, patch, window_size(shape, plan), strict=True):
        assert p <= w <= LONGEST * p
        assert w == (n if 1 < p < n <= LONGEST * p else p)
        assert w >= n or n > LONGEST * p or p == 1


def test_short_axes_need_one_window(plan: Callable[..., Plan]) -> None:
    calls: list[tuple[int, ...]] = []

    class Counting(Pointwise):
        def forward(self, image: Tensor) -> Tensor:
            calls.append(tuple(image.shape))
            return super().forward(image)

    slide(torch.randn(1, 24, 17, 16), [Counting()], plan(), mirror=False)
    assert calls == [(1, 1, 24, 17, 16)]


def test_mirrored_predictions_are_turned_back_and_averaged(plan: Callable[..., Plan]) -> None:
    windows = torch.randn(2, 1, 4, 5, 6)
    network = Lopsided()
    for axes in ((0,), (0, 2), (0, 1, 2)):
        flips = [[a + 2 for i, a in enumerate(axes) if code >> i & 1] for code in range(2 ** len(axes))]
        expected = torch.stack([network(windows.flip(f)).flip(f) for f in flips]).mean(0)
        chosen = plan(augmentation={"mirror_axes": axes})
        assert torch.allclose(window_logits([network], chosen, mirror=True)(windows), expected, atol=1e-6)
        assert torch.equal(window_logits([network], chosen, mirror=False)(windows), network(windows))


def test_folds_are_averaged(plan: Callable[..., Plan]) -> None:
    windows = torch.randn(1, 1, 4, 4, 4)

    class Twice(Pointwise):
        def forward(self, image: Tensor) -> Tensor:
            return 3 * super().forward(image)

    found = window_logits([Pointwise(), Twice()], plan(), mirror=False)(windows)
    assert torch.allclose(found, 2 * Pointwise()(windows))


def test_a_network_may_return_what_it_was_given(plan: Callable[..., Plan]) -> None:
    windows = torch.randn(1, 1, 4, 4, 4)
    before = windows.clone()
    found = window_logits([nn.Identity(), nn.Identity()], plan(), mirror=True)(windows)
    assert torch.equal(windows, before)
    assert torch.allclose(found, before, atol=1e-6)


def test_slices_are_predicted_one_by_one(plan: Callable[..., Plan]) -> None:
    shapes: list[tuple[int, ...]] = []

    class Flat(Pointwise):
        def forward(self, image: Tensor) -> Tensor:
            shapes.append(tuple(image.shape))
            return super().forward(image)

    image = torch.randn(1, 16, 16, 9)
    found = slide(image, [Flat()], plan(dimensions=2), mirror=False)
    assert torch.allclose(found, Pointwise()(image[None])[0], atol=1e-5)
    assert {shape[1:] for shape in shapes} == {(1, 16, 16)}
    assert sum(shape[0] for shape in shapes) == 9


def test_half_precision_is_averaged_in_full(plan: Callable[..., Plan]) -> None:
    found = slide(torch.randn(1, 20, 20, 20), [Pointwise()], plan(precision="bf16"), mirror=True)
    assert found.dtype == torch.float32
