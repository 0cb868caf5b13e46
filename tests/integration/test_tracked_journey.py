"""What MLflow holds after train and evaluate, and that a dead server changes nothing but that."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medseg import api
from medseg.bundle import open_bundle
from medseg.planning.plan import read_plan
from medseg.tracking import list_versions, sync, version_by_alias

Builder = Callable[..., Path]
LABELS = ("ball", "box")


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder, tiny_plan: Builder) -> Path:
    """A folder with data/, run/, masks/, scores/ and store/."""
    root = tmp_path_factory.mktemp("journey")
    tiny_dataset(root / "data", cases=6, test=2)
    plan = tiny_plan(root / "data", root / "plan.yaml", steps=6)
    api.train(root / "data", out=root / "run", steps=6, plan=plan, track=root / "store")
    api.predict(root / "data", model=root / "run", out=root / "masks")
    api.evaluate(root / "masks", root / "data", out=root / "scores", track=root / "store")
    return root


@pytest.fixture(scope="module")
def client(journey: Path) -> Any:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{journey / 'store' / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture(scope="module")
def run(journey: Path, client: Any) -> Any:
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    found = client.get_run(open_bundle(journey / "run").info.tracking_run)
    assert found.info.experiment_id == experiment.experiment_id
    return found


def test_parameters_are_the_plan(journey: Path, run: Any) -> None:
    plan = read_plan(journey / "run" / "3_plan.yaml")
    assert run.info.status == "FINISHED"
    assert run.data.params["plan.batch_size"] == str(plan.batch_size)
    assert run.data.params["plan.learning_rate"] == str(plan.learning_rate)
    assert run.data.params["plan.steps"] == "6"
    assert run.data.tags["plan_digest"] == plan.digest


def test_each_validation_has_a_value_a_label(run: Any, client: Any) -> None:
    for label in LABELS:
        history = client.get_metric_history(run.info.run_id, f"val_dice_{label}")
        assert [row.step for row in history] == [2, 4, 6]
        assert all(0 <= row.value <= 1 for row in history)
        assert f"final_dice_{label}" in run.data.metrics
        assert f"test_dice_{label}" in run.data.metrics
    losses = client.get_metric_history(run.info.run_id, "train_loss")
    assert [row.step for row in losses] == [2, 4, 6]
    rates = client.get_metric_history(run.info.run_id, "learning_rate")
    assert rates[-1].value < rates[0].value


def test_tables_hold_every_case(run: Any, client: Any, journey: Path) -> None:
    import json

    def rows(name: str) -> list[dict[str, Any]]:
        folder = client.download_artifacts(run.info.run_id, "", str(fresh(journey, name)))
        file = next(Path(folder).rglob(f"*{name}*.json"))
        content = json.loads(file.read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]

    assert {row["case"] for row in rows("test_cases")} == {"c4", "c5"}
    validated = {row["case"] for row in rows("validation_cases")}
    assert len(validated) == 1
    assert validated < {"c0", "c1", "c2", "c3"}


def fresh(root: Path, name: str) -> Path:
    place = root / "downloads" / name
    place.mkdir(parents=True, exist_ok=True)
    return place


def test_pictures_and_files_are_artifacts(run: Any, client: Any) -> None:
    def names(folder: str = "") -> set[str]:
        found = set()
        for item in client.list_artifacts(run.info.run_id, folder):
            found |= names(item.path) if item.is_dir else {item.path}
        return found

    found = names()
    assert "curves/0/curves.png" in found
    assert any(name.startswith("overlays/") and name.endswith(".png") for name in found)
    assert {"3_plan.yaml", "2_fingerprint.json", "evaluation/test/cases.csv"} <= found


def test_the_dataset_is_an_input_of_the_run(run: Any, journey: Path) -> None:
    import json

    digest = json.loads((journey / "run" / "1_dataset.json").read_text())["digest"]
    assert run.data.tags["dataset_digest"] == digest
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "tiny"
    # MLflow cuts digests to 36 characters
    assert digest.startswith(used.dataset.digest)


def test_the_model_is_registered_as_candidate_and_can_be_used_by_name(journey: Path) -> None:
    (version,) = list_versions(journey / "store", "tiny")
    assert "candidate" in version.aliases
    found = version_by_alias(journey / "store", "tiny", "candidate")
    assert found is not None
    assert found.version == version.version
    from medseg.tracking import fetch

    folder = fetch(journey / "store", "models:/tiny@candidate", journey / "fetched")
    assert open_bundle(folder).info.digest == open_bundle(journey / "run").info.digest


def test_a_resumed_run_goes_on_in_its_own_mlflow_run(
    tmp_path: Path, journey: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medseg.training import run as module

    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    options: dict[str, Any] = {"steps": 6, "plan": journey / "plan.yaml", "track": journey / "store"}
    with monkeypatch.context() as patch:
        patch.setattr(module, "finish_run", stop)
        with pytest.raises(KeyboardInterrupt):
            api.train(journey / "data", out=out, model_name="resumed", **options)
    api.train(journey / "data", out=out, model_name="resumed", **options)
    run_id = open_bundle(out).info.tracking_run
    assert run_id is not None
    history = client.get_metric_history(run_id, "val_dice_ball")
    assert [row.step for row in history] == [2, 4, 6]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_dead_server_does_not_fail_the_run_and_is_caught_up(
    tmp_path: Path, journey: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = tmp_path / "store"
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        options: dict[str, Any] = {"steps": 6, "plan": journey / "plan.yaml", "track": store}
        result = api.train(journey / "data", out=tmp_path / "run", **options)
        assert result.steps == 6
        api.predict(journey / "data", model=tmp_path / "run", out=tmp_path / "masks")
        api.evaluate(tmp_path / "masks", journey / "data", out=tmp_path / "scores", track=store)
    assert "does not answer" in caplog.text
    weights = [(run / "6_model" / "fold_0.safetensors").read_bytes() for run in (journey / "run", tmp_path / "run")]
    assert weights[0] == weights[1], "tracking has no part in what is learnt"
    synced = sync(store)
    assert synced.sent > 0
    (version,) = list_versions(store, "tiny")
    assert version.version
