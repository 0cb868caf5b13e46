"""What cannot be learnt from is refused with a clear word, before time is spent on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml
from rich.console import Console

from medseg import api
from medseg.display import Display
from medseg.errors import ConfigError, PlanError, SpecError, TrainingError
from medseg.planning.limits import refuse_large_patch
from medseg.planning.plan import Measured
from medseg.training import make_plan as make_plan_module
from medseg.training import run as run_module

Builder = Callable[..., Path]
Make = Callable[..., Any]
QUICK = ("batch_size=2", "validations=1", "test_mirroring=false", "network.options.features=[4,8,8]")


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(device="cpu", threads=1, step_seconds={"narrow fp32": 0.05})
    monkeypatch.setattr(make_plan_module, "measure", lambda *args, **options: measured)


def without(data: Path, case: str, *values: int) -> None:
    """Take labels out of the mask of a case."""
    file = data / "masks" / f"{case}.nii.gz"
    image = nibabel.load(file)
    mask = np.asarray(image.dataobj).copy()
    mask[np.isin(mask, values)] = 0
    nibabel.Nifti1Image(mask, image.affine).to_filename(file)


def test_one_case_is_refused_before_anything_is_read_or_written(tmp_path: Path, tiny_dataset: Builder) -> None:
    data = tiny_dataset(tmp_path / "data", cases=1, test=0)
    with pytest.raises(TrainingError, match=r"1 patient\(s\) to learn from; at least 2 are needed") as caught:
        api.train(data, out=tmp_path / "run", steps=1)
    assert caught.value.code == "TOO_FEW_PATIENTS"
    assert not (tmp_path / "run").exists()
    with pytest.raises(TrainingError, match=r"3 patient\(s\) to learn from; at least 5"):
        api.train(tiny_dataset(tmp_path / "three", cases=3, test=0), out=tmp_path / "run", steps=1, folds=5)
    assert not (tmp_path / "run").exists()


def test_empty_foreground_everywhere(tmp_path: Path, tiny_dataset: Builder) -> None:
    data = tiny_dataset(tmp_path / "data", cases=3, test=1)
    for number in range(2):
        without(data, f"c{number}", 1, 2)
    words = r"none of the 2 training cases holds a voxel of a label \(ball = 1, box = 2\)"
    for run in (
        lambda: api.plan(data, steps=1),
        lambda: api.train(data, out=tmp_path / "run", steps=1, settings=QUICK),
    ):
        with pytest.raises(SpecError, match=words) as caught:
            run()
        assert caught.value.code == "NO_FOREGROUND"


def test_a_network_whose_own_cases_are_all_empty_is_refused(tmp_path: Path, tiny_dataset: Builder) -> None:
    """Of two cases one is held out; whichever it is, the other network has nothing to learn from."""
    data = tiny_dataset(tmp_path / "data", cases=2, test=0)
    without(data, "c0", 1, 2)
    with pytest.raises(TrainingError, match=r"none of the 1 cases of fold \d to learn from holds a label") as caught:
        api.train(data, out=tmp_path / "run", steps=1, folds=2, settings=QUICK)
    assert caught.value.code == "NO_FOREGROUND"


def test_a_label_that_nobody_has_is_pointed_out(
    tmp_path: Path, tiny_dataset: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_dataset(tmp_path / "data", cases=3, test=0)
    for number in range(3):
        without(data, f"c{number}", 2)
    api.train(data, out=tmp_path / "run", steps=1, settings=QUICK, display=Display(Console()))
    assert "no training case holds box: the model cannot learn what it has never seen" in capsys.readouterr().out


def test_budgets_that_teach_nothing_are_refused_early(tmp_path: Path, tiny_dataset: Builder) -> None:
    data = tiny_dataset(tmp_path / "data", cases=3, test=0)
    with pytest.raises(PlanError, match="--budget 5s: starting and finishing take about 10 s") as caught:
        api.train(data, out=tmp_path / "run", budget="5s")
    assert caught.value.code == "BUDGET_TOO_SMALL"
    assert not (tmp_path / "run").exists(), "before anything is read"
    words = r"--budget 11s leaves 1 s to learn, \d+ steps of 0\.05 s .*At least 50 steps need --budget 13s"
    for command in (api.plan, lambda *args, **options: api.train(*args, out=tmp_path / "run", **options)):
        with pytest.raises(PlanError, match=words):
            command(data, budget="11s", settings=QUICK)
    assert not (tmp_path / "run" / "3_plan.yaml").exists()


@pytest.mark.parametrize("stage", ["2_fingerprint.json", "4_cache"])
def test_reading_and_preparing_end_with_the_budget(
    tmp_path: Path, tiny_dataset: Builder, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the last case: a hundred large ones would take hours more."""
    data = tiny_dataset(tmp_path / "data", cases=4, test=0)

    def now() -> float:
        return 100.0 if stage == "2_fingerprint.json" or (tmp_path / "run" / "3_plan.yaml").exists() else 0.0

    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=now, time=time.time))
    with pytest.raises(TrainingError, match="the budget of 1:00 was over before the first step") as caught:
        api.train(data, out=tmp_path / "run", budget="1m", settings=QUICK, began=0.0)
    assert caught.value.code == "BUDGET_TOO_SMALL"
    if stage == "4_cache":
        assert len(list((tmp_path / "run" / "4_cache").iterdir())) == 1, "the first case was the last"
    else:
        assert not (tmp_path / "run" / "2_fingerprint.json").exists()


