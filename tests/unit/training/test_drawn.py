"""What was drawn: counted where the network sees it, and the same however often a training was interrupted."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.spec import Case
from medseg.training.drawn import COLUMNS, add_drawn, label_voxels, write_drawn


@pytest.mark.parametrize(("dtype", "ignore"), [(torch.uint8, 255), (torch.int16, -1), (torch.int64, 8)])
def test_voxels_of_labels_are_counted_in_each_patch(rng: np.random.Generator, dtype: torch.dtype, ignore: int) -> None:
    array = rng.choice([0, 1, 2, 7, ignore], (3, 1, 4, 5, 6))
    array[1] = 0
    found = label_voxels(torch.from_numpy(array).to(dtype), [7, 1, 2])
    expected = [[int((patch == value).sum()) for value in (7, 1, 2)] for patch in array]
    assert found.tolist() == expected


def test_no_patch_gives_no_row() -> None:
    assert label_voxels(torch.zeros((0, 1, 2, 2, 2), dtype=torch.uint8), [1]).shape == (0, 1)


def test_a_case_drawn_twice_in_a_batch_is_counted_twice() -> None:
    seen = torch.zeros((2, 2, 2), dtype=torch.int64)
    add_drawn(seen, [1, 1, 0], np.array([[3.0, 0.0], [4.0, 1.0], [0.0, 5.0]]))
    assert seen.tolist() == [[[0, 0], [1, 5]], [[2, 7], [1, 1]]]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_row_for_each_case_and_label(tmp_path: Path, make_spec: Any, make_plan: Any) -> None:
    spec = make_spec()
    plan = make_plan(spec, batch_size=2, foreground_share=0.5)
    cases = [Case(name, (tmp_path / name,), None, name) for name in ("a", "b,c")]
    seen = torch.arange(2 * len(spec.foreground) * 2).reshape(2, -1, 2)
    write_drawn(tmp_path / "draws.csv", spec, plan, cases, steps=5, seen=seen)
    found = rows(tmp_path / "draws.csv")
    assert tuple(found[0]) == COLUMNS
    assert [(row["case"], row["label"]) for row in found] == [(c, x) for c in ("a", "b,c") for x in spec.foreground]
    assert [[int(row["patches_with_label"]), int(row["voxels"])] for row in found] == seen.reshape(-1, 2).tolist()
    first = {row["case"]: row for row in found}.values()
    assert [int(row["patches"]) for row in first] == [5, 5]
    assert sum(int(row["foreground_forced"]) for row in first) == 5


def test_what_was_not_counted_is_empty_and_not_zero(tmp_path: Path, make_spec: Any, make_plan: Any) -> None:
    spec = make_spec()
    cases = [Case("a", (tmp_path / "a",), None, "a")]
    seen = torch.zeros((0, 0, 2), dtype=torch.int64)
    write_drawn(tmp_path / "draws.csv", spec, make_plan(spec), cases, steps=5, seen=seen)
    assert {(row["patches_with_label"], row["voxels"]) for row in rows(tmp_path / "draws.csv")} == {("", "")}
