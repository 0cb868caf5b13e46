"""Jobs of a queue (Slurm, PBS, SGE, LSF, HTCondor) as workers of Dask, asked for again when they ended.

dask-jobqueue writes and submits the jobs. It neither tells who waits that the queue refused one, nor that a job ended
before its worker called, nor asks for another in place of one that reached its time limit: that is done here.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from medseg.batch.cluster import ClusterConfig
from medseg.errors import BatchError, ConfigError

LISTS = {"slurm": ("squeue", "--me", "--noheader", "--format=%A")}
"""Kind of queue -> the command that lists the user's jobs that wait or run, one number a line.

Of other queues Dask itself notices when a worker is lost, but nobody that a job ended before its worker called.
"""
LOOK_SECONDS = 5.0
"""Between two looks at jobs, while there are fewer workers than were asked for."""
LIST_SECONDS = 60.0
"""How long the queue may take to list its jobs."""
POLL_SECONDS = 0.2
DEFAULTS = {
    "cores": 1,
    "processes": 1,
    # Whoever else is on the network of the cluster is kept out: by a certificate of this run, in a folder that the
    # machines share, and without pages for browsers.
    "security": True,
    "shared_temp_directory": os.path.expanduser("~"),
    "scheduler_options": {"dashboard": False, "dashboard_address": "127.0.0.1:0"},
    "worker_extra_args": ["--no-dashboard"],
}
"""What the class of dask-jobqueue is given unless the options of the configuration say otherwise."""


@contextmanager
def asked(kind: Any, config: ClusterConfig) -> Iterator[Queue]:
    """Keep `config.workers` jobs in the queue while the block runs; then they are cancelled.

    Parameters
    ----------
    kind : class of dask-jobqueue, such as SLURMCluster.

    Raises
    ------
    ConfigError : the class does not take these options.
    """
    refusals: list[str] = []
    try:
        cluster = kind(job_cls=_telling(kind.job_cls, refusals.append), **{**DEFAULTS, **config.options})
    except (TypeError, ValueError) as error:
        what = re.split(r"\. |, for example", _line(error))[0]
        raise ConfigError(f"options of kind {config.kind} in the file of --cluster: {what}") from error
    with cluster:
        queue = Queue(cluster, config, refusals)
        keeper = threading.Thread(target=queue.keep)
        keeper.start()
        try:
            yield queue
        finally:
            queue.over.set()
            keeper.join()


class Queue:
    """The jobs of one run.

    Attributes
    ----------
    cluster : of dask-jobqueue.
    over : no more jobs are asked for.
    """

    def __init__(self, cluster: Any, config: ClusterConfig, refusals: list[str]) -> None:
        self.cluster, self.over = cluster, threading.Event()
        self._config, self._refusals = config, refusals
        self._ended: list[str] = []

    def keep(self) -> None:
        """Ask for jobs until it is over, for others in place of those that ended."""
        jobs = self._config.workers
        self.cluster.scale(jobs=jobs)
        while not self.over.wait(LOOK_SECONDS):
            if len(self.cluster.scheduler_info["workers"]) < jobs:
                for name, job in self._gone():
                    self._ended += [str(job.job_id)] if job.job_id else []  # one that was refused never began
                    self.cluster.loop.add_callback(self._drop, name, job)
                self.cluster.scale(jobs=jobs)

    def wait(self, client: Any) -> None:
        """Wait until a job has brought a worker, for as long as the queue lets it wait.

        Raises
        ------
        BatchError : QUEUE, the queue refuses the jobs; WORKER_START, they end before their worker calls.
        """
        while not client.nthreads():
            if self._refusals and not any(job.job_id for job in list(self.cluster.workers.values())):
                text = f"{self._config.kind}: {self._refusals[-1]}; change options in the file of --cluster"
                raise BatchError(text, code="QUEUE")
            if len(self._ended) > 2 * self._config.workers:
                text = f"{len(self._ended)} jobs ended before their worker called, the last one was {self._ended[-1]}"
                look = "look at its output (option log_directory, else where the queue puts it)"
                raise BatchError(f"{text}; {look}: python or medseg may be missing there", code="WORKER_START")
            time.sleep(POLL_SECONDS)

    def _gone(self) -> list[tuple[Any, Any]]:
        """Return names and jobs that the queue refused or no longer knows."""
        jobs = list(self.cluster.workers.items())  # before the queue is asked: a job is in the queue before it is here
        known = self._known()
        return [(name, job) for name, job in jobs if not job.job_id or (known is not None and job.job_id not in known)]

    def _known(self) -> set[str] | None:
        """Return the numbers of all jobs that wait or run; None where the queue cannot say."""
        words = LISTS.get(self._config.kind)
        if words is None:
            return None
        try:
            listed = subprocess.run(words, capture_output=True, text=True, timeout=LIST_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError):  # its controller restarts, perhaps: asked again later
            return None
        return set(listed.stdout.split())

    def _drop(self, name: Any, job: Any) -> None:
        """Forget a job, so that another is asked for; runs where Dask itself changes its workers."""
        if self.cluster.workers.get(name) is job:
            del self.cluster.workers[name]


def _telling(job_class: Any, tell: Callable[[str], None]) -> Any:
    """Return a class of jobs that says why the queue refused one, and goes on as a job without a number."""

    class Job(job_class):  # type: ignore[misc]
        status: Any

        async def start(self) -> None:
            try:
                await super().start()
            except (OSError, RuntimeError, ValueError) as error:  # no such program, its refusal, its strange answer
                tell(_line(error))
                self.job_id = None
                self.status = type(self.status).running

    return Job


def _line(error: Exception) -> str:
    """Return what a program said, or else the error, as one line."""
    return " ".join((str(error).partition("stderr:\n")[2].strip() or str(error)).split())
