"""From a fingerprint to a plan: what must hold for any dataset, and hand-checked ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medseg.errors import PlanError
from medseg.planning.fingerprint import Fingerprint
from medseg.planning.plan import Measured, Plan
from medseg.planning.planner import (
    ENOUGH_STEPS,
    MAX_STAGES,
    PATCH_VOXELS,
    WIDTHS,
    Draft,
    decide,
    draft,
    worth_measuring,
)
from medseg.spec import Spec

Make = Callable[..., Any]
shapes = st.tuples(*[st.integers(1, 400)] * 3)
spacings = st.tuples(*[st.floats(0.05, 8).map(lambda x: round(x, 3))] * 3)
devices = st.sampled_from(["cpu", "cuda"])


def measured(seconds: float = 0.1, *, widths: tuple[str, ...] = tuple(WIDTHS), bf16: float = 1.0) -> Measured:
    """Step times: each width costs twice as much as the one before; bf16 costs `bf16` times fp32."""
    rows = {}
    for number, width in enumerate(widths):
        rows[f"{width} fp32"] = seconds * 2**number
        rows[f"{width} bf16"] = seconds * 2**number * bf16
    return Measured(device="cpu", threads=2, step_seconds=rows)


def plan_for(spec: Spec, fingerprint: Fingerprint, **options: Any) -> tuple[Plan, dict[str, str]]:
    sketch = draft(spec, fingerprint, device="cpu")
    values = {"budget_seconds": None, "training_seconds": None, "steps": 100, "seed": 0, **options}
    return decide(spec, fingerprint, sketch, values.pop("times", measured()), **values)


def total_stride(sketch: Draft) -> list[int]:
    return [math.prod(s[a] for s in sketch.strides) for a in range(sketch.dimensions)]


@settings(deadline=None, max_examples=150)
@given(shape=shapes, spacing=spacings, device=devices, dimensions=st.sampled_from([None, 2, 3]))
def test_every_draft_can_be_learnt_from(
    make_spec: Make, make_fingerprint: Make, shape: Any, spacing: Any, device: str, dimensions: Any
) -> None:
    fingerprint = make_fingerprint(shape, spacing)
    try:
        sketch = draft(make_spec(), fingerprint, device=device, dimensions=dimensions)
    except PlanError:
        assert max(shape) * max(spacing) / min(spacing) < 16 or sorted(shape)[1] < 8
        return
    multiple = total_stride(sketch)
    assert all(n % m == 0 for n, m in zip(sketch.patch_size, multiple, strict=False))
    assert sketch.dimensions == 3 or sketch.patch_size[2] == 1
    # At the coarsest stage there is something left to convolve.
    assert max(n // m for n, m in zip(sketch.patch_size, multiple, strict=False)) >= 2
    assert 1 <= len(sketch.strides) <= MAX_STAGES - 1
    assert len(sketch.kernels) == len(sketch.strides) + 1
    for row in (*sketch.strides, *sketch.kernels):
        assert len(row) == sketch.dimensions
    assert all(max(s) == 2 and min(s) >= 1 for s in sketch.strides)
    assert all(set(k) <= {1, 3} and 3 in k for k in sketch.kernels)
    # An axis that was convolved along once is convolved along at all coarser stages.
    for fine, coarse in zip(sketch.kernels, sketch.kernels[1:], strict=False):
        assert all(b >= a for a, b in zip(fine, coarse, strict=True))
    assert 2 <= sketch.batch_size <= 32
    assert sorted(sketch.orientation.translate(str.maketrans("RAS", "012"))) == ["0", "1", "2"]
    assert {len(row) for row in sketch.widths.values()} == {len(sketch.strides) + 1}
    smallest = all(n <= 2 * m for n, m in zip(sketch.patch_size, (*multiple, 1), strict=False))
    assert math.prod(sketch.patch_size) <= PATCH_VOXELS[(device, sketch.dimensions)] or smallest
    assert all(sketch.reasons[key] for key in ("dimensions", "orientation", "spacing", "patch_size", "batch_size"))


@settings(deadline=None, max_examples=30)
@given(shape=shapes, spacing=spacings)
def test_planning_is_a_pure_function(make_spec: Make, make_fingerprint: Make, shape: Any, spacing: Any) -> None:
    assume(sorted(shape)[1] >= 8)
    spec, fingerprint = make_spec(), make_fingerprint(shape, spacing)
    assert plan_for(spec, fingerprint) == plan_for(spec, fingerprint)


@settings(deadline=None, max_examples=8)
@given(shape=shapes, spacing=spacings)
def test_a_draft_makes_a_network_that_runs_on_its_patch(
    make_spec: Make, make_fingerprint: Make, shape: Any, spacing: Any
) -> None:
    import torch

    from medseg.networks import build_network

    assume(sorted(shape)[1] >= 8)
    sketch = draft(make_spec(), make_fingerprint(shape, spacing), device="cpu")
    network = sketch.network("narrow")
    options = {**network.options, "features": [2] * len(network.options["features"]), "convolutions": 1}
    size = sketch.patch_size[: sketch.dimensions]
    with torch.device("meta"):  # shapes without numbers
        built = build_network("unet", spatial_dims=sketch.dimensions, in_channels=1, out_channels=2, options=options)
        assert built(torch.zeros(1, 1, *size)).shape == (1, 2, *size)
    assert list(built.divisor) == total_stride(sketch)


def test_hippocampus_by_hand(make_spec: Make, make_fingerprint: Make) -> None:
    sketch = draft(make_spec(), make_fingerprint((36, 50, 35), cases=200), device="cpu")
    assert sketch.dimensions == 3
    assert sketch.orientation == "RAS"
    assert sketch.spacing == (1, 1, 1)
    assert sketch.patch_size == (40, 56, 40)
    assert sketch.strides == ((2, 2, 2),) * 3
    assert sketch.kernels == ((3, 3, 3),) * 4
    assert sketch.batch_size == 2


def test_thick_slices_are_joined_late(make_spec: Make, make_fingerprint: Make) -> None:
    """5 mm slices of 1 mm pixels: in-plane convolutions until the voxels are about cubes."""
    sketch = draft(make_spec(), make_fingerprint((160, 160, 24), (1.0, 1.0, 5.0)), device="cuda")
    assert sketch.kernels[:3] == ((3, 3, 1), (3, 3, 1), (3, 3, 3))
    assert sketch.strides[:3] == ((2, 2, 1), (2, 2, 1), (2, 2, 2))


def test_a_flat_stack_is_still_halved_in_its_planes(make_spec: Make, make_fingerprint: Make) -> None:
    """The axis of 8 voxels is used up after one stage; the others must go on, with kernels along them."""
    sketch = draft(make_spec(), make_fingerprint((128, 128, 8)), device="cuda")
    assert sketch.dimensions == 3
    assert len(sketch.strides) == 5
    assert sketch.strides[0] == (2, 2, 2)
    assert sketch.strides[1:] == ((2, 2, 1),) * 4
    assert set(sketch.kernels) == {(3, 3, 3)}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (1, 1, 4), (4, 1, 1), (1, 3, 1)])
def test_few_slices_make_a_2d_plan_with_the_slices_last(
    make_spec: Make, make_fingerprint: Make, axis: int, spacing: tuple[float, float, float]
) -> None:
    shape = [64, 64, 64]
    shape[axis] = 5
    sketch = draft(make_spec(), make_fingerprint(tuple(shape), spacing), device="cpu")
    assert sketch.dimensions == 2
    assert sketch.orientation[2] == "RAS"[axis]
    assert sketch.patch_size[2] == 1
    assert sketch.spacing[2] == spacing[axis]
    assert len(sketch.strides[0]) == 2
    assert "5 slice(s)" in sketch.reasons["dimensions"]


def test_pictures_are_2d_whatever_their_depth(make_spec: Make, make_fingerprint: Make) -> None:
    spec = make_spec(unit="pixel")
    assert draft(spec, make_fingerprint((512, 512, 1)), device="cpu").orientation == "RAS"
    assert draft(spec, make_fingerprint((512, 512, 30)), device="cpu").dimensions == 2


def test_2d_asked_for_slices_along_the_coarsest_axis(make_spec: Make, make_fingerprint: Make) -> None:
    sketch = draft(make_spec(), make_fingerprint((60, 60, 60), (3.0, 1.0, 1.0)), device="cpu", dimensions=2)
    assert sketch.orientation == "ASR"
    assert sketch.reasons["dimensions"] == "asked for"


def test_microscopes_have_small_voxels(make_spec: Make, make_fingerprint: Make) -> None:
    """4 nm in millimetres must not be rounded to nothing."""
    spec, fingerprint = make_spec(), make_fingerprint((64, 64, 64), (4e-6, 4e-6, 5e-5))
    sketch = draft(spec, fingerprint, device="cpu", dimensions=2)
    assert sketch.spacing == (4e-6, 4e-6, 5e-5)
    assert sketch.orientation == "RAS"
    assert plan_for(spec, fingerprint)[0].spacing[0] == 4e-6


def test_spacing_of_the_spec_is_kept(make_spec: Make, make_fingerprint: Make) -> None:
    spec = make_spec(spacing=(2.0, 1.0, 3.0))
    fingerprint = make_fingerprint((60, 60, 60))
    assert draft(spec, fingerprint, device="cpu", coarser=3.0).spacing == (2, 1, 3)


def test_far_coarser_axis_follows_its_finer_cases(make_spec: Make, make_fingerprint: Make) -> None:
    base = make_fingerprint((160, 160, 30), (1.0, 1.0, 6.0))
    spacings = ((1.0, 1.0, 2.0), (1.0, 1.0, 4.0), (1.0, 1.0, 6.0), (1.0, 1.0, 6.0), (1.0, 1.0, 6.0))
    fingerprint = base.model_copy(update={"spacings": spacings})
    assert draft(make_spec(), fingerprint, device="cpu").spacing == (1, 1, 4)


@given(coarser=st.floats(1, 4), spacing=spacings)
@settings(deadline=None, max_examples=40)
def test_coarser_only_ever_makes_voxels_larger(
    make_spec: Make, make_fingerprint: Make, coarser: float, spacing: Any
) -> None:
    fingerprint = make_fingerprint((200, 200, 200), spacing)
    fine = draft(make_spec(), fingerprint, device="cpu")
    rough = draft(make_spec(), fingerprint, device="cpu", coarser=coarser, because="the budget is small")
    assert all(b >= a for a, b in zip(fine.spacing, rough.spacing, strict=True))
    assert rough.voxels <= fine.voxels * (1 + 1e-9)
    assert ("budget" in rough.reasons["spacing"]) == (coarser > 1)


def test_only_widths_that_could_be_chosen_are_worth_measuring() -> None:
    wide = list(WIDTHS)[1]
    assert not worth_measuring(wide, 0.1, None), "by steps the narrowest is taken"
    assert not worth_measuring(wide, 0.1, 0.1 * ENOUGH_STEPS[wide] - 1)
    assert worth_measuring(wide, 0.1, 0.1 * ENOUGH_STEPS[wide])


def test_channels_are_normalised_by_their_kind(make_spec: Make, make_fingerprint: Make) -> None:
    channels = {"ct": {"modality": "CT"}, "pet": {"modality": "PT"}, "raw": {"normalisation": "none"}}
    spec = make_spec().model_copy(
        update={"channels": Spec.model_validate({"name": "x", "labels": {"a": 1}, "channels": channels}).channels}
    )
    plan, _ = plan_for(spec, make_fingerprint(channels=tuple(channels)))
    rows = plan.normalisation
    assert list(rows) == ["ct", "pet", "raw"]
    assert (rows["ct"].scheme, rows["ct"].low, rows["ct"].high) == ("ct", -100, 300)
    assert (rows["ct"].mean, rows["ct"].deviation) == (50, 80)
    assert rows["pet"].scheme == "zscore"
    assert rows["raw"].scheme == "none"


@pytest.mark.parametrize(
    "name", ["kidney_left", "Left-Kidney", "lung left", "LeftLung", "hippocampus_L", "ctx-lh-cuneus", "RIGHT_EYE"]
)
@pytest.mark.parametrize("shape", [(40, 40, 40), (5, 40, 40), (40, 40, 5)])
def test_sides_that_are_told_apart_are_never_swapped(
    make_spec: Make, make_fingerprint: Make, name: str, shape: tuple[int, int, int]
) -> None:
    plan, reasons = plan_for(make_spec(labels={name: 1, "x": 2}), make_fingerprint(shape, labels=(name, "x")))
    assert all(plan.orientation[axis] not in "RL" for axis in plan.augmentation.mirror_axes)
    assert "left and right" in reasons["augmentation"]


@pytest.mark.parametrize("name", ["liver", "bright_spot", "cleft", "Leftover", "all", "R2"])
def test_other_names_tell_no_sides(make_spec: Make, make_fingerprint: Make, name: str) -> None:
    plan, reasons = plan_for(make_spec(labels={name: 1}), make_fingerprint(labels=(name,)))
    if name == "R2":  # cannot be told from a side: rather not mirrored
        assert "left and right" in reasons["augmentation"]
    else:
        assert [plan.orientation[axis] for axis in plan.augmentation.mirror_axes] == ["R"]


def test_the_widest_network_that_gets_enough_steps(make_spec: Make, make_fingerprint: Make) -> None:
    spec, fingerprint = make_spec(), make_fingerprint()
    names = list(WIDTHS)
    for number, name in enumerate(names):
        seconds = 0.1 * 2**number * ENOUGH_STEPS[name] + 10
        plan, reasons = plan_for(spec, fingerprint, training_seconds=seconds, steps=None, budget_seconds=seconds)
        assert repr(name) in reasons["network"]
        assert plan.network.options["features"] == list(WIDTHS[name][: len(plan.network.options["features"])])
        assert plan.steps == int(seconds / (0.1 * 2**number))


def test_the_fastest_precision(make_spec: Make, make_fingerprint: Make) -> None:
    spec, fingerprint = make_spec(), make_fingerprint()
    assert plan_for(spec, fingerprint, times=measured(bf16=0.5))[0].precision == "bf16"
    assert plan_for(spec, fingerprint, times=measured(bf16=1.5))[0].precision == "fp32"


def test_a_width_that_was_not_measured_is_not_chosen(make_spec: Make, make_fingerprint: Make) -> None:
    times = measured(widths=("narrow",))
    plan, _ = plan_for(make_spec(), make_fingerprint(), times=times, training_seconds=1e6, steps=None)
    assert plan.network.options["features"][0] == WIDTHS["narrow"][0]


def test_budgets_that_teach_nothing(make_spec: Make, make_fingerprint: Make) -> None:
    spec, fingerprint = make_spec(), make_fingerprint()
    with pytest.raises(PlanError, match=r"leaves 0 s to learn and one step takes 0\.1 s here; give a larger --budget"):
        plan_for(spec, fingerprint, training_seconds=0.05, steps=None)
    with pytest.raises(PlanError, match="0 steps teach nothing"):
        plan_for(spec, fingerprint, steps=0)
    with pytest.raises(PlanError, match="no step time was measured"):
        plan_for(spec, fingerprint, times=Measured(device="cpu", threads=1, step_seconds={}))


def test_every_decision_has_a_reason(make_spec: Make, make_fingerprint: Make) -> None:
    plan, reasons = plan_for(make_spec(), make_fingerprint())
    assert set(reasons) <= set(Plan.model_fields)
    assert {"spacing", "patch_size", "network", "augmentation", "steps", "test_mirroring"} <= set(reasons)
    assert reasons["steps"].startswith("Asked for; every voxel of the dataset is seen about ")
    assert plan.steps == 100
    by_clock = plan_for(make_spec(), make_fingerprint(), budget_seconds=70.0, training_seconds=60.0, steps=None)
    assert by_clock[0].steps == 600
    words = by_clock[1]["steps"]
    assert "of 70s, about 60s are left for the training of a network, at 0.100 s a step (measured)" in words
    assert "The clock decides" in words


@pytest.mark.parametrize("steps", [1, 10, 400, 100_000])
def test_the_average_reaches_over_a_part_of_the_run(make_spec: Make, make_fingerprint: Make, steps: int) -> None:
    averaging = plan_for(make_spec(), make_fingerprint(), steps=steps)[0].averaging
    assert 1 / (1 - averaging) == pytest.approx(max(10, 0.03 * steps), rel=0.01)


def test_every_value_of_a_plan_has_its_reason(make_spec: Make, make_fingerprint: Make) -> None:
    plan, reasons = plan_for(make_spec(), make_fingerprint())
    assert set(plan.model_dump()) == set(reasons)
    assert all(reasons.values())
