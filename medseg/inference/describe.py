"""What a foreign model says of itself, told by a process of its own: reading its checkpoints takes torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medseg.bundle import Bundle, BundleInfo, is_foreign, open_bundle
from medseg.inference.aside import answer, ask

PROGRAM = "medseg.inference.describe"


def described(model: Path) -> Bundle:
    """Return `open_bundle` without weights, and without torch in this process.

    Raises
    ------
    BundleError : as `open_bundle`, or the other process ended without an answer.
    """
    if not is_foreign(model):
        return open_bundle(model)
    return _bundle(model, ask(PROGRAM, str(model), about=model.name))


def _bundle(folder: Path, answer: dict[str, Any]) -> Bundle:
    previous = None if answer["previous"] is None else _bundle(folder, answer["previous"])
    return Bundle(folder, BundleInfo.model_validate(answer["info"]), previous)


def _described(bundle: Bundle) -> dict[str, Any]:
    previous = None if bundle.previous is None else _described(bundle.previous)
    return {"info": bundle.info.model_dump(mode="json"), "previous": previous}


if __name__ == "__main__":
    answer(lambda model: _described(open_bundle(Path(model))))
