"""Results that wait to be sent: one small file a study in ``OUT/outbox``, until every destination has confirmed.

A destination that does not answer rests for a while, longer each time; a result that one refuses waits by itself, and
nothing else for it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medseg.batch.ledger import Ledger
from medseg.errors import MedsegError
from medseg.files import sweep, write_json
from medseg.pacs.delivery import Destination, deliver, is_delivered

LONGEST = 3600.0
DOWN = ("PACS_UNREACHABLE",)
"""Codes that say that the destination is down: it then rests for all results."""


@dataclass
class Rest:
    """How long something is left alone after it failed, twice as long each time."""

    first: float
    fails: int = 0
    until: float = 0

    def failed(self, now: float) -> None:
        """Begin the next rest."""
        self.until = now + min(self.first * 2**self.fails, LONGEST)
        self.fails = min(self.fails + 1, 30)


@dataclass
class Outbox:
    """What waits below OUT for `destinations`."""

    out: Path
    destinations: Sequence[Destination]
    retry: float = 30
    clock: Callable[[], float] = time.monotonic
    tell: Callable[[str], None] = lambda text: None
    _rests: dict[tuple[str, str], Rest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder, deep=False)

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self.out / "outbox"

    def put(self, study: str, cases: Sequence[str]) -> None:
        """Let the results of these cases be sent, also after a restart."""
        if self.destinations:
            write_json(self._file(study), {"cases": list(cases)})
            for key in [key for key in self._rests if key[1] == study]:
                del self._rests[key]

    def waiting(self) -> list[str]:
        """Return the studies whose results wait, in the order of their names."""
        return sorted(file.stem for file in self.folder.glob("*.json"))

    def send(self) -> int:
        """Try what is due; returns how many studies were finished."""
        finished = 0
        for study in self.waiting():
            left = [target for target in self.destinations if not self._try(study, target)]
            if not left:
                self._file(study).unlink(missing_ok=True)
                self.tell(f"{study}: results are delivered")
                finished += 1
        return finished

    def resting(self, destination: Destination) -> bool:
        """Tell whether a destination did not answer when it was last tried."""
        return (destination.name, "") in self._rests

    def _try(self, study: str, destination: Destination) -> bool:
        """Send the results of a study to one destination if it is time; tells whether it has them all."""
        whole, alone = (destination.name, ""), (destination.name, study)
        now = self.clock()
        if any(key in self._rests and now < self._rests[key].until for key in (whole, alone)):
            return False
        ledger = Ledger(self.out)
        entries = [entry for case in self._cases(study) if (entry := ledger.read(case)) and entry.state == "done"]
        if all(is_delivered(self.out, entry, destination) for entry in entries):
            return True
        try:
            for entry in entries:
                deliver(self.out, entry, destination)
        except MedsegError as error:
            key = whole if error.code in DOWN else alone
            self._rests.setdefault(key, Rest(self.retry)).failed(self.clock())
            self.tell(f"{study}: not sent, is tried again: {error.code}: {error}")
            return False
        except Exception as error:  # one result must never stop the others
            if os.environ.get("MEDSEG_DEBUG"):
                raise
            self._rests.setdefault(alone, Rest(self.retry)).failed(self.clock())
            self.tell(f"{study}: not sent, is tried again: INTERNAL: {type(error).__name__}")
            return False
        self._rests.pop(whole, None)
        self._rests.pop(alone, None)
        return True

    def _cases(self, study: str) -> list[str]:
        try:
            return [str(case) for case in json.loads(self._file(study).read_text(encoding="utf-8"))["cases"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _file(self, study: str) -> Path:
        return self.folder / f"{study}.json"
