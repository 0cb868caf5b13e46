"""The YAML of a job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medseg.errors import ConfigError
from medseg.retraining.settings import load_settings

Writer = Callable[..., Path]
RULE: dict[str, Any] = {"min_improvement": 0.0, "max_drop": 0.2, "floor": 0.5}


def test_paths_start_at_the_folder_of_the_file(write_job: Writer, tmp_path: Path) -> None:
    settings = load_settings(write_job(splits="lists/splits.yaml", work="/elsewhere/work"))
    assert settings.dataset == tmp_path / "data"
    assert settings.gate.dataset == tmp_path / "gate"
    assert settings.splits == tmp_path / "lists" / "splits.yaml"
    assert settings.gate.splits is None
    assert settings.work == Path("/elsewhere/work")


def test_digest_counts_what_is_asked_for_and_not_where_files_lie(write_job: Writer) -> None:
    plain = load_settings(write_job()).digest
    assert load_settings(write_job(dataset="moved", store="s", work="w", gate={"dataset": "g"})).digest == plain
    for change in (
        {"seed": 1},
        {"training": {"steps": 3}},
        {"min_new_cases": 2},
        {"gate": {"dataset": "gate", "cases": "test"}},
        {"rule": {**RULE, "max_drop": 0.3}},
        {"name": "other"},
    ):
        assert load_settings(write_job(**change)).digest != plain, change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {}}, "budget or steps"),
        ({"training": {"budget": "1h", "steps": 3}}, "budget or steps"),
        ({"training": {"budget": "1 hour"}}, "hour"),
        ({"rule": {"max_drop": 0.2, "floor": 0.5}}, "min_improvement .* or margins"),
        ({"rule": {**RULE, "margins": 0}}, "between 0 and 1"),
        ({"rule": {**RULE, "margins": {"ball": 1.5}}}, "between 0 and 1"),
        ({"rule": {**RULE, "metric": "hd95"}}, "dice"),
        ({"rule": {"min_improvement": 0, "floor": 0.5}}, "max_drop: this key is missing"),
        ({"gate": {"dataset": "gate", "digest": "abc"}}, "digest"),
        ({"gate": {"dataset": "gate", "cases": "train"}}, "cases"),
        ({"name": "a/b"}, "name"),
        ({"min_new_cases": 0}, "min_new_cases"),
        ({"neme": "x"}, "did you mean"),
    ],
)
def test_what_does_not_fit_is_named(write_job: Writer, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(write_job(**change))
