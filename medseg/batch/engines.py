"""Who does the studies of a run: workers of this machine, of a Dask scheduler, or of a cluster's queue.

The one door to Dask. Every engine hands studies to the same guarded worker processes (medseg.batch.isolation); what
became of a study stands in the ledger, so an engine may lose whatever it likes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import psutil

from medseg.batch.attempt import Outcome
from medseg.batch.cluster import ClusterConfig
from medseg.batch.isolation import UNSHARED, Child, Job, Limits
from medseg.batch.job import Settings, encode
from medseg.batch.memory import image_bytes
from medseg.batch.queues import asked
from medseg.batch.study_input import StudyInput
from medseg.batch.waiting import Waiting
from medseg.errors import BatchError, ConfigError

TIMEOUT = 2 * 3600.0
"""Seconds that one study may take unless told."""
STAGES = 3
"""Studies that a worker of this machine may have: one is read, one predicted, one written (medseg.batch.child)."""
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
    scheduler : address of a running Dask scheduler whose workers do the studies instead.
    cluster : whose workers do the studies instead.
    """

    count: int = 1
    timeout: float = TIMEOUT
    memory: int | None = None
    scheduler: str = ""
    cluster: ClusterConfig | None = None

    @property
    def limits(self) -> Limits:
        """What one study may take; a share of this machine tells nothing of others."""
        if self.scheduler or self.cluster is not None:
            return Limits(self.timeout, self.memory)
        share = int(psutil.virtual_memory().total * _SHARE / self.count)
        return Limits(self.timeout, self.memory or share)


@contextmanager
def started(workers: Workers) -> Iterator[Engine]:
    """Start an engine; when the block ends, whatever its workers still do is ended too.

    Raises
    ------
    ConfigError : Dask is not installed.
    BatchError : NO_SCHEDULER, QUEUE, WORKER_VERSION, WORKER_START.
    """
    if workers.scheduler or workers.cluster is not None:
        with _connected(workers) as client:
            engine = _Dask(client, workers)
            try:
                yield engine
            finally:
                engine.close()
        return
    local = _Local(workers)
    try:
        yield local
    finally:
        local.close()


class _Local:
    """Worker processes of this machine, each guarded by a thread that takes studies from one queue."""

    def __init__(self, workers: Workers) -> None:
        threads = _threads(workers.count)
        self._children = [Child(workers.limits, slot=slot, threads=threads) for slot in range(workers.count)]
        self._waiting = Waiting()
        self._guards = [threading.Thread(target=c.serve, args=(self._waiting.take,)) for c in self._children]
        for child, guard in zip(self._children, self._guards, strict=True):
            with contextlib.suppress(BatchError):  # tried again with the first study, and told then
                child.start()  # it imports what it needs while studies are still being looked for
            guard.start()

    def width(self) -> int:
        return STAGES * len(self._children)

    def submit(self, settings: Settings, study: StudyInput, *, alone: bool = False) -> Future[Outcome]:
        size = UNSHARED if alone or settings.max_memory is not None else image_bytes(study)
        job = Job(encode(settings), encode(study), size)
        self._waiting.add(job)
        return job.future

    def close(self) -> None:
        """End all workers at once."""
        self._waiting.close()
        for child in self._children:
            child.close()
        for guard in self._guards:
            guard.join()


