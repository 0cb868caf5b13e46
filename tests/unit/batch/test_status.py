"""How a run stands: read from its folder while it runs, after it was killed, and when it is over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medseg.batch.ledger import Entry, Ledger
from medseg.batch.locks import present
from medseg.batch.status import RUNS, Tally, announced, describe, forget_runs, status
from medseg.batch.summary import PAGE, write_summary
from medseg.errors import BatchError, ConfigError


def put(out: Path, study: str, state: str, code: str = "", recipe: str = "m", **facts: object) -> None:
    ledger = Ledger(out)
    ledger.attempt(study)
    ledger.end(study, facts)
    content = {"id": study, "state": state, "code": code, "input_digest": "i", "model_digest": recipe}
    ledger.write(Entry.model_validate({**content, "volumes_ml": {"organ": 2.5} if state == "done" else {}}))


def begin_and_die(out: Path, studies: list[str], recipe: str) -> None:
    with pytest.raises(KeyboardInterrupt), announced(out, studies, recipe):
        raise KeyboardInterrupt


def test_a_run_at_work(tmp_path: Path) -> None:
    with present(tmp_path), announced(tmp_path, list("abcdef"), "m"):
        put(tmp_path, "a", "done")
        put(tmp_path, "b", "refused", "TRUNCATED")
        put(tmp_path, "c", "failed", "POISON")
        put(tmp_path, "old", "done")
        Ledger(tmp_path).attempt("d")
        Ledger(tmp_path).journal("d", {"state": "predicting"})
        found = status(tmp_path)
        assert (found.total, found.done, found.refused, found.failed) == (6, 1, 1, 1)
        assert found.under_way == {"d": "predicting"}
        assert found.share == 0.5
        assert found.running
        assert found.per_hour is None or found.per_hour > 0
        lines = describe(found, tmp_path)
    assert lines[0].startswith("1 done, 1 refused, 1 failed of 6")
    assert lines[1:] == ["  predicting: d", "  1 refused: TRUNCATED", "  1 failed: POISON", "a run is at work"]


def test_a_run_that_is_over_or_was_killed(tmp_path: Path) -> None:
    put(tmp_path, "a", "done")
    Ledger(tmp_path).attempt("b")
    found = status(tmp_path)
    assert (found.total, found.done, found.running, found.under_way) == (1, 1, False, {})
    assert describe(found, tmp_path)[-1] == "no run is at work"
    with pytest.raises(ConfigError, match="no run wrote"):
        status(tmp_path / "elsewhere")


def test_a_killed_run_tells_what_is_left(tmp_path: Path) -> None:
    put(tmp_path, "old", "done")
    begin_and_die(tmp_path, ["a", "b", "c"], "m")
    put(tmp_path, "a", "done")
    found = status(tmp_path)
    assert (found.total, found.done, found.running, found.per_hour) == (4, 2, False, None)
    assert describe(found, tmp_path)[-1] == "no run is at work; 2 are left: repeat the command"


def test_a_run_that_stopped_early_is_remembered_until_the_next(tmp_path: Path) -> None:
    begin_and_die(tmp_path, ["a", "b"], "m")
    forget_runs(tmp_path, unfinished=False)
    put(tmp_path, "a", "done")
    assert status(tmp_path).total == 2
    forget_runs(tmp_path, unfinished=True)  # as the next run does when it begins
    with announced(tmp_path, ["a", "b"], "m"):
        pass
    assert status(tmp_path).total == 2
    forget_runs(tmp_path, unfinished=False)
    assert status(tmp_path).total == 1
    with announced(tmp_path, ["a", "b"], "m"):
        forget_runs(tmp_path, unfinished=True)
    assert status(tmp_path).total == 1


def test_masks_that_another_model_made_are_not_done(tmp_path: Path) -> None:
    with present(tmp_path), announced(tmp_path, ["a", "b"], "0123456789+mirror"):
        put(tmp_path, "a", "done")
        found = status(tmp_path)
        assert (found.total, found.done) == (2, 0)
        put(tmp_path, "b", "done", recipe="0123456789+mirror")
        assert status(tmp_path).done == 1
    told = [line for line in describe(status(tmp_path), tmp_path) if "different models" in line]
    assert len(told) == 1
    assert "1 by m, 1 by 01234567+mirror" in told[0]


def test_who_may_only_read_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the mode of the file: root may write whatever it says."""
    opened = os.open

    def reading(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *rest)

    with present(tmp_path), announced(tmp_path, ["a"], "m"), monkeypatch.context() as patch:
        patch.setattr("medseg.batch.locks.os.open", reading)
        assert status(tmp_path).running
    monkeypatch.setattr("medseg.batch.locks.os.open", reading)
    assert not status(tmp_path).running


def test_runs_with_different_models_are_kept_apart(tmp_path: Path) -> None:
    with present(tmp_path), announced(tmp_path, ["a"], "m"):
        with announced(tmp_path, ["b"], "m"):
            pass
        other = announced(tmp_path, ["a"], "m+mirror")
        with pytest.raises(BatchError, match="another model or other options") as caught, other:
            pass
        assert caught.value.code == "LOCKED"


def test_what_a_dead_run_left_locks_nobody_out(tmp_path: Path) -> None:
    """Also where nobody could remove it: somebody looked at OUT, or began in it, just when this run began."""
    with present(tmp_path):
        begin_and_die(tmp_path, ["a"], "m+mirror")
        for number in range(2):
            (tmp_path / RUNS / f"elsewhere-{number}.json").write_text('{"began": "", "studies": [], "recipe": "old"}')
        with announced(tmp_path, ["a"], "m"):
            assert status(tmp_path).running


def test_what_was_settled_before_tells_nothing_about_the_speed() -> None:
    tally = Tally(4)
    assert tally.add("done", fresh=False).per_hour is None
    now = tally.add("refused", fresh=True)
    assert now.per_hour is not None
    assert (now.done, now.refused, now.share) == (1, 1, 0.5)
    assert "left" in now.text


def test_tables_over_all_studies(tmp_path: Path, make_spec: object) -> None:
    put(tmp_path, "a<b>", "done", seconds=12.34, peak_mb=567)
    put(tmp_path, "b", "refused", "TRUNCATED")
    spec = make_spec(labels={"organ": 1})  # type: ignore[operator]
    write_summary(tmp_path, spec)
    assert (tmp_path / "summary.csv").read_text().splitlines() == [
        "id,state,code,message,notes,model_digest,organ_ml",
        "a<b>,done,,,,m,2.5",
        "b,refused,TRUNCATED,,,m,",
    ]
    page = (tmp_path / PAGE).read_text()
    for word in ("12.3", "567", "TRUNCATED", "a&lt;b&gt;", "2.50"):
        assert word in page
