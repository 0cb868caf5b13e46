"""The guard of one worker process: gives it studies, and ends it when one of them hangs or takes too much memory.

reading -> predicting -> writing

A worker has up to one study in each of these stages (see `medseg.batch.child`): it gets another one as soon as the last
one it got is being predicted, if the images of all of them are small enough. When it ends, what was in flight is told:
the study that hung, all of them where nobody knows which one it was.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from medseg.batch.attempt import Outcome
from medseg.batch.job import decode
from medseg.batch.ledger import Entry
from medseg.batch.process import Process
from medseg.errors import BatchError, MedsegError
from medseg.sizes import said

POLL_SECONDS = 0.1
START_SECONDS = 900.0
"""After these a worker that loads its model counts as hanging: large models lie on slow disks."""
STARTS = 8
"""Starts in a row that may fail before the run ends; each may be somebody's kill."""
PAUSE_SECONDS = 0.25
"""Before a worker that could not start is started again; twice as long each time, up to LONGEST_PAUSE."""
LONGEST_PAUSE = 8.0
AHEAD = 0.125
"""Share of a worker's memory that the images of its studies may take together; a larger one is done without others."""
UNSHARED = sys.maxsize
"""Size of a study beside which there must be no other."""
_STARTING = ("", "loading")
_EARLY = (*_STARTING, "checking", "reading", "read")
"""Stages before the network has a study."""
_RESTING = ("read", "predicted")
"""A study waits for another one of its worker: that costs it no time."""


@dataclass(frozen=True)
class Limits:
    """What one study may take.

    Attributes
    ----------
    seconds : from its first byte read to its last written, without loading the model and without waiting for other
        studies; None: for ever.
    bytes : resident memory of the worker, model and neighbours included; None: all.
    """

    seconds: float | None = None
    bytes: int | None = None

    @property
    def ahead(self) -> int:
        """Bytes that the images of several studies at once may take."""
        return 0 if self.bytes is None else int(AHEAD * self.bytes)


@dataclass(frozen=True)
class Job:
    """A study that is to be done.

    Attributes
    ----------
    settings, study : as `medseg.batch.job.encode` writes them.
    size : about the bytes of its image.
    future : gets the outcome.
    """

    settings: str
    study: str
    size: int = UNSHARED
    future: Future[Outcome] = field(default_factory=Future)


Take = Callable[[int | None], Job | None]
"""Gives the next study whose image has no more than these bytes; None: of any size, and it may be waited for."""


@dataclass
class _Flight:
    """A study that the worker has."""

    job: Job
    stage: str = ""
    source: str = ""
    spent: float = 0.0
    since: float = field(default_factory=time.monotonic)

    @property
    def begun(self) -> bool:
        return self.stage not in _STARTING

    @property
    def seconds(self) -> float:
        return self.spent + (0.0 if self.stage in _RESTING else time.monotonic() - self.since)

    def enter(self, stage: str, source: str | None) -> None:
        """Note that a stage begins; the time of the first one that counts is that of reading."""
        self.spent = 0.0 if stage in ("checking", "loading", "reading") else self.seconds
        self.stage, self.since = stage, time.monotonic()
        self.source = self.source if source is None else source


