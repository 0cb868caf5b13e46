"""The ledger: one small file a study that says how it stands; the source of truth of a batch run.

``OUT/ledger/<id>.json`` holds what a repeated run would write again byte for byte; what differs between runs
(times, attempts) goes to ``OUT/journal/<id>.json``.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from medseg.config import Config
from medseg.files import file_digest, write_json
from medseg.readers.allowances import Allowance, still_true

State = Literal["done", "refused", "failed"]


class Entry(Config):
    """How one study stands.

    Attributes
    ----------
    state : done (outputs exist and hashes verify), refused (the input is unfit) or failed (we could not).
    code, message : why, when it is not done; without any path.
    input_digest, model_digest : what the result was made from.
    outputs : file name in OUT -> SHA-256.
    volumes_ml : label -> mL (for pictures, pixels).
    notes : what the reader remarked.
    correction : how a corrected series lay, and the steps it was brought to.
    """

    id: str
    state: State
    code: str = ""
    message: str = ""
    input_digest: str
    model_digest: str
    outputs: dict[str, str] = Field(default_factory=dict)
    volumes_ml: dict[str, float] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    correction: dict[str, str] = Field(default_factory=dict)


class Ledger:
    """The entries below one output folder."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def read(self, study: str) -> Entry | None:
        """Return the entry of a study; None where there is none or it is damaged (the study is then done again)."""
        try:
            return Entry.model_validate(json.loads(self._file(study).read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError):
            return None

    def write(self, entry: Entry) -> None:
        """Write an entry; with state "done" this is the commit of the study."""
        write_json(self._file(entry.id), entry.model_dump(mode="json"))

    def settled(
        self,
        study: str,
        *,
        input_digest: str,
        model_digest: str,
        outputs: tuple[str, ...] = (),
        allow: Collection[Allowance] = (),
    ) -> Entry | None:
        """Return the entry if it is done or refused, from the same input and model, with intact outputs.

        `outputs` are files that it must have if it is done; `allow` is what may be corrected now: a study that would
        end otherwise with it is not settled.
        """
        entry = self.read(study)
        if entry is None or entry.state == "failed":
            return None
        if (entry.input_digest, entry.model_digest) != (input_digest, model_digest):
            return None
        if not still_true(code=entry.code, notes=entry.notes, allow=allow):
            return None
        if entry.state == "done" and not set(outputs) <= set(entry.outputs):
            return None
        intact = all(
            (self.out / name).is_file() and file_digest(self.out / name) == expected
            for name, expected in entry.outputs.items()
        )
        return entry if intact else None

    def attempt(self, study: str) -> int:
        """Count an attempt before it begins, and return which it is (from 1)."""
        file = self.out / "journal" / f"{study}.json"
        try:
            before = int(json.loads(file.read_text(encoding="utf-8"))["attempts"])
        except (OSError, ValueError, KeyError, TypeError):
            before = 0
        write_json(file, {"attempts": before + 1})
        return before + 1

    def journal(self, study: str, facts: dict[str, Any]) -> None:
        """Keep facts of the latest attempt that differ from run to run."""
        file = self.out / "journal" / f"{study}.json"
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        write_json(file, {**content, **facts})

    def _file(self, study: str) -> Path:
        return self.out / "ledger" / f"{study}.json"
