"""The device at hand and its arithmetic; the only place that asks what the hardware can do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def best_device(slot: int = 0) -> torch.device:
    """Return the GPU if there is one, else the processor; of several GPUs each `slot` gets the next one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    return torch.device(f"cuda:{slot % count}" if count > 1 else "cuda")


def device_name(device: torch.device) -> str:
    """Return "cpu" or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def precisions(device: torch.device) -> tuple[str, ...]:
    """Return the precisions that are worth measuring on a device, the plain one first."""
    if device.type == "cuda":
        return ("fp32", "bf16") if torch.cuda.is_bf16_supported() else ("fp32",)
    return ("fp32", "bf16")


def autocast(device_type: str, precision: str) -> AbstractContextManager[object]:
    """Return the context in which the network computes."""
    if precision == "bf16":
        return torch.autocast(device_type, torch.bfloat16)
    return nullcontext()
