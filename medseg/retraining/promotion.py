"""Moving the aliases champion, previous and challenger: first the decision is written, then they move.

champion is the version in use, previous the one before it (what a rollback gives back), challenger the latest one that
was trained and not promoted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg.errors import RetrainingError
from medseg.retraining.decisions import STORE_SECONDS, Decision, append_decision, locked, read_decisions
from medseg.tracking import delete_alias, list_versions, set_alias

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
Aliases = Mapping[str, int | None]
"""Alias -> the version that it shall name, None: none."""


def promote_version(store: Path, name: str, version: int) -> str:
    """Make a version the champion because a person says so; the former champion becomes `previous`.

    Returns a sentence for the terminal.

    Raises
    ------
    RetrainingError : NO_SUCH_VERSION; LOCKED, LOG_TAMPERED.
    ConfigError : the store does not answer; run the command again.
    """
    with store_locked(store):
        now = current_aliases(store, name)
        numbers = [v.version for v in list_versions(store, name)]
        if version not in numbers:
            raise RetrainingError(
                f"model {name} has no version {version}; versions: {', '.join(map(str, numbers)) or 'none'} "
                "(medseg models list)",
                code="NO_SUCH_VERSION",
            )
        if now.get(CHAMPION) == version:
            return f"{name} {version} is the champion already."
        move(store, {"event": "promotion", "model": name}, promoted(now, version))
    former = now.get(CHAMPION)
    return f"{name} {version} is the champion now" + ("." if former is None else f"; previous is version {former}.")


def roll_back(store: Path, name: str) -> str:
    """Give the alias champion back to `previous`, which then names nothing: a second rollback must not undo the first.

    Returns a sentence for the terminal. Raises as `promote_version`, and RetrainingError(NO_PREVIOUS).
    """
    with store_locked(store):
        now = current_aliases(store, name)
        former, back = now.get(CHAMPION), now.get(PREVIOUS)
        if back is None:
            raise RetrainingError(
                f"model {name} has no version with the alias {PREVIOUS}: there is nothing to go back to; choose one "
                "with medseg models list and medseg models promote",
                code="NO_PREVIOUS",
            )
        move(store, {"event": "rollback", "model": name}, {CHAMPION: back, PREVIOUS: None})
    return (
        f"{name} {back} is the champion again; version {former} is not. To undo: medseg models promote {name} {former}"
    )


def current_aliases(store: Path, name: str) -> dict[str, int]:
    """Return alias -> version of a model; empty for a model that is not registered."""
    return {alias: row.version for row in list_versions(store, name) for alias in row.aliases}


def promoted(now: Aliases, version: int) -> dict[str, int | None]:
    """Return the aliases after `version` became the champion."""
    wanted: dict[str, int | None] = {CHAMPION: version}
    if now.get(CHAMPION) != version:
        wanted[PREVIOUS] = now.get(CHAMPION)
    if now.get(CHALLENGER) == version:
        wanted[CHALLENGER] = None
    return wanted


def move(store: Path, content: Mapping[str, Any], wanted: Aliases) -> Decision:
    """Write a decision, let the aliases follow, and note that they did; only with the store locked."""
    decision = append_decision(store, {**content, "aliases": dict(wanted)})
    _follow(store, decision)
    return decision


@contextmanager
def store_locked(store: Path) -> Iterator[list[Decision]]:
    """Let nobody else decide, and complete what a killed command had decided; yields the decisions."""
    with locked(store / "decisions.lock", seconds=STORE_SECONDS, what="deciding about models in this store"):
        for decision in unfinished(read_decisions(store)):
            _follow(store, decision)
        yield read_decisions(store)


def unfinished(decisions: Sequence[Decision]) -> list[Decision]:
    """Return the decisions whose aliases may not have moved."""
    followed = {row.content["decision"] for row in decisions if row.content["event"] == "aliases_moved"}
    return [row for row in decisions if "aliases" in row.content and row.number not in followed]


def _follow(store: Path, decision: Decision) -> None:
    name, wanted = decision.content["model"], decision.content["aliases"]
    # champion moves in one call; previous goes first so that a rollback is possible from that moment on
    for alias in (PREVIOUS, CHAMPION, CHALLENGER):
        if alias in wanted and wanted[alias] is None:
            delete_alias(store, name, alias)
        elif alias in wanted:
            set_alias(store, name, alias, wanted[alias])
    append_decision(store, {"event": "aliases_moved", "model": name, "decision": decision.number})
