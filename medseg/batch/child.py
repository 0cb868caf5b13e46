"""The program of a worker: takes studies line by line, answers how each ended, and dies with who started it.

reading -> network -> writing, each with one study at a time

A study runs in a process of its own kind so that a decoder that aborts, a hang or a memory hog costs that study only.
See medseg.batch.isolation for the other side.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from medseg.batch.attempt import Course, Outcome, attempt
from medseg.batch.job import Settings, decode, encode, recipe
from medseg.batch.locks import present
from medseg.batch.pipe import readable
from medseg.errors import BatchError, BundleError, MedsegError
from medseg.startup import quick_start

if TYPE_CHECKING:
    from medseg.inference.predict import Model, Prediction

WAITS = {"predicting": "read", "writing": "predicted"}
"""Stage that one study at a time is in -> what is said of a study that waits before it."""
IDLE_SECONDS = 600.0
"""A worker without work gives its memory back: that of a cluster outlives the run that started it."""
PREFERRED = 100
"""Thousandths of the memory by which this process looks larger to the system's memory killer than it is: more than who
commands it, but no more than who really takes the memory, be it another program."""


class Line(Course):
    """The way of one study through a worker: it leaves a stage when the next one is free, and one study is in each.

    So no more than one study waits before each stage, however fast the one before it is. The guard sends the next study
    when the one before it has been read.
    """

    def __init__(self, worker: Worker, number: int) -> None:
        self._worker, self._number = worker, number
        self._held: threading.Lock | None = None

    def enter(self, stage: str, **facts: str) -> float:
        """Begin a stage, as soon as no other study is in it."""
        began, waits = time.monotonic(), WAITS.get(stage)
        if waits is not None:
            lock = self._worker.locks[stage]
            if not lock.acquire(blocking=False):
                self._worker.say({"study": self._number, "stage": waits})
                lock.acquire()
            self.leave()
            self._held = lock
        if stage == "reading":
            self._worker.begin()
        self._worker.say({"study": self._number, "stage": stage, **facts})
        return time.monotonic() - began if waits else 0.0

    def call(self, network: Callable[[], Prediction]) -> Prediction:
        """Let the network work in its thread: each thread that calls it would get threads and memory of its own."""
        return self._worker.network.submit(network).result()

    def leave(self) -> None:
        """Give back the stage that the study is in."""
        held, self._held = self._held, None
        if held is not None:
            held.release()


class Worker:
    """Does studies with one model in memory.

    Parameters
    ----------
    answers : where lines of JSON go.
    slot : number of this worker on its machine; it takes the GPU of that number.
    """

    def __init__(self, answers: IO[bytes], slot: int = 0) -> None:
        self._answers, self._speaking = answers, threading.Lock()
        self._slot = slot
        self._recipe = ""
        self._model: Model | None = None
        self.locks = {stage: threading.Lock() for stage in WAITS}
        self.network = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._studies: set[Future[None]] = set()
        self._begun = False

    def serve(self, requests: Iterator[bytes]) -> None:
        """Answer each request ``[number, settings, study]`` until there are no more."""
        with ThreadPoolExecutor(len(WAITS) + 1, thread_name_prefix="study") as pool:
            for line in requests:
                number, settings, study = json.loads(line)
                future = pool.submit(self._do, number, settings, study)
                future.add_done_callback(_end_with)
                self._studies = {future, *(each for each in self._studies if not each.done())}

    def busy(self) -> bool:
        """Whether a study is under way."""
        return not all(each.done() for each in self._studies)

    def begin(self) -> None:
        """Be about to read a study: what libraries say from now on may be about a patient, and goes nowhere."""
        if not self._begun and not os.environ.get("MEDSEG_DEBUG"):
            os.dup2(1, 2)
        self._begun = True

    def _do(self, number: int, settings: str, study: str) -> None:
        course = Line(self, number)
        try:
            shared = decode(settings)
            with present(shared.out):
                outcome = attempt(decode(study), shared, partial(self._load, shared, course), course=course)
        except MedsegError as error:
            self.say({"stop": encode(error)})
        except OSError as error:
            stop = BatchError(f"the worker cannot go on ({error.strerror or type(error).__name__})", code="WORKER")
            self.say({"stop": encode(stop)})
        else:
            self.say({"study": number, "outcome": _plain(outcome)})
        finally:
            course.leave()

    def _load(self, settings: Settings, course: Course) -> Model:
        """Return the model, loaded once as long as it stays the same; the guard lets no other study be this far."""
        if self._model is None or self._recipe != settings.recipe:
            course.enter("loading")
            from medseg.bundle import BundleInfo
            from medseg.device import best_device
            from medseg.inference.predict import load_model

            self._model = None
            info = BundleInfo.model_validate_json(settings.info)
            model = load_model(settings.model, device=best_device(self._slot), info=info)
            if recipe(info, settings.mirror) != settings.recipe:
                raise BundleError(f"{settings.model}: this worker has another version of medseg than the command")
            self._model, self._recipe = model, settings.recipe
        return self._model

    def say(self, message: dict[str, Any]) -> None:
        """Answer."""
        with self._speaking:
            self._answers.write(json.dumps(message).encode("ascii") + b"\n")
            self._answers.flush()


def _end_with(study: Future[None]) -> None:
    """End this process if a study met what nobody foresaw, with a traceback as any program."""
    error = study.exception()
    if error is not None:
        traceback.print_exception(error)
        os._exit(1)


def _plain(outcome: Outcome) -> dict[str, Any]:
    entry = None if outcome.entry is None else outcome.entry.model_dump(mode="json")
    return {"entry": entry, "fresh": outcome.fresh}


def die_with(lifeline: int) -> None:
    """Let the system end this process when the other end of the pipe `lifeline` closes, whatever it is doing then.

    A thread that waits for it would not do: a decoder that hangs may hold the interpreter's lock.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if readable(lifeline, 0):
        os._exit(1)  # it was closed before we listened


def lines(source: int, busy: Callable[[], bool]) -> Iterator[bytes]:
    """Yield the lines of a file handle; end when it does, or nothing comes for IDLE_SECONDS while nothing is done."""
    rest = b""
    while readable(source, IDLE_SECONDS) or busy():
        if not readable(source, 0):
            continue
        data = os.read(source, 1 << 20)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from whole


def main(lifeline: int, slot: int) -> None:
    """Be a worker on stdin and stdout."""
    quick_start()
    die_with(lifeline)
    with contextlib.suppress(OSError):  # the system's memory killer must take this process, not who commands it
        place = Path("/proc/self/oom_score_adj")
        place.write_text(str(min(1000, int(place.read_text()) + PREFERRED)), encoding="ascii")
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # what libraries print must not come among the answers
    # While the command still looks for studies, this one imports what it will need.
    threading.Thread(target=__import__, args=("medseg.batch.study",), daemon=True).start()
    worker = Worker(answers, slot)
    worker.serve(lines(0, worker.busy))
    answers.close()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
