"""Tracking against a real ``mlflow server`` process, looked at through its REST interface as the browser does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from medseg import tracking
from medseg.tracking.operations import content_digest

START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(store: Path, artifacts: Path, port: int) -> Iterator[str]:
    """Run a server over the SQLite file `store` until the block ends (or somebody kills it)."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{store}", "--artifacts-destination", str(artifacts)]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # four more processes that nothing here needs
    log = store.with_suffix(f".{port}.log")
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True, cwd=store.parent
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while not answers(f"{uri}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield uri
    finally:
        stop(process)


def stop(process: subprocess.Popen) -> None:
    """End the server and its workers: they are one process group of their own."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    finally:
        process.wait(10)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def look(uri: str, run_id: str) -> dict[str, Any]:
    """Collect what the browser would show of a run and of the registry."""
    api = f"{uri}/api/2.0/mlflow"
    run = ask(f"{api}/runs/get?run_id={run_id}")["run"]
    history = ask(f"{api}/metrics/get-history?run_id={run_id}&metric_key=dice/anterior")["metrics"]
    table = ask(f"{uri}/get-artifact?path=test_dice.json&run_uuid={run_id}")
    alias = ask(f"{api}/registered-models/alias?name=hippocampus&alias=champion")["model_version"]
    return {
        "status": run["info"]["status"],
        "params": {p["key"]: p["value"] for p in run["data"]["params"]},
        "tables": json.loads({t["key"]: t["value"] for t in run["data"]["tags"]}["mlflow.loggedArtifacts"]),
        "tags": {t["key"] for t in run["data"]["tags"]},
        "datasets": [(d["dataset"]["name"], d["tags"][0]["value"]) for d in run["inputs"]["dataset_inputs"]],
        "history": [(m["step"], m["value"]) for m in history],
        "table": table,
        "artifacts": {f["path"].split("-")[0] for f in ask(f"{api}/artifacts/list?run_id={run_id}")["files"]},
        "champion": (int(alias["version"]), alias["run_id"] == run_id),
    }


EXPECTED = {
    "status": "FINISHED",
    "params": {"plan.patch": "[64, 64, 64]"},
    "tables": [{"path": "test_dice.json", "type": "table"}],
    "tags": {
        "medseg.run", "mlflow.runName", "mlflow.loggedArtifacts", "medseg.dataset.training",
    },
    "datasets": [("hippocampus", "training")],
    "history": [(0, 0.0), (1, 0.5), (2, 1.0)],
    "table": {"columns": ["case", "dice"], "data": [["case_1", 0.5]]},
    "artifacts": {"plots", "plan.yaml", "test_dice.json", "model"},
    "champion": (1, True),
}  # fmt: skip


def first_half(run: tracking.Tracker) -> None:
    run.params({"plan": {"patch": [64, 64, 64]}})
    run.dataset("hippocampus", "ab" * 32, "training")
    run.metrics({"dice/anterior": 0.0}, step=0)


def second_half(run: tracking.Tracker, folder: Path) -> None:
    for epoch in (1, 2):
        run.metrics({"dice/anterior": epoch / 2}, step=epoch)
    run.table("test_dice", [{"case": "case_1", "dice": 0.5}])
    run.text("patch", "plan.yaml")
    picture = folder / "curves.png"
    picture.write_bytes(b"\x89PNG")
    run.artifact(picture, "plots")
    run.register("hippocampus", bundle(folder), alias="champion", tags={"dice": 0.5})
    run.finish()


def bundle(folder: Path) -> Path:
    place = folder / "6_model"
    place.mkdir(exist_ok=True)
    (place / "plan.yaml").write_text("patch")
    (place / "weights.safetensors").write_bytes(bytes(5000))
    return place


def begin(folder: Path, **options: Any) -> tracking.Tracker:
    return tracking.start(folder, experiment="hippocampus", run_name="seed 1", **options)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("server")


def test_a_run_a_death_and_a_return(shop, tmp_path, monkeypatch, caplog):
    port = free_port()
    store, artifacts = shop / "server.db", shop / "artifacts"
    with mlflow_server(store, artifacts, port) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        whole, cut = begin(tmp_path), begin(tmp_path)
        first_half(whole)
        second_half(whole, tmp_path)
        first_half(cut)
        assert look(uri, whole.run_id) == EXPECTED
        fetched = tracking.fetch(tmp_path, "models:/hippocampus@champion", tmp_path / "cache")
        assert content_digest(fetched) == content_digest(bundle(tmp_path))
        assert caplog.records == []

    begun = time.monotonic()
    second_half(cut, tmp_path)  # the server was killed
    assert time.monotonic() - begun < 10
    assert len(caplog.records) == 1

    with mlflow_server(store, artifacts, port) as uri:
        assert tracking.sync(tmp_path).refused == 0
        assert look(uri, cut.run_id) == {**EXPECTED, "champion": (2, True)}
        tracking.set_alias(tmp_path, "hippocampus", "champion", 1)
        assert tracking.version_by_alias(tmp_path, "hippocampus", "champion").run_id == whole.run_id
        tracking.delete_alias(tmp_path, "hippocampus", "champion")
        assert [v.aliases for v in tracking.list_versions(tmp_path)] == [(), ()]
    assert not (tmp_path / "mlflow.db").exists()


def test_a_server_over_the_folder_shows_what_was_recorded_without_one(tmp_path):
    run = begin(tmp_path)
    first_half(run)
    second_half(run, tmp_path)
    with mlflow_server(tmp_path / "mlflow.db", tmp_path / "mlartifacts", free_port()) as uri:
        assert look(uri, run.run_id) == EXPECTED
