from __future__ import annotations

import logging
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from medseg import tracking
from medseg.tracking import operations
from medseg.tracking.door import TrackingUnreachableError


def begin(folder: Path, **options) -> tracking.Tracker:
    return tracking.start(folder, experiment="e", run_name="r", **options)


def journey(folder: Path, scratch: Path, bundle: Path, **options) -> str | None:
    """Every operation once or more."""
    picture = scratch / "curves.png"
    with begin(folder, **options) as run:
        run.params({"epochs": 2})
        for epoch in range(2):
            picture.write_bytes(b"%d" % epoch)
            run.metrics({"loss": 1.0 - epoch}, step=epoch)
        run.tags({"device": "cpu"})
        run.dataset("d", "ab" * 32, "training")
        run.table("dice", [{"case": "a", "dice": 0.5}])
        run.artifact(picture, "plots")
        run.text("x", "plan.yaml")
        run.register("m", bundle, alias="challenger", tags={"dice": 0.5})
    return run.run_id


def contents(folder: Path) -> dict:
    """All that a store holds, without ids and times."""
    queries = {
        "runs": "select name, status, lifecycle_stage from runs",
        "params": "select key, value from params",
        "metrics": "select key, value, step from metrics",
        "tags": "select key, value from tags where key != 'medseg.run'",
        "datasets": "select name, digest, dataset_source_type, dataset_source from datasets",
        "inputs": "select count(*) from inputs",
        "versions": "select name, version from model_versions",
        "version tags": "select name, version, key, value from model_version_tags where key != 'medseg.registered'",
        "aliases": "select name, alias, version from registered_model_aliases",
        "experiments": "select name from experiments",
    }
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        found = {name: sorted(database.execute(query).fetchall()) for name, query in queries.items()}
    files = [p for p in (folder / "mlartifacts").rglob("*") if p.is_file()]
    found["files"] = sorted(("/".join(p.parts[len(folder.parts) + 3 :]), p.read_bytes()) for p in files)
    return found


@pytest.fixture
def expected(tmp_path, empty_store, bundle) -> dict:
    """What the journey leaves in a store that is alive."""
    live = tmp_path / "live"
    live.mkdir()
    shutil.copyfile(empty_store, live / "mlflow.db")
    journey(live, tmp_path, bundle)
    return contents(live)


def journey_with_dead_server(folder, tmp_path, bundle, dead_server) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", dead_server)
        return journey(folder, tmp_path, bundle)


def test_a_dead_server_costs_seconds_and_one_warning(folder, tmp_path, bundle, dead_server, caplog):
    begun = time.monotonic()
    run_id = journey_with_dead_server(folder, tmp_path, bundle, dead_server)
    assert time.monotonic() - begun < 3
    assert run_id.startswith("pending-")
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning.name == "medseg"
    assert "does not answer" in warning.getMessage()
    assert "mlflow-spool.jsonl" in warning.getMessage()
    assert str(tmp_path) not in warning.getMessage()


def test_sent_later_equals_sent_at_once(folder, tmp_path, bundle, dead_server, expected):
    pending = journey_with_dead_server(folder, tmp_path, bundle, dead_server)
    (tmp_path / "curves.png").unlink()
    shutil.rmtree(bundle)  # the spool has its own copies
    assert tracking.sync(folder) == tracking.Synced(sent=11, refused=0)
    assert contents(folder) == expected
    assert not (folder / "mlflow-spool.jsonl").exists()
    assert not [p for p in (folder / "mlflow-spool").rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert tracking.sync(folder) == tracking.Synced(0, 0)

    again = begin(folder, run_id=pending)  # an id written down while the server was dead
    assert not again.run_id.startswith("pending-")
    assert len(contents(folder)["runs"]) == 1


@pytest.mark.parametrize("half_done", [False, True])
def test_sending_interrupted_at_every_call(folder, tmp_path, bundle, dead_server, expected, monkeypatch, half_done):
    journey_with_dead_server(folder, tmp_path, bundle, dead_server)
    real, broken = dict(operations.OPERATIONS), 0

    def flaky(name):
        def call(client, run_id, **arguments):
            nonlocal broken
            broken += 1
            if broken % 2 == 0:
                return real[name](client, run_id, **arguments)
            if half_done:
                real[name](client, run_id, **arguments)  # done, but the answer was lost
            raise ConnectionError("gone")

        return call

    monkeypatch.setattr("medseg.tracking.spool.alive", lambda client: False)
    monkeypatch.setattr("medseg.tracking.spool.OPERATIONS", {name: flaky(name) for name in real})
    attempts = 0
    while True:
        attempts += 1
        try:
            tracking.sync(folder)
            break
        except TrackingUnreachableError:
            continue
    assert attempts == 12
    assert contents(folder) == expected


def test_one_bad_call_does_not_hold_up_the_others(folder, tmp_path, bundle, dead_server, expected, monkeypatch, caplog):
    journey_with_dead_server(folder, tmp_path, bundle, dead_server)

    def broken(*_: object, **__: object) -> None:
        raise ImportError("no module named boto3")

    with monkeypatch.context() as patch:
        patch.setattr("medseg.tracking.spool.OPERATIONS", {**operations.OPERATIONS, "artifact": broken})
        assert tracking.sync(folder) == tracking.Synced(sent=10, refused=0, waiting=1)
    assert "1 calls still wait" in caplog.text
    assert contents(folder) != expected
    assert tracking.sync(folder) == tracking.Synced(sent=1, refused=0)
    assert contents(folder) == expected


def test_a_server_that_dies_during_the_run(folder, tmp_path, bundle, expected, monkeypatch, caplog):
    with begin(folder) as run:
        run.params({"epochs": 2})
        run.metrics({"loss": 1.0}, step=0)
        run_id = run.run_id
        monkeypatch.setattr(run._client, "log_batch", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("gone")))
        (tmp_path / "curves.png").write_bytes(b"1")
        run.metrics({"loss": 0.0}, step=1)
        run.tags({"device": "cpu"})
        run.dataset("d", "ab" * 32, "training")
        run.table("dice", [{"case": "a", "dice": 0.5}])
        run.artifact(tmp_path / "curves.png", "plots")
        run.text("x", "plan.yaml")
        assert run.register("m", bundle, alias="challenger", tags={"dice": 0.5}) is None
        assert run.run_id == run_id
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    again = begin(folder, run_id=run_id)  # the next command sends what waited
    assert again.run_id == run_id
    assert contents(folder) == expected


