from __future__ import annotations

from pathlib import Path

import pytest

from medseg.phantom.anatomy import PhantomPatient, make_patient
from medseg.phantom.dataset import write_dataset


@pytest.fixture(scope="session")
def cohort() -> list[PhantomPatient]:
    """One patient of every protocol and scanner, and a few more."""
    return [make_patient(0, index=index) for index in range(8)]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients on disk, two held out; returns the spec."""
    return write_dataset(tmp_path_factory.mktemp("phantom"), patients=6, test=2)
