"""Sampling: which case, which place, exactly which voxels."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Compose, RandFlipd

from medseg.preparation.sampling import Draw, SamplePatch, draws, patch_start, read_region, read_through, tally

triples = st.tuples(*[st.integers(1, 9)] * 3)


def opened(shape: tuple[int, int, int] = (12, 10, 8), labels: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """A case whose image holds the number of each voxel, and whose labels sit in its far corners."""
    image = np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(1, *shape)
    mask = np.zeros((1, *shape), np.uint8)
    corners = [(0, 0, 0), tuple(n - 1 for n in shape)]
    rows = []
    for label in labels:
        mask[(0, *corners[label])] = label + 1
        rows.append((label, *corners[label]))
    locations = np.array(rows, np.int32).reshape(-1, 4)
    return {"case": "x", "image": image, "mask": mask, "locations": locations, "foreground": True}


@settings(max_examples=80)
@given(shape=triples, size=triples, start=st.tuples(*[st.integers(-12, 12)] * 3))
def test_region_is_what_indexing_gives(
    shape: tuple[int, int, int], size: tuple[int, int, int], start: tuple[int, int, int]
) -> None:
    array = np.arange(1, 2 * math.prod(shape) + 1).reshape(2, *shape)
    found = read_region(array, start, size)
    assert found.shape == (2, *size)
    for index in np.ndindex(*size):
        place = tuple(i + s for i, s in zip(index, start, strict=True))
        inside = all(0 <= p < n for p, n in zip(place, shape, strict=True))
        expected = array[(slice(None), *place)] if inside else [0, 0]
        assert list(found[(slice(None), *index)]) == list(expected)


def test_region_is_a_copy_of_the_same_type() -> None:
    array = np.ones((1, 4, 4, 4), np.int32)
    found = read_region(array, (0, 0, 0), (2, 2, 2))
    found[:] = 5
    assert array.max() == 1
    assert found.dtype == np.int32


@given(shape=triples, size=triples, place=triples)
def test_patch_holds_its_centre_and_lies_inside_or_around_the_image(
    shape: tuple[int, int, int], size: tuple[int, int, int], place: tuple[int, int, int]
) -> None:
    centre = tuple(p % n for p, n in zip(place, shape, strict=True))
    for start, n, s, c in zip(patch_start(centre, size, shape), size, shape, centre, strict=True):
        assert start <= c < start + n
        if s >= n:
            assert 0 <= start <= s - n
        else:
            assert s - n <= start <= 0


@pytest.mark.parametrize("shape", [(30, 30, 30), (12, 10, 8), (5, 40, 9), (3, 3, 3)])
def test_foreground_lies_in_the_patch_itself(shape: tuple[int, int, int]) -> None:
    """Labels in the very corner of an image are learnt too, not only where regions have room for margins."""
    sample = SamplePatch((8, 8, 6))
    for seed in range(20):
        sample.set_random_state(seed=seed)
        assert (sample(opened(shape))["mask"] > 0).any()


def test_patch_of_a_large_image_lies_inside() -> None:
    sample = SamplePatch((4, 4, 2))
    for seed in range(10):
        data = {**opened(), "foreground": False}
        sample.set_random_state(seed=seed)
        patch = sample(data)["image"].as_tensor().numpy()
        start = patch_start(sample.centre, (4, 4, 2), (12, 10, 8))
        assert np.array_equal(patch, read_region(data["image"], start, (4, 4, 2)))
        assert (patch > 0).all(), "a patch of a large image has no voxel outside of it"


@settings(max_examples=80, deadline=None)
@given(shape=triples, size=triples, margin=st.tuples(*[st.integers(0, 9)] * 3), place=triples)
def test_region_with_a_margin_reads_as_the_image_between_zeros(
    shape: tuple[int, int, int], size: tuple[int, int, int], margin: tuple[int, int, int], place: tuple[int, int, int]
) -> None:
    """Every voxel within the margin is found, those beyond the region at its border, which is 0 there."""
    array = np.arange(1, math.prod(shape) + 1).reshape(1, *shape)
    centre = tuple(p % n for p, n in zip(place, shape, strict=True))
    start = patch_start(centre, size, shape)  # type: ignore[arg-type]
    region, middle = read_through(array, start, size, margin)
    assert all(n <= s + 2 for n, s in zip(region.shape[1:], shape, strict=True)) or margin == (0, 0, 0)
    outer = tuple(n + 2 * m for n, m in zip(size, margin, strict=True))
    expected = read_region(array, tuple(s - m for s, m in zip(start, margin, strict=True)), outer)  # type: ignore[arg-type]
    where = []
    for c, n, m, whole in zip(middle, size, margin, region.shape[1:], strict=True):
        where.append(np.clip(np.arange(-m, n + m) + round(c - (n - 1) / 2), 0, whole - 1))
    assert np.array_equal(region[0][np.ix_(*where)], expected[0])


def test_image_smaller_than_the_patch_is_whole_in_it() -> None:
    data = opened((3, 4, 2))
    sample = SamplePatch((8, 8, 8))
    sample.set_random_state(seed=1)
    patch = sample(data)["image"].as_tensor().numpy()
    assert sorted(patch[patch > 0]) == list(range(1, 25))


def test_labels_are_drawn_equally_often_whatever_their_size() -> None:
    data = opened()
    data["locations"] = np.array([(0, 1, 1, 1)] * 500 + [(1, 10, 8, 6)] * 3, np.int32)
    sample = SamplePatch((1, 1, 1))
    sample.set_random_state(seed=0)
    counts: Counter[int] = Counter()
    for _ in range(1000):
        sample.randomize(data)
        counts[sample.centre[0]] += 1
    assert set(counts) == {1, 10}
    assert abs(counts[1] - 500) < 70  # more than four standard deviations


def test_every_voxel_may_be_the_centre() -> None:
    data = {**opened((3, 2, 2)), "foreground": False}
    sample = SamplePatch((1, 1, 1))
    sample.set_random_state(seed=0)
    found = {float(sample(data)["image"]) for _ in range(300)}
    assert found == set(range(1, 13))


def test_a_case_without_foreground_is_sampled_anywhere() -> None:
    sample = SamplePatch((4, 4, 4))
    sample.set_random_state(seed=0)
    assert sample(opened(labels=()))["image"].shape == (1, 4, 4, 4)


def test_same_random_state_same_region_in_a_compose_of_monai() -> None:
    path = Compose([SamplePatch((4, 4, 4)), RandFlipd(["image", "mask"], prob=0.5, spatial_axis=0)])
    data = {**opened(), "foreground": False}

    def run(seed: int) -> list[np.ndarray[Any, Any]]:
        path.set_random_state(seed=seed)
        return [path(data)["image"].as_tensor().numpy() for _ in range(4)]

    first, again, other = run(3), run(3), run(4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert not all(np.array_equal(first[0], b) for b in first[1:])


def test_a_seed_is_that_of_numpy_and_leaves_a_given_state_alone() -> None:
    """Numbers of the first version, which made a RandomState for each seed."""
    sample = SamplePatch((4, 4, 4))
    for seed in (0, 7, 2**31, 7):
        numbers = sample.set_random_state(seed=seed).R.randint(10**6, size=5)
        assert np.array_equal(numbers, np.random.RandomState(seed).randint(10**6, size=5))
    state = np.random.RandomState(3)
    sample.set_random_state(state=state)
    assert sample.R is state
    sample.set_random_state(seed=1)
    assert np.array_equal(state.randint(99, size=5), np.random.RandomState(3).randint(99, size=5))


@settings(max_examples=50)
@given(cases=st.integers(1, 12), batch=st.integers(1, 7), share=st.integers(0, 100), seed=st.integers(0, 2**31))
def test_cases_take_turns_and_the_foreground_share_is_kept(cases: int, batch: int, share: int, seed: int) -> None:
    steps = [
        draws(seed=seed, step=step, batch_size=batch, cases=cases, foreground_share=share / 100)
        for step in range(cases * 2)
    ]
    rows = [row for step in steps for row in step]
    # batch * 2 * cases places: every case exactly 2 * batch times, and once in every round.
    assert set(Counter(row.case_index for row in rows).values()) == {2 * batch}
    for begin in range(0, len(rows), cases):
        assert {row.case_index for row in rows[begin : begin + cases]} == set(range(cases))
    for step in steps:
        forced = [row.foreground for row in step]
        assert sum(forced) == -(-share * batch // 100)
        assert forced == sorted(forced, reverse=True)


@settings(max_examples=50)
@given(
    cases=st.integers(1, 12),
    batch=st.integers(1, 7),
    steps=st.integers(0, 20),
    share=st.integers(0, 100),
    seed=st.integers(0, 2**31),
)
def test_the_tally_is_the_count_of_what_was_drawn(cases: int, batch: int, steps: int, share: int, seed: int) -> None:
    options = {"seed": seed, "batch_size": batch, "cases": cases, "foreground_share": share / 100}
    rows = [row for step in range(steps) for row in draws(step=step, **options)]
    total, forced = tally(steps=steps, **options)
    assert total.tolist() == [sum(row.case_index == case for row in rows) for case in range(cases)]
    assert forced.tolist() == [sum(row.case_index == case and row.foreground for row in rows) for case in range(cases)]


def test_what_a_step_draws_is_what_it_always_drew() -> None:
    """Numbers of the first version: a checkpoint of then goes on to the same bits."""
    rows = draws(seed=3, step=7, batch_size=4, cases=5, foreground_share=0.5)
    assert [(row.case_index, row.foreground, row.seed) for row in rows] == [
        (0, True, 1895587293),
        (2, True, 1044953080),
        (1, False, 2023729869),
        (3, False, 1990822229),
    ]


def test_share_that_is_a_whole_number_is_not_rounded_up() -> None:
    rows = draws(seed=0, step=0, batch_size=10, cases=3, foreground_share=0.1 + 0.2)
    assert sum(row.foreground for row in rows) == 3


def test_draws_are_a_pure_function_of_the_step() -> None:
    def at(step: int, seed: int = 1) -> list[Draw]:
        return draws(seed=seed, step=step, batch_size=4, cases=5, foreground_share=0.5)

    forward = [at(step) for step in range(6)]
    assert [at(step) for step in reversed(range(6))] == forward[::-1]
    seeds = [row.seed for step in forward for row in step]
    assert len(set(seeds)) == len(seeds)
    assert [at(step, seed=2) for step in range(6)] != forward
