"""Tracking against a real ``mlflow server`` process, looked at through its REST interface as the browser does."""

from __future__ import annotations

import time

import pytest

from medseg import tracking
from medseg.tracking.operations import content_digest


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


def test_a_run_a_death_and_a_return(shop, mlflow_server, free_port, tracked, tmp_path, monkeypatch, caplog):
    port = free_port()
    store, artifacts = f"sqlite:///{shop / 'server.db'}", shop / "artifacts"
    with mlflow_server(store, artifacts, port) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        whole, cut = tracked.begin(tmp_path), tracked.begin(tmp_path)
        tracked.first_half(whole)
        tracked.second_half(whole, tmp_path)
        tracked.first_half(cut)
        assert tracked.look(uri, whole.run_id) == tracked.expected
        fetched = tracking.fetch(tmp_path, "models:/hippocampus@champion", tmp_path / "cache")
        assert content_digest(fetched) == content_digest(tracked.bundle(tmp_path))
        assert caplog.records == []

    begun = time.monotonic()
    tracked.second_half(cut, tmp_path)  # the server was killed
    assert time.monotonic() - begun < 10
    assert len(caplog.records) == 1

    with mlflow_server(store, artifacts, port) as uri:
        assert tracking.sync(tmp_path).refused == 0
        assert tracked.look(uri, cut.run_id) == {**tracked.expected, "champion": (2, True)}
        tracking.set_alias(tmp_path, "hippocampus", "champion", 1)
        assert tracking.version_by_alias(tmp_path, "hippocampus", "champion").run_id == whole.run_id
        tracking.delete_alias(tmp_path, "hippocampus", "champion")
        assert [v.aliases for v in tracking.list_versions(tmp_path)] == [(), ()]
    assert not (tmp_path / "mlflow.db").exists()


def test_a_server_over_the_folder_shows_what_was_recorded_without_one(mlflow_server, free_port, tracked, tmp_path):
    run = tracked.begin(tmp_path)
    tracked.first_half(run)
    tracked.second_half(run, tmp_path)
    with mlflow_server(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "mlartifacts", free_port()) as uri:
        assert tracked.look(uri, run.run_id) == tracked.expected
