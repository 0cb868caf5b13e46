"""Who does the studies of a run: workers of this machine, of a Dask scheduler, or of a cluster's queue.

The one door to Dask. Every engine hands studies to the same guarded worker processes (medseg.batch.isolation); what
became of a study stands in the ledger, so an engine may lose whatever it likes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import psutil

from medseg.batch.attempt import Outcome
from medseg.batch.isolation import Child, Limits
from medseg.batch.job import Settings, encode
from medseg.batch.study_input import StudyInput

TIMEOUT = 2 * 3600.0
"""Seconds that one study may take unless told."""
_SHARE = 0.9
"""Of the machine's memory that all its workers may take together unless told."""


class Engine(Protocol):
    """Gives studies to workers."""

    def width(self) -> int:
        """Return how many studies it can do at once now."""

    def submit(self, settings: Settings, study: StudyInput, *, alone: bool = False) -> Future[Outcome]:
        """Begin a study; `alone` says that it is suspected to cost its worker."""


@dataclass(frozen=True)
class Workers:
    """Who does the studies, and what one study may take.

    Attributes
    ----------
    count : processes on this machine; they share its GPUs.
    timeout : seconds that a study may take.
    memory : bytes that a worker may take; None: its share of the machine.
    """

    count: int = 1
    timeout: float = TIMEOUT
    memory: int | None = None

    @property
    def limits(self) -> Limits:
        """What one study may take."""
        share = int(psutil.virtual_memory().total * _SHARE / self.count)
        return Limits(self.timeout, self.memory or share)


@contextmanager
def started(workers: Workers) -> Iterator[Engine]:
    """Start an engine; when the block ends, whatever its workers still do is ended too."""
    engine = _Local(workers)
    try:
        yield engine
    finally:
        engine.close()


class _Local:
    """Worker processes of this machine, each guarded by a thread."""

    def __init__(self, workers: Workers) -> None:
        threads = _threads(workers.count)
        self._children = [Child(workers.limits, slot=slot, threads=threads) for slot in range(workers.count)]
        self._free = list(self._children)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers.count, thread_name_prefix="medseg-guard")
        for child in self._children:
            child.start()  # it imports what it needs while studies are still being looked for

    def width(self) -> int:
        return len(self._children)

    def submit(self, settings: Settings, study: StudyInput, *, alone: bool = False) -> Future[Outcome]:
        return self._pool.submit(self._run, encode(settings), encode(study))

    def close(self) -> None:
        """End all workers at once."""
        for child in self._children:
            child.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, settings: str, study: str) -> Outcome:
        with self._lock:
            child = self._free.pop()
        try:
            return child.run(settings, study)
        finally:
            with self._lock:
                self._free.append(child)


def _threads(workers: int) -> int:
    """Return how many threads each of several workers may use; 0, which leaves it to the libraries, for one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if workers == 1 else max(1, cores // workers)
