"""The program of a worker: takes studies line by line, answers how each ended, and dies with who started it.

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
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from medseg.batch.attempt import Outcome, attempt
from medseg.batch.job import Settings, decode, encode, recipe
from medseg.batch.locks import present
from medseg.batch.pipe import readable
from medseg.errors import BatchError, BundleError, MedsegError

if TYPE_CHECKING:
    from medseg.inference.predict import Model

IDLE_SECONDS = 600.0
"""A worker without work gives its memory back: that of a cluster outlives the run that started it."""


class Worker:
    """Does studies, one after the other, with one model in memory.

    Parameters
    ----------
    answers : where lines of JSON go.
    slot : number of this worker on its machine; it takes the GPU of that number.
    """

    def __init__(self, answers: IO[bytes], slot: int = 0) -> None:
        self._answers = answers
        self._slot = slot
        self._recipe = ""
        self._model: Model | None = None

    def serve(self, requests: Iterator[bytes]) -> None:
        """Answer each request ``[settings, study]`` until there are no more."""
        for line in requests:
            try:
                settings, study = map(decode, json.loads(line))
                with present(settings.out):
                    outcome = attempt(study, settings, partial(self._load, settings), tell=self._tell)
            except MedsegError as error:
                self._say({"stop": encode(error)})
            except OSError as error:
                stop = BatchError(f"the worker cannot go on ({error.strerror or type(error).__name__})", code="WORKER")
                self._say({"stop": encode(stop)})
            else:
                self._say({"outcome": _plain(outcome)})

    def _tell(self, stage: str, **facts: str) -> None:
        self._say({"stage": stage, **facts})

    def _load(self, settings: Settings) -> Model:
        """Return the model, loaded once as long as it stays the same."""
        if self._model is None or self._recipe != settings.recipe:
            self._tell("loading")
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

    def _say(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message).encode("ascii") + b"\n")
        self._answers.flush()


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


def lines(source: int) -> Iterator[bytes]:
    """Yield the lines of a file handle; end when it does, or nothing comes for IDLE_SECONDS."""
    rest = b""
    while readable(source, IDLE_SECONDS):
        data = os.read(source, 1 << 20)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from whole


def main(lifeline: int, slot: int) -> None:
    """Be a worker on stdin and stdout."""
    die_with(lifeline)
    with contextlib.suppress(OSError):  # the system's memory killer must take this process, not who commands it
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # what libraries print must not come among the answers
    # While the command still looks for studies, this one imports what it will need.
    threading.Thread(target=__import__, args=("medseg.batch.study",), daemon=True).start()
    Worker(answers, slot).serve(lines(0))
    answers.close()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
