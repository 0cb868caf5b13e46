"""The plan of a training: the planner's, from step times measured on this machine."""

from __future__ import annotations

from typing import Any

import torch

from medseg.errors import PlanError
from medseg.planning.fingerprint import Fingerprint
from medseg.planning.plan import Plan, override
from medseg.planning.planner import DEFAULT_NETWORK, decide, draft, needed_coarseness
from medseg.spec import Dataset
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
    learning = request.budget * 0.9 / folds if request.budget else None
    dimensions, settings = _forced(request.settings, "dimensions")
    if dimensions not in (None, "2", "3"):
        raise PlanError(f"--set dimensions={dimensions}: 2 or 3 are allowed")
    named, settings = _forced(settings, "network.name")
    network = request.network or named or DEFAULT_NETWORK
    forced: Any = None if dimensions is None else int(dimensions)
    sketch = draft(spec, fingerprint, device=device.type, dimensions=forced)
    longest = max(5.0, CALIBRATION_SHARE * request.budget) if request.budget else 20.0
    measured = measure(spec, sketch, device, longest=longest, network=network)
    if learning is not None:
        factor = needed_coarseness(sketch, min(measured.step_seconds.values()), learning)
        if factor > 1.05:
            sketch = draft(spec, fingerprint, device=device.type, coarser=factor, dimensions=forced)
            measured = measure(spec, sketch, device, longest=longest, network=network)
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
    plan = plan.model_copy(update={"network": as_network(network, plan.network)})
    return override(plan, settings), reasons


def _forced(settings: tuple[str, ...], key: str) -> tuple[str | None, tuple[str, ...]]:
    """Take ``KEY=VALUE`` out of the settings: what the planner decides depends on it."""
    rows = [setting.partition("=") for setting in settings]
    chosen = [value.strip() for name, _, value in rows if name.strip() == key]
    rest = tuple(setting for setting, row in zip(settings, rows, strict=True) if row[0].strip() != key)
    return (chosen[-1] if chosen else None), rest
