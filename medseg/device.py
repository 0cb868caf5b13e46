"""The device at hand and its arithmetic; the only place that asks what the hardware can do."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self

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


class Stopwatch:
    """Seconds of a block on a device, read after the next moment at which the processor waits for it anyway.

    On a GPU two events are put into its queue, so that measuring makes nobody wait; on the processor it is a clock.
    """

    def __init__(self, device: torch.device) -> None:
        event: Any = torch.cuda.Event
        self._events = [event(enable_timing=True), event(enable_timing=True)] if device.type == "cuda" else None
        self._began = self._ended = 0.0

    def __enter__(self) -> Self:
        """Start."""
        self._began = time.monotonic()
        if self._events:
            self._events[0].record()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        if self._events:
            self._events[1].record()
        self._ended = time.monotonic()

    def seconds(self) -> float:
        """Return how long the block took; on a GPU to be asked only after it was waited for."""
        if self._events:
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._ended - self._began
