"""The plan of a fine-tuning: what the weights fix is the model's, the rest follows from these data and this machine."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch

from medseg.bundle import Bundle
from medseg.errors import PlanError
from medseg.joined import dataset_of
from medseg.planning.budget import LEAST_STEPS, duration, enough, learning_seconds
from medseg.planning.fingerprint import Fingerprint
from medseg.planning.plan import Measured, NetworkPlan, Plan, Triple, override
from medseg.planning.planner import BATCH_VOXELS, PATCH_VOXELS, Draft, draft, names_sides, shortened
from medseg.spec import Dataset, Spec
from medseg.training.assume import REASONS, assumed
from medseg.training.calibrate import measure_network
from medseg.training.folds import repeats
from medseg.training.make_plan import make_plan
from medseg.training.manifest import learning_cases
from medseg.training.request import Request
from medseg.training.start import as_started, channel_places

FINE_TUNING_RATE = 1e-3
"""A fifth of the planner's rate for random weights."""


def plan_training(
    dataset: Dataset, fingerprint: Fingerprint, request: Request, device: torch.device, start: Bundle | None
) -> tuple[Plan, dict[str, str]]:
    """Plan for a request, with or without a model to begin with; returns the plan and the reason of each value.

    Raises
    ------
    PlanError : the budget is too small; what is asked for does not go with the weights.
    """
    if start is None:
        plan, reasons = make_plan(dataset, fingerprint, request, device)
        return plan, reasons | _balance(dataset)
    if request.network not in (None, start.info.plan.network.name):
        raise PlanError(
            f"--network {request.network}: the model given by --from is a {start.info.plan.network.name}, and its "
            "weights fit no other network; leave --network out"
        )
    plan, reasons = _plan_from(start, dataset, fingerprint, request, device)
    return as_started(override(plan, request.settings), dataset.spec, start), reasons | _balance(dataset)


def _balance(dataset: Dataset) -> dict[str, str]:
    """Return why cases of several datasets are drawn as they are; nothing for one dataset."""
    cases = learning_cases(dataset)
    sizes = Counter(map(dataset_of, cases))
    if len(sizes) < 2:
        return {}
    rows = [f"{name} {sizes[name]} (each {times}x in a pass)" for name, times in repeats(cases).items()]
    return {
        "dataset": f"Names in the specs. Cases to learn from: {', '.join(rows)}: the root of how much smaller a "
        "dataset is, so that it neither drowns nor is learnt by heart."
    }