class Child:
    """One worker process; it is started when needed, and again after it died.

    Parameters
    ----------
    slot : its number on this machine.
    threads : that its libraries may use; 0 leaves it to them.
    """

    def __init__(self, limits: Limits, *, slot: int = 0, threads: int = 0) -> None:
        self.limits = limits
        self.process = Process(slot=slot, threads=threads)
        self._flights: dict[int, _Flight] = {}
        self._again: deque[Job] = deque()
        self._count = self._failed_starts = 0
        self._weighed = 0.0
        self._closed = threading.Event()
        self._serving = threading.Lock()

    def start(self) -> None:
        """Start the process unless it runs.

        Raises
        ------
        BatchError : WORKER_START.
        """
        self.process.start()

    def run(self, settings: str, study: str) -> Outcome:
        """Let the worker do one study (both as `medseg.batch.job.encode` writes them).

        Raises
        ------
        MedsegError : the run cannot go on: OUT cannot be written, the model cannot be loaded, no worker can start.
        """
        jobs = [job := Job(settings, study)]
        self.serve(lambda room: jobs.pop() if jobs else None)
        return job.future.result() if job.future.done() else Outcome(death="died")

    def serve(self, take: Take) -> None:
        """Do studies until `take` gives none while none is in flight; errors of the run go into their futures."""
        with self._serving:
            while not self._closed.is_set():
                try:
                    self._fill(take)
                    if not self._flights:
                        return
                    self._step()
                except Exception as error:  # noqa: BLE001 - whoever waits for a study is told, and decides
                    self._give_up(error)
            self._lose(cause="died")
            self.process.end()

    def close(self) -> None:
        """End the process at once, for good; what it was doing ends as a death."""
        self._closed.set()
        self.process.kill()
        with self._serving:
            self.process.end()

    def _fill(self, take: Take) -> None:
        """Send the next study unless one is still being read."""
        while not any(flight.stage in _EARLY for flight in self._flights.values()):
            room = self.limits.ahead - sum(f.job.size for f in self._flights.values()) if self._flights else None
            if self._again and (room is None or self._again[0].size <= room):
                job: Job | None = self._again.popleft()
            else:
                job = None if self._again else take(room)
            if job is None:
                return
            self._count += 1
            self._flights[self._count] = _Flight(job)
            self._send(self._count, job)

    def _send(self, number: int, job: Job) -> None:
        """Send a study to the process, which is started if there is none."""
        if len(self._flights) == 1:
            try:
                self.process.start()
            except BatchError as error:  # too many processes, too little memory: both may pass
                self._failed_start(str(error))
                return
        self.process.send([number, job.settings, job.study])

    def _step(self) -> None:
        """Hear one message, and look whether a study takes too much."""
        message = self.process.message(POLL_SECONDS)
        if message is None:
            self._died()
            return
        if "stop" in message:
            raise _error(message["stop"])
        if message:
            self._hear(message)
        self._require_measure()

    def _hear(self, message: dict[str, Any]) -> None:
        flight = self._flights[message["study"]]
        if "stage" in message:
            flight.enter(message["stage"], message.get("input_digest"))
            self._failed_starts = 0 if flight.begun else self._failed_starts
            return
        del self._flights[message["study"]]
        row = message["outcome"]
        flight.job.future.set_result(Outcome(row["entry"] and Entry.model_validate(row["entry"]), row["fresh"]))

    def _died(self) -> None:
        """Tell all studies that had begun that they may have ended their worker."""
        how = self.process.end()
        if self._closed.is_set():
            return
        if not self._lose(cause="died"):
            self._failed_start(how)

    def _lose(self, *, cause: str, guilty: _Flight | None = None) -> bool:
        """Take the studies from a process that has ended; return whether one of them had begun.

        What had not begun is done again as if nothing had happened; if it is known who is `guilty`, so is all else.
        """
        flights, self._flights = list(self._flights.values()), {}
        for flight in flights:
            suspect = flight is guilty or (guilty is None and (flight.begun or self._closed.is_set()))
            if suspect:
                flight.job.future.set_result(Outcome(death=cause, input_digest=flight.source))
            else:
                self._again.append(flight.job)
        return any(flight.begun for flight in flights)

    def _failed_start(self, how: str) -> None:
        """Wait a little; what is wrong with the machine may pass.

        Raises
        ------
        BatchError : WORKER_START, too many starts in a row failed.
        """
        self._lose(cause="died")
        self._failed_starts += 1
        if self._failed_starts >= STARTS:
            raise BatchError(
                f"workers end before they begin, {STARTS} times in a row ({how}); MEDSEG_DEBUG=1 shows all they say",
                code="WORKER_START",
            )
        self._closed.wait(min(LONGEST_PAUSE, PAUSE_SECONDS * 2 ** (self._failed_starts - 1)))

    def _require_measure(self) -> None:
        """End the process if a study takes too long, or the process too much memory.

        Raises
        ------
        BatchError : MEMORY_LIMIT, WORKER_START: that is so before any study began.
        """
        begun = [flight for flight in self._flights.values() if flight.begun]
        if self._too_heavy():
            if not begun:
                text = f"the model alone takes more than the {said(self.limits.bytes or 0)} of a worker"
                raise BatchError(f"{text}; allow more", code="MEMORY_LIMIT")
            self.process.end()
            # Of several nobody knows who it was: each is done again alone.
            alone = begun[0] if len(begun) == 1 else None
            self._lose(cause="memory" if alone else "died", guilty=alone)
            return
        for flight in self._flights.values():
            if not flight.begun and flight.seconds > START_SECONDS:
                raise BatchError(f"a worker did not load the model in {START_SECONDS:.0f} s", code="WORKER_START")
            if flight.begun and self.limits.seconds and flight.seconds > self.limits.seconds:
                self.process.end()
                self._lose(cause="timeout", guilty=flight)
                return

    def _too_heavy(self) -> bool:
        """Weigh the process, if the last time is a while ago: the system is slow to tell."""
        now = time.monotonic()
        if self.limits.bytes is None or now - self._weighed < POLL_SECONDS:
            return False
        self._weighed = now
        return self.process.memory() > self.limits.bytes

    def _give_up(self, error: Exception) -> None:
        """Let all who wait know that the run cannot go on."""
        self.process.end()
        jobs = [*(flight.job for flight in self._flights.values()), *self._again]
        self._flights, self._failed_starts = {}, 0
        self._again.clear()
        for job in jobs:
            job.future.set_exception(error)


def _error(text: str) -> MedsegError:
    error = decode(text)
    return error if isinstance(error, MedsegError) else BatchError(text, code="WORKER")
