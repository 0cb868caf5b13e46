"""Promotion and rollback by hand: where the aliases go, and what a killed command leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medseg.errors import RetrainingError
from medseg.retraining import promote_version, promotion, read_decisions, roll_back
from medseg.retraining.decisions import LOG
from medseg.retraining.promotion import current_aliases
from medseg.tracking import set_alias

Register = Callable[[str, int], None]


def events(store: Path) -> list[str]:
    return [row.content["event"] for row in read_decisions(store)]


def test_promotion_and_rollback(store: Path, register: Register) -> None:
    register("organs", 3)
    set_alias(store, "organs", "challenger", 2)
    assert promote_version(store, "organs", 1) == "organs 1 is the champion now."
    assert current_aliases(store, "organs") == {"champion": 1, "challenger": 2}
    assert "previous is version 1" in promote_version(store, "organs", 2)
    assert current_aliases(store, "organs") == {"champion": 2, "previous": 1}
    assert "organs 1 is the champion again" in roll_back(store, "organs")
    assert current_aliases(store, "organs") == {"champion": 1}
    assert events(store) == ["promotion", "aliases_moved"] * 2 + ["rollback", "aliases_moved"]


def test_a_second_rollback_does_not_undo_the_first(store: Path, register: Register) -> None:
    register("organs", 2)
    promote_version(store, "organs", 1)
    promote_version(store, "organs", 2)
    roll_back(store, "organs")
    with pytest.raises(RetrainingError) as caught:
        roll_back(store, "organs")
    assert caught.value.code == "NO_PREVIOUS"
    assert current_aliases(store, "organs") == {"champion": 1}


def test_the_champion_cannot_replace_itself(store: Path, register: Register) -> None:
    register("organs", 2)
    promote_version(store, "organs", 1)
    promote_version(store, "organs", 2)
    assert "already" in promote_version(store, "organs", 2)
    assert current_aliases(store, "organs") == {"champion": 2, "previous": 1}
    assert len(read_decisions(store)) == 4


def test_an_unknown_version_is_refused_and_not_written_down(store: Path, register: Register) -> None:
    register("organs", 2)
    with pytest.raises(RetrainingError, match="versions: 1, 2") as caught:
        promote_version(store, "organs", 7)
    assert caught.value.code == "NO_SUCH_VERSION"
    with pytest.raises(RetrainingError, match="versions: none"):
        promote_version(store, "lungs", 1)
    assert read_decisions(store) == []


def test_models_do_not_touch_each_other(store: Path, register: Register) -> None:
    register("organs", 1)
    register("lungs", 1)
    promote_version(store, "organs", 1)
    promote_version(store, "lungs", 1)
    with pytest.raises(RetrainingError):
        roll_back(store, "lungs")
    assert current_aliases(store, "organs") == {"champion": 1}


@pytest.mark.parametrize("calls", [0, 1])
def test_a_command_killed_while_aliases_move_is_completed_by_the_next(
    store: Path, register: Register, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    register("organs", 3)
    promote_version(store, "organs", 1)
    done: list[str] = []

    def dies(store: Path, name: str, alias: str, version: int) -> None:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(alias)
        set_alias(store, name, alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(promotion, "set_alias", dies)
        with pytest.raises(KeyboardInterrupt):
            promote_version(store, "organs", 2)
    assert current_aliases(store, "organs")["champion"] == 1
    promote_version(store, "organs", 3)
    assert current_aliases(store, "organs") == {"champion": 3, "previous": 2}
    assert events(store) == ["promotion", "aliases_moved"] * 3


def test_nothing_moves_after_the_log_was_tampered_with(store: Path, register: Register) -> None:
    register("organs", 2)
    promote_version(store, "organs", 1)
    log = store / LOG
    log.write_bytes(log.read_bytes().replace(b'"champion":1', b'"champion":2'))
    for command in (lambda: promote_version(store, "organs", 2), lambda: roll_back(store, "organs")):
        with pytest.raises(RetrainingError) as caught:
            command()
        assert caught.value.code == "LOG_TAMPERED"
    assert current_aliases(store, "organs") == {"champion": 1}
