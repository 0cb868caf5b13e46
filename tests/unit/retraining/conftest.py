"""Stores with registered models, and retraining jobs whose training and scores are given."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from medseg.tracking import start
from medseg.tracking.door import connect

JOB = {
    "name": "tiny",
    "dataset": "data",
    "gate": {"dataset": "gate"},
    "training": {"steps": 2},
    "rule": {"min_improvement": 0.0, "max_drop": 0.2, "floor": 0.5},
    "store": "store",
    "work": "work",
}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one takes 1.5 s, copying it nothing."""
    folder = tmp_path_factory.mktemp("store")
    connect(folder)
    return folder / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> Path:
    place = tmp_path / "store"
    place.mkdir()
    shutil.copyfile(empty_store, place / "mlflow.db")
    return place


@pytest.fixture
def register(store: Path, tmp_path: Path) -> Callable[[str, int], None]:
    """``register(name, n)``: n versions of a model."""

    def make(name: str, versions: int) -> None:
        with start(store, experiment="tests", run_name="versions") as tracker:
            for number in range(versions):
                bundle = tmp_path / "bundles" / f"{name}-{number}"
                bundle.mkdir(parents=True)
                (bundle / "model.json").write_text(f"{number}")
                tracker.register(name, bundle)

    return make


@pytest.fixture
def write_job(tmp_path: Path) -> Callable[..., Path]:
    """``write_job(key=value)``: the YAML of a job in the test's folder."""

    def write(**changes: Any) -> Path:
        file = tmp_path / "job.yaml"
        file.write_text(yaml.safe_dump({**JOB, **changes}), encoding="utf-8")
        return file

    return write