def test_a_patch_far_larger_than_the_images_is_refused(tmp_path: Path, tiny_dataset: Builder) -> None:
    data = tiny_dataset(tmp_path / "data", cases=3, test=0)
    # 22 × 20 × 18 voxels at 1.5 × 1.5 × 2 mm
    words = r"patch_size \[512, 24, 24\] is far larger than any image .*20×22×18 voxels .*; \[32, 32, 32\] covers"
    for command in (api.plan, lambda *args, **options: api.train(*args, out=tmp_path / "run", **options)):
        with pytest.raises(PlanError, match=words) as caught:
            command(data, steps=1, settings=(*QUICK, "patch_size=[512,24,24]"))
        assert caught.value.code == "PATCH_TOO_LARGE"
    assert not (tmp_path / "run" / "3_plan.yaml").exists()


def test_a_plan_is_held_against_the_images_that_are_there(
    tmp_path: Path, tiny_dataset: Builder, tiny_plan: Builder
) -> None:
    """Edited by hand, or made for larger images: what its own fingerprint says is not what will be prepared."""
    data = tiny_dataset(tmp_path / "data", cases=3, test=0)
    file = tiny_plan(data, tmp_path / "plan.yaml", steps=1)
    plan = yaml.safe_load(file.read_text())
    plan["patch_size"] = [512, 512, 512]
    plan["fingerprint"]["shapes"][-1] = [400, 400, 400]
    file.write_text(yaml.safe_dump(plan))
    with pytest.raises(PlanError, match="20×22×18 voxels") as caught:
        api.train(data, out=tmp_path / "run", plan=file, steps=1)
    assert caught.value.code == "PATCH_TOO_LARGE"


def test_a_plan_that_was_edited_in_the_run_folder_is_checked(
    tmp_path: Path, tiny_dataset: Builder, tiny_plan: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_dataset(tmp_path / "data", cases=3, test=0)
    file = tiny_plan(data, tmp_path / "plan.yaml", steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "prepare_cases", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            api.train(data, out=tmp_path / "run", plan=file, steps=1)
    kept = tmp_path / "run" / "3_plan.yaml"
    plan = yaml.safe_load(kept.read_text())
    kept.write_text(yaml.safe_dump({**plan, "patch_size": [512, 24, 24]}))
    with pytest.raises(PlanError, match="far larger than any image"):
        api.train(data, out=tmp_path / "run", plan=file, steps=1)


def test_a_plan_of_stored_axes_is_checked_by_the_longest_side(
    make_spec: Make, make_plan: Make, make_fingerprint: Make
) -> None:
    fingerprint = make_fingerprint((20, 100, 400))
    plan = make_plan(make_spec(), orientation="IJK", patch_size=(832, 832, 832), fingerprint=fingerprint)
    refuse_large_patch(plan)
    with pytest.raises(PlanError, match="far larger"):
        refuse_large_patch(plan.model_copy(update={"patch_size": (833, 20, 100)}))


def test_a_spacing_that_no_memory_holds_is_refused(make_spec: Make, make_plan: Make, make_fingerprint: Make) -> None:
    """As of a plan edited by hand whose spacing is in metres."""
    plan = make_plan(make_spec(), spacing=(0.001, 0.001, 0.002), fingerprint=make_fingerprint((20, 100, 400)))
    with pytest.raises(PlanError, match=r"spacing \[0.001, 0.001, 0.002\] is far finer .*×.* voxels; it is in mm"):
        refuse_large_patch(plan)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_torch_does_not_take_is_refused(tmp_path: Path, seed: int) -> None:
    for command in (api.plan, lambda *args, **options: api.train(*args, out=tmp_path / "run", **options)):
        with pytest.raises(ConfigError, match=f"seed {seed}: a whole number from 0"):
            command(tmp_path, steps=1, seed=seed)


def test_a_patch_that_is_a_little_larger_learns(tmp_path: Path, tiny_dataset: Builder) -> None:
    data = tiny_dataset(tmp_path / "data", cases=3, test=0)
    settings = (*QUICK, "patch_size=[32,40,24]")
    assert api.train(data, out=tmp_path / "run", steps=1, settings=settings).steps == 1


@pytest.mark.parametrize(
    ("orientation", "patch", "fits"),
    [("RAS", (64, 256, 832), True), ("SAR", (832, 256, 64), True), ("SAR", (64, 256, 832), False)],
)
def test_sizes_follow_the_axes(
    make_spec: Make, make_plan: Make, make_fingerprint: Make, orientation: str, patch: Any, fits: bool
) -> None:
    fingerprint = make_fingerprint((20, 100, 400))
    plan = make_plan(make_spec(), orientation=orientation, patch_size=patch, fingerprint=fingerprint)
    if fits:
        refuse_large_patch(plan)
    else:
        with pytest.raises(PlanError, match="400×100×20"):
            refuse_large_patch(plan)
    flat = plan.model_copy(update={"dimensions": 2, "patch_size": (*patch[:2], 1)})
    refuse_large_patch(flat)
    fine = plan.model_copy(update={"spacing": (0.05, 0.05, 0.05)})
    refuse_large_patch(fine)
