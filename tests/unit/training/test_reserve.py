"""The rehearsal of the end: done on real cases before the first step, it measures, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medseg.planning.plan import read_plan
from medseg.preparation.cache import CaseCache, prepare_cases
from medseg.preparation.path import training_path, up_to_cache
from medseg.spec import load_dataset
from medseg.training import reserve
from medseg.training.loop import Job
from medseg.training.reserve import CASES, FIXED_SECONDS, measure_reserve

Builder = Callable[..., Path]


@pytest.fixture(params=["labels", "ignore"])
def job(
    request: pytest.FixtureRequest, tmp_path: Path, tiny: SimpleNamespace, tiny_dataset: Builder, tiny_plan: Builder
) -> Job:
    """A network to be trained, with five validation cases; `ignore`: where parts of each mask are not known."""
    changes = {"ignore": 9} if request.param == "ignore" else {}
    root = tiny_dataset(tmp_path / "data", cases=6, test=0, **changes)
    if changes:
        for number in range(6):
            mask = tiny.case(number)[1]
            mask[:, :, :4] = 9
            tiny.save(root / "masks" / f"c{number}.nii.gz", mask)
    dataset = load_dataset(root)
    plan = read_plan(tiny_plan(root, tmp_path / "plan.yaml", steps=3))
    cache = CaseCache(tmp_path / "cache", dataset.spec, plan)
    path = training_path(dataset.spec, plan, cache)
    prepare_cases(up_to_cache(path), cache, dataset.cases)
    return Job(
        spec=dataset.spec,
        plan=plan,
        path=path,
        cache=cache,
        train=dataset.cases[:1],
        validation=dataset.cases[1:],
        checkpoint=tmp_path / "run" / "0" / "checkpoint" / "state.safetensors",
        digest="job",
        device=torch.device("cpu"),
    )


def test_all_cases_of_all_networks_are_counted_and_nothing_is_left(job: Job, tmp_path: Path) -> None:
    found = measure_reserve([job], budget=600.0)
    assert found.validation(job) > 0
    assert found.finishing > FIXED_SECONDS
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file()]


def test_a_short_budget_tries_one_case_only(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    score: Any = reserve._score
    monkeypatch.setattr(
        reserve, "_score", lambda model, case, *rest: (tried.append(case.id), score(model, case, *rest))
    )
    measure_reserve([job], budget=1e-6)
    assert len(tried) == 1
    tried.clear()
    measure_reserve([job], budget=1e6)
    assert len(set(tried)) == CASES


def test_what_a_killed_rehearsal_left_is_no_hindrance(job: Job, tmp_path: Path) -> None:
    left = job.checkpoint.parent.parent / "rehearsal"
    left.mkdir(parents=True)
    (left / "c9.nii.gz").write_bytes(b"half a mask")
    measure_reserve([job], budget=1.0)
    assert not left.exists()
