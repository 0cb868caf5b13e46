"""Tracking as a hospital runs it: an MLflow server over a PostgreSQL database, either of which may die."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medseg import tracking
from medseg.tracking.operations import content_digest

USER = "medseg"


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL server on a port of this machine, which knows one user with a password."""

    programs: Path
    folder: Path
    port: int
    password: str

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://{USER}:{self.password}@127.0.0.1:{self.port}/postgres"

    def call(self, name: str, *arguments: object) -> None:
        """Run one of PostgreSQL's programs, as a user that is not root: the server refuses to be root."""
        become = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*become, str(self.programs / name), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=self.folder)
        assert done.returncode == 0, f"{name}: {done.stdout}\n{done.stderr}"

    def create(self) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password)
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres")
            shutil.chown(secret, "postgres")
        access = ("--auth", "scram-sha-256", "--pwfile", secret)
        self.call("initdb", "-D", self.folder / "data", "-U", USER, *access, "-E", "UTF8", "--no-locale", "--no-sync")

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories={self.folder}"
        log = self.folder / "log"
        self.call("pg_ctl", "-D", self.folder / "data", "-w", "-l", log, "-o", f"{options} -c fsync=off", "start")

    def stop(self) -> None:
        """End it as a failure of power would."""
        self.call("pg_ctl", "-D", self.folder / "data", "-m", "immediate", "stop")

    @property
    def running(self) -> bool:
        return (self.folder / "data" / "postmaster.pid").exists()

    def runs(self) -> dict[str, str]:
        """Return the state of every run, as the database has it."""
        import psycopg2

        with closing(psycopg2.connect(self.uri.replace("+psycopg2", ""))) as connection, connection.cursor() as cursor:
            cursor.execute("select run_uuid, status from runs")
            return dict(cursor.fetchall())


@pytest.fixture
def cluster(program: Callable[[str], str], free_port: Callable[[], int]) -> Iterator[Cluster]:
    """A fresh database; in /tmp itself, because the user postgres may not look into pytest's folders."""
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: make test-system installs it")
    homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian keeps the server off the PATH
    programs = homes[-1] if homes else Path(program("initdb")).resolve().parent
    with tempfile.TemporaryDirectory(prefix="medseg-pg-") as folder:
        made = Cluster(programs, Path(folder), free_port(), secrets.token_hex(12))
        made.create()
        made.start()
        try:
            yield made
        finally:
            if made.running:
                made.stop()


def test_a_server_over_postgresql(
    cluster: Cluster,
    mlflow_server: Any,
    free_port: Callable[[], int],
    tracked: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shop, port = tmp_path / "shop", free_port()
    shop.mkdir()
    with mlflow_server(cluster.uri, shop / "artifacts", port) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        whole, orphan, cut = (tracked.begin(tmp_path) for _ in range(3))
        tracked.first_half(whole)
        tracked.second_half(whole, tmp_path)
        assert tracked.look(uri, whole.run_id) == tracked.expected
        fetched = tracking.fetch(tmp_path, "models:/hippocampus@champion", tmp_path / "cache")
        assert content_digest(fetched) == content_digest(tracked.bundle(tmp_path))
        assert caplog.records == []
        running = dict.fromkeys((orphan.run_id, cut.run_id), "RUNNING")
        assert cluster.runs() == {whole.run_id: "FINISHED", **running}

        # The database dies, the server lives and says so.
        tracked.first_half(orphan)
        cluster.stop()
        goes_on(lambda: tracked.second_half(orphan, tmp_path), caplog)
        cluster.start()
        assert tracking.sync(tmp_path).refused == 0
        assert tracked.look(uri, orphan.run_id) == {**tracked.expected, "champion": (2, True)}
        tracked.first_half(cut)

    # The server dies, the database lives.
    goes_on(lambda: tracked.second_half(cut, tmp_path), caplog)
    with mlflow_server(cluster.uri, shop / "artifacts", port) as uri:
        assert tracking.sync(tmp_path).refused == 0
        assert tracked.look(uri, cut.run_id) == {**tracked.expected, "champion": (3, True)}
    assert sorted(path.name for path in tmp_path.rglob("*.db")) == [], "nothing is kept in SQLite"
    assert cluster.password not in caplog.text


def goes_on(work: Callable[[], None], caplog: pytest.LogCaptureFixture) -> None:
    """Do work whose store is dead: it takes no long time, and one line says what happened."""
    caplog.clear()
    begun = time.monotonic()
    work()
    assert time.monotonic() - begun < 40
    assert len(caplog.records) == 1
