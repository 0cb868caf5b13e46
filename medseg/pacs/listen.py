"""The receiver of a hospital: what comes is segmented when it is quiet, and the results are sent where they belong.

Each step leaves on disk what the next one needs, so a process that is killed at any moment goes on from there:

    inbox/studies (confirmed to the sender) -> OUT with its ledger -> OUT/outbox -> inbox/states -> images deleted
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread

from medseg.batch.dicom_inputs import wanted_modalities
from medseg.batch.ledger import Entry
from medseg.batch.run import predict as predict_files
from medseg.cases import study_id
from medseg.errors import MedsegError
from medseg.files import write_json
from medseg.inference.predict import Model
from medseg.pacs.address import parse_address
from medseg.pacs.credentials import find_credentials
from medseg.pacs.delivery import Destination, Stow
from medseg.pacs.dimse import Node, Receiver
from medseg.pacs.inbox import Inbox, Snapshot
from medseg.pacs.outbox import Outbox, Rest
from medseg.pacs.predict import locked
from medseg.pacs.settings import ListenConfig
from medseg.pacs.visits import keep_linkage
from medseg.pacs.web import Patience, Web
from medseg.privacy import keyed_id
from medseg.readers.dicom_identity import identify

log = logging.getLogger("medseg.listen")
TICK_SECONDS = 1.0
LOOK_SECONDS = 10.0
"""A study with nothing to do is looked at again after this time, or when something comes for it."""
STATUS_SECONDS = 10.0
ONCE = Patience(attempts=1)
"""The outbox tries again by itself, and meanwhile studies are segmented."""


def destinations(settings: ListenConfig) -> list[Destination]:
    """Return where results go; raise ConfigError where credentials are missing or unsafe."""
    addresses = {target.url: parse_address(target.url, whole=True) for target in settings.send if target.url}
    found: list[Destination] = []
    for target in settings.send:
        if target.url:
            address = addresses[target.url]
            found.append(Stow(Web(address, find_credentials(address, list(addresses.values())), ONCE)))
        else:
            found.append(Node(target, calling=settings.ae_title, tls=settings.tls))
    return found


@dataclass
class Station:
    """A receiver with its inbox, its model and its outbox; `tick` does what is due."""

    settings: ListenConfig
    model: Model
    inbox: Inbox
    outbox: Outbox
    receiver: Receiver | None = None
    counts: Counter[str] = field(default_factory=Counter)
    state: str = "running"
    busy: str = ""
    look_seconds: float = LOOK_SECONDS

    def __post_init__(self) -> None:
        self._looked: dict[str, tuple[float | None, float]] = {}
        self._rests: dict[str, Rest] = {}
        self._said: set[tuple[str, str]] = set()
        self._started = _now()
        self._last_status: tuple[float, object] = (float("-inf"), None)

    def tick(self, stop: Event | None = None) -> bool:
        """Segment every study that is due (none further once `stop` is set), send, delete; tells if it did anything."""
        did = False
        for study in self.inbox.studies():
            if stop is not None and stop.is_set():
                break
            came, now = self.inbox.last.get(study), self.inbox.clock()
            before, until = self._looked.get(study, (None, now))
            if before == came and now < until:
                continue
            acted = self._look_at(study)
            did |= acted
            if not acted and self.inbox.is_quiet(study, self.settings.quiet_seconds):
                self._looked[study] = (came, now + self.look_seconds)
        if stop is None or not stop.is_set():
            did |= self.outbox.send() > 0
        self.write_status()
        return did

    def _look_at(self, study: str) -> bool:
        if not self.inbox.is_quiet(study, self.settings.quiet_seconds):
            return False
        if lacking := len(self.inbox.lacking.get(study, ())):
            self._say_once(study, f"{lacking} instances were refused and have not come again: it waits for them")
            return False
        found = self.inbox.snapshot(study)
        state = self.inbox.state(study)
        same = state is not None and state.content == found.content
        if not found.series:
            return False
        if state is not None and same and state.outcome in ("done", "refused"):
            return self._clean(found, state.at)
        if state is not None and same and state.outcome == "held":
            return False
        attempts = state.attempts if state is not None and same else 0
        rest = self._rests.setdefault(study, Rest(self.settings.retry_seconds))
        if attempts == 0:
            rest.fails, rest.until = 0, 0.0
        if attempts >= self.settings.attempts or self.inbox.clock() < rest.until:
            if attempts >= self.settings.attempts:
                self._say_once(study, f"given up after {attempts} attempts; its images stay in the inbox")
            return False
        self._process(found, attempts + 1, rest)
        return True

    def _process(self, found: Snapshot, attempt: int, rest: Rest) -> None:
        study = found.study
        if missing := self.inbox.missing(found):
            self._say(study, f"LATE_INSTANCES: {missing} that came before are deleted: send the whole study again")
            self.inbox.record(found, "held", code="LATE_INSTANCES")
            return
        self.busy = study
        self.write_status()
        self.inbox.record(found, "tried", attempts=attempt)  # before it begins: what kills us must not do so for ever
        self._say(study, f"{sum(map(len, found.series.values()))} instances, quiet: attempt {attempt}")
        self._link(found)
        entries, code = self._segment(found)
        for entry in entries:
            self._say(study, f"{entry.id} {entry.state} {entry.code}".rstrip())
        if done := [entry.id for entry in entries if entry.state == "done"]:
            self.outbox.put(study, done)
        failed = code or next((entry.code for entry in entries if entry.state == "failed"), "")
        outcome = "failed" if failed else "done" if done else "refused"
        self.counts[outcome] += 1
        if outcome == "failed":
            rest.failed(self.inbox.clock())
            self.inbox.record(found, "failed", code=failed, attempts=attempt)
        else:
            self.inbox.record(found, "done" if outcome == "done" else "refused", attempts=attempt)
        self.busy = ""

    def _segment(self, found: Snapshot) -> tuple[tuple[Entry, ...], str]:
        """Return the entries of a study, or the code of why there is none."""
        try:
            result = predict_files(
                [found.folder],
                model=self.model,
                out=self.settings.out,
                mirror=self.settings.mirror,
                formats=self.settings.formats,
                allow=self.settings.allow,
                tables=False,
            )
        except MedsegError as error:
            self._say(found.study, f"failed {error.code}")
            return (), error.code
        except Exception as error:  # one study must never stop the node
            if os.environ.get("MEDSEG_DEBUG"):
                raise
            self._say(found.study, f"failed INTERNAL {type(error).__name__}")
            return (), "INTERNAL"
        return result.entries, ""

    def _link(self, found: Snapshot) -> None:
        """Keep which UIDs the ids stand for, for the user only."""
        rows = {}
        for name, items in found.series.items():
            item = identify(found.folder / name / f"{items[0]}.dcm")
            rows[found.study] = (item.study, "")
            rows[keyed_id("case", item.series, "")] = (item.study, item.series)
            rows[study_id(item.study)] = (item.study, "")
        keep_linkage(self.settings.out, rows)

    def _clean(self, found: Snapshot, at: float) -> bool:
        if found.study in self.outbox.waiting() or time.time() - at < self.settings.keep_seconds:
            return False
        if self.inbox.delete(found):
            self._say(found.study, "its images are deleted from the inbox")
            return True
        return False

    def write_status(self) -> None:
        """Write OUT/status.json where something has changed, or its time stamp is old."""
        tally = self.receiver.tally if self.receiver else None
        studies = self.inbox.studies()
        states = Counter(state.outcome for study in studies if (state := self.inbox.state(study)))
        facts = {
            "state": self.state,
            "segmenting": self.busy,
            "instances": {name: getattr(tally, name) for name in ("received", "ignored", "refused")} if tally else {},
            "inbox": {"studies": len(studies), "held": states["held"], "failed": states["failed"]},
            "since_start": {name: self.counts[name] for name in ("done", "refused", "failed")},
            "outbox": len(self.outbox.waiting()),
            "destinations": {
                target.name: "no answer" if self.outbox.resting(target) else "ok" for target in self.outbox.destinations
            },
        }
        now = time.monotonic()
        if facts != self._last_status[1] or now - self._last_status[0] > STATUS_SECONDS:
            self._last_status = (now, facts)
            times = {"started": self._started, "updated": _now()}
            write_json(self.settings.out / "status.json", {**facts, **times})

    def _say_once(self, study: str, text: str) -> None:
        if (study, text) not in self._said:
            self._said.add((study, text))
            self._say(study, text)

    def _say(self, study: str, text: str) -> None:
        log.info("%s: %s", study, text)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def make_station(settings: ListenConfig, model: Model) -> Station:
    """Build a station from its settings; its port is not open yet."""
    inbox = Inbox(settings.inbox, settings.max_study_bytes)
    outbox = Outbox(settings.out, destinations(settings), settings.retry_seconds, tell=log.info)
    modalities = wanted_modalities(model.bundle.info.spec)
    return Station(settings, model, inbox, outbox, Receiver(settings, inbox, log.warning, modalities=modalities))


def listen(settings: ListenConfig, model: Model, stop: Event) -> None:
    """Receive, segment and send until `stop` is set; the study at hand is then finished, and nothing is lost.

    Raises
    ------
    ConfigError : the port cannot be opened; a certificate or credentials are wrong; the extra is not installed.
    BatchError : LOCKED, another receiver has the inbox.
    ExportError : the disk is full or a folder cannot be written.
    """
    with locked(settings.inbox), locked(Path(settings.out) / "private"):
        station = make_station(settings, model)
        assert station.receiver is not None
        if not settings.loopback:
            log.warning(
                "%s is reached from the network%s%s: let a firewall admit the senders only",
                settings.host,
                "" if settings.tls else ", without TLS",
                "" if settings.calling else ", from any AE title",
            )
        station.receiver.start()
        # While a study is being segmented, so that nothing more is accepted from the moment of the signal on.
        closer = Thread(target=_close, args=(stop, station.receiver), daemon=True)
        closer.start()
        log.info("%s listens on %s:%d", settings.ae_title, settings.host, settings.port)
        try:
            while not stop.is_set():
                try:
                    station.tick(stop)
                except MedsegError as error:  # a full disk: what comes is refused, and what is here waits
                    log.error("%s: %s", error.code, error)
                    stop.wait(settings.retry_seconds)
                stop.wait(TICK_SECONDS)
        finally:
            stop.set()
            closer.join()
            station.state = "stopped"
            station.write_status()
        waiting = len(station.inbox.studies()), len(station.outbox.waiting())
        log.info("stopped: %d studies in the inbox, %d in the outbox", *waiting)


def _close(stop: Event, receiver: Receiver) -> None:
    stop.wait()
    receiver.stop()
