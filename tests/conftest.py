"""What every test may use: the real data sets, a seeded generator, a clean environment, ``--no-skips``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# Read before `clean_environment` clears the MEDSEG_ names.
DATA = Path(os.environ.get("MEDSEG_DATA") or REPOSITORY.parent / "shared" / "data").resolve()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a test that skips fails (`make test-system`)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.data)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    # An expected failure is reported as a skip too; it says `wasxfail` and stays one.
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("--no-skips"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    if report.skipped and collector.config.getoption("--no-skips"):
        _fail(report)
    return report


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: {reason} (a skip is a failure under --no-skips)"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data sets: $MEDSEG_DATA, else ../shared/data; the test skips where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}: set MEDSEG_DATA to the folder that holds hippocampus/ and the others")
    return DATA


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that gives the same numbers in every run and every order of the tests."""
    return np.random.default_rng(20240229)


@pytest.fixture(scope="session", autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run without the user's MLFLOW_* and MEDSEG_* settings, and away from the user's key."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "MEDSEG_"))]:
            patch.delenv(name)
        patch.setenv("MEDSEG_KEY_FILE", str(tmp_path_factory.mktemp("key") / "medseg.key"))
        yield


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test its own place for the key that hides DICOM ids."""
    monkeypatch.setenv("MEDSEG_KEY_FILE", str(tmp_path / "medseg.key"))
