"""Which study is given to a worker when, and what follows when a worker dies.

normal studies, as many at once as the engine can -> suspected ones, last and one at a time

A study is suspected when it was in flight as its worker or the command died. Only deaths while it was alone count
against it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from medseg.batch.attempt import Outcome, commit, settled
from medseg.batch.engines import Engine
from medseg.batch.job import Settings
from medseg.batch.ledger import Entry, Ledger
from medseg.batch.study_input import StudyInput
from medseg.errors import ExportError

DEATHS = 2
"""Deaths of a worker that was alone with a study that make it poison."""
FULL = 2
"""Studies in a row that find the disk full and end the run; one alone may have been too large for what was left."""
BUSY_SECONDS = 0.5
"""Before a study on which another process works is asked for again."""

CAUSES = {
    "timeout": ("TIMEOUT", "it took longer than a study may take (--timeout), and its worker was ended"),
    "memory": ("MEMORY", "it took more memory than a worker may take (--memory-limit), and its worker was ended"),
    "died": ("POISON", "it ended its worker each time that it was tried, at last alone; a decoder may have crashed"),
}


class Dispatch:
    """One run: give `studies` to `engine` until each has an entry.

    Parameters
    ----------
    told : is called with each outcome that has an entry.
    """

    def __init__(self, engine: Engine, settings: Settings, told: Callable[[Outcome], None]) -> None:
        self._engine, self._settings, self._told = engine, settings, told
        self._ledger = Ledger(settings.out)
        self._last: list[StudyInput] = []
        self._full: list[Entry] = []
        self._fitted = False
        self.entries: dict[str, Entry] = {}

    def run(self, studies: Sequence[StudyInput]) -> dict[str, Entry]:
        """Return id -> entry.

        Raises
        ------
        MedsegError : the run cannot go on; what is done stays done.
        """
        suspected = {study.id for study in studies if self._ledger.suspected(study.id)}
        self._last = [study for study in studies if study.id in suspected]
        self._together([study for study in studies if study.id not in suspected])
        while self._last:
            self._alone(self._last.pop(0))
        if not self._fitted:
            self._require_room()
        return self.entries

    def _together(self, studies: Sequence[StudyInput]) -> None:
        waiting = deque(studies)
        flight: dict[Future[Outcome], StudyInput] = {}
        later: list[StudyInput] = []
        while waiting or flight or later:
            while waiting and len(flight) < self._engine.width():
                study = waiting.popleft()
                flight[self._engine.submit(self._settings, study)] = study
            if not flight:
                time.sleep(BUSY_SECONDS)
                waiting, later = deque(later), []
                continue
            wait(flight, return_when=FIRST_COMPLETED)
            for future in [each for each in flight if each.done()]:
                study = flight.pop(future)
                outcome = future.result()
                if outcome.busy:
                    later.append(study)
                elif outcome.death == "died":
                    self._last.append(study)
                else:
                    self._record(study, outcome)

    def _alone(self, study: StudyInput) -> None:
        while True:
            outcome = self._engine.submit(self._settings, study, alone=True).result()
            if outcome.busy:
                time.sleep(BUSY_SECONDS)
            elif outcome.death == "died" and self._ledger.death(study.id, outcome.input_digest) < DEATHS:
                continue
            else:
                self._record(study, outcome)
                return

    def _record(self, study: StudyInput, outcome: Outcome) -> None:
        entry = outcome.entry or self._failed(study, outcome)
        self.entries[study.id] = entry
        self._told(Outcome(entry, outcome.fresh or bool(outcome.death)))
        if entry.code == "DISK_FULL":
            self._full.append(entry)
        elif outcome.fresh and entry.state == "done":
            self._fitted, self._full = True, []
        if len(self._full) >= FULL:
            self._require_room()

    def _require_room(self) -> None:
        """Raise the ExportError of a study that found the disk full: to predict all others for nothing helps nobody."""
        if self._full:
            entry = self._full[-1]
            raise ExportError(f"case {entry.id}: {entry.message}", code=entry.code)

    def _failed(self, study: StudyInput, outcome: Outcome) -> Entry:
        """Commit that a study ended its worker, unless that had committed it just before."""
        source, settings = outcome.input_digest, self._settings
        known = settled(study, source, settings) if source else None
        if known is not None:
            self._ledger.forget_flight(study.id)
            return known
        code, message = CAUSES[outcome.death]
        entry = Entry(
            id=study.id,
            state="failed",
            code=code,
            message=message,
            input_digest=source,
            model_digest=settings.recipe,
        )
        commit(self._ledger, entry, {}, forgive=False)
        return entry
