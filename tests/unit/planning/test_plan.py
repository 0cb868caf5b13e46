"""The plan as a model and as a file, and how settings change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from medseg.errors import PlanError
from medseg.planning.plan import Measured, Plan, override, read_plan, write_plan

Make = Callable[..., Any]


@pytest.fixture
def plan(make_spec: Make, make_plan: Make) -> Plan:
    measured = Measured(device="cpu", threads=2, step_seconds={"narrow fp32": 0.12345})
    return make_plan(make_spec(channels=("t2", "adc")), measured=measured, learning_rate=1e-5, budget_seconds=600.0)


REASONS = {"dataset": "One line.", "spacing": "Why " * 100, "fingerprint": "What it is."}


def test_what_is_written_is_read_back_to_the_last_digit(tmp_path: Path, plan: Plan) -> None:
    write_plan(tmp_path / "plan.yaml", plan, REASONS)
    found = read_plan(tmp_path / "plan.yaml")
    assert found == plan
    assert found.digest == plan.digest
    assert list(found.normalisation) == ["t2", "adc"]


def test_file_is_for_people(tmp_path: Path, plan: Plan) -> None:
    write_plan(tmp_path / "plan.yaml", plan, REASONS)
    text = (tmp_path / "plan.yaml").read_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    for line in (
        "dataset: toy",
        "dimensions: 3",
        "spacing: [1.0, 1.0, 1.0]",
        "patch_size: [16, 16, 16]",
        "network:",
        "  name: unet",
        "  noise: 0.15",
        "learning_rate: 1.0e-05",
        "precision: fp32",
        "test_mirroring: false",
    ):
        assert line in lines
    assert "{dataset" not in text
    assert lines[lines.index("dataset: toy") - 1] == "# One line."
    place = next(i for i, line in enumerate(lines) if line.startswith("spacing:"))
    why = [line for line in lines[place - 5 : place] if line.startswith("# Why")]
    assert len(why) == 4, "a long reason is several lines"
    assert [line for line in lines if line and not line.startswith((" ", "#")) and ":" not in line] == []
    late = ("nnunet", "monai", "start")  # only in imported and in fine-tuned ones
    assert list(yaml.safe_load(text)) == [key for key in Plan.model_fields if key not in late]


@pytest.mark.parametrize("name", ["on", "1", "a: b", "ünï", "x" * 200, "null", "{a}"])
def test_any_name_of_a_channel_survives(tmp_path: Path, make_spec: Make, make_plan: Make, name: str) -> None:
    plan = make_plan(make_spec(channels=(name, "t1")))
    write_plan(tmp_path / "plan.yaml", plan, {})
    assert read_plan(tmp_path / "plan.yaml") == plan


def test_reasons_of_unknown_keys_and_no_reasons_are_fine(tmp_path: Path, plan: Plan) -> None:
    write_plan(tmp_path / "plan.yaml", plan, {"nothing": "here"})
    assert "here" not in (tmp_path / "plan.yaml").read_text()


def test_an_edited_file_is_checked_with_its_lines(tmp_path: Path, plan: Plan) -> None:
    file = tmp_path / "plan.yaml"
    write_plan(file, plan, REASONS)
    text = file.read_text().replace("batch_size: 2", "batch_sze: 2").replace("overlap: 0.5", "overlap: 1.5")
    file.write_text(text)
    with pytest.raises(PlanError) as caught:
        read_plan(file)
    message = str(caught.value)
    lines = text.splitlines()
    assert f"plan.yaml:{lines.index('batch_sze: 2') + 1}: batch_sze: unknown key, did you mean 'batch_size'?" in message
    assert f"plan.yaml:{lines.index('overlap: 1.5') + 1}: overlap: " in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": (16, 16, 0)}, "sizes are positive"),
        ({"dimensions": 2, "augmentation": {"mirror_axes": [0]}, "patch_size": (16, 16, 2)}, "the third is 1"),
        ({"spacing": (1.0, 0.0, 1.0)}, "three positive numbers"),
        ({"orientation": "RLS"}, "one letter of each pair"),
        ({"orientation": "RRA"}, "one letter of each pair"),
        ({"orientation": "ras"}, "pattern"),
        ({"augmentation": {"mirror_axes": [3]}}, "axes are below 3"),
        ({"augmentation": {"mirror_axes": [-1]}}, "axes are below 3"),
        ({"augmentation": {"scale": (0.0, 1.4)}}, "two numbers from 0.1 to 10"),
        ({"augmentation": {"scale": (-1.0, 1.0)}}, "two numbers from 0.1 to 10"),
        ({"augmentation": {"scale": (0.7, 1000.0)}}, "two numbers from 0.1 to 10"),
        ({"augmentation": {"elastic": 1e6}}, "less than or equal to 20"),
        ({"augmentation": {"elastic": -1.0}}, "greater than or equal to 0"),
        ({"budget_seconds": -60.0}, "greater than 0"),
        ({"budget_seconds": 0.0}, "greater than 0"),
        ({"normalisation": {"t1": {"scheme": "ct", "low": 5.0, "high": -5.0}}}, "low 5 is above high -5"),
        ({"normalisation": {"t1": {"scheme": "ct"}}}, "t1: the scheme ct needs low, high, mean and deviation"),
        ({"seed": 2**63}, "less than or equal to"),
        ({"dimensions": 4}, "2 or 3"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"foreground_share": 1.1}, "less than or equal to 1"),
    ],
)
def test_values_that_cannot_be(make_spec: Make, make_plan: Make, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_plan(make_spec(), **change)


def test_settings_reach_every_depth(plan: Plan) -> None:
    settings = (
        "batch_size=7",
        "augmentation.noise=0",
        "network.options.features=[8, 16]",
        "normalisation.t2.scheme=none",
        "learning_rate=1e-3",
        "spacing=[1, 2, 3.5]",
        "test_mirroring=true",
        "budget_seconds=null",
        " seed = 5 ",
    )
    found = override(plan, settings)
    assert found.batch_size == 7
    assert found.augmentation.noise == 0
    assert found.augmentation.blur == plan.augmentation.blur
    assert found.network.options["features"] == [8, 16]
    assert found.network.options["kernels"] == plan.network.options["kernels"]
    assert found.normalisation["t2"].scheme == "none"
    assert found.normalisation["adc"] == plan.normalisation["adc"]
    assert found.learning_rate == 1e-3
    assert found.spacing == (1, 2, 3.5)
    assert found.test_mirroring is True
    assert found.budget_seconds is None
    assert found.seed == 5
    assert plan.batch_size == 2, "the plan that was given is left alone"
    assert plan.network.options["features"] == [4, 8]


def test_no_settings_no_change(plan: Plan) -> None:
    assert override(plan, ()) is plan


def test_a_later_setting_wins(plan: Plan) -> None:
    assert override(plan, ("batch_size=7", "batch_size=9")).batch_size == 9


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batch_size", "--set batch_size: write KEY=VALUE"),
        ("spacing=[0, 1, 1]", "--set spacing (0.0, 1.0, 1.0): three positive"),
        ("batch_sze=4", "--set batch_sze: unknown key, did you mean 'batch_size'?"),
        ("augmentation.nose=0", "--set augmentation.nose: unknown key, did you mean 'noise'?"),
        ("augmentaton.noise=0", "--set augmentaton: unknown key, did you mean 'augmentation'?"),
        ("batch_size.x=4", "batch_size is a value, not a section"),
        ("measured.device=x", "measured is a value, not a section"),
        ("batch_size=many", "--set batch_size: .*found 'many'"),
        ("batch_size=0", "greater than or equal to 1"),
        ("spacing=[1, 2", "'[1, 2' is not valid YAML"),
        ("spacing=[1, 2]", "spacing"),
        ("=3", "unknown key"),
    ],
)
def test_settings_that_cannot_be(make_spec: Make, make_plan: Make, setting: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        override(make_plan(make_spec()), (setting,))
    parts = message.split(".*")
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_digest_sees_every_value(plan: Plan) -> None:
    assert plan.digest == Plan.model_validate(plan.model_dump()).digest
    assert plan.digest != override(plan, ("seed=1",)).digest
