"""Results to where they belong, and the proof that they are there: STOW-RS with read-back, or C-STORE.

What a destination has confirmed is kept in ``OUT/delivered/<id>.json`` with the hash of each file, so that a repeated
run sends only what is missing. Sending twice is harmless all the same: the UIDs of results are derived from their
source.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from medseg.batch.ledger import Entry
from medseg.errors import BatchError, MedsegError
from medseg.exporters import EXPORTERS
from medseg.files import file_digest, write_json
from medseg.pacs.archive import retrieve_instance
from medseg.pacs.multipart import Body, BrokenBodyError
from medseg.pacs.web import Answer, Request, Web, answer_json
from medseg.readers.dicom_identity import Identity, difference, identify


class Destination(Protocol):
    """Where results go.

    Attributes
    ----------
    name : says where, in messages and receipts; holds no secret.
    """

    @property
    def name(self) -> str:
        """Where it is."""

    def send(self, files: Sequence[Path]) -> None:
        """Send DICOM files and make sure that they have come.

        Raises
        ------
        BatchError : PACS_UNREACHABLE, PACS_REFUSED, SEND_REFUSED or SEND_UNCONFIRMED.
        """


class Stow:
    """An archive that takes results by STOW-RS (PS3.18 section 10.5), and is then asked for each of them."""

    def __init__(self, web: Web) -> None:
        self.web = web

    @property
    def name(self) -> str:
        """The address of the archive."""
        return self.web.address.base

    def send(self, files: Sequence[Path]) -> None:
        """Store files, look at the answer for each instance, then fetch each and compare; see `Destination`."""
        allowed = (200, 202, 204, 409)  # 409: some or all were not taken, and the answer says which
        request = Request("storing", "/studies", "application/dicom+json", body=Body(files), allowed=allowed)
        refused = self.web.ask(request, _refused)
        for file in files:
            item = identify(file)
            wrong = self._difference(file, item)
            if not wrong:
                continue  # also when it was refused because it was there already
            reason = refused.get(item.instance)
            if reason is not None:
                raise BatchError(
                    f"{self.web.address.host}: the archive did not take a result (failure reason {reason}, see PS3.18 "
                    "table I.2-2)",
                    code="SEND_REFUSED",
                )
            raise BatchError(
                f"{self.web.address.host}: the archive took a result, but {wrong}; it does not count as sent",
                code="SEND_UNCONFIRMED",
            )

    def _difference(self, file: Path, item: Identity) -> str:
        """Find the instance and fetch it; return what is wrong with it, "" where it is what was sent."""
        path = f"/studies/{item.study}/series/{item.series}/instances"
        rows = self.web.query(path, (("SOPInstanceUID", item.instance),))
        if not any(item.instance in _values(row, "00080018") for row in rows):
            return "does not find it"
        with tempfile.TemporaryDirectory(prefix=".read-back-", dir=file.parent) as scratch:
            try:
                back = retrieve_instance(self.web, item, Path(scratch) / "0")
            except BatchError as error:
                if error.code == "PACS_NOT_FOUND":
                    return "does not give it back"
                raise
            if _same_bytes(file, back):
                return ""
            changed = difference(file, back)
            return f"gives it back with another {changed}" if changed else ""


def _same_bytes(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and file_digest(one) == file_digest(other)


def _refused(answer: Answer) -> dict[str, str]:
    """Return instance -> failure reason of a Store Instances Response (PS3.18 section I.2)."""
    if answer.status == 204 or "json" not in answer.content_type.lower():
        return {}  # an archive that answers in XML only: what it holds decides
    content = answer_json(answer)
    if not isinstance(content, dict):
        if content == []:
            return {}
        raise BrokenBodyError("the answer to storing is no DICOM JSON object")
    refused: dict[str, str] = {}
    for item in _values(content, "00081198"):
        reason = (_values(item, "00081197") or ["unknown"])[0]
        text = f"0x{reason:04X}" if isinstance(reason, int) else "unknown"
        refused |= {str(uid): text for uid in _values(item, "00081155")}
    return refused


def _values(row: Any, tag: str) -> list[Any]:
    element = row.get(tag) if isinstance(row, dict) else None
    values = element.get("Value") if isinstance(element, dict) else None
    return values if isinstance(values, list) else []


def dicom_outputs(out: Path, entry: Entry) -> dict[str, str]:
    """Return name -> SHA-256 of the DICOM files that an entry's result has."""
    suffixes = tuple(row.suffix for _, row in EXPORTERS.items() if row.dicom)
    return {name: digest for name, digest in entry.outputs.items() if name.endswith(suffixes)}


def is_delivered(out: Path, entry: Entry, destination: Destination) -> bool:
    """Tell whether the destination has confirmed every DICOM file of this result."""
    return _receipts(out, entry.id).get(destination.name) == dicom_outputs(out, entry)


def deliver(out: Path, entry: Entry, destination: Destination) -> None:
    """Send the DICOM files of a result that is done, unless that was confirmed before, and keep the confirmation.

    Raises
    ------
    BatchError : as `Destination.send`; RESULT_CHANGED, a file is not what the ledger says.
    """
    if is_delivered(out, entry, destination):
        return
    files = dicom_outputs(out, entry)
    for name, digest in files.items():
        if not (out / name).is_file() or file_digest(out / name) != digest:
            raise BatchError(f"{name} is gone or not what the ledger says; predict it again", code="RESULT_CHANGED")
    if files:
        destination.send([out / name for name in files])
    write_json(_receipt(out, entry.id), _receipts(out, entry.id) | {destination.name: files})


def try_to_deliver(out: Path, entry: Entry, destinations: Sequence[Destination]) -> Entry:
    """Deliver a result to every destination; return its entry, as failed where one did not confirm it."""
    for destination in destinations if entry.state == "done" else ():
        try:
            deliver(out, entry, destination)
        except MedsegError as error:
            return entry.model_copy(update={"state": "failed", "code": error.code, "message": str(error)})
    return entry


def _receipt(out: Path, case: str) -> Path:
    return out / "delivered" / f"{case}.json"


def _receipts(out: Path, case: str) -> dict[str, Any]:
    try:
        content = json.loads(_receipt(out, case).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def clean_scratch(folder: Path) -> Path:
    """Make `folder` empty and private (0700), whatever a killed process left in it; return it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    return folder
