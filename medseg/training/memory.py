"""What to say where there is no memory left and nothing helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from medseg.device import freed, is_out_of_memory
from medseg.errors import TrainingError
from medseg.planning.plan import Plan


@contextmanager
def explained_memory(plan: Plan, device: torch.device) -> Iterator[None]:
    """Turn an error for want of memory that nothing could avoid into one that says what to lower.

    Raises
    ------
    TrainingError : OUT_OF_MEMORY.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        freed(device)
        raise TrainingError(no_memory(plan, device), code="OUT_OF_MEMORY") from error


def no_memory(plan: Plan, device: torch.device) -> str:
    """Say that a single patch is too much, and what to lower."""
    half = [n // 2 if n > 8 and axis < plan.dimensions else n for axis, n in enumerate(plan.patch_size)]
    place = "the GPU has" if device.type == "cuda" else "this machine has"
    return (
        f"out of memory: {place} none left for one patch of {'×'.join(map(str, plan.patch_size))} voxels and the "
        f"network {plan.network.name!r} in {plan.precision}. The last checkpoint is kept; end other programs and run "
        f"the same command again, or train in another --out with --set patch_size={half} or a "
        "network of fewer features"
    )