def _threads(workers: int) -> int:
    """Return how many threads each of several workers may use; 0, which leaves it to the libraries, for one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if workers == 1 else max(1, cores // workers)


CLUSTERS = {
    "local": ("distributed", "LocalCluster"),
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "pbs": ("dask_jobqueue", "PBSCluster"),
    "sge": ("dask_jobqueue", "SGECluster"),
    "lsf": ("dask_jobqueue", "LSFCluster"),
    "htcondor": ("dask_jobqueue", "HTCondorCluster"),
}
"""Kind of ClusterConfig -> module and class."""
CONNECT_SECONDS = 30.0
KEPT = 2
"""Guarded processes that a thread of a Dask worker keeps: those of its latest runs, whose commands may share it."""
_children: dict[tuple[str, int], Child] = {}
"""Run and thread -> the guarded process, in a worker of Dask."""


class _Dask:
    """Workers of Dask, each of which guards one process a thread, and does one study after the other.

    A worker of Dask that dies was ended by somebody, never by a study: Dask then gives the study to another one.
    """

    def __init__(self, client: Any, workers: Workers) -> None:
        self._client, self._limits = client, workers.limits
        self._run = uuid.uuid4().hex
        self._pool = client.get_executor(pure=False, retries=0)

    def width(self) -> int:
        return max(1, sum(int(count) for count in self._client.nthreads().values()))

    def submit(self, settings: Settings, study: StudyInput, *, alone: bool = False) -> Future[Outcome]:
        limits = (self._limits.seconds, self._limits.bytes)
        future: Future[Outcome] = Future()
        remote = self._pool.submit(guarded, self._run, encode(settings), encode(study), limits)
        remote.add_done_callback(lambda ended: _pass_on(ended, future))
        return future

    def close(self) -> None:
        """End the processes of this run; those of workers that do not answer end by themselves when they are idle."""
        with contextlib.suppress(Exception):  # the run is over, and its results stand in the ledger
            self._client.run(end_guarded, self._run, on_error="ignore")


def guarded(run: str, settings: str, study: str, limits: tuple[float | None, int | None]) -> Outcome:
    """Do a study in the guarded process of this thread; called in a worker of Dask."""
    key = run, threading.get_ident()
    child = _children.pop(key, None) or Child(Limits(*limits))
    # A command that was killed ends nothing: the models of its processes would fill the memory of this machine.
    for old in [other for other in list(_children) if other[1] == key[1]][: 1 - KEPT or None]:
        if idle := _children.pop(old, None):
            idle.close()
    _children[key] = child
    return child.run(settings, study)


def end_guarded(run: str) -> None:
    """End the guarded processes of a run; called in a worker of Dask."""
    for key in [key for key in _children if key[0] == run]:
        _children.pop(key).close()


def _pass_on(ended: Future[Outcome], future: Future[Outcome]) -> None:
    """Give the outcome of a task of Dask to `future`."""
    from distributed import KilledWorker

    error = CancelledError() if ended.cancelled() else ended.exception()
    if error is None:
        future.set_result(ended.result())
    elif isinstance(error, KilledWorker):  # of several workers in a row, all of which somebody ended
        future.set_result(Outcome(death="died"))
    elif isinstance(error, CancelledError):
        text = "the Dask scheduler is gone; what is done stays done, the same command goes on from here"
        future.set_exception(BatchError(text, code="NO_SCHEDULER"))
    else:
        future.set_exception(error)


@contextmanager
def _connected(workers: Workers) -> Iterator[Any]:
    """Give a client of the scheduler, or of a cluster that is started for the time of the block."""
    start = _of_scheduler(workers.scheduler) if workers.cluster is None else _of_cluster(workers.cluster)
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(start)
        except (OSError, RuntimeError) as error:
            if workers.cluster is None:
                raise
            text = f"a cluster of kind {workers.cluster.kind} cannot be started: {error or type(error).__name__}"
            raise BatchError(f"{text}; change options in the file of --cluster", code="NO_SCHEDULER") from error
        _require_same(client)
        yield client


@contextmanager
def _of_scheduler(address: str) -> Iterator[Any]:
    distributed = _module("distributed")
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(distributed.Client(address, timeout=CONNECT_SECONDS))
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except (OSError, TimeoutError) as error:
            text = f"{address}: no Dask scheduler with a worker answers within {CONNECT_SECONDS:.0f} s"
            raise BatchError(f"{text}; start `dask scheduler` and `dask worker`", code="NO_SCHEDULER") from error
        yield client


@contextmanager
def _of_cluster(config: ClusterConfig) -> Iterator[Any]:
    """Give a client of a cluster that is started for the time of the block and has a worker."""
    distributed, (module, name) = _module("distributed"), CLUSTERS[config.kind]
    kind = getattr(_module(module), name)
    if config.kind == "local":
        # Reached from this machine only, and with a certificate of its own: other users of it are kept out.
        fixed = {"host": "127.0.0.1", "security": True, "dashboard_address": None, "memory_limit": 0}
        options = {"threads_per_worker": 1, "processes": True, **fixed, **config.options}
        with kind(n_workers=config.workers, **options) as cluster, distributed.Client(cluster) as client:
            client.wait_for_workers(1)
            yield client
    else:
        with asked(kind, config) as queue, distributed.Client(queue.cluster) as client:
            queue.wait(client)
            yield client


def _require_same(client: Any) -> None:
    """Raise BatchError(WORKER_VERSION) where a worker has no medseg, or another one."""
    own = version("medseg")
    try:
        found = set(client.run(version, "medseg").values())
    except PackageNotFoundError:
        found = {"none"}
    if found - {own}:
        text = f"the Dask workers have medseg {', '.join(sorted(found))}, this command has {own}; install the same"
        raise BatchError(text, code="WORKER_VERSION")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise ConfigError(f"{package} is not installed: pip install 'medseg[cluster]'") from error
