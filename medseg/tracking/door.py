"""Which MLflow store, is it alive, and a client for it that fails fast."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import socket
import sqlite3
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medseg.errors import ConfigError
from medseg.files import PARTIAL_PREFIX

PROBE_SECONDS = 3.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}

# MLflow's own defaults (120 s, 7 retries) would hold a training run for many minutes when a server dies.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
}
_TELEMETRY_OFF = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}

# What these say at lower levels is about tables and retries; what matters is said once, by `medseg`.
_QUIET = {
    "mlflow": logging.WARNING,
    "mlflow.store.db.utils": logging.CRITICAL,
    "alembic": logging.WARNING,
    "urllib3.connectionpool": logging.ERROR,
}
# MLflow statuses below 500 that a later attempt can cure: log-in, time-out, conflict of writers, too many requests.
_WORTH_REPEATING = {401, 403, 408, 429}


class TrackingUnreachableError(ConfigError):
    """The store does not answer or cannot be written; a later attempt may succeed."""

    code = "TRACKING_UNREACHABLE"


class TrackingRefusedError(ConfigError):
    """The store answered no; the same call would be refused again."""

    code = "TRACKING_REFUSED"


def tracking_uri(folder: Path) -> str:
    """Return ``MLFLOW_TRACKING_URI`` if set, else the absolute SQLite URI of ``<folder>/mlflow.db``."""
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    path = (folder.resolve() / "mlflow.db").as_posix()
    if "?" in path or "%" in path:  # MLflow uses the path quoted in one place and not in another
        raise TrackingUnreachableError(
            "MLflow cannot use a database in a folder whose path holds ? or %; rename it or set MLFLOW_TRACKING_URI."
        )
    return f"sqlite:///{path}"


def artifact_location(folder: Path) -> str | None:
    """Return where a new experiment keeps artifacts; None leaves the choice to the server."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    return (folder.resolve() / "mlartifacts").as_uri()


def store_exists(folder: Path) -> bool:
    """Return False when nothing was ever tracked here, so that asking does not create a database."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or (folder / "mlflow.db").is_file()


def connect(folder: Path) -> Any:
    """Return an ``MlflowClient`` whose store has answered one call.

    Raises
    ------
    TrackingUnreachableError : no answer; after 3 s at most when the host is dead, and after
        ``MLFLOW_HTTP_REQUEST_TIMEOUT`` (10 s unless set) times two when it accepts but stays silent.
    """
    uri = tracking_uri(folder)
    file = Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None
    if file is None:
        _knock(uri)
    else:
        _open_sqlite(file)
    os.environ.update(_TELEMETRY_OFF)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with translated():
        import mlflow.tracking  # sets its own log levels when imported, so before the next line

        for name, level in _QUIET.items():
            logging.getLogger(name).setLevel(level)
        if file is not None and not file.is_file():
            _create_sqlite(file)
        client = mlflow.tracking.MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


def alive(client: Any) -> bool:
    """Return whether the store answers a simple question."""
    try:
        with translated():
            client.search_experiments(max_results=1)
    except ConfigError:
        return False
    return True


@contextmanager
def translated() -> Iterator[None]:
    """Turn whatever MLflow, its database and its storage plug-ins raise into the two errors above."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        status = _status(error)
        message = _redacted(f"{type(error).__name__}: {error}")
        if status < 500 and status not in _WORTH_REPEATING:
            raise TrackingRefusedError(f"MLflow refused: {message}") from error
        raise TrackingUnreachableError(f"MLflow store {_redacted(_store_name())} does not answer: {message}") from error


def _status(error: Exception) -> int:
    if isinstance(error, FileNotFoundError):
        return 404
    code = getattr(error, "get_http_status_code", None)
    return int(code()) if code is not None else 500


def _store_name() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or "mlflow.db"


def _redacted(text: str) -> str:
    """Take passwords out of URLs, and keep one line of readable length."""
    first_line = text.strip().splitlines()[0]
    return re.sub(r"//[^/@\s]+@", "//***@", first_line)[:400]


def _open_sqlite(file: Path) -> None:
    """Open the file once, because MLflow repeats a failing open for 102 s (measured, 3.17.2)."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            with closing(sqlite3.connect(file, timeout=PROBE_SECONDS)) as database:
                database.execute("PRAGMA schema_version")
        elif file.exists() or not os.access(file.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "not a file, or its folder is not writable")
    except (OSError, sqlite3.Error) as error:
        raise TrackingUnreachableError(f"MLflow database {file.name} cannot be opened ({error}).") from error


def _create_sqlite(file: Path) -> None:
    """Build the tables in a file aside, then give it its name.

    Of processes that begin together in a new folder all but one fail in MLflow's migrations otherwise (measured).
    """
    from mlflow.tracking import MlflowClient

    built, finished = (file.with_name(f"{PARTIAL_PREFIX}{uuid.uuid4().hex[:8]}.db") for _ in range(2))
    try:
        MlflowClient(tracking_uri=f"sqlite:///{built.as_posix()}").search_experiments(max_results=1)
        shutil.copyfile(built, finished)  # MLflow keeps connections to the one that it built
        try:
            os.link(finished, file)  # unlike a rename it never replaces what another process began to fill
        except FileExistsError:
            return
        except OSError:  # a file system without links
            if not file.exists():
                os.replace(finished, file)
    finally:
        built.unlink(missing_ok=True)
        finished.unlink(missing_ok=True)


def _knock(uri: str) -> None:
    """Try the server's port, name look-up included, within `PROBE_SECONDS`; stores without a host pass."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port or _PORTS.get(parts.scheme.partition("+")[0])
    except ValueError as error:
        raise TrackingUnreachableError(
            f"MLFLOW_TRACKING_URI={_redacted(uri)}: {error}; use http://HOST:PORT."
        ) from error
    if not host or port is None or _behind_proxy(parts.scheme, host):
        return
    failure: list[str] = [f"no answer in {PROBE_SECONDS:g} s"]

    def knock() -> None:
        try:
            socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
            failure.clear()
        except OSError as error:
            failure[:] = [error.strerror or str(error)]

    # In a thread because a name look-up has no time limit of its own.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if failure:
        raise TrackingUnreachableError(f"MLflow server {host}:{port} does not answer ({failure[0]}).")


def _behind_proxy(scheme: str, host: str) -> bool:
    return scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
