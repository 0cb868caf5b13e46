"""The Python shown in the README and in the tutorial runs as it stands; only the length of the training is ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medseg import api
from medseg.phantom.dicom import write_series
from medseg.volume import Volume

Builder = Callable[..., Path]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_dataset: Builder, tiny_plan: Builder, tiny: SimpleNamespace
) -> Path:
    """A working folder with data/, the same as medseg-demo/data, and archive/; a budget is a few steps there."""
    tiny_dataset(tmp_path / "data", cases=6, test=2)
    tiny_dataset(tmp_path / "medseg-demo" / "data", cases=6, test=2)
    image, _ = tiny.case(9)
    tiny.save(tmp_path / "archive" / "deep" / "scan.nii.gz", image)
    write_series(Volume(np.rint(image)[None].clip(0), tiny.affine), tmp_path / "archive" / "series", modality="MR")
    plan = tiny_plan(tmp_path / "data", tmp_path / "plan.yaml")
    real = api.train

    def short(*args: Any, budget: str, **options: Any) -> Any:
        assert re.fullmatch(r"\d+m", budget)
        return real(*args, steps=6, plan=plan, **options)

    monkeypatch.setattr(api, "train", short)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tutorial_runs(repository: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journey, archive = blocks(repository / "docs" / "tutorials" / "python-api.md")
    lines = [line for line in journey.splitlines() if line.strip()]
    assert len(lines) <= 12, "about ten lines"
    exec(compile(journey, "python-api.md", "exec"), {})
    told = capsys.readouterr().out
    assert "6 steps; validation Dice {'ball': " in told
    assert "c4 done {'ball': " in told
    assert re.search(r"mean Dice 0\.\d+ report report/", told)
    for name in (
        "check/check.html",
        "masks/c5.nii.gz",
        "masks/private/linkage.csv",
        "scores/cases.csv",
        "store/mlflow.db",
    ):
        assert (work / name).is_file(), f"the page promises {name}"
    exec(compile(archive, "python-api.md", "exec"), {})
    assert "2 of 2 done" in capsys.readouterr().out


def test_the_readme_runs(repository: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(repository / "README.md")
    assert found, "the README shows the journey in Python"
    for block in found:
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out
    assert (work / "run" / "6_model" / "model.json").is_file()


def test_importing_medseg_is_instant_and_names_what_it_has() -> None:
    import medseg

    assert dir(medseg) == [
        "check",
        "evaluate",
        "import_model",
        "listen",
        "plan",
        "predict",
        "report",
        "retrain",
        "train",
    ]
    with pytest.raises(AttributeError, match="no attribute 'trian'; it has check, evaluate, import_model, listen"):
        _ = medseg.trian
