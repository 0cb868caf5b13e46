"""Several studies in one worker: who is in which stage, who waits, and what becomes of the others when one fails."""

from __future__ import annotations

import gzip
import io
import json
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medseg.batch import child as program
from medseg.batch import isolation
from medseg.batch.attempt import Course, Outcome
from medseg.batch.child import Worker
from medseg.batch.isolation import UNSHARED, Child, Job, Limits
from medseg.batch.job import Settings, encode
from medseg.batch.ledger import Entry
from medseg.batch.memory import image_bytes
from medseg.batch.study_input import StudyInput
from medseg.batch.waiting import Waiting
from medseg.errors import BatchError, ExportError

GIB = 1 << 30


class Scripted:
    """Pretends to be a process: says what a script says, and ends where it says None."""

    def __init__(self, *script: dict[str, Any] | Callable[[], None] | None) -> None:
        self.script, self.sent, self.starts, self.weight = list(script), [], 0, 0  # type: ignore[var-annotated]
        self.pid: int | None = None

    def start(self) -> None:
        if self.pid is None:
            self.starts, self.pid = self.starts + 1, 1

    def send(self, message: list[Any]) -> None:
        self.sent.append(message[2])

    def message(self, seconds: float) -> dict[str, Any] | None:
        assert self.script, "the guard listens for more than it should"
        row = self.script.pop(0)
        if callable(row):
            row()
            return {}
        return row

    def memory(self) -> int:
        return self.weight

    def kill(self) -> None: ...

    def end(self) -> str:
        self.pid = None
        return "it ended with status 3"


def stage(number: int, name: str) -> dict[str, Any]:
    return {"study": number, "stage": name}


def done(number: int, name: str) -> dict[str, Any]:
    entry = Entry(id=name, state="done", input_digest="i", model_digest="m")
    return {"study": number, "outcome": {"entry": entry.model_dump(mode="json"), "fresh": True}}


def through(number: int, name: str) -> list[dict[str, Any]]:
    return [*(stage(number, each) for each in ("checking", "reading", "predicting", "writing")), done(number, name)]


def served(script: Scripted, *sizes: int, limits: Limits | None = None) -> list[Job]:
    """Serve studies a, b, c... of these sizes by a scripted process."""
    child, waiting = Child(limits or Limits(bytes=GIB)), Waiting()
    child.process = script  # type: ignore[assignment]
    jobs = [Job("", name, size) for name, size in zip("abcdef", sizes, strict=False)]
    for job in jobs:
        waiting.add(job)
    child.serve(lambda room: waiting.take(-1 if room is None and not waiting._jobs else room))
    return jobs


def fates(jobs: list[Job]) -> dict[str, str]:
    outcomes = {job.study: job.future.result(0) for job in jobs}
    return {name: o.death or (o.entry.state if o.entry else "") for name, o in outcomes.items()}


def test_the_next_study_is_sent_when_the_last_one_is_predicted() -> None:
    process = Scripted()
    sent: list[list[str]] = []

    def look() -> None:
        sent.append(list(process.sent))

    process.script = [
        *(stage(1, "reading"), look, stage(1, "predicting"), look, stage(2, "reading"), stage(2, "read"), look),
        *(stage(1, "writing"), stage(2, "predicting"), look, done(1, "a"), stage(2, "writing"), done(2, "b")),
        *through(3, "c")[:4],
        done(3, "c"),
    ]
    jobs = served(process, 1, 1, 1)
    assert sent == [["a"], ["a", "b"], ["a", "b"], ["a", "b", "c"]], "never more than one is read ahead"
    assert fates(jobs) == dict.fromkeys("abc", "done")
    assert process.starts == 1


