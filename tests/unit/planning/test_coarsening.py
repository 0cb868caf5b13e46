"""Coarser voxels: for large things in volumes under small budgets, never for pictures, never at the cost of detail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.planning.coarsening import (
    ENOUGH_PASSES,
    MAX_FACTOR,
    MIN_THICKNESS,
    Coarsening,
    coarsening,
    diameter,
    seen_passes,
)
from medseg.planning.planner import Draft, draft

Make = Callable[..., Any]


def ball_ml(mm: float) -> float:
    return math.pi / 6 * mm**3 / 1000


@pytest.fixture
def ct(make_spec: Make, make_fingerprint: Make) -> Callable[..., tuple[Any, Any, Draft]]:
    """A CT of 0.8 mm with one label of a diameter (a ball's volume) and a thickness in mm."""

    def make(across: float = 140.0, thick: float = 30.0, **changes: Any) -> tuple[Any, Any, Draft]:
        spec = make_spec(labels={"organ": 1}, **changes)
        base = make_fingerprint((400, 400, 300), (0.8, 0.8, 0.8), cases=40)
        told = {"label_ml": {"organ": ball_ml(across)}, "label_thickness": {"organ": thick}}
        fingerprint = base.model_copy(update=told)
        return spec, fingerprint, draft(spec, fingerprint, device="cpu")

    return make


def seconds_for(sketch: Draft, passes: float) -> float:
    return passes * sketch.voxels / sketch.batch_size / math.prod(sketch.patch_size)


def test_a_large_organ_in_a_short_time_is_seen_coarser(ct: Make) -> None:
    spec, fingerprint, sketch = ct()
    seconds = seconds_for(sketch, ENOUGH_PASSES / 8)
    assert seen_passes(sketch, 1.0, seconds) == pytest.approx(ENOUGH_PASSES / 8)
    found = coarsening(spec, fingerprint, sketch, 1.0, seconds)
    assert found.factor == pytest.approx(2)
    for words in ("1.2 times only", "largest label (140 mm)", "`spacing` in the dataset spec", "measures 19 voxels"):
        assert words in found.reason
    assert coarsening(spec, fingerprint, sketch, 1.0, seconds / 1e6).factor == pytest.approx(
        140 / (math.prod(sketch.patch_size) ** (1 / 3) * 0.8)
    ), "no coarser than the field of view asks for"


def test_a_budget_that_sees_enough_touches_nothing(ct: Make) -> None:
    spec, fingerprint, sketch = ct()
    found = coarsening(spec, fingerprint, sketch, 1.0, seconds_for(sketch, ENOUGH_PASSES))
    assert found == Coarsening(1.0, "the budget sees every voxel 10 times")


def test_a_patch_that_holds_the_label_is_enough(ct: Make) -> None:
    spec, fingerprint, sketch = ct(across=40.0)
    found = coarsening(spec, fingerprint, sketch, 1.0, 1.0)
    assert found.factor == 1
    assert "holds the largest label (40 mm) as it is" in found.reason


@pytest.mark.parametrize(("thick", "factor"), [(2.4, 1.0), (2.0, 1.0), (4.8, 2.0), (0.5, 1.0)])
def test_thin_labels_are_never_lost(ct: Make, thick: float, factor: float) -> None:
    spec, fingerprint, sketch = ct(thick=thick)
    found = coarsening(spec, fingerprint, sketch, 1.0, 1.0)
    assert found.factor == pytest.approx(factor)
    if factor == 1:
        assert f"lose the thinnest label (about {thick:g} mm across)" in found.reason


def test_without_a_thickness_nothing_is_lost_either(ct: Make) -> None:
    spec, fingerprint, sketch = ct()
    unknown = fingerprint.model_copy(update={"label_thickness": {}})
    assert coarsening(spec, unknown, sketch, 1.0, 1.0).factor == 1


@pytest.mark.parametrize("shape", [(512, 512, 1), (4096, 4096, 30)])
def test_pictures_keep_their_resolution(make_spec: Make, make_fingerprint: Make, shape: Any) -> None:
    spec = make_spec(unit="pixel")
    fingerprint = make_fingerprint(shape).model_copy(
        update={"label_ml": {"organ": 1e6}, "label_thickness": {"organ": 100.0}}
    )
    found = coarsening(spec, fingerprint, draft(spec, fingerprint, device="cpu"), 1.0, 1.0)
    assert found.factor == 1
    assert "pictures keep their resolution" in found.reason


def test_slices_keep_their_resolution(ct: Make) -> None:
    spec, fingerprint, _ = ct()
    sketch = draft(spec, fingerprint, device="cpu", dimensions=2)
    assert "slices keep their resolution" in coarsening(spec, fingerprint, sketch, 1.0, 1.0).reason


def test_a_run_by_steps_and_a_spacing_of_the_spec_are_kept(ct: Make) -> None:
    spec, fingerprint, sketch = ct()
    assert coarsening(spec, fingerprint, sketch, 1.0, None).factor == 1
    told = ct(spacing=(1.0, 1.0, 1.0))
    assert "set in the dataset spec" in coarsening(*told, 1.0, 1.0).reason


@given(
    across=st.floats(1, 400),
    thick=st.floats(0.01, 100),
    step=st.floats(1e-4, 100),
    seconds=st.floats(0.1, 1e6),
)
@settings(deadline=None, max_examples=60)
def test_whatever_the_label_it_is_never_made_thin(
    make_spec: Make, make_fingerprint: Make, across: float, thick: float, step: float, seconds: float
) -> None:
    base = make_fingerprint((300, 300, 200), (1.0, 1.0, 1.5))
    told = {"label_ml": {"organ": ball_ml(across)}, "label_thickness": {"organ": thick}}
    fingerprint = base.model_copy(update=told)
    spec = make_spec()
    sketch = draft(spec, fingerprint, device="cpu")
    found = coarsening(spec, fingerprint, sketch, step, seconds)
    assert 1 <= found.factor <= MAX_FACTOR
    assert found.factor == 1 or thick / found.factor >= MIN_THICKNESS * (1 - 1e-9)
    assert found == coarsening(spec, fingerprint, sketch, step, seconds)


def test_a_slower_machine_never_gets_finer_voxels(ct: Make) -> None:
    spec, fingerprint, sketch = ct()
    seconds = seconds_for(sketch, 4)
    factors = [coarsening(spec, fingerprint, sketch, step, seconds).factor for step in (0.1, 0.5, 1, 2, 4, 8)]
    assert factors == sorted(factors)


def test_a_ball_by_hand() -> None:
    assert diameter(4.18879) == pytest.approx(20, rel=1e-5)
    assert diameter(0) == 0
