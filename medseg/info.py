"""What ``medseg info`` answers."""

from __future__ import annotations

from typing import Any

import psutil

from medseg.bundle import versions
from medseg.device import best_device, device_name
from medseg.evaluation.metrics import METRICS
from medseg.losses import LOSSES
from medseg.networks import NETWORKS
from medseg.preparation.intensity import AUGMENTATIONS
from medseg.readers import READERS


def gather() -> dict[str, Any]:
    """Return versions, device, processor threads, memory (GiB) and the names in every table."""
    import torch

    memory = psutil.virtual_memory()
    tables = (NETWORKS, LOSSES, READERS, METRICS, AUGMENTATIONS)
    return {
        **versions(),
        "device": device_name(best_device()),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory.total / 2**30, 1),
        "memory_free_gib": round(memory.available / 2**30, 1),
        **{table.kind: list(table) for table in tables},
    }
