"""Read many DICOM headers: in this process while there are few, then in several.

Whether there are few is measured, not counted: reading begins here, and only if what is left would still take seconds
are processes started (each costs half a second of one core). A worker that dies or hangs on a file loses nothing but
that file, which then counts as damaged. They are programs of their own that talk JSON over pipes: nothing is forked
beside threads, nothing is pickled, and no script of a user is imported a second time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from medseg.readers.dicom_damage import Damage, examine, is_uid
from medseg.readers.dicom_header import PARSE_ERRORS, Header, may_be_slice, quiet, read_header
from medseg.readers.dicom_index import is_image, is_sized

Outcome = Header | Damage | None
"""Of one file; None where it is not DICOM."""

PATIENCE, WORTH = 0.5, 3.0
"""Seconds of reading here before processes are thought of, and seconds that must be left to make them worth it."""
MOST_WORKERS = 16
BATCH = 128
"""Files that a worker is given at once."""
BATCH_SECONDS, FILE_SECONDS, START_SECONDS = 120.0, 30.0, 30.0
"""After these a worker counts as hanging: with a batch, with one file, while it starts."""


def read_one(path: Path) -> Outcome:
    """Read one file's header; call inside `quiet`."""
    try:
        header = read_header(path)
    except PermissionError:
        return Damage(path, unread=True) if may_be_slice(path.name) else None
    except PARSE_ERRORS:
        return examine(path)
    if header is not None and is_image(header) and not (is_sized(header) and is_uid(header.series_uid)):
        return examine(path)  # pydicom takes what is there of a file that ends in its header, half a UID too
    return header


def read_all(files: Sequence[Path], *, workers: int | None = None) -> list[Outcome]:
    """Read the headers of `files`; the answer has their order, whoever read them.

    Parameters
    ----------
    workers : processes from the first file on; unless told, as many as pay, which is none for small inputs.
    """
    found: list[Outcome] = []
    with quiet():
        if workers is None:
            workers = _read_here(files, found)
        rest = files[len(found) :]
        return found + (_read_there(rest, workers) if workers and rest else [read_one(path) for path in rest])


def _read_here(files: Sequence[Path], found: list[Outcome]) -> int:
    """Fill `found` from `files` until it is known that processes pay; return how many (0: all is read)."""
    began, worked, cores = time.perf_counter(), time.process_time(), _cores()
    for number, path in enumerate(files, start=1):
        found.append(read_one(path))
        if number % BATCH:
            continue
        spent = time.perf_counter() - began
        if spent > PATIENCE and spent / number * (len(files) - number) > WORTH:
            # Where most of the time is waiting for a disk or server, more may wait at once.
            waiting = spent / max(time.process_time() - worked, 1e-3)
            workers = min(MOST_WORKERS, int(cores * max(1.0, waiting)))
            if workers > 1:
                return workers
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_there(files: Sequence[Path], workers: int) -> list[Outcome]:
    """Share `files` among processes; what none of them answers is read here."""
    batches = [files[at : at + BATCH] for at in range(0, len(files), BATCH)]
    answers: list[list[Outcome] | None] = [None] * len(batches)
    numbers = iter(range(len(batches)))
    lock = threading.Lock()

    def serve_one() -> None:
        with contextlib.closing(_Worker()) as worker:
            while worker.works:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                answers[number] = worker.read(batches[number])

    threads = [threading.Thread(target=serve_one, daemon=True) for _ in range(min(workers, len(batches)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [
        outcome
        for batch, answer in zip(batches, answers, strict=True)
        for outcome in ([read_one(path) for path in batch] if answer is None else answer)
    ]


class _Worker:
    """One process that reads headers; it is started again when a file was too much for it.

    Attributes
    ----------
    works : False when it cannot be started: then its caller reads by itself.
    """

    def __init__(self) -> None:
        self.works = True
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def read(self, batch: Sequence[Path]) -> list[Outcome] | None:
        """Return the outcomes of a batch, None if no process can be had."""
        outcomes = self._ask(batch, BATCH_SECONDS)
        if outcomes is not None:
            return outcomes
        outcomes = []
        for path in batch:  # one of them is the culprit
            self._start()
            if not self.works:
                return None
            answer = self._ask([path], FILE_SECONDS)
            outcomes += [Damage(path)] if answer is None else answer
        return outcomes

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        if self._process is not None:
            return
        # -P: a file called json.py in the current folder must not become part of the program.
        command = [sys.executable, "-P", "-m", __name__]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        except OSError:
            self.works = False
        else:
            self.works = self._line(START_SECONDS) == b"ready\n"

    def _ask(self, batch: Sequence[Path], seconds: float) -> list[Outcome] | None:
        """Send a batch and return the answer; None if the process died or hung, and then it is gone."""
        if self._process is None or self._process.stdin is None:
            return None
        request = b"\0".join(os.fsencode(path) for path in batch)
        try:
            self._process.stdin.write(len(request).to_bytes(4, "big") + request)
            self._process.stdin.flush()
            answer = json.loads(self._line(seconds))
        except (OSError, ValueError):
            self.close()
            return None
        return [_decoded(value, path) for value, path in zip(answer, batch, strict=True)]

    def _line(self, seconds: float) -> bytes:
        """Return the next line of the process, which is killed when it takes too long; b"" when it is dead."""
        if self._process is None or self._process.stdout is None:
            return b""
        watch = threading.Timer(seconds, self._process.kill)
        watch.start()
        try:
            return self._process.stdout.readline()
        finally:
            watch.cancel()


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Be a worker: answer each list of paths with a line of JSON, until there are no more."""
    answers.write(b"ready\n")
    answers.flush()
    with quiet():
        while len(size := requests.read(4)) == 4:
            paths = requests.read(int.from_bytes(size, "big")).split(b"\0")
            outcomes = [_encoded(read_one(Path(os.fsdecode(path)))) for path in paths]
            answers.write(json.dumps(outcomes).encode("ascii") + b"\n")
            answers.flush()


def _encoded(outcome: Outcome) -> Any:
    """Return plain values without the path, which the other side knows."""
    if outcome is None:
        return None
    values = {name: _encode_value(value) for name, value in vars(outcome).items() if name != "path"}
    return [type(outcome).__name__, values]


def _encode_value(value: Any) -> Any:
    if isinstance(value, tuple) and value and isinstance(value[0], Header):
        return [_encoded(frame) for frame in value]
    return value


def _decoded(value: Any, path: Path) -> Outcome:
    if value is None:
        return None
    kind, values = value
    known = {name: _decode_value(each, path) for name, each in values.items()}
    return Header(path=path, **known) if kind == "Header" else Damage(path=path, **known)


def _decode_value(value: Any, path: Path) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(_decoded(each, path) if isinstance(each, list) and each[:1] == ["Header"] else each for each in value)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
