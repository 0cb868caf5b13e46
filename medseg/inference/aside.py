"""A question to a process of its own: what it takes to answer (torch: 300 MiB) goes with it.

A command whose workers predict needs no more than the answer, and its own memory is there for as long as they work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from medseg.errors import BundleError, MedsegError
from medseg.startup import quick_start


def ask(program: str, question: Any, *, about: str) -> Any:
    """Return what a module of medseg says to a question; both are what JSON can hold.

    The answer comes in a file of its own, so that a library that prints something does not garble it.

    Parameters
    ----------
    program : name of a module that calls `answer` when it is run.
    about : whose model it is, for the message.

    Raises
    ------
    BundleError : the other process did, or ended without an answer.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with tempfile.TemporaryFile() as file:
        done = subprocess.run(
            # -P: a file called json.py in the current folder must not become part of the program.
            [sys.executable, "-P", "-m", program, str(file.fileno())],
            input=json.dumps(question).encode("ascii"),
            capture_output=True,
            pass_fds=(file.fileno(),),
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
        file.seek(0)
        said = file.read()
    try:
        told = json.loads(said)
    except ValueError as error:
        raise BundleError(f"{about}: the process that reads it ended with {done.returncode}") from error
    if "error" in told:
        raise BundleError(told["error"], code=told["code"])
    return told["answer"]


def answer(find: Callable[[Any], Any]) -> None:
    """Answer the question that this process was started with, or tell the error of medseg that it raised."""
    quick_start()
    try:
        told = {"answer": find(json.loads(sys.stdin.buffer.read()))}
    except MedsegError as error:
        told = {"error": str(error), "code": error.code}
    with os.fdopen(int(sys.argv[1]), "w", encoding="ascii") as file:
        json.dump(told, file)
