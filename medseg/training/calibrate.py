"""Step times measured on this machine, from which the planner chooses.

A measurement is short, and other work on the machine must not change a plan: each candidate makes a few steps, of
which the fastest counts, and where the processor was shared, the work of a single thread tells what it would have been.
What was measured is kept (see step_times).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from medseg.device import autocast, device_name, freed, is_out_of_memory, precisions
from medseg.losses import LOSSES, deep_supervision
from medseg.networks import build_network, planned_options
from medseg.planning.plan import Measured, NetworkPlan
from medseg.planning.planner import DEFAULT_NETWORK, Draft, worth_measuring
from medseg.spec import Spec
from medseg.targets import channel_names, exclusive
from medseg.training.step_times import keep, recall

REPEATS = 4
"""Steps that are timed, after one of warming up."""
USUAL_SHARE = 0.9
"""On a machine without other work, the thread that leads a step has the processor for at least this of its time."""
USUAL_EFFICIENCY = 0.8
"""Of several threads against one."""


def measure(
    spec: Spec,
    sketch: Draft,
    device: torch.device,
    *,
    longest: float,
    network: str = DEFAULT_NETWORK,
    training_seconds: float | None = None,
) -> Measured:
    """Time training steps of the candidate widths on noise, the cheapest first, or recall their times.

    Parameters
    ----------
    longest : seconds that may be spent; wider candidates are left out once it is used up.
    network : name in the table of networks.
    training_seconds : what the loop will have; widths that could not get enough steps in it are left out.

    Returns
    -------
    Measured, without a row for candidates that the memory does not hold; perhaps without any.
    """
    began = time.monotonic()
    rows: dict[str, float] = {}
    for number, width in enumerate(sketch.widths):
        if rows and not worth_measuring(width, min(rows.values()), training_seconds):
            continue
        candidate = as_network(network, sketch.network(width))
        for precision in precisions(device):
            step = _step(spec, sketch, candidate, precision)
            seconds = recall(device, step)
            if seconds is None:
                # The precisions of the first width are always compared: a busy machine must not choose one.
                if number and time.monotonic() - began > longest:
                    break
                seconds = _timed(spec, sketch, candidate, precision, device, longest=longest / 4)
                if seconds is None:
                    continue
            rows[f"{width} {precision}"] = seconds
    return Measured(device=device_name(device), threads=torch.get_num_threads(), step_seconds=rows)


def _step(spec: Spec, sketch: Draft, plan: NetworkPlan, precision: str) -> dict[str, Any]:
    """Return what a step computes: numbers and words of the table of networks only."""
    return {
        "network": plan.model_dump(mode="json"),
        "patch": list(sketch.patch_size),
        "batch": sketch.batch_size,
        "channels": len(spec.channels),
        "classes": [len(channel_names(spec)), exclusive(spec)],
        "precision": precision,
    }


def _step_seconds(
    spec: Spec, sketch: Draft, plan: NetworkPlan, precision: str, device: torch.device, *, longest: float = math.inf
) -> float:
    """Return the seconds of forward, loss, backward and update on a machine where nothing else runs.

    That is the least of a few steps. Where even that one had to share the processor, threads that wait for each other
    burn the time of both, and no clock tells what was work: there a single thread is timed by its own clock, and more
    are taken to share its work as well as they usually do.
    """
    step = _stepper(spec, sketch, plan, precision, device)
    wall, worked = _least(step, REPEATS, longest=longest)
    if device.type != "cpu" or worked >= USUAL_SHARE * wall:
        return wall
    threads = torch.get_num_threads()
    if threads == 1:
        return worked / USUAL_SHARE
    torch.set_num_threads(1)
    try:
        alone = _least(step, 2, longest=longest)[1]
    finally:
        torch.set_num_threads(threads)
    return min(wall, worked / USUAL_SHARE, alone / (threads * USUAL_EFFICIENCY))


def _least(step: Callable[[], None], repeats: int, *, longest: float) -> tuple[float, float]:
    """Return the least wall time and the least time of the leading thread of steps, after one of warming up."""
    began, rows = time.monotonic(), []
    for number in range(repeats + 1):
        start, own = time.monotonic(), time.thread_time()
        step()
        rows.append((time.monotonic() - start, time.thread_time() - own))
        if number >= 1 and time.monotonic() - began > longest:
            break
    walls, worked = zip(*rows[1:], strict=True)
    return min(walls), min(worked)


def _stepper(spec: Spec, sketch: Draft, plan: NetworkPlan, precision: str, device: torch.device) -> Callable[[], None]:
    """Return a training step on noise."""
    network = make_candidate(spec, sketch, plan).to(device)
    layout = torch.channels_last_3d if sketch.dimensions == 3 else torch.channels_last
    network = network.to(memory_format=layout)  # type: ignore[call-overload]
    size = sketch.patch_size[: sketch.dimensions]
    images = torch.randn((sketch.batch_size, len(spec.channels), *size), device=device)
    classes = len(channel_names(spec))
    target = torch.rand((sketch.batch_size, classes, *size), device=device).softmax(1)
    valid = torch.ones((sketch.batch_size, 1, *size), dtype=torch.bool, device=device)
    optimizer = torch.optim.AdamW(network.parameters())

    def step() -> None:
        with autocast(device.type, precision):
            levels = network.forward_levels(images.contiguous(memory_format=layout))
        loss = deep_supervision(LOSSES["dice_ce"], levels, target, valid, exclusive(spec))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        float(loss.detach())

    return step


def as_network(name: str, planned: NetworkPlan) -> NetworkPlan:
    """Return the network `name` with the stages that were planned for a U-Net, as far as it has such."""
    return NetworkPlan(name=name, options=planned_options(name, planned.options))


def make_candidate(spec: Spec, sketch: Draft, plan: NetworkPlan) -> torch.nn.Module:
    """Return the network of one candidate."""
    return build_network(
        plan.name,
        spatial_dims=sketch.dimensions,
        in_channels=len(spec.channels),
        out_channels=len(channel_names(spec)),
        options=plan.options,
    )


def measure_network(spec: Spec, sketch: Draft, plan: NetworkPlan, device: torch.device) -> Measured:
    """Time training steps of the one network of `plan`, or recall their times; rows are named "given <precision>".

    Precisions that the memory does not hold have no row.
    """
    rows = {}
    for precision in precisions(device):
        seconds = recall(device, _step(spec, sketch, plan, precision)) or _timed(spec, sketch, plan, precision, device)
        if seconds is not None:
            rows[f"given {precision}"] = seconds
    return Measured(device=device_name(device), threads=torch.get_num_threads(), step_seconds=rows)


def _timed(
    spec: Spec, sketch: Draft, plan: NetworkPlan, precision: str, device: torch.device, *, longest: float = 5.0
) -> float | None:
    """Time a step and keep its time; None where the memory does not hold it."""
    try:
        seconds = round(_step_seconds(spec, sketch, plan, precision, device, longest=longest), 5)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        freed(device)
        return None
    keep(device, _step(spec, sketch, plan, precision), seconds)
    return seconds
