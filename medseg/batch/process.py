"""One worker process as its guard sees it: started, written to, listened to, weighed, ended.

What it says on its standard error is kept until it reads its first study, so that a failed start can be explained.
Later words may come from a library that has looked into a patient's file: nobody keeps those.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any

import psutil

from medseg.batch.pipe import readable
from medseg.errors import BatchError

PROGRAM = "medseg.batch.child"
_MIB = 1 << 20
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 * _MIB), "MALLOC_TRIM_THRESHOLD_": str(64 * _MIB)}
"""For glibc: what is freed goes back to the system, so that a worker's peak is what it holds, and not what it held."""

WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""For libgomp, which torch brings: threads that wait for each other sleep. Unless told they spin, and where others use
the processors, too, they spin away the time of the very thread that they wait for."""
PUSH_SECONDS = 0.01
"""How long to listen before more of a message is written."""
WORDS = 300
"""Characters of the last line of a worker that could not start, which an error repeats."""


class Process:
    """A process that may not run yet, runs, or has ended; it can be started again.

    Parameters
    ----------
    slot : its number on this machine.
    threads : that its libraries may use; 0 leaves it to them.
    """

    def __init__(self, *, slot: int = 0, threads: int = 0) -> None:
        self._slot, self._threads = slot, threads
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._rest, self._unsent = b"", b""
        self._errors: IO[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Number of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it unless it runs.

        Raises
        ------
        BatchError : WORKER_START, the system lets no process begin.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.end()
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**ALLOCATOR, **WAITING, **os.environ, "PYTHONPATH": path}
        if self._threads:
            environment.setdefault("OMP_NUM_THREADS", str(self._threads))
        try:
            self._begin(environment)
        except OSError as error:
            raise BatchError(f"no worker can be started ({error.strerror})", code="WORKER_START") from error

    def _begin(self, environment: dict[str, str]) -> None:
        listen, lifeline = os.pipe()
        try:
            self._errors = None if os.environ.get("MEDSEG_DEBUG") else tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
            self._process = subprocess.Popen(
                # -P: a file called json.py in the current folder must not become part of the program.
                [sys.executable, "-P", "-m", PROGRAM, str(listen), str(self._slot)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                pass_fds=(listen,),
                start_new_session=True,  # Ctrl-C is for the command, and what it starts can be ended with it
            )
        except OSError:
            os.close(lifeline)
            raise
        finally:
            os.close(listen)
        self._lifeline, self._rest, self._unsent = lifeline, b"", b""
        assert self._process.stdin is not None, "it was asked for"
        os.set_blocking(self._process.stdin.fileno(), False)

    def send(self, message: Any) -> None:
        """Begin to write a line of JSON; what the pipe has no room for follows with each call of `message`.

        So nobody waits for a process that hangs: the headers of a large series fill a pipe. That it died is found out
        by who listens.
        """
        self._unsent += json.dumps(message).encode("ascii") + b"\n"
        self._push()

    def _push(self) -> None:
        """Write what the pipe has room for."""
        if self._unsent and self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # full for now, or its reader died
                while self._unsent:
                    self._unsent = self._unsent[os.write(self._process.stdin.fileno(), self._unsent) :]

    def message(self, seconds: float) -> dict[str, Any] | None:
        """Return its next message, nothing if none comes within `seconds`, None when it has ended."""
        process = self._process
        if process is None or process.stdout is None:
            return None
        self._push()
        while b"\n" not in self._rest:
            if not readable(process.stdout.fileno(), min(seconds, PUSH_SECONDS) if self._unsent else seconds):
                return {}
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def memory(self) -> int:
        """Return the resident bytes of the process and of what it started.

        Pages of files are left out: the system takes them back when it wants, and probabilities of a large image lie
        in one (medseg.batch.room).
        """
        if self._process is None:
            return 0
        total = 0
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self._process.pid)
            for process in (own, *own.children(recursive=True)):
                found = process.memory_info()
                total += found.rss - getattr(found, "shared", 0)
        return total

    def kill(self) -> None:
        """Kill it and what it started, from any thread; who listens finds out."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def end(self) -> str:
        """Kill it, give back all that it holds, and return how it ended and its last words, for a person."""
        with self._lock:
            process, self._process = self._process, None
            status, words = "", ""
            if process is not None:
                status = _ending(process)
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        with contextlib.suppress(OSError):
                            pipe.close()
            if self._errors is not None:
                words = _last_line(self._errors)
                self._errors.close()
            lifeline, self._lifeline, self._errors = self._lifeline, -1, None
            if lifeline >= 0:
                os.close(lifeline)
        return f"{status}, and said last: {words}" if words else status


def _ending(process: subprocess.Popen[bytes]) -> str:
    """Wait for the end of a process whose pipe is closed, kill what is left, and say how it ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.2)  # it may be about to tell its status
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    if code == -signal.SIGKILL:
        return "it was killed (SIGKILL), by somebody or by a system that is short of memory"
    return f"signal {signal.Signals(-code).name} ended it" if code < 0 else f"it ended with status {code}"


def _last_line(file: IO[bytes]) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - 4096))
    lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[:WORDS] if lines else ""
