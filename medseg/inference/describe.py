"""What a foreign model says of itself, told by a process of its own: reading its checkpoints takes torch (300 MiB).

A command whose workers predict needs no more than that, and its own memory is there for as long as they work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from medseg.bundle import Bundle, BundleInfo, is_foreign, open_bundle
from medseg.errors import BundleError, MedsegError
from medseg.startup import quick_start

PROGRAM = "medseg.inference.describe"


def described(model: Path) -> Bundle:
    """Return `open_bundle` without weights, and without torch in this process.

    Raises
    ------
    BundleError : as `open_bundle`, or the other process ended without an answer.
    """
    if not is_foreign(model):
        return open_bundle(model)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        # -P: a file called json.py in the current folder must not become part of the program.
        [sys.executable, "-P", "-m", PROGRAM, str(model)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        raise BundleError(f"{model.name}: the process that reads it ended with {done.returncode}") from error
    if "error" in answer:
        raise BundleError(answer["error"], code=answer["code"])
    return _bundle(model, answer)


def _bundle(folder: Path, answer: dict[str, Any]) -> Bundle:
    previous = None if answer["previous"] is None else _bundle(folder, answer["previous"])
    return Bundle(folder, BundleInfo.model_validate(answer["info"]), previous)


def _described(bundle: Bundle) -> dict[str, Any]:
    previous = None if bundle.previous is None else _described(bundle.previous)
    return {"info": bundle.info.model_dump(mode="json"), "previous": previous}


def main(model: Path) -> None:
    """Say on stdout what a model is, or why it cannot be used."""
    try:
        answer = _described(open_bundle(model))
    except MedsegError as error:
        answer = {"error": str(error), "code": error.code}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    quick_start()
    main(Path(sys.argv[1]))
