"""The engine without workers: this process does the studies with a model in memory.

A study that kills it is noticed by the next run, which gives it to a guarded process.
"""

from __future__ import annotations

from concurrent.futures import Future

from medseg.batch.attempt import Outcome, attempt
from medseg.batch.isolation import Child, Limits
from medseg.batch.job import Settings, encode
from medseg.batch.study_input import StudyInput
from medseg.inference.predict import Model


class Here:
    """Does each study before `submit` returns."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._child = Child(Limits())

    def width(self) -> int:
        """Return 1."""
        return 1

    def submit(self, settings: Settings, study: StudyInput, *, alone: bool = False) -> Future[Outcome]:
        """Do a study; errors are raised at once."""
        future: Future[Outcome] = Future()
        if alone:
            future.set_result(self._child.run(encode(settings), encode(study)))
        else:
            future.set_result(attempt(study, settings, lambda: self._model))
        return future

    def close(self) -> None:
        """End the guarded process, if there was need of one."""
        self._child.close()
