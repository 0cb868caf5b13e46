"""A model that was hardly trained, for tests of what surrounds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medseg import api


@pytest.fixture(scope="session")
def model(
    tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Callable[..., Path], tiny_plan: Callable[..., Path]
) -> Path:
    """A run folder with a model of one channel, labels ball and box."""
    root = tmp_path_factory.mktemp("model")
    tiny_dataset(root / "data", cases=4, test=0)
    plan = tiny_plan(root / "data", root / "plan.yaml", steps=30)
    api.train(root / "data", out=root / "run", steps=30, plan=plan)
    return root / "run"
