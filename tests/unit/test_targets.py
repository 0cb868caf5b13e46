"""Between label values and channels: round trips, gaps, regions, unannotated voxels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.spec import Spec
from medseg.targets import background_logits, channel_names, decode, encode, exclusive, probabilities

Make = Callable[..., Spec]
REGIONS = {
    "whole": {"labels": ["edema", "core", "enhancing"], "paint": "edema"},
    "tumour": {"labels": ["core", "enhancing"], "paint": "core"},
    "enhancing": {"labels": ["enhancing"], "paint": "enhancing"},
}
TUMOUR = {"edema": 5, "core": 2, "enhancing": 9}


def logits_of(target: torch.Tensor) -> torch.Tensor:
    return (target[0] - 0.5) * 20


@settings(deadline=None, max_examples=40)
@given(values=st.lists(st.integers(1, 2**24 - 1), min_size=1, max_size=6, unique=True), seed=st.integers(0, 99))
def test_classes_round_trip(make_spec: Make, values: list[int], seed: int) -> None:
    spec = make_spec(labels={f"label{value}": value for value in values})
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor([0, *values], dtype=torch.int32)
    mask = table[torch.randint(len(table), (1, 1, 3, 4, 5), generator=generator)]
    target, valid = encode(spec, mask)
    assert target.shape == (1, len(values) + 1, 3, 4, 5)
    assert (target.sum(1) == 1).all()
    assert valid.all()
    decoded = decode(spec, logits_of(target))
    assert torch.equal(decoded.int(), mask[0])
    assert decoded.dtype == (torch.uint8 if max(values) < 256 else torch.int32)


def test_channels_follow_the_spec_not_the_values(make_spec: Make) -> None:
    spec = make_spec(labels={"late": 7, "early": 3})
    assert exclusive(spec)
    assert channel_names(spec) == ["background", "late", "early"]
    target, _ = encode(spec, torch.tensor([[[[0, 3, 7]]]], dtype=torch.uint8))
    assert target[0, :, 0].tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_a_value_beyond_the_type_of_the_mask_is_not_found_in_it(make_spec: Make) -> None:
    spec = make_spec(labels={"small": 1, "large": 300})
    target, _ = encode(spec, torch.tensor([[[[44, 1]]]], dtype=torch.uint8))  # 300 is 44 modulo 256
    assert target[0, 2].sum() == 0


@pytest.mark.parametrize("mask_type", [torch.uint8, torch.int32, torch.int64])
def test_unannotated_voxels_are_in_no_class(make_spec: Make, mask_type: torch.dtype) -> None:
    spec = make_spec(labels={"a": 1}, ignore=255)
    target, valid = encode(spec, torch.tensor([[[[0, 1, 255]]]], dtype=mask_type))
    assert valid.flatten().tolist() == [True, True, False]
    assert target[0, :, 0].tolist() == [[1, 0, 0], [0, 1, 0]]


def test_ignore_value_is_never_predicted(make_spec: Make) -> None:
    spec = make_spec(labels={"a": 1}, ignore=255)
    assert set(decode(spec, torch.randn(2, 4, 4, 4)).unique().tolist()) <= {0, 1}


def test_regions_overlap_and_are_painted_in_their_order(make_spec: Make) -> None:
    spec = make_spec(labels=TUMOUR, regions=REGIONS)
    assert not exclusive(spec)
    assert channel_names(spec) == ["whole", "tumour", "enhancing"]
    mask = torch.tensor([[[[0, 5, 2, 9]]]], dtype=torch.uint8)
    target, valid = encode(spec, mask)
    assert target[0, :, 0].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert valid.all()
    assert torch.equal(decode(spec, logits_of(target)), mask[0])
    # A network may contradict itself: the last region that says yes wins.
    assert decode(spec, torch.tensor([-1.0, -1.0, 1.0]).reshape(3, 1, 1, 1)).item() == 9
    assert decode(spec, torch.tensor([1.0, -1.0, -1.0]).reshape(3, 1, 1, 1)).item() == 5


def test_regions_of_unannotated_voxels_are_empty(make_spec: Make) -> None:
    spec = make_spec(labels=TUMOUR, regions=REGIONS, ignore=4)
    target, valid = encode(spec, torch.tensor([[[[4, 9]]]], dtype=torch.uint8))
    assert target[0, :, 0, 0].sum() == 0
    assert valid.flatten().tolist() == [False, True]


def test_probabilities_of_classes_and_of_regions(make_spec: Make) -> None:
    logits = torch.tensor([0.0, 1.0, 3.0]).reshape(3, 1, 1, 1)
    weights = logits.exp()
    classes = probabilities(make_spec(labels={"a": 1, "b": 2}), logits)
    assert torch.allclose(classes, (weights / weights.sum())[1:]), "the background is the rest"
    regions = probabilities(make_spec(labels=TUMOUR, regions=REGIONS), logits)
    assert torch.allclose(regions, weights / (1 + weights)), "each on its own: they overlap"


@pytest.mark.parametrize("rest", [{}, {"regions": REGIONS}])
def test_background_logits_decode_to_background(make_spec: Make, rest: dict[str, Any]) -> None:
    spec = make_spec(labels=TUMOUR, **rest)
    logits = background_logits(spec)
    assert logits.shape == (len(channel_names(spec)),)
    assert decode(spec, logits.reshape(-1, 1, 1, 1)).item() == 0


def test_two_dimensional_targets(make_spec: Make) -> None:
    spec = make_spec(labels={"a": 3})
    mask = torch.tensor([[[[0, 3], [3, 0]]]], dtype=torch.uint8)
    target, _ = encode(spec, mask)
    assert target.shape == (1, 2, 2, 2)
    assert torch.equal(decode(spec, logits_of(target)), mask[0])
