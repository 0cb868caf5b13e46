"""The guard of one worker process: gives it studies, and ends it when it hangs or takes too much memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil

from medseg.batch.attempt import Outcome
from medseg.batch.job import decode
from medseg.batch.ledger import Entry
from medseg.batch.pipe import readable
from medseg.errors import BatchError, MedsegError

PROGRAM = "medseg.batch.child"
POLL_SECONDS = 0.1
START_SECONDS = 900.0
"""After these a worker that loads its model counts as hanging: large models lie on slow disks."""
STARTS = 8
"""Starts in a row that may fail before the run ends; each may be somebody's kill."""
_MIB = 1 << 20
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 * _MIB), "MALLOC_TRIM_THRESHOLD_": str(64 * _MIB)}
"""For glibc: what is freed goes back to the system, so that a worker's peak is what it holds, and not what it held."""

WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""For libgomp, which torch brings: threads that wait for each other sleep. Unless told they spin, and where others use
the processors, too, they spin away the time of the very thread that they wait for."""


@dataclass(frozen=True)
class Limits:
    """What one study may take.

    Attributes
    ----------
    seconds : from its first byte read to its last written, without loading the model; None: for ever.
    bytes : resident memory of the worker, model included; None: all.
    """

    seconds: float | None = None
    bytes: int | None = None


class Child:
    """One worker process; it is started when needed, and again after it died.

    Parameters
    ----------
    slot : its number on this machine.
    threads : that its libraries may use; 0 leaves it to them.
    """

    def __init__(self, limits: Limits, *, slot: int = 0, threads: int = 0) -> None:
        self.limits = limits
        self._slot, self._threads = slot, threads
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._rest = b""
        self._closed = False

    def start(self) -> None:
        """Start the process unless it runs.

        Raises
        ------
        BatchError : WORKER_START.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        listen, self._lifeline = os.pipe()
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**ALLOCATOR, **WAITING, **os.environ, "PYTHONPATH": path}
        if self._threads:
            environment.setdefault("OMP_NUM_THREADS", str(self._threads))
        quiet = None if os.environ.get("MEDSEG_DEBUG") else subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                # -P: a file called json.py in the current folder must not become part of the program.
                [sys.executable, "-P", "-m", PROGRAM, str(listen), str(self._slot)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=quiet,
                env=environment,
                pass_fds=(listen,),
                start_new_session=True,  # Ctrl-C is for the command, and what it starts can be ended with it
            )
        except OSError as error:
            raise BatchError(f"no worker can be started ({error.strerror})", code="WORKER_START") from error
        finally:
            os.close(listen)
        self._rest = b""

    def run(self, settings: str, study: str) -> Outcome:
        """Let the worker do one study (both as `medseg.batch.job.encode` writes them).

        Raises
        ------
        MedsegError : the run cannot go on: OUT cannot be written, the model cannot be loaded, no worker can start.
        """
        request = json.dumps([settings, study]).encode("ascii") + b"\n"
        for _ in range(STARTS):
            if self._closed:
                return _death("died", "")
            self.start()
            with contextlib.suppress(OSError):  # it just died, which `_follow` finds out
                self._send(request)
            outcome = self._follow()
            if outcome is not None:
                return outcome
        raise BatchError(
            f"workers end before they begin, {STARTS} times in a row; MEDSEG_DEBUG=1 shows what they say",
            code="WORKER_START",
        )

    def close(self) -> None:
        """End the process at once, for good; what it was doing ends as a death."""
        self._closed = True
        self._end()

    def _send(self, request: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(request)
        self._process.stdin.flush()

    def _follow(self) -> Outcome | None:
        """Wait for the end of a study; None if the worker ended before it began it."""
        stage, source, began = "", "", time.monotonic()
        while True:
            message = self._message()
            if message is None:
                self._end()
                return None if stage in ("", "loading") and not self._closed else _death("died", source)
            if "stop" in message:
                raise _error(message["stop"])
            if "outcome" in message:
                row = message["outcome"]
                entry = row["entry"] and Entry.model_validate(row["entry"])
                return Outcome(entry, row["fresh"])
            if "stage" in message:
                if message["stage"] in ("checking", "loading", "reading"):
                    began = time.monotonic()
                stage, source = message["stage"], message.get("input_digest", source)
            cause = self._excess(stage, time.monotonic() - began)
            if cause:
                self._end()
                return _death(cause, source)

    def _excess(self, stage: str, seconds: float) -> str:
        """Return what the worker takes too much of, "" while it does not."""
        loading = stage in ("", "loading")
        if self.limits.bytes is not None and self._memory() > self.limits.bytes:
            if loading:
                self._end()
                text = f"the model alone takes more than the {self.limits.bytes // _MIB} MiB of a worker; allow more"
                raise BatchError(text, code="MEMORY_LIMIT")
            return "memory"
        if loading and seconds > START_SECONDS:
            self._end()
            raise BatchError(f"a worker did not load the model in {START_SECONDS:.0f} s", code="WORKER_START")
        return "timeout" if not loading and self.limits.seconds and seconds > self.limits.seconds else ""

    def _memory(self) -> int:
        """Return the resident bytes of the process and of what it started."""
        if self._process is None:
            return 0
        total = 0
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self._process.pid)
            for process in (own, *own.children(recursive=True)):
                total += process.memory_info().rss
        return total

    def _message(self) -> dict[str, Any] | None:
        """Return the next message, nothing if none comes for a moment, None at the end."""
        process = self._process
        if process is None or process.stdout is None:
            return None
        while b"\n" not in self._rest:
            try:
                if not readable(process.stdout.fileno(), POLL_SECONDS):
                    return {}
                data = os.read(process.stdout.fileno(), 1 << 16)
            except (OSError, ValueError):  # closed by another thread
                return None
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _end(self) -> None:
        """Kill the process and what it started."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)


def _death(cause: str, source: str) -> Outcome:
    return Outcome(death=cause, input_digest=source)


def _error(text: str) -> MedsegError:
    error = decode(text)
    return error if isinstance(error, MedsegError) else BatchError(text, code="WORKER")