@pytest.mark.parametrize("sizes", [(GIB // 8, 1), (1, GIB // 8), (1, UNSHARED), (UNSHARED, 1), (UNSHARED, UNSHARED)])
def test_large_images_are_done_without_neighbours(sizes: tuple[int, int]) -> None:
    process, sent = Scripted(*through(1, "a"), *through(2, "b")), []  # type: ignore[var-annotated]
    process.script.insert(3, lambda: sent.append(list(process.sent)))
    assert fates(served(process, *sizes)) == {"a": "done", "b": "done"}
    assert sent == [["a"]]


def test_all_that_were_in_flight_when_a_worker_died_are_suspected_and_what_was_not_begun_is_not() -> None:
    process = Scripted(
        *(stage(1, "reading"), stage(1, "predicting"), stage(2, "reading"), stage(2, "read"), stage(1, "writing")),
        *(stage(2, "predicting"), None),
        *through(4, "c"),
    )
    jobs = served(process, 1, 1, 1)
    assert fates(jobs) == {"a": "died", "b": "died", "c": "done"}
    assert process.sent == ["a", "b", "c", "c"]
    assert process.starts == 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Callable[[], None]]:
    """Give steps of a script that let seconds pass."""
    now = [100.0]
    monkeypatch.setattr(isolation.time, "monotonic", lambda: now[0])

    def passing(seconds: float) -> Callable[[], None]:
        def step() -> None:
            now[0] += seconds

        return step

    return passing


def test_a_study_that_takes_too_long_is_known_and_its_neighbours_are_done_again(
    clock: Callable[[float], Callable[[], None]],
) -> None:
    process = Scripted(
        *(stage(1, "reading"), stage(1, "predicting"), clock(4), stage(2, "reading"), stage(2, "read"), clock(7)),
        *through(3, "b"),
    )
    assert fates(served(process, 1, 1, limits=Limits(10, GIB))) == {"a": "timeout", "b": "done"}


def test_waiting_for_neighbours_costs_no_time(clock: Callable[[float], Callable[[], None]]) -> None:
    process = Scripted(
        *(stage(1, "reading"), stage(1, "predicting"), clock(5), stage(2, "reading"), clock(4), stage(2, "read")),
        *(stage(1, "predicted"), clock(90), stage(1, "writing"), stage(2, "predicting"), clock(0.5)),
        *(done(1, "a"), clock(5), stage(2, "writing"), done(2, "b")),
    )
    assert fates(served(process, 1, 1, limits=Limits(10, GIB))) == {"a": "done", "b": "done"}


def test_of_several_nobody_knows_who_took_the_memory(clock: Callable[[float], Callable[[], None]]) -> None:
    process = Scripted()

    def grow() -> None:
        process.weight = 2 * GIB
        clock(1)()

    process.script = [stage(1, "reading"), stage(1, "predicting"), stage(2, "reading"), grow]
    assert fates(served(process, 1, 1)) == {"a": "died", "b": "died"}
    process = Scripted(stage(1, "reading"), lambda: clock(1)())
    process.weight = 2 * GIB
    with pytest.raises(BatchError, match="the model alone"):
        fates(served(Scripted(clock(1)), 1, limits=Limits(bytes=-1)))
    assert fates(served(process, 1)) == {"a": "memory"}, "alone it is known"


def test_an_error_of_the_run_reaches_all_who_wait() -> None:
    stop = {"stop": encode(ExportError("full", code="DISK_FULL"))}
    jobs = served(Scripted(stage(1, "reading"), stage(1, "predicting"), stage(2, "reading"), stop), 1, 1)
    for job in jobs:
        with pytest.raises(ExportError, match="full"):
            job.future.result(0)


def test_a_start_that_fails_is_tried_again_and_in_the_end_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "PAUSE_SECONDS", 0.0)
    process = Scripted(*[None] * 7, *through(8, "a"), *[None] * 8)
    jobs = served(process, 1, 1)
    assert jobs[0].future.result(0).entry is not None
    with pytest.raises(BatchError, match=r"8 times in a row .it ended with status 3"):
        jobs[1].future.result(0)


def test_the_queue_gives_nothing_that_does_not_fit_and_ends_when_closed() -> None:
    waiting, found = Waiting(), []  # type: ignore[var-annotated]
    waiting.add(Job("", "a", 5))
    assert waiting.take(4) is None
    assert waiting.take(5) is not None
    thread = threading.Thread(target=lambda: found.append(waiting.take(None)))
    thread.start()
    waiting.close()
    thread.join(30)
    assert found == [None]


def test_size_of_an_image_by_its_header(tmp_path: Path) -> None:
    file = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)), file)
    assert image_bytes(StudyInput("a", (file, file), None, file)) == 2 * 4 * 5 * 6 * 4
    file.write_bytes(b"broken")
    assert image_bytes(StudyInput("a", (file,), None, file)) == 6 * 40
    assert image_bytes(StudyInput("a", (tmp_path / "none.nii",), None, file)) == 0


