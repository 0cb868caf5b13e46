"""Step times measured on this machine, from which the planner chooses."""

from __future__ import annotations

import statistics
import time

import torch

from medseg.device import autocast, device_name, precisions
from medseg.losses import LOSSES, deep_supervision
from medseg.networks import build_network, planned_options
from medseg.planning.plan import Measured, NetworkPlan
from medseg.planning.planner import DEFAULT_NETWORK, Draft
from medseg.spec import Spec
from medseg.targets import channel_names, exclusive

REPEATS = 3


def measure(
    spec: Spec, sketch: Draft, device: torch.device, *, longest: float, network: str = DEFAULT_NETWORK
) -> Measured:
    """Time training steps of the candidate widths on noise, the cheapest first.

    Parameters
    ----------
    longest : seconds that may be spent; wider candidates are left out once it is used up.
    network : name in the table of networks.
    """
    began = time.monotonic()
    rows: dict[str, float] = {}
    for width in sketch.widths:
        candidate = as_network(network, sketch.network(width))
        for precision in precisions(device):
            if rows and time.monotonic() - began > longest:
                break
            try:
                rows[f"{width} {precision}"] = round(_step_seconds(spec, sketch, candidate, precision, device), 5)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
    return Measured(device=device_name(device), threads=torch.get_num_threads(), step_seconds=rows)


def _step_seconds(spec: Spec, sketch: Draft, plan: NetworkPlan, precision: str, device: torch.device) -> float:
    """Return the median seconds of forward, loss, backward and update, after one step of warming up."""
    network = make_candidate(spec, sketch, plan).to(device)
    layout = torch.channels_last_3d if sketch.dimensions == 3 else torch.channels_last
    network = network.to(memory_format=layout)  # type: ignore[call-overload]
    size = sketch.patch_size[: sketch.dimensions]
    images = torch.randn((sketch.batch_size, len(spec.channels), *size), device=device)
    classes = len(channel_names(spec))
    target = torch.rand((sketch.batch_size, classes, *size), device=device).softmax(1)
    valid = torch.ones((sketch.batch_size, 1, *size), dtype=torch.bool, device=device)
    optimizer = torch.optim.AdamW(network.parameters())
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.monotonic()
        with autocast(device.type, precision):
            levels = network.forward_levels(images.contiguous(memory_format=layout))
        loss = deep_supervision(LOSSES["dice_ce"], levels, target, valid, exclusive(spec))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        float(loss.detach())
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds[1:])


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
