"""What the benchmark scripts share, and how they end schedules, count time and tell results."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Load = Callable[[str], ModuleType]
CASES = [f"hippocampus_{number:03d}" for number in range(1, 300)]


def test_development_never_sees_the_test_cases(load: Load, tmp_path: Path) -> None:
    common = load("_common")
    split = common.inner_split(tmp_path / "split.json", CASES)
    assert json.loads((tmp_path / "split.json").read_text()) == split
    assert len(common.test_cases()) == 40
    assert not common.test_cases() & {*split["train"], *split["test"]}
    assert len(split["test"]) == 32
    assert {*split["train"], *split["test"]} == set(CASES) - common.test_cases()
    assert common.inner_split(tmp_path / "again.json", reversed(CASES)) == split


def test_processor_seconds_of_what_a_command_starts_count(load: Load) -> None:
    common = load("_common")
    work = "import time\nwhile time.process_time() < 0.3: pass"
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    spent = common.run([sys.executable, "-c", starter])
    assert spent.cpu >= 0.3
    assert spent.wall >= 0.3


def test_a_command_that_fails_ends_the_benchmark(load: Load, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with 3"):
        load("_common").run([sys.executable, "-c", "raise SystemExit(3)"], log=tmp_path / "log")


def test_what_has_run_is_known_again(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = load("_common").Lines(tmp_path / "folder" / "results.jsonl", "who", "seed")
    assert lines.rows() == []
    lines.add({"who": "a", "seed": 0, "dice": 0.5})
    assert lines.holds(who="a", seed=0)
    assert not lines.holds(who="a", seed=1)
    assert json.loads(capsys.readouterr().out)["dice"] == 0.5


def test_interval_holds_the_mean_and_shrinks_to_equal_values(load: Load) -> None:
    interval = load("_common").interval
    mean, low, high = interval({"a": 0.7, "b": 0.8, "c": 0.9})
    assert low < mean < high
    assert mean == pytest.approx(0.8)
    assert interval({"a": 0.7, "b": 0.7}) == pytest.approx((0.7, 0.7, 0.7))


def test_schedule_of_the_peer_ends_with_the_steps(load: Load) -> None:
    progress = load("_nnunet_peer")._progress
    options = Namespace(steps=4, seconds=None)
    assert [progress(options, [1.0] * done, 0.0) for done in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_schedule_of_the_peer_ends_before_a_step_that_would_be_late(load: Load) -> None:
    peer = load("_nnunet_peer")
    now = time.monotonic()
    seconds = now - peer.BEGAN + 100
    options = Namespace(steps=None, seconds=seconds)
    assert peer._progress(options, [10.0], now - 100) == pytest.approx(0.5, abs=0.05)
    assert peer._progress(options, [101.0], now - 100) == 1
    assert peer._progress(Namespace(steps=None, seconds=0.0), [], now) == 0, "one step is always made"


def test_table_of_the_curve_tells_seeds_and_what_had_no_time(load: Load) -> None:
    curve = load("learning_curve")
    row = {"contender": "medseg", "minutes": 2.0, "steps": 10, "train_s": 119.0, "train_cpu_s": 230.0, "predict_s": 9.0}
    rows = [{**row, "seed": 0, "dice": 0.8}, {**row, "seed": 1, "dice": 0.9, "steps": 20}]
    rows.append({"contender": "nnunet", "minutes": 2.0, "seed": 0, "prepare_s": 130.0})
    text = curve.table(rows)
    assert "| medseg | 2 | 2 | 0.8500 (0.8000 to 0.9000) | 15 | 119 | 230 | 9 |" in text
    assert "| 2 | – | no time left after its preparation |" in text


def test_curve_is_drawn(load: Load, tmp_path: Path) -> None:
    rows = [{"contender": "medseg", "minutes": m, "seed": s, "dice": 0.8} for m in (2.0, 10.0) for s in (0, 1)]
    load("learning_curve").plot([*rows, {"contender": "nnunet", "minutes": 2.0, "seed": 0}], tmp_path / "curve")
    assert (tmp_path / "curve.svg").stat().st_size > 1000
    assert (tmp_path / "curve.png").exists()


def test_network_without_peers_is_one_that_medseg_can_be(load: Load) -> None:
    from medseg.nnunet.architecture import network_plan

    plan = network_plan(load("step_time").PLAN)
    assert plan.name == "unet"
    assert plan.options["features"] == [32, 64, 128, 256]


def test_difference_holds_what_separates_two_means(load: Load) -> None:
    low, high = {"a": 0.7, "b": 0.8, "c": 0.9}, {"d": 0.9, "e": 1.0}
    apart, least, most = load("_common").difference(high, low)
    assert apart == pytest.approx(0.15)
    assert least < apart < most
    assert load("_common").difference(low, low)[1] < 0 < load("_common").difference(low, low)[2]
