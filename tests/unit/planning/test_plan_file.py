"""3_plan.yaml is written for people and read back to the same plan."""

from __future__ import annotations

from pathlib import Path

import yaml

from medseg.planning.plan import Plan, read_plan, write_plan


def test_a_written_plan_reads_back_the_same_with_its_reasons_beside_it(tmp_path, tiny_dataset, tiny_plan) -> None:
    file = tiny_plan(tiny_dataset(tmp_path / "data"), tmp_path / "plan.yaml")
    plan = read_plan(file)
    lines = file.read_text().splitlines()
    written = [n for n, line in enumerate(lines) if line.startswith("dimensions: 3")]
    assert written, "every key starts its own line, where a person can edit it"
    assert lines[written[0] - 1].startswith("# The median case has")
    assert set(yaml.safe_load(file.read_text())) == set(Plan.model_fields) - {"nnunet", "monai", "start"}
    again = tmp_path / "again.yaml"
    write_plan(again, plan, {})
    assert read_plan(again) == plan
    assert read_plan(again).digest == plan.digest


def test_an_edited_value_is_what_is_read(tmp_path, tiny_dataset, tiny_plan) -> None:
    file: Path = tiny_plan(tiny_dataset(tmp_path / "data"), tmp_path / "plan.yaml")
    before = read_plan(file)
    file.write_text(file.read_text().replace(f"learning_rate: {before.learning_rate}", "learning_rate: 0.0625"))
    assert read_plan(file) == before.model_copy(update={"learning_rate": 0.0625})
