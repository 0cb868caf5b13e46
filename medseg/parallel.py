"""Many processes as one: who takes part, sums over all of them, and the wish to stop.

``torchrun`` starts the processes and tells each its place by environment variables; a command that was started alone is
a world of one, in which every sum is its own part.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=2)
"""How long the others wait while the first process prepares the data; torchrun ends all when one dies."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Sent by schedulers before they take a machine away (Slurm: ``--signal=USR1@120``)."""


@dataclass(frozen=True)
class World:
    """The place of this process among all that train together; rank 0 decides and writes."""

    rank: int
    size: int

    @property
    def share(self) -> slice:
        """Which rows of a list are this process's."""
        return slice(self.rank, None, self.size)


def world() -> World:
    """Return the place of this process."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World(0, 1)


@contextmanager
def joined() -> Iterator[World]:
    """Take part in the group that torchrun started, if it did; each process gets a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield world()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield world()
    finally:
        dist.destroy_process_group()


class _Total(torch.autograd.Function):
    """Sum over processes whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient


def total(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, with a gradient.

    Every process then computes the same loss of the whole batch; its gradient comes out `size` times too large in
    each, and the mean that DistributedDataParallel takes of them is that of the one loss.
    """
    if world().size == 1:
        return value
    result: Tensor = _Total.apply(value)  # type: ignore[no-untyped-call]
    return result


def added(numbers: Sequence[float]) -> list[float]:
    """Return the sum of each number over all processes."""
    if world().size == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


class StopRequest:
    """Whether somebody asked this process to stop."""

    asked = False

    def __call__(self, *_: object) -> None:
        """Take note of a signal."""
        self.asked = True


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch STOP_SIGNALS while the block runs, which then ends where it can go on later."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may catch signals
        yield request
        return
    before = {number: signal.signal(number, request) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
