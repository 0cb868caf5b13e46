"""STORE/decisions.jsonl: what was decided about models, one line each, never changed, each line sealing the one before.

A line is the canonical JSON of its content and of ``previous``, the SHA-256 of the line before it (64 zeros for the
first): whoever changes, removes or moves a line breaks the chain. It names no path and no patient.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medseg.errors import ExportError, RetrainingError
from medseg.files import canonical_json

LOG = "decisions.jsonl"
FIRST = "0" * 64
STORE_SECONDS = 30.0
"""How long a command waits for another one that is moving aliases."""


@dataclass(frozen=True)
class Decision:
    """One line.

    Attributes
    ----------
    number : from 1.
    sha256 : of the line; the next line holds it.
    content : the line itself: at, event, model, aliases (name -> version or null), numbers and digests.
    """

    number: int
    sha256: str
    content: Mapping[str, Any]


def read_decisions(store: Path) -> list[Decision]:
    """Return all decisions after verifying the chain; empty where none was ever made.

    A last line without its end was cut off by a crash before it had any effect; it does not count.

    Raises
    ------
    RetrainingError : LOG_TAMPERED, naming the first line that does not fit.
    """
    file = store / LOG
    raw = file.read_bytes() if file.exists() else b""
    found: list[Decision] = []
    previous = FIRST
    for number, line in enumerate(raw.split(b"\n")[:-1], start=1):
        try:
            content = json.loads(line)
            fits = content["previous"] == previous and content["number"] == number and canonical_json(content) == line
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise RetrainingError(
                f"{file}:{number}: this line does not follow from the one before it: the log was changed after it was "
                "written. No model is promoted or taken back until it is restored from a backup (its SHA-256 sums "
                "stand as the tag retraining.decision in the MLflow runs).",
                code="LOG_TAMPERED",
            )
        previous = hashlib.sha256(line).hexdigest()
        found.append(Decision(number, previous, content))
    return found


def append_decision(store: Path, content: Mapping[str, Any]) -> Decision:
    """Seal `content` into the log; only with the store locked.

    Raises
    ------
    RetrainingError : LOG_TAMPERED.
    ExportError : it cannot be written; the log then still is what it was.
    """
    known = read_decisions(store)
    previous = known[-1].sha256 if known else FIRST
    number = len(known) + 1
    full = {**content, "number": number, "previous": previous, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    line = canonical_json(full)
    try:
        store.mkdir(parents=True, exist_ok=True)
        _append(store / LOG, line + b"\n")
    except OSError as error:
        raise ExportError(
            f"{LOG}: the decision cannot be written ({error.strerror}); nothing was promoted. Free space, then run the "
            "same command again.",
            code="DISK_FULL" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "NOT_WRITABLE",
        ) from error
    return Decision(number, hashlib.sha256(line).hexdigest(), full)


def _append(file: Path, line: bytes) -> None:
    """Write a line after the last whole one; when that fails, leave nothing of it."""
    with open(file, "ab", buffering=0) as handle:
        whole = file.read_bytes().rfind(b"\n") + 1
        handle.truncate(whole)
        try:
            if handle.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle.fileno())
        except OSError:
            handle.truncate(whole)
            raise


@contextmanager
def locked(file: Path, *, seconds: float, what: str) -> Iterator[None]:
    """Hold a lock that the system releases when the process ends, however it ends.

    Raises
    ------
    RetrainingError : LOCKED, another process holds it for longer than `seconds`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(file, timeout=seconds).acquire()
    except Timeout as error:
        raise RetrainingError(
            f"{file}: another process is {what}; wait for it, then run the same command again", code="LOCKED"
        ) from error
    with lock:
        yield
