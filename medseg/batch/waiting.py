"""Studies that wait for a worker of this machine."""

from __future__ import annotations

import threading
from collections import deque

from medseg.batch.isolation import Job


class Waiting:
    """A queue from which workers take: those that have nothing wait for it, the others look whether the next fits."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def add(self, job: Job) -> None:
        """Put a study at the end."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def take(self, room: int | None) -> Job | None:
        """Return the next study: at once and only if its image has at most `room` bytes, or, without `room`, any.

        None: there is none that fits, or the queue was closed.
        """
        with self._changed:
            if room is None:
                self._changed.wait_for(lambda: self._jobs or self._closed)
            if self._closed or not self._jobs or (room is not None and self._jobs[0].size > room):
                return None
            return self._jobs.popleft()

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
