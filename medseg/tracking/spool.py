"""Calls that wait on disk for a store that does not answer, and sending them later.

``<folder>/mlflow-spool.jsonl`` holds one call per line, each complete in itself,
``<folder>/mlflow-spool/files/<id>/<name>`` the artifacts of these calls, linked or copied, and
``<folder>/mlflow-spool/batch-<time>.jsonl`` calls being sent, or what remained when sending failed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.files import write_text
from medseg.tracking.door import (
    TrackingRefusedError,
    TrackingUnreachableError,
    alive,
    artifact_location,
    connect,
    translated,
)
from medseg.tracking.operations import OPERATIONS, open_run

_log = logging.getLogger("medseg")
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Synced:
    """What `sync` did: calls sent, refused for good (logged, not kept), and failed while the store was alive (kept)."""

    sent: int
    refused: int
    waiting: int = 0

    def __add__(self, other: Synced) -> Synced:
        return Synced(self.sent + other.sent, self.refused + other.refused, self.waiting + other.waiting)


def append(folder: Path, run: Mapping[str, Any], operation: str, arguments: Mapping[str, Any]) -> None:
    """Add one call; artifacts are kept as they are now.

    Raises
    ------
    OSError : the disk is full, the folder cannot be written, or another process holds it for 10 s.
    """
    if "path" in arguments:
        arguments = {**arguments, "path": _keep(folder, Path(arguments["path"]))}
    # The leading newline separates this call from one that a killed process left half written.
    line = "\n" + json.dumps({"run": dict(run), "do": operation, "with": dict(arguments)}) + "\n"
    with _lock(folder, "write", _LOCK_SECONDS), open(_file(folder), "a", encoding="utf-8") as handle:
        handle.write(line)


def waiting(folder: Path) -> bool:
    """Return whether `folder` holds calls that were not sent."""
    return _file(folder).is_file() or any(_home(folder).glob("batch-*.jsonl"))


def sync(folder: Path) -> Synced:
    """Send the calls that wait in `folder` to its store, oldest first; ``medseg.tracking.start`` does this too.

    Nothing is sent twice, also when an earlier attempt was interrupted. With no calls waiting, or while
    another process is sending them, it does nothing.

    Raises
    ------
    TrackingUnreachableError : the store does not answer (any more); the calls not yet sent still wait.
    """
    return replay(folder, connect(folder)) if waiting(folder) else Synced(0, 0)


def replay(folder: Path, client: Any) -> Synced:
    """Send the waiting calls through `client`."""
    from filelock import Timeout

    total = Synced(0, 0)
    try:
        with _lock(folder, "send", 0):
            _set_aside(folder)
            for batch in sorted(_home(folder).glob("batch-*.jsonl")):
                total += _send(folder, batch, client)
    except Timeout:
        return total
    if total.waiting:
        _log.warning("MLflow: %d calls still wait in mlflow-spool, the store failed on them.", total.waiting)
    if total.sent:
        _log.info("MLflow: %d calls that had waited were sent.", total.sent)
    return total


def _send(folder: Path, batch: Path, client: Any) -> Synced:
    """Send one file of calls; on any end the file holds what was not dealt with, or is gone."""
    lines = [line for line in batch.read_text(encoding="utf-8").splitlines() if line.strip()]
    ids: dict[str, str] = {}
    failed: list[str] = []
    sent = refused = position = 0
    try:
        for line in lines:
            try:
                _send_one(folder, line, client, ids)
                sent += 1
            except TrackingRefusedError as error:
                _log.warning("A call that waited for MLflow is dropped. %s", error)
                refused += 1
            except TrackingUnreachableError:
                if not alive(client):
                    raise
                failed.append(line)  # one bad call, or its artifact storage, must not hold up the others
            position += 1
    finally:
        rest = failed + lines[position:]
        if rest:
            write_text(batch, "\n".join(rest) + "\n")
        else:
            batch.unlink()
    return Synced(sent, refused, len(failed))


def _send_one(folder: Path, line: str, client: Any, ids: dict[str, str]) -> None:
    try:
        call = json.loads(line)
    except ValueError as error:
        raise TrackingRefusedError(f"its line of {len(line)} characters was cut when its process ended") from error
    run, operation, arguments = {**call["run"], "location": artifact_location(folder)}, call["do"], call["with"]
    kept = _home(folder) / arguments["path"] if "path" in arguments else None
    if kept is not None:
        arguments = {**arguments, "path": str(kept)}
    with translated():
        if run["key"] not in ids:
            ids[run["key"]] = open_run(client, run)
        OPERATIONS[operation](client, ids[run["key"]], **arguments)
    if kept is not None:
        shutil.rmtree(kept.parent)


def _keep(folder: Path, path: Path) -> str:
    """Link or copy `path` into the spool; return its place there. Links cost nothing and outlive a replaced file."""
    place = Path("files") / uuid.uuid4().hex / path.name
    target = _home(folder) / place
    target.parent.mkdir(parents=True)
    if path.is_dir():
        shutil.copytree(path, target, copy_function=_link_or_copy)
    else:
        _link_or_copy(str(path), str(target))
    return place.as_posix()


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def _set_aside(folder: Path) -> None:
    """Take the calls out of reach of those who still add some."""
    with _lock(folder, "write", _LOCK_SECONDS):
        if _file(folder).is_file():
            os.replace(_file(folder), _home(folder) / f"batch-{time.time_ns():020d}.jsonl")


def _lock(folder: Path, name: str, seconds: float) -> Any:
    from filelock import FileLock

    _home(folder).mkdir(parents=True, exist_ok=True)
    return FileLock(_home(folder) / f"{name}.lock", timeout=seconds)


def _file(folder: Path) -> Path:
    return folder / "mlflow-spool.jsonl"


def _home(folder: Path) -> Path:
    return folder / "mlflow-spool"
