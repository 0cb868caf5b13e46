"""The ledger: one small file a study that says how it stands; the source of truth of a batch run.

``OUT/ledger/<id>.json`` holds what a repeated run would write again byte for byte; what differs between runs
(times, attempts) goes to ``OUT/journal/<id>.json``.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from medseg.config import Config
from medseg.files import file_digest, write_json
from medseg.readers.allowances import Allowance, still_true

State = Literal["done", "refused", "failed"]
IN_FLIGHT = ("reading", "predicting", "writing")
"""What the journal says of a study while it is being done."""
COSTLY = ("MEMORY", "POISON", "TIMEOUT")
"""Codes of failed studies that ended their worker."""


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
    expected_dice : label -> Dice to expect (see medseg.quality); labels of which nothing can be said are left out.
    review : whether a person should look at the mask; None where the model has no estimate of quality.
    review_reasons : why, in words.
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
    expected_dice: dict[str, float] = Field(default_factory=dict)
    review: bool | None = None
    review_reasons: tuple[str, ...] = ()
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
        return entry if self.intact(entry) == set(entry.outputs) else None

    def outlasting(self, failed: Entry) -> Entry | None:
        """Return the entry that outlasts a failed attempt: of the same input and model, with a file that is intact.

        The attempt then was to add a format, or to replace a lost file, which is no reason to lose what is there, nor
        to forget what was lost: that is done again by the next run. Nor is one that ended before it had read the input,
        whose digest is then not known.
        """
        entry = self.read(failed.id)
        if entry is None or (failed.state, entry.state) != ("failed", "done"):
            return None
        same = failed.input_digest in ("", entry.input_digest) and failed.model_digest == entry.model_digest
        return entry if same and self.intact(entry) else None

    def intact(self, entry: Entry) -> set[str]:
        """Return the names of the outputs that are what the entry says."""
        files = {name: self.out / name for name in entry.outputs}
        return {name for name, file in files.items() if file.is_file() and file_digest(file) == entry.outputs[name]}

    def attempt(self, study: str) -> int:
        """Count an attempt before it begins, and return which it is (from 1)."""
        before = self.facts(study)
        number = before.get("attempts")
        count = (number if isinstance(number, int) else 0) + 1
        kept: dict[str, Any] = {name: before[name] for name in ("deaths", "deaths_of") if name in before}
        self._put(study, {**kept, "attempts": count, "state": IN_FLIGHT[0], "began": now(), "host": platform.node()})
        return count

    def journal(self, study: str, facts: dict[str, Any]) -> None:
        """Keep facts of the latest attempt that differ from run to run."""
        self._put(study, {**self.facts(study), **facts})

    def end(self, study: str, facts: dict[str, Any], *, forgive: bool = True) -> None:
        """Note that the attempt is over, however it ended; deaths of earlier ones are forgiven unless told.

        A fact `cost` is the code by which an attempt on a study that is done, and stays so, ended its worker.
        """
        before = self._landed(study)
        kept = {name: fact for name, fact in before.items() if not forgive or name not in ("deaths", "deaths_of")}
        self._put(study, {**kept, **facts, "ended": now()})

    def forget_flight(self, study: str) -> None:
        """Note that no attempt is under way, or is to be made: its process died after the study was committed."""
        facts = self.facts(study)
        if facts.get("state") in IN_FLIGHT or "cost" in facts:
            self._put(study, {name: fact for name, fact in facts.items() if name not in ("state", "cost")})

    def in_flight(self, study: str) -> bool:
        """Tell whether an attempt began and did not end: it is under way, or its process was killed."""
        return self.facts(study).get("state") in IN_FLIGHT

    def suspected(self, study: str) -> bool:
        """Tell whether a study has cost a worker, or may have: it is then done last and alone."""
        facts = self.facts(study)
        entry = self.read(study)
        costly = entry is not None and entry.state == "failed" and entry.code in COSTLY
        return facts.get("state") in IN_FLIGHT or bool(facts.get("deaths") or facts.get("cost")) or costly

    def death(self, study: str, input_digest: str) -> int:
        """Count a death of the worker of this study, which was alone, and return how many there were from this input.

        An attempt that ends by itself sets the count to nothing.
        """
        before = self.facts(study)
        same = before.get("deaths_of") == input_digest and isinstance(before.get("deaths"), int)
        count = (before["deaths"] if same else 0) + 1
        self._put(study, {**before, "deaths": count, "deaths_of": input_digest})
        return count

    def facts(self, study: str) -> dict[str, Any]:
        """Return what the journal holds of a study; nothing where it is damaged or there is none."""
        try:
            content = json.loads((self.out / "journal" / f"{study}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def studies(self) -> list[str]:
        """Return the ids of all studies that have an entry, in order."""
        return sorted(file.stem for file in (self.out / "ledger").glob("*.json") if not file.name.startswith("."))

    def _landed(self, study: str) -> dict[str, Any]:
        return {name: fact for name, fact in self.facts(study).items() if name != "state"}

    def _put(self, study: str, facts: dict[str, Any]) -> None:
        write_json(self.out / "journal" / f"{study}.json", facts)

    def _file(self, study: str) -> Path:
        return self.out / "ledger" / f"{study}.json"


def now() -> str:
    """Return this moment in UTC, as the journal writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
