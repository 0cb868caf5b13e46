from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from medseg import tracking
from medseg.errors import BundleError, ConfigError
from medseg.tracking.operations import content_digest


def register(folder: Path, bundle: Path, text: str, *, name: str = "hippocampus", alias: str | None = None) -> int:
    (bundle / "plan.yaml").write_text(text)
    with tracking.start(folder, experiment="e", run_name=text) as run:
        return run.register(name, bundle, alias=alias, tags={"dice": 0.8})


def aliases(folder: Path, name: str = "hippocampus") -> dict[int, tuple[str, ...]]:
    return {v.version: v.aliases for v in tracking.list_versions(folder, name)}


def test_asking_an_untouched_folder_makes_nothing(tmp_path):
    assert tracking.list_versions(tmp_path) == []
    assert tracking.version_by_alias(tmp_path, "m", "champion") is None
    with pytest.raises(BundleError, match="Models: none"):
        tracking.fetch(tmp_path, "models:/m@champion", tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_versions_and_aliases(folder, bundle):
    assert register(folder, bundle, "one", alias="champion") == 1
    assert register(folder, bundle, "two", alias="challenger") == 2
    assert register(folder, bundle, "other", name="liver", alias="champion") == 1
    assert register(folder, bundle, "quote", name="it's") == 1
    first, second = tracking.list_versions(folder, "hippocampus")
    assert (first.version, first.aliases, second.aliases) == (1, ("champion",), ("challenger",))
    assert first.tags["dice"] == "0.8"
    assert len(first.run_id) == 32
    assert abs(first.created - datetime.now(UTC)) < timedelta(minutes=1)
    assert [v.name for v in tracking.list_versions(folder)] == ["hippocampus", "hippocampus", "it's", "liver"]

    tracking.set_alias(folder, "hippocampus", "previous", 1)
    tracking.set_alias(folder, "hippocampus", "champion", 2)
    assert aliases(folder) == {1: ("previous",), 2: ("challenger", "champion")}
    tracking.delete_alias(folder, "hippocampus", "challenger")
    tracking.delete_alias(folder, "hippocampus", "challenger")
    assert tracking.version_by_alias(folder, "hippocampus", "champion").version == 2
    assert tracking.version_by_alias(folder, "hippocampus", "challenger") is None
    assert aliases(folder, "liver") == {1: ("champion",)}


def test_same_bundle_same_run_same_version(folder, bundle):
    with tracking.start(folder, experiment="e", run_name="r") as run:
        assert run.register("m", bundle) == 1
        assert run.register("m", bundle, alias="champion") == 1
        (bundle / "plan.yaml").write_text("changed")
        assert run.register("m", bundle) == 2
    digests = [v.tags["medseg.sha256"] for v in tracking.list_versions(folder, "m")]
    assert digests[1] == content_digest(bundle) != digests[0]
    first = tracking.fetch(folder, "models:/m/1", folder / "cache")
    assert content_digest(first) == digests[0]


def test_fetch_returns_what_was_registered(folder, bundle, tmp_path):
    register(folder, bundle, "one", alias="champion")
    one = content_digest(bundle)
    register(folder, bundle, "two")
    by_alias = tracking.fetch(folder, "models:/hippocampus@champion", tmp_path / "cache")
    assert content_digest(by_alias) == one
    assert tracking.fetch(folder, "models:/hippocampus/1", tmp_path / "cache") == by_alias
    assert content_digest(tracking.fetch(folder, "models:/hippocampus/2", tmp_path / "cache")) == content_digest(bundle)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_fetch_a_bundle_that_is_one_file(folder, tmp_path):
    file = tmp_path / "model.medseg"
    file.write_bytes(b"PK\x03\x04")
    with tracking.start(folder, experiment="e", run_name="r") as run:
        run.register("m", file, alias="champion")
    fetched = tracking.fetch(folder, "models:/m@champion", tmp_path / "cache")
    assert (fetched.name, fetched.read_bytes()) == ("model.medseg", b"PK\x03\x04")


def test_the_cache_does_not_mix_stores(folder, bundle, tmp_path, empty_store):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mlflow.db").write_bytes(empty_store.read_bytes())
    register(folder, bundle, "here", alias="champion")
    register(other, bundle, "there", alias="champion")
    texts = [
        (tracking.fetch(place, "models:/hippocampus@champion", tmp_path / "cache") / "plan.yaml").read_text()
        for place in (folder, other)
    ]
    assert texts == ["here", "there"]


def test_a_changed_artifact_is_not_handed_out(folder, bundle, tmp_path):
    register(folder, bundle, "one")
    (weights,) = (folder / "mlartifacts").rglob("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match="hippocampus version 1") as error:
        tracking.fetch(folder, "models:/hippocampus/1", tmp_path / "cache")
    assert error.value.code == "HASH_MISMATCH"
    assert list((tmp_path / "cache").iterdir()) == []


def test_messages_name_what_exists(folder, bundle, tmp_path):
    register(folder, bundle, "one", alias="champion")
    for act in (
        lambda: tracking.fetch(folder, "models:/hippocampus@challenger", tmp_path / "cache"),
        lambda: tracking.fetch(folder, "models:/hippocampus/7", tmp_path / "cache"),
        lambda: tracking.set_alias(folder, "hippocampus", "champion", 7),
    ):
        with pytest.raises(BundleError, match=r"Aliases: champion \(version 1\)\. Versions: 1\."):
            act()
    for act in (
        lambda: tracking.fetch(folder, "models:/liver@champion", tmp_path / "cache"),
        lambda: tracking.set_alias(folder, "liver", "champion", 1),
        lambda: tracking.delete_alias(folder, "liver", "champion"),
    ):
        with pytest.raises(BundleError, match=r"No model 'liver' is registered\. Models: hippocampus"):
            act()


@pytest.mark.parametrize("uri", ["models:/m", "models:/m/champion", "models:/a/b@c", "runs:/m/1", "models:/@x", ""])
def test_other_uris_are_refused(folder, uri, tmp_path):
    with pytest.raises(ConfigError, match="models:/NAME@ALIAS"):
        tracking.fetch(folder, uri, tmp_path)


def test_an_alias_that_mlflow_does_not_allow(folder, bundle):
    register(folder, bundle, "one")
    with pytest.raises(ConfigError, match="v1"):
        tracking.set_alias(folder, "hippocampus", "v1", 1)


def test_a_dead_server_is_an_error_here(folder, dead_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    with pytest.raises(ConfigError, match="does not answer") as error:
        tracking.list_versions(folder)
    assert error.value.code == "TRACKING_UNREACHABLE"
