"""One tracked run: every call goes to MLflow, or to the spool when MLflow does not answer. It never fails the work."""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from medseg.errors import MedsegError
from medseg.tracking import spool
from medseg.tracking.door import TrackingRefusedError, TrackingUnreachableError, artifact_location, connect, translated
from medseg.tracking.operations import OPERATIONS, PENDING, open_run

_log = logging.getLogger("medseg")

Status = Literal["FINISHED", "FAILED", "KILLED"]


def start(folder: Path, *, experiment: str, run_name: str, run_id: str | None = None, enabled: bool = True) -> Tracker:
    """Begin a run, or reopen the one with `run_id` to go on or to add results.

    Parameters
    ----------
    folder : where ``mlflow.db``, ``mlartifacts`` and the spool lie; made when absent.
    experiment, run_name : as MLflow shows them; must hold nothing that names a patient.
    run_id : a former ``Tracker.run_id``, also one that began with the store dead. A run that had ended well stays
        ended, one that failed is running again; an id that the store does not know makes a new run, with a warning.
    enabled : False gives a tracker that does nothing (other ranks of a distributed training, ``--no-track``).

    A dead store is found within seconds, answered by one warning, and the calls wait on disk. When it answers,
    calls that waited in `folder` are sent first.
    """
    pending = run_id is not None and run_id.startswith(PENDING)
    run = {
        "key": run_id.removeprefix(PENDING) if run_id is not None and pending else uuid.uuid4().hex,
        "run_id": None if pending else run_id,
        "experiment": experiment,
        "name": run_name,
        "at": _now(),
    }
    tracker = Tracker(folder, run, enabled=enabled)
    if enabled:
        tracker._open()
    return tracker


class Tracker:
    """A run being recorded; made by `start`. Methods may be called from several threads and never raise for MLflow.

    As a context manager it ends the run: FINISHED, FAILED after an exception, KILLED after Ctrl-C.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], *, enabled: bool) -> None:
        self._folder = folder
        self._run = dict(run)
        self._enabled = enabled
        self._client: Any = None
        self._lost = False
        self._lock = threading.Lock()

    @property
    def run_id(self) -> str | None:
        """MLflow's id; ``pending-…`` while the store is dead (`start` understands it later); None when disabled."""
        if not self._enabled:
            return None
        return str(self._run["run_id"] or PENDING + self._run["key"])

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings; nested mappings become dotted names, values text of at most 6000 characters."""
        self._do("params", values=_flat(values))

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Record numbers of one `step` (epoch); NaN and infinite ones are left out."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if finite:
            self._do("metrics", values=finite, step=int(step), at=_now())

    def tags(self, values: Mapping[str, Any]) -> None:
        """Record labels that may change later."""
        self._do("tags", values=_flat(values))

    def dataset(self, name: str, digest: str, context: str) -> None:
        """Record which data were used: a name, the SHA-256 of the manifest, and for what (training, test, …)."""
        self._do("dataset", name=name, digest=digest, context=context)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record `rows` as the table ``<name>.json``, replacing an earlier one; a missing or NaN cell is null."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        self._do("table", name=name, columns=columns, data=[[_cell(row.get(c)) for c in columns] for row in rows])

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file, or a folder with all in it, under `folder` of the run."""
        if self._exists(path):
            self._do("artifact", path=str(path), folder=folder)

    def text(self, text: str, name: str) -> None:
        """Record `text` as the file `name`."""
        self._do("text", text=text, name=name)

    def register(
        self, model_name: str, bundle: Path, *, alias: str | None = None, tags: Mapping[str, Any] | None = None
    ) -> int | None:
        """Record a bundle (file or folder) and make a version of `model_name` from it; `alias` then names it.

        Returns the version; None when the store is dead (the call waits), refuses, or tracking is disabled.
        The same bundle registered again by the same run is the same version.
        """
        if not self._exists(bundle):
            return None
        version = self._do(
            "register", model=model_name, path=str(bundle), alias=alias, tags=_flat(tags or {}), at=_now()
        )
        return None if version is None else int(version)

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run; a reopened run that had ended keeps its status and times."""
        self._do("finish", status=status, at=_now())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _open(self) -> None:
        try:
            client = connect(self._folder)
            if spool.waiting(self._folder):
                spool.replay(self._folder, client)
            with translated():
                self._run["run_id"] = open_run(client, {**self._run, "location": artifact_location(self._folder)})
            self._client = client
        except (MedsegError, OSError) as error:
            self._lose(error)
            self._wait("tags", {"values": {}})  # so that the run exists later even if nothing follows

    def _do(self, operation: str, **arguments: Any) -> Any:
        if not self._enabled:
            return None
        client = self._client
        if client is not None:
            try:
                with translated():
                    return OPERATIONS[operation](client, self._run["run_id"], **arguments)
            except TrackingRefusedError as error:
                _log.warning("Not tracked (%s). %s", operation, error)
                return None
            except TrackingUnreachableError as error:
                self._lose(error)
        self._wait(operation, arguments)
        return None

    def _lose(self, error: Exception) -> None:
        with self._lock:
            known, self._lost, self._client = self._lost, True, None
        if not known:
            _log.warning(
                "%s The run goes on; what it would track waits in mlflow-spool.jsonl and is sent by the next tracked "
                "command in this folder, or by medseg.tracking.sync(folder).",
                error,
            )

    def _wait(self, operation: str, arguments: Mapping[str, Any]) -> None:
        if operation == "register":
            arguments = {**arguments, "late": True}
        try:
            spool.append(self._folder, self._run, operation, arguments)
        except OSError as error:
            self._enabled = False
            _log.warning("Tracking stops here: calls cannot be kept on disk (%s).", error.strerror or error)

    def _exists(self, path: Path) -> bool:
        if self._enabled and not path.exists():
            _log.warning("Not tracked: %s does not exist.", path.name)
        return self._enabled and path.exists()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _cell(value: Any) -> Any:
    """Return `value` as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    item = getattr(value, "item", None)  # numpy scalars
    return _cell(item()) if item is not None else str(value)


def _now() -> int:
    """Return milliseconds since 1970 UTC, as MLflow counts."""
    return time.time_ns() // 1_000_000
