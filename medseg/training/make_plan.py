"""The plan of a training: the planner's, from step times measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from medseg.errors import PlanError
from medseg.planning.budget import learning_seconds, refuse_small_budget
from medseg.planning.coarsening import coarsening
from medseg.planning.fingerprint import Fingerprint
from medseg.planning.limits import refuse_large_patch
from medseg.planning.plan import Measured, Plan, override
from medseg.planning.planner import DEFAULT_NETWORK, Draft, decide, draft
from medseg.spec import Dataset, Spec
from medseg.training.assume import REASONS, assumed
from medseg.training.calibrate import as_network, measure
from medseg.training.request import Request

CALIBRATION_SHARE = 0.03
"""Largest share of a budget that is spent on measuring step times."""


def make_plan(
    dataset: Dataset, fingerprint: Fingerprint, request: Request, device: torch.device
) -> tuple[Plan, dict[str, str]]:
    """Measure step times here and plan for a request; returns the plan and the reason of each value."""
    spec = dataset.spec
    folds = 1 if request.fold is not None else (request.folds or 1)
    learning = learning_seconds(request.budget, folds) if request.budget else None
    dimensions, settings = _forced(request.settings, "dimensions")
    if dimensions not in (None, "2", "3"):
        raise PlanError(f"--set dimensions={dimensions}: 2 or 3 are allowed")
    named, settings = _forced(settings, "network.name")
    network = request.network or named or DEFAULT_NETWORK
    forced: Any = None if dimensions is None else int(dimensions)
    sketch = draft(spec, fingerprint, device=device.type, dimensions=forced)
    measuring = _Measuring(spec, device, network, request.budget, learning, assume=request.deterministic)
    sketch, measured = measuring(sketch)
    fastest = min(measured.step_seconds.values())
    if request.budget:
        refuse_small_budget(request.budget, folds, fastest)
    choice = coarsening(spec, fingerprint, sketch, fastest, learning)
    if choice.factor > 1:
        coarse = draft(
            spec,
            fingerprint,
            device=device.type,
            coarser=choice.factor,
            because=choice.reason,
            dimensions=forced,
        )
        sketch, measured = measuring(coarse)
    steps = request.steps
    if steps is None and request.epochs is not None:
        steps = max(1, request.epochs * fingerprint.cases // sketch.batch_size)
    plan, reasons = decide(
        spec,
        fingerprint,
        sketch,
        measured,
        budget_seconds=request.budget,
        training_seconds=learning,
        steps=steps,
        seed=request.seed,
    )
    if choice.factor == 1:
        reasons["spacing"] += f" Not coarser: {choice.reason}."
    plan = plan.model_copy(update={"network": as_network(network, plan.network)})
    plan = override(plan, settings)
    refuse_large_patch(plan)
    return plan, reasons | (REASONS if request.deterministic else {})


@dataclass(frozen=True)
class _Measuring:
    """Measures a draft, with as many patches a step as the memory holds; `assume`: takes its times as given."""

    spec: Spec
    device: torch.device
    network: str
    budget: float | None
    learning: float | None
    assume: bool

    def __call__(self, sketch: Draft) -> tuple[Draft, Measured]:
        if self.assume:
            return sketch, assumed(sketch, self.device)
        longest = max(3.0, CALIBRATION_SHARE * self.budget) if self.budget else 20.0
        while True:
            measured = measure(
                self.spec,
                sketch,
                self.device,
                longest=longest,
                network=self.network,
                training_seconds=self.learning,
            )
            if measured.step_seconds:
                return sketch, measured
            if sketch.batch_size == 1:
                raise PlanError(
                    f"out of memory: this machine has none left for one patch of {sketch.patch_size} voxels and the "
                    "smallest network; end other programs, or give a plan with a smaller patch_size (--plan)",
                    code="OUT_OF_MEMORY",
                )
            half = sketch.batch_size // 2
            why = f"{sketch.reasons['batch_size']} Of {sketch.batch_size} the memory holds only {half}."
            sketch = replace(sketch, batch_size=half, reasons={**sketch.reasons, "batch_size": why})


def _forced(settings: tuple[str, ...], key: str) -> tuple[str | None, tuple[str, ...]]:
    """Take ``KEY=VALUE`` out of the settings: what the planner decides depends on it."""
    rows = [setting.partition("=") for setting in settings]
    chosen = [value.strip() for name, _, value in rows if name.strip() == key]
    rest = tuple(setting for setting, row in zip(settings, rows, strict=True) if row[0].strip() != key)
    return (chosen[-1] if chosen else None), rest
