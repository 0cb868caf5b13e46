"""The device at hand and its arithmetic; the only place that asks what the hardware can do."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from medseg.errors import TrainingError


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


MEMORY_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "out of memory",
    "status_alloc_failed",
)
"""Of plain RuntimeErrors of torch, oneDNN, cuDNN and cuBLAS that mean it, in lower case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory was asked for and not there.

    Where Linux promises more than it has, no error comes: the kernel ends the process (exit status 137).
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in MEMORY_WORDS)


def freed(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def trim() -> None:
    """Give the system back what the C library keeps of freed memory for later (glibc; others have no such function)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Return the bytes that this process holds now, without what it has given up already."""
    import psutil

    trim()
    return int(psutil.Process().memory_info().rss)


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


CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def repeatable(on: bool, *, threads: int | None = None) -> Iterator[None]:
    """Let torch compute only what comes out the same every time while the block runs, if `on`.

    Parameters
    ----------
    threads : the number that torch uses on the processor in the block, on or not; on it depend the last bits of sums.

    Raises
    ------
    TrainingError : NOT_REPEATABLE, an operation has no such implementation on this device.
    """
    cudnn = torch.backends.cudnn
    was_on, benchmarked, was_deterministic = (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.benchmark,
        cudnn.deterministic,
    )
    before, workspace = torch.get_num_threads(), os.environ.get(CUBLAS)
    try:
        # Also where it is that already: the call itself changes how MKL chooses its threads.
        if on or threads not in (None, before):
            torch.set_num_threads(threads or before)
        if on:
            os.environ.setdefault(CUBLAS, ":4096:8")  # asked for by torch; read when cuBLAS is first used
            torch.use_deterministic_algorithms(True)
            cudnn.benchmark, cudnn.deterministic = False, True
        yield
    except RuntimeError as error:
        if on and "deterministic" in str(error):
            first = str(error).split(". ")[0]
            raise TrainingError(
                f"--deterministic: {first}; leave the option out, or choose another --network or --set loss=",
                code="NOT_REPEATABLE",
            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(was_on)
        cudnn.benchmark, cudnn.deterministic = benchmarked, was_deterministic
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
        if workspace is None:
            os.environ.pop(CUBLAS, None)


def hardware(device: torch.device) -> dict[str, str | int | None]:
    """Return what of the machine the bits of a training depend on; nothing that names it."""
    cudnn: Any = torch.backends.cudnn
    return {
        "device": device_name(device),
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": cudnn.version() if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


@cache
def processor_name() -> str:
    """Return the name of the processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
