"""Step times that nobody measured, for plans that must come out the same again (--deterministic)."""

from __future__ import annotations

import math

import torch

from medseg.planning.plan import Measured
from medseg.planning.planner import Draft

ASSUMED_SECONDS = {"cpu": 1e-8, "cuda": 3e-11}
"""Of a voxel and channel² of the first stage: 0.5 s a step of 200 000 voxels and 16 channels on a processor."""
REASONS = {
    "precision": "Not chosen by speed (--deterministic): fp32, unless --set precision=bf16.",
    "measured": "Assumed, not measured (--deterministic): no plan depends on how fast a machine is.",
}
"""Why the plan has these values."""


def assumed(sketch: Draft, device: torch.device) -> Measured:
    """Return times of the candidate widths in fp32: they grow with a batch's voxels and the square of the channels."""
    voxels = sketch.batch_size * math.prod(sketch.patch_size)
    rows = {
        f"{width} fp32": round(ASSUMED_SECONDS[device.type] * voxels * channels[0] ** 2, 5)
        for width, channels in sketch.widths.items()
    }
    return Measured(device="assumed, not measured", threads=1, step_seconds=rows)
