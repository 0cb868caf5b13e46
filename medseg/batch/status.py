"""How a run stands: from the ledger alone, so of running, killed and finished ones alike."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medseg.batch.ledger import IN_FLIGHT, Ledger, now
from medseg.batch.locks import alone, holding, in_use, is_held
from medseg.display import clock
from medseg.errors import BatchError, ConfigError
from medseg.files import write_json

RUNS = Path("journal") / "runs"
FINISHED = ".done.json"
"""Ending of the file of a run that came to its end."""


@dataclass(frozen=True)
class Status:
    """How the studies of a folder stand.

    Attributes
    ----------
    total : studies that the runs of now found; when none runs, those of a run that was killed, and all that are known.
    done, refused, failed : of these, by the model and the options of the run that found them.
    under_way : id -> what is being done with it.
    per_hour : studies that ended in the runs of now, an hour; None before the first.
    running : whether a run holds the folder.
    """

    total: int
    done: int
    refused: int
    failed: int
    under_way: dict[str, str]
    per_hour: float | None
    running: bool

    @property
    def share(self) -> float:
        """From 0 to 1, how much is over."""
        return (self.done + self.refused + self.failed) / max(1, self.total)

    @property
    def text(self) -> str:
        """One line for a person."""
        parts = [f"{self.done} done", f"{self.refused} refused", f"{self.failed} failed", f"of {self.total}"]
        if self.per_hour:
            left = self.total - self.done - self.refused - self.failed
            parts.append(f"{self.per_hour:.0f} an hour")
            if left > 0:
                parts.append(f"{clock(left / self.per_hour * 3600)} left")
        return ", ".join(parts[:3]) + " " + ", ".join(parts[3:])


class Tally:
    """Counts outcomes while a run goes on."""

    def __init__(self, total: int) -> None:
        self._total, self._counts, self._fresh, self._began = total, Counter[str](), 0, time.monotonic()

    def add(self, state: str, *, fresh: bool) -> Status:
        """Count a study; one that was settled before tells nothing about the speed."""
        self._counts[state] += 1
        self._fresh += fresh
        hours = max(time.monotonic() - self._began, 1e-3) / 3600
        done, refused, failed = (self._counts[name] for name in ("done", "refused", "failed"))
        return Status(self._total, done, refused, failed, {}, self._fresh / hours if self._fresh else None, True)


@contextmanager
def announced(out: Path, studies: list[str], recipe: str) -> Iterator[None]:
    """Write which studies this run is about to do, and by what (medseg.batch.job.recipe), and at the end that it ended.

    Until the last of the runs that are at work has ended, what was written counts for `status`.

    Raises
    ------
    BatchError : LOCKED: a run with another model or other options is at work. Each would do the other's studies again,
        and the masks of both would be left.
    """
    file = out / RUNS / f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
    with ExitStack() as stack:
        with alone(out, "runs"):
            # What killed runs left may still be here: whoever only looks at OUT, too, keeps others from sweeping.
            found = [(each, _read(each)) for each in _files(out)]
            others = [each for each, run in found if run is not None and run["recipe"] not in ("", recipe)]
            if any(is_held(each) for each in others):
                raise BatchError(
                    f"{out}: a run with another model or other options is at work in this folder; wait for it, or "
                    "choose another --out",
                    code="LOCKED",
                )
            write_json(file, {"began": now(), "studies": studies, "recipe": recipe})
            stack.enter_context(holding(file))
        yield
        with contextlib.suppress(FileNotFoundError):
            os.replace(file, file.with_suffix(FINISHED))


def forget_runs(out: Path, *, unfinished: bool) -> None:
    """Remove what runs wrote of themselves; unless `unfinished`, nothing if one of them did not come to its end."""
    files = list((out / RUNS).glob("*.json"))
    if unfinished or all(file.name.endswith(FINISHED) for file in files):
        for file in files:
            file.unlink(missing_ok=True)


def status(out: Path) -> Status:
    """Read how OUT stands; nothing is changed.

    Raises
    ------
    ConfigError : nothing was ever predicted into OUT.
    """
    if not (out / "journal").is_dir():
        raise ConfigError(f"{out}: no run wrote into this folder; give the --out of medseg predict")
    ledger, running, runs = Ledger(out), in_use(out), _runs(out)
    recipes = {study: run["recipe"] for run in runs for study in run["studies"]}  # of a killed run, too
    wanted = sorted(recipes) if running and recipes else sorted({*recipes, *ledger.studies()})
    began = min((run["began"] for run in runs), default="") if running else ""
    counts: Counter[str] = Counter()
    under_way, ended = {}, 0
    for study in wanted:
        facts = ledger.facts(study)
        if running and facts.get("state") in IN_FLIGHT:
            under_way[study] = str(facts["state"])
            continue
        entry = ledger.read(study)
        counts[entry.state if entry and recipes.get(study, "") in ("", entry.model_digest) else ""] += 1
        ended += bool(began) and str(facts.get("ended", "")) >= began
    hours = (datetime.now(UTC) - datetime.fromisoformat(began)).total_seconds() / 3600 if began else 0.0
    speed = ended / hours if ended and hours > 0 else None
    return Status(len(wanted), counts["done"], counts["refused"], counts["failed"], under_way, speed, running)


def describe(found: Status, out: Path) -> list[str]:
    """Return what `medseg predict --status` prints."""
    entries = [entry for entry in map(Ledger(out).read, Ledger(out).studies()) if entry]
    codes = Counter((entry.state, entry.code) for entry in entries if entry.state != "done")
    recipes = Counter(_short(entry.model_digest) for entry in entries if entry.state == "done")
    lines = [found.text, *(f"  {state}: {study}" for study, state in sorted(found.under_way.items()))]
    lines += [f"  {number} {state}: {code}" for (state, code), number in codes.most_common()]
    if len(recipes) > 1:
        rows = ", ".join(f"{number} by {recipe}" for recipe, number in recipes.most_common())
        lines.append(f"  masks of different models or options: {rows} (model_digest in ledger/<id>.json)")
    left = found.total - found.done - found.refused - found.failed
    if found.running:
        return [*lines, "a run is at work"]
    return [*lines, f"no run is at work; {left} are left: repeat the command" if left else "no run is at work"]


def _short(recipe: str) -> str:
    digest, sign, way = recipe.partition("+")
    return f"{digest[:8]}{sign}{way}"


def _runs(out: Path) -> list[dict[str, Any]]:
    return [run for run in map(_read, _files(out)) if run]


def _files(out: Path) -> list[Path]:
    return sorted((out / RUNS).glob("*.json"))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        return {"began": str(run["began"]), "studies": list(run["studies"]), "recipe": str(run.get("recipe", ""))}
    except (OSError, ValueError, KeyError, TypeError):
        return None