@pytest.mark.parametrize(
    ("place", "value"),
    [(70, 999), (108, 0), (42, -3), (40, 0), (252, -1)],
    ids=["type", "offset", "negative", "dimensions", "form"],
)
@pytest.mark.parametrize("cut", [0, 30])
def test_the_size_of_a_damaged_image_stops_no_run(tmp_path: Path, place: int, value: int, cut: int) -> None:
    """It is asked in the command itself, where an error would end all studies."""
    file = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).integers(0, 999, (4, 5, 6), np.int16), np.eye(4)), file)
    header = bytearray(gzip.decompress(file.read_bytes()))
    header[place : place + 4] = struct.pack("<f", value) if place == 108 else struct.pack("<hxx", value)
    packed = bytearray(gzip.compress(bytes(header)))
    packed[12 : 12 + cut] = bytes(255 for _ in range(cut))
    file.write_bytes(packed)
    assert 0 <= image_bytes(StudyInput("a", (file,), None, file)) < 1 << 20


def test_the_size_of_what_cannot_be_looked_at_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refused)
    monkeypatch.setattr("os.stat", refused)
    assert image_bytes(StudyInput("a", (tmp_path / "a.mha",), None, tmp_path)) == 0
    assert image_bytes(StudyInput("a", (tmp_path / "a.nii",), None, tmp_path)) == 0


class Meeting:
    """Stands in for `attempt`: each study goes on only when the others are where they should be beside it."""

    AWAITS = (("a", "predicting", "b reading"), ("b", "predicting", "c reading"), ("a", "writing", "b predicting"))

    def __init__(self) -> None:
        self.reached = {f"{n} {s}": threading.Event() for n in "abc" for s in ("reading", "predicting", "writing")}
        self.threads: set[int] = set()

    def attempt(self, study: StudyInput, settings: Settings, model: object, *, course: Course) -> Outcome:
        for stage in ("reading", "predicting", "writing"):
            course.enter(stage)
            self.reached[f"{study.id} {stage}"].set()
            meet = partial(self.meet, study.id, stage)
            course.call(meet) if stage == "predicting" else meet()
        return Outcome(fresh=True)

    def meet(self, name: str, stage: str) -> Any:
        if stage == "predicting":
            self.threads.add(threading.get_ident())
        for who, where, event in self.AWAITS:
            assert (who, where) != (name, stage) or self.reached[event].wait(60)

    def requests(self, settings: str, folder: Path) -> Iterator[bytes]:
        """Give studies as the guard does: the next one when the last one is being predicted."""
        for number, (name, before) in enumerate([("a", ""), ("b", "a predicting"), ("c", "b predicting")]):
            assert not before or self.reached[before].wait(60)
            study = StudyInput(name, (folder / name,), None, folder)
            yield json.dumps([number, settings, encode(study)]).encode()


def test_a_worker_reads_while_it_predicts_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other they would wait for each other for ever."""
    meeting, answers = Meeting(), io.BytesIO()
    monkeypatch.setattr(program, "attempt", meeting.attempt)
    monkeypatch.setenv("MEDSEG_DEBUG", "1")  # the test keeps its standard error
    settings = encode(Settings(tmp_path, tmp_path, "", "r", None, ("nifti",)))
    Worker(answers).serve(meeting.requests(settings, tmp_path))
    told = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert sum("outcome" in each for each in told) == 3
    assert not [each for each in told if "stop" in each]
    assert len(meeting.threads) == 1, "the network has one thread"