def test_a_silent_server_does_not_hold_the_run(folder, silent_server, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    begun = time.monotonic()
    with begin(folder) as run:
        for epoch in range(20):
            run.metrics({"loss": 1.0}, step=epoch)
    assert time.monotonic() - begun < 8
    assert len(caplog.records) == 1


@pytest.mark.parametrize("uri", ["http://name.invalid:5000", "http://127.0.0.1:99999", "nonsense://x", "http://[::1"])
def test_uris_that_lead_nowhere(folder, uri, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    begun = time.monotonic()
    with begin(folder) as run:
        run.metrics({"loss": 1.0}, step=0)
    assert time.monotonic() - begun < 8
    assert "The run goes on" in caplog.text
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.sync(folder).refused == 0
    assert contents(folder)["metrics"] == [("loss", 1.0, 0)]


def test_passwords_stay_out_of_the_log(folder, silent_server, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server.replace("//", "//user:secret@"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with begin(folder):
        pass
    assert "does not answer" in caplog.text
    assert "secret" not in caplog.text
    assert "secret" not in (folder / "mlflow-spool.jsonl").read_text()


def test_a_damaged_database_is_left_alone(tmp_path, caplog):
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    begun = time.monotonic()
    with begin(tmp_path) as run:
        run.metrics({"loss": 1.0}, step=0)
    assert time.monotonic() - begun < 3
    assert "file is not a database" in caplog.text
    assert (tmp_path / "mlflow.db").read_bytes() == b"not a database" * 100


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    begun = time.monotonic()
    with begin(tmp_path / "file" / "sub") as run:
        run.metrics({"loss": 1.0}, step=0)
        assert run.run_id is None
    assert time.monotonic() - begun < 3
    assert "Tracking stops here" in caplog.text


def test_a_line_cut_by_a_kill_costs_only_itself(folder, dead_server, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    run = begin(folder)
    run.metrics({"loss": 1.0}, step=0)
    with open(folder / "mlflow-spool.jsonl", "a") as handle:
        handle.write('{"run": {"key": "0')
    run.metrics({"loss": 2.0}, step=1)
    run.finish()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    caplog.clear()
    assert tracking.sync(folder) == tracking.Synced(sent=4, refused=1)
    assert "was cut" in caplog.text
    assert len(contents(folder)["metrics"]) == 2


def test_artifacts_are_kept_as_they_were(folder, tmp_path, dead_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    with begin(folder) as run:
        for version in ("old", "new"):
            fresh = tmp_path / "fresh"
            fresh.write_text(version)
            fresh.replace(tmp_path / "curves.png")
            run.artifact(tmp_path / "curves.png", version)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracking.sync(folder)
    assert contents(folder)["files"] == [("new/curves.png", b"new"), ("old/curves.png", b"old")]


def test_a_late_registration_does_not_take_an_alias_from_a_younger_model(folder, tmp_path, bundle, dead_server, caplog):
    journey_with_dead_server(folder, tmp_path, bundle, dead_server)
    aside = folder.parent / "aside"
    aside.mkdir()
    for name in ("mlflow-spool", "mlflow-spool.jsonl"):
        shutil.move(folder / name, aside / name)
    (bundle / "plan.yaml").write_text("younger")
    with begin(folder) as run:
        assert run.register("m", bundle, alias="challenger") == 1
    for name in ("mlflow-spool", "mlflow-spool.jsonl"):
        shutil.move(aside / name, folder / name)
    tracking.sync(folder)
    assert [(v.version, v.aliases) for v in tracking.list_versions(folder, "m")] == [(1, ("challenger",)), (2, ())]
    assert "challenger stays with version 1" in caplog.text


def test_registrations_that_waited_together_end_in_their_order(folder, bundle, dead_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    for text in ("one", "two"):
        (bundle / "plan.yaml").write_text(text)
        with begin(folder) as run:
            run.register("m", bundle, alias="challenger")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracking.sync(folder)
    assert [(v.version, v.aliases) for v in tracking.list_versions(folder, "m")] == [(1, ()), (2, ("challenger",))]


def test_two_runs_wait_side_by_side(folder, dead_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    runs = [begin(folder) for _ in range(2)]
    for epoch in range(3):
        for number, run in enumerate(runs):
            run.metrics({"loss": number}, step=epoch)
    runs[0].finish()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracking.sync(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    runs[1].metrics({"loss": 1}, step=3)  # still waiting on, after a first sync
    runs[1].finish()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracking.sync(folder)
    found = contents(folder)
    assert [status for _, status, _ in found["runs"]] == ["FINISHED", "FINISHED"]
    assert len(found["metrics"]) == 7
