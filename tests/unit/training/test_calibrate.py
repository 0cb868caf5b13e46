"""Step times: measured for every candidate that the time allows, never for none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.planning.fingerprint import take_fingerprint
from medseg.planning.planner import Draft, draft
from medseg.spec import Spec, load_dataset
from medseg.training.calibrate import measure

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Any) -> Spec:
    return load_dataset(tiny_dataset(tmp_path_factory.mktemp("measure"), cases=2, test=0)).spec


@pytest.fixture(scope="module")
def sketch(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Any) -> Draft:
    folder: Path = tiny_dataset(tmp_path_factory.mktemp("measure"), cases=2, test=0)
    found = load_dataset(folder)
    made = draft(found.spec, take_fingerprint(found.spec, found.cases), device="cpu")
    widths = {"narrow": (2, 4, 4), "middle": (4, 8, 8)}
    return replace(made, patch_size=(8, 8, 8), batch_size=2, widths=widths)


def test_every_width_and_precision_is_measured(spec: Spec, sketch: Draft) -> None:
    measured = measure(spec, sketch, CPU, longest=60)
    assert set(measured.step_seconds) == {f"{w} {p}" for w in ("narrow", "middle") for p in ("fp32", "bf16")}
    assert all(seconds > 0 for seconds in measured.step_seconds.values())
    assert measured.device == "cpu"
    assert measured.threads == torch.get_num_threads()


def test_without_time_the_cheapest_is_measured_alone(spec: Spec, sketch: Draft) -> None:
    assert list(measure(spec, sketch, CPU, longest=0).step_seconds) == ["narrow fp32"]
