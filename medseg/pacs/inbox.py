"""Studies as they come, on disk: nothing that was confirmed is lost, whatever happens to the process.

``INBOX/studies/<study>/<series>/<instance>.dcm`` holds the instances, all names being keyed hashes; ``INBOX/states/
<study>.json`` how the study stood when it was last segmented, which outlives its images: it tells a study that comes
again whole from a few late instances of one whose images are gone.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from medseg.config import Config
from medseg.errors import BatchError, ExportError
from medseg.files import digest, sweep, sync_folder, write_atomically, write_json
from medseg.pacs.archive import RESERVE_BYTES
from medseg.privacy import keyed_id
from medseg.readers.dicom_identity import Identity

Outcome = Literal["tried", "done", "refused", "failed", "held"]
DIGITS = 24


class State(Config):
    """How a study stood when it was last looked at.

    Attributes
    ----------
    content : digest of the instances that it had.
    outcome : "tried" when it was begun, then done, refused, failed, or held (it must not be segmented as it is).
    code : why it is not done.
    attempts : how often it was begun with these instances.
    at : when, in seconds since 1970.
    series : series -> instances that it has had, as hashes.
    deleted : whether its images were deleted after success.
    """

    content: str
    outcome: Outcome
    code: str = ""
    attempts: int = 0
    at: float
    series: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    deleted: bool = False


@dataclass(frozen=True)
class Snapshot:
    """A study at one moment: its folder, the digest of what is in it, and series -> instances."""

    study: str
    folder: Path
    content: str
    series: dict[str, tuple[str, ...]]


@dataclass
class Inbox:
    """The folder for what comes; `receive` may be called from many threads."""

    folder: Path
    max_study_bytes: int = 32 * 1024**3
    clock: Callable[[], float] = time.monotonic
    last: dict[str, float] = field(default_factory=dict)
    lacking: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: dict[str, int] = {}
        for name in ("studies", "states", "trash"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.chmod(0o700)
        shutil.rmtree(self.folder / "trash", ignore_errors=True)
        (self.folder / "trash").mkdir(mode=0o700)
        sweep(self.folder)
        # Who knows how long ago the last instance came: the quiet time begins again.
        self.last = {place.name: self.clock() for place in (self.folder / "studies").iterdir()}

    def receive(self, raw: bytes, item: Identity) -> str:
        """Store one instance safely on disk; returns the hashed id of its study.

        The same bytes again change nothing; other bytes under the same UID replace the former ones.

        Raises
        ------
        ExportError : DISK_FULL, NOT_WRITABLE. BatchError : STUDY_TOO_LARGE. The study is then not segmented until the
            instance has come.
        """
        study = keyed_id("study", item.study, digits=DIGITS)
        name = keyed_id("instance", item.instance, digits=DIGITS)
        file = self.folder / "studies" / study / keyed_id("series", item.series, digits=DIGITS) / f"{name}.dcm"
        with self._lock:
            self.last[study] = self.clock()
            try:
                self._store(raw, file, study)
            except (ExportError, BatchError):
                self.lacking.setdefault(study, set()).add(name)
                raise
            self.lacking.get(study, set()).discard(name)
        return study

    def _store(self, raw: bytes, file: Path, study: str) -> None:
        before = file.stat().st_size if file.exists() else 0
        if before == len(raw) and file.read_bytes() == raw:
            return
        if study not in self._bytes:
            self._bytes[study] = sum(path.stat().st_size for path in file.parent.parent.rglob("*.dcm"))
        if self._bytes[study] + len(raw) - before > self.max_study_bytes:
            raise BatchError(f"{study}: has more than {self.max_study_bytes} bytes", code="STUDY_TOO_LARGE")
        if shutil.disk_usage(self.folder).free < RESERVE_BYTES + len(raw):
            raise ExportError(f"less than {RESERVE_BYTES // 2**20} MiB are free for the inbox", code="DISK_FULL")
        if not file.parent.exists():
            self._make(file.parent)

        def write(temporary: Path) -> None:
            temporary.write_bytes(raw)

        write_atomically(file, write, mode=0o600)
        self._bytes[study] += len(raw) - before

    def _make(self, folder: Path) -> None:
        """Make the folder of a series so that it survives a power cut."""
        try:
            for place in (folder.parent, folder):
                place.mkdir(exist_ok=True, mode=0o700)
                sync_folder(place.parent)
        except OSError as error:
            raise ExportError(f"the inbox cannot be written ({error.strerror})", code="DISK_FULL") from error

    def studies(self) -> list[str]:
        """Return the ids of the studies that have images here, in the order of their names."""
        return sorted(place.name for place in (self.folder / "studies").iterdir())

    def is_quiet(self, study: str, seconds: float) -> bool:
        """Tell whether nothing came for a study for so long."""
        return self.clock() - self.last.get(study, float("-inf")) >= seconds

    def snapshot(self, study: str) -> Snapshot:
        """Return what a study holds at this moment."""
        folder = self.folder / "studies" / study
        with self._lock:
            files = sorted(folder.glob("*/*.dcm"))
            facts = [(path.parent.name, path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        series: dict[str, list[str]] = {}
        for path in files:
            series.setdefault(path.parent.name, []).append(path.stem)
        return Snapshot(study, folder, digest(facts), {name: tuple(items) for name, items in series.items()})

    def state(self, study: str) -> State | None:
        """Return how a study stood when it was last looked at; None where it never was, or its record is damaged."""
        try:
            return State.model_validate(json.loads(self._state_file(study).read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError):
            return None

    def record(self, found: Snapshot, outcome: Outcome, *, code: str = "", attempts: int = 0) -> None:
        """Keep how a study stands with what it held; earlier instances stay known."""
        before = self.state(found.study)
        series = dict(before.series) if before else {}
        if outcome in ("done", "refused"):
            series |= found.series
        state = State(
            content=found.content,
            outcome=outcome,
            code=code,
            attempts=attempts,
            at=time.time(),
            series=series,
            deleted=before.deleted if before else False,
        )
        self._write_state(found.study, state)

    def missing(self, found: Snapshot) -> int:
        """Return how many instances of these series were here once, are deleted, and did not come again."""
        before = self.state(found.study)
        known = before.series if before and before.deleted else {}
        return sum(len(set(known.get(name, ())) - set(items)) for name, items in found.series.items())

    def delete(self, found: Snapshot) -> bool:
        """Delete the images of a study unless something has come since `found`; tells whether it did."""
        state = self.state(found.study)
        if state is None or self.snapshot(found.study).content != found.content:
            return False
        self._write_state(found.study, state.model_copy(update={"deleted": True}))
        trash = self.folder / "trash" / f"{found.study}-{time.monotonic_ns()}"
        with self._lock:
            if sorted(found.folder.glob("*/*.dcm")) != sorted(
                found.folder / name / f"{item}.dcm" for name, items in found.series.items() for item in items
            ):
                return False
            found.folder.rename(trash)
            self._bytes.pop(found.study, None)
            self.last.pop(found.study, None)
        shutil.rmtree(trash)
        return True

    def _write_state(self, study: str, state: State) -> None:
        write_json(self._state_file(study), state.model_dump(mode="json"), mode=0o600)

    def _state_file(self, study: str) -> Path:
        return self.folder / "states" / f"{study}.json"
