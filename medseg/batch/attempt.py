"""One study from the ledger and back: is it settled, else record the attempt, segment it, commit how it ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.batch.job import Settings
from medseg.batch.ledger import COSTLY, Entry, Ledger
from medseg.batch.locks import study_lock
from medseg.batch.placing import IMAGE_SUFFIX
from medseg.batch.study_input import INPUT_AWAY, UNREAD, StudyInput
from medseg.errors import ExportError
from medseg.exporters import EXPORTERS

if TYPE_CHECKING:
    from medseg.inference.predict import Model, Prediction


@dataclass(frozen=True)
class Outcome:
    """What became of one study that was given to a worker.

    Attributes
    ----------
    entry : how it stands; None if that is not known: another process works on it, or the worker died.
    fresh : it was done now, not by an earlier run.
    death : why its worker ended: "died", "timeout" or "memory".
    input_digest : of the study whose worker ended, as far as it came.
    """

    entry: Entry | None = None
    fresh: bool = False
    death: str = ""
    input_digest: str = ""

    @property
    def busy(self) -> bool:
        """Whether another process works on it."""
        return self.entry is None and not self.death


class Course:
    """The stages of a study ("checking", "loading", "reading", "predicting", "writing"), and who hears of them."""

    def enter(self, stage: str, **facts: str) -> float:
        """Begin a stage; return the seconds that it had to wait for other studies."""
        return 0.0

    def call(self, network: Callable[[], Prediction]) -> Prediction:
        """Let the network work."""
        return network()


ALONE = Course()


class _Noted(Course):
    """A course that stands in the journal; sums up the seconds that the study waited for others."""

    def __init__(self, course: Course, ledger: Ledger, study: str) -> None:
        self._course, self._ledger, self._study = course, ledger, study
        self.waited = 0.0

    def enter(self, stage: str, **facts: str) -> float:
        waited = self._course.enter(stage, **facts)
        self.waited += waited
        self._ledger.journal(self._study, {"state": stage})
        return waited

    def call(self, network: Callable[[], Prediction]) -> Prediction:
        return self._course.call(network)


def attempt(study: StudyInput, settings: Settings, model: Callable[[], Model], *, course: Course = ALONE) -> Outcome:
    """Bring one study to its end and commit it, unless it is settled or another process works on it.

    Parameters
    ----------
    model : gives the model; asked only when it is needed.
    course : the other studies of this process, where there are some.

    Raises
    ------
    ExportError : OUT cannot be written.
    BundleError : from `model`.
    """
    ledger = Ledger(settings.out)
    with study_lock(settings.out, study.id) as mine:
        if not mine:
            return Outcome()
        course.enter("checking")
        source = study.digest()
        known = settled(study, source, settings)
        if known is not None:
            ledger.forget_flight(study.id)
            return Outcome(known)
        if study.passing or source == UNREAD:
            spared = without_input(study, settings)
            if spared is not None:
                return spared
        loaded = model()
        course.enter("reading", input_digest=source)
        return _attempt(study, source, settings, loaded, ledger, course)


def settled(study: StudyInput, source: str, settings: Settings) -> Entry | None:
    """Return the entry of a study if nothing is to be done for it."""
    names = tuple(f"{study.id}{EXPORTERS[name].suffix}" for name in settings.formats_of(study))
    return Ledger(settings.out).settled(
        study.id, input_digest=source, model_digest=settings.recipe, outputs=names, allow=study.allow
    )


def without_input(study: StudyInput, settings: Settings) -> Outcome | None:
    """Return what becomes of a study that is done and whose input cannot be read now; None of one that is not done.

    Nothing is known to be wrong with it: it stays done, with the note INPUT_AWAY in what is returned alone. Where it
    would have to be done again (another model, another format, a lost file), that fails, and what is there stays.
    """
    ledger = Ledger(settings.out)
    before = ledger.read(study.id)
    if before is None or before.state != "done":
        return None
    known = settled(study, before.input_digest, settings)
    if known is not None:
        ledger.forget_flight(study.id)
        return Outcome(known.model_copy(update={"notes": (*known.notes, INPUT_AWAY)}))
    entry = Entry(
        id=study.id,
        state="failed",
        code=INPUT_AWAY,
        message="its input cannot be read now (rights, or a drive that does not answer); repeat the command then",
        input_digest="",
        model_digest=settings.recipe,
    )
    if before.model_digest == settings.recipe:
        commit(ledger, entry, {})
    return Outcome(entry, fresh=True)


def _attempt(
    study: StudyInput, source: str, settings: Settings, model: Model, ledger: Ledger, course: Course
) -> Outcome:
    from medseg.batch.study import segment

    ledger.attempt(study.id)
    began = time.monotonic()
    _reset_peak()
    noted = _Noted(course, ledger, study.id)

    entry = Entry(id=study.id, state="failed", input_digest=source, model_digest=settings.recipe)
    entry = segment(
        study,
        model,
        ledger,
        entry,
        mirror=settings.mirror,
        formats=settings.formats_of(study),
        max_memory=settings.max_memory,
        course=noted,
    )
    if entry.state == "refused" and study.digest() == UNREAD:  # it went away while it was read
        spared = without_input(study, settings)
        if spared is not None:
            ledger.end(study.id, {})
            return spared
    facts: dict[str, object] = {"seconds": round(time.monotonic() - began - noted.waited, 3), "peak_mb": _peak()}
    try:
        commit(ledger, entry, facts)
    except ExportError:
        with contextlib.suppress(ExportError):  # nor may this have a place to be written
            ledger.end(study.id, {})
        raise
    return Outcome(entry, fresh=True)


def commit(ledger: Ledger, entry: Entry, facts: dict[str, object], *, forgive: bool = True) -> None:
    """Write how a study ended; a study that is not done keeps no file of an earlier input or model.

    A study that was done and failed to get another format stays done, as it was; what cost its worker is remembered in
    the journal. With `forgive` the deaths of its workers no longer count against it.
    """
    kept = ledger.outlasting(entry)
    intact = ledger.intact(kept) if kept is not None else ()
    if entry.state != "done":
        # A mask of an earlier input or model must not pass for the result of this one.
        for suffix in (*(exporter.suffix for _, exporter in EXPORTERS.items()), IMAGE_SUFFIX):
            if f"{entry.id}{suffix}" not in intact:
                (ledger.out / f"{entry.id}{suffix}").unlink(missing_ok=True)
    cost = {"cost": entry.code} if kept is not None and entry.code in COSTLY else {}
    ledger.end(entry.id, {**facts, **cost}, forgive=forgive)
    if kept is None:
        ledger.write(entry)


def _reset_peak() -> None:
    """Begin to measure the peak of this process's memory anew, neighbours included (Linux 4.0; proc(5))."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak() -> int | None:
    """Return the peak of this process's memory since `_reset_peak` in MiB; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:")), None)