def _plan_from(
    start: Bundle, dataset: Dataset, fingerprint: Fingerprint, request: Request, device: torch.device
) -> tuple[Plan, dict[str, str]]:
    old, spec = start.info.plan, dataset.spec
    patch = patch_size(old, fingerprint, PATCH_VOXELS[(device.type, old.dimensions)], divisor(old))
    batch = max(2, min(32, BATCH_VOXELS[device.type] // math.prod(patch)))
    first = tuple(old.network.options.get("features", (16,)))[:1]
    sketch = draft(spec, fingerprint, device=device.type, dimensions=old.dimensions)
    sketch = replace(sketch, patch_size=patch, batch_size=batch, widths={"given": first})
    batch, measured = _step_times(spec, sketch, old.network, device, assume=request.deterministic)
    name = min(measured.step_seconds, key=lambda key: measured.step_seconds[key])
    steps = _steps(fingerprint, request, batch, measured.step_seconds[name])
    mirror = () if names_sides(spec) else old.augmentation.mirror_axes
    rows, places = list(old.normalisation.values()), channel_places(start.info.spec, spec)
    values = old.model_copy(
        update={
            "dataset": spec.name,
            "normalisation": {name: rows[place] for name, place in zip(spec.channels, places, strict=True)},
            "patch_size": patch,
            "batch_size": batch,
            "loss": "dice_ce",
            "foreground_share": 0.5,
            "augmentation": old.augmentation.model_copy(update={"mirror_axes": mirror}),
            "learning_rate": FINE_TUNING_RATE,
            "weight_decay": 1e-2,
            "warmup": 0.05,
            "averaging": round(1 - 1 / max(10.0, 0.03 * steps), 6),
            "precision": name.split()[-1],
            "steps": steps,
            "validations": 10,
            "test_mirroring": old.test_mirroring and bool(mirror),
            "seed": request.seed,
            "budget_seconds": request.budget,
            "measured": measured,
            "fingerprint": fingerprint,
            "start": None,
        }
    )
    reasons = _reasons(measured, name) | (REASONS if request.deterministic else {})
    return Plan.model_validate(values.model_dump()), reasons


def _step_times(
    spec: Spec, sketch: Draft, network: NetworkPlan, device: torch.device, *, assume: bool
) -> tuple[int, Measured]:
    """Return how many patches the memory holds, of those that are wanted, and the times of a step."""
    if assume:
        return sketch.batch_size, assumed(sketch, device)
    batch = sketch.batch_size
    while batch:
        measured = measure_network(spec, replace(sketch, batch_size=batch), network, device)
        if measured.step_seconds:
            return batch, measured
        batch //= 2
    raise PlanError(
        f"out of memory: this machine has none left for one patch of {sketch.patch_size} voxels and the network of the "
        "model given by --from; end other programs",
        code="OUT_OF_MEMORY",
    )


def divisor(plan: Plan) -> Triple:
    """Return the total stride of a plan's network along I, J, K, by which a patch is best divisible."""
    strides = plan.network.options.get("strides") or []
    return tuple(math.prod(row[a] for row in strides) if a < plan.dimensions else 1 for a in range(3))  # type: ignore[return-value]


def patch_size(old: Plan, fingerprint: Fingerprint, limit: int, multiple: Triple) -> Triple:
    """Return the model's patch, cut to the size of the new cases and to `limit` voxels, in multiples of the stride.

    Along axes named by how images are stored nothing is known of the new cases: there it is cut to the limit only.
    """
    size = list(old.patch_size)
    if not old.stored_axes:
        axes = ["RL", "AP", "SI"]
        for axis, letter in enumerate(old.orientation):
            number = next(n for n, pair in enumerate(axes) if letter in pair)
            extent = fingerprint.median_shape[number] * fingerprint.median_spacing[number]
            # A 2-D plan of nnU-Net's keeps the distance of slices; its patch is one slice thick.
            needed = max(1, math.ceil(extent / old.spacing[axis] / multiple[axis]))
            size[axis] = min(size[axis], needed * multiple[axis])
    return shortened(size, multiple, limit)


def _steps(fingerprint: Fingerprint, request: Request, batch: int, seconds: float) -> int:
    if request.steps is not None:
        return request.steps
    if request.epochs is not None:
        return max(1, request.epochs * fingerprint.cases // batch)
    folds = 1 if request.fold is not None else (request.folds or 1)
    learning = learning_seconds(request.budget or 0.0, folds)
    # Fewer than the planner's least number: weights that know most already gain from a few steps, too.
    if learning < seconds:
        each = f" for each of {folds} networks" if folds > 1 else ""
        raise PlanError(
            f"the budget leaves {learning:.0f} s{each} to learn and one step takes {seconds:.1f} s here; give at least "
            f"--budget {duration(enough(seconds, LEAST_STEPS, folds))}",
            code="BUDGET_TOO_SMALL",
        )
    return int(learning / seconds)


def _reasons(measured: Measured, fastest: str) -> dict[str, str]:
    fixed = "The model's: its weights have learnt with it."
    cut = "The model's, cut to the size of these cases and to what a step can hold on this machine."
    return {
        "dataset": "Name in the spec.",
        "dimensions": fixed,
        "orientation": fixed,
        "spacing": fixed,
        "normalisation": f"{fixed} For CT that means its clipping and statistics, not those of these data.",
        "patch_size": cut,
        "batch_size": "About the usual number of voxels a step on this machine, as far as its memory goes.",
        "network": f"{fixed} Measured: {measured.step_seconds[fastest]:.3f} s a step.",
        "loss": "Dice for the overlap that is scored, cross-entropy for gradients everywhere.",
        "foreground_share": "At least this share of a batch holds a label, so that small ones are seen.",
        "augmentation": "The model's; without mirroring where the labels name left and right.",
        "learning_rate": "A fifth of the rate for random weights: these know most already, which large steps would "
        "undo.",
        "warmup": "Share of the training; without it the first steps of AdamW are too large.",
        "averaging": "The weights that predict are a running average over about 3 % of the steps.",
        "precision": f"The fastest measured on this machine ({measured.device}).",
        "steps": "Asked for, or expected from the measured step time and the budget; then the clock decides.",
        "overlap": fixed,
        "seed": "Asked for, or 0: the same seed makes the same choices.",
        "budget_seconds": "Asked for: wall time of the whole command (null for a run by steps).",
        "measured": "Step times of the network on this machine, in seconds.",
        "fingerprint": "What the dataset is.",
        "start": "Whose weights the training begins with; labels are found by name, the output of new ones is random.",
    }
