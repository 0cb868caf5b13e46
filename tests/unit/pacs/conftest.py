"""A tiny DICOMweb archive in this process, which can be told to fail; a model and a study to put into it."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pydicom
import pytest

from medseg.inference.predict import Model, load_model
from medseg.pacs import need
from medseg.phantom.dicom import write_series
from medseg.volume import Volume


def _json(dataset: Any, count: int) -> dict[str, Any]:
    return {
        "0020000D": {"vr": "UI", "Value": [dataset.StudyInstanceUID]},
        "0020000E": {"vr": "UI", "Value": [dataset.SeriesInstanceUID]},
        "00080018": {"vr": "UI", "Value": [dataset.SOPInstanceUID]},
        "00080060": {"vr": "CS", "Value": [dataset.Modality]},
        "00201209": {"vr": "IS", "Value": [count]},
    }


@dataclass
class Archive:
    """What the archive holds, what it was asked, and how it should fail.

    Attributes
    ----------
    trouble : (method, path, number of earlier requests like it) -> None to serve, or (status, content type, body).
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    trouble: Callable[[str, str, int], Any] = lambda method, path, before: None
    refuse: dict[str, int] = field(default_factory=dict)
    change: Callable[[bytes], bytes] = lambda raw: raw
    delay: float = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"dicomweb://127.0.0.1:{self.port}/web"

    def add(self, *files: Path) -> None:
        for file in files:
            raw = file.read_bytes()
            self.objects[pydicom.dcmread(io.BytesIO(raw)).SOPInstanceUID] = raw

    def rows(self) -> list[Any]:
        return [pydicom.dcmread(io.BytesIO(raw), stop_before_pixels=True) for raw in self.objects.values()]

    def seg(self) -> list[Any]:
        return [row for row in self.rows() if row.Modality == "SEG"]

    def search(self, path: str, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        parts = path.strip("/").split("/")
        rows = self.rows()
        if len(parts) > 1:
            rows = [row for row in rows if row.StudyInstanceUID == parts[1]]
        if len(parts) > 3:
            rows = [row for row in rows if row.SeriesInstanceUID == parts[3]]
        if "SOPInstanceUID" in query:
            rows = [row for row in rows if row.SOPInstanceUID in query["SOPInstanceUID"]]
        if "PatientID" in query:
            rows = [row for row in rows if row.PatientID in query["PatientID"]]
        key = {"studies": "0020000D", "series": "0020000E", "instances": "00080018"}[parts[-1]]
        counts = [sum(other.SeriesInstanceUID == row.SeriesInstanceUID for other in rows) for row in rows]
        found = {_json(row, 0)[key]["Value"][0]: _json(row, count) for row, count in zip(rows, counts, strict=True)}
        start = int(query.get("offset", ["0"])[0])
        return list(found.values())[start : start + int(query.get("limit", ["100"])[0])]

    def fetch(self, path: str) -> list[bytes]:
        parts = path.strip("/").split("/")
        return [
            self.change(raw)
            for raw, row in zip(self.objects.values(), self.rows(), strict=True)
            if parts[1] == row.StudyInstanceUID and parts[3] == row.SeriesInstanceUID
            if len(parts) < 6 or parts[5] == row.SOPInstanceUID
        ]

    def body(
        self, path: str, *, kind: str = "application/dicom", drop: int = 0, change: Any = None
    ) -> tuple[str, bytes]:
        parts = self.fetch(path)[drop:]
        return multipart([change(part) for part in parts] if change else parts, kind)

    def store(self, content_type: str, body: bytes) -> tuple[int, dict[str, Any]]:
        boundary = re.search(r'boundary="?([^";]+)', content_type)
        assert boundary is not None
        taken, refused = [], []
        for part in body.split(b"--" + boundary[1].encode())[1:-1]:
            raw = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
            row = pydicom.dcmread(io.BytesIO(raw))
            reason = self.refuse.get(row.Modality)
            item = {"00081155": {"vr": "UI", "Value": [row.SOPInstanceUID]}}
            if reason is None:
                self.objects[row.SOPInstanceUID] = raw
                taken.append(item)
            else:
                refused.append(item | {"00081197": {"vr": "US", "Value": [reason]}})
        answer = {"00081199": {"vr": "SQ", "Value": taken}} if taken else {}
        answer |= {"00081198": {"vr": "SQ", "Value": refused}} if refused else {}
        return (409 if refused else 200), answer


def multipart(parts: list[bytes], kind: str = "application/dicom") -> tuple[str, bytes]:
    body = b"".join(b"--xyz\r\nContent-Type: " + kind.encode() + b"\r\n\r\n" + part + b"\r\n" for part in parts)
    return f'multipart/related; type="{kind}"; boundary=xyz', body + b"--xyz--\r\n"


class _Handler(BaseHTTPRequestHandler):
    archive: Archive
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET", b"")

    def do_POST(self) -> None:
        self._serve("POST", self.rfile.read(int(self.headers["Content-Length"])))

    def _serve(self, method: str, body: bytes) -> None:
        archive = self.archive
        url = urlsplit(self.path)
        path = url.path.removeprefix("/web")
        before = sum((method, path) == (one, other) for one, other, _ in archive.asked)
        archive.asked.append((method, path, dict(self.headers)))
        time.sleep(archive.delay)
        trouble = archive.trouble(method, path, before)
        if trouble is not None:
            self._answer(*trouble)
        elif method == "POST":
            status, answer = archive.store(self.headers["Content-Type"], body)
            self._answer(status, "application/dicom+json", json.dumps(answer).encode())
        elif "json" in self.headers["Accept"]:
            rows = archive.search(path, parse_qs(url.query))
            self._answer(200 if rows else 204, "application/dicom+json", json.dumps(rows).encode() if rows else b"")
        else:
            parts = archive.fetch(path)
            self._answer(*((200, *multipart(parts)) if parts else (404, "text/plain", b"")))

    def _answer(self, status: int, kind: str, body: bytes, length: int | None = None) -> None:
        """Answer; with `length`, promise more or less than `body` and hang up after it."""
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Connection", "close")  # else a client may find a connection that is just being closed
            if status != 204:
                self.send_header("Content-Length", str(len(body) if length is None else length))
            if 300 <= status < 400:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass  # the other side did not wait
        self.close_connection = True


@pytest.fixture
def archive() -> Iterator[Archive]:
    found = Archive()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"archive": found}))
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield found
    server.shutdown()
    thread.join(10)
    server.server_close()


@pytest.fixture(scope="session")
def loaded(model: Path) -> Model:
    """A model of one MR channel that was hardly trained."""
    return load_model(model)


CANARIES = {
    "PatientName": "Kanarienvogel^Nele",
    "PatientID": "KNR4711",
    "PatientBirthDate": "19330422",
    "AccessionNumber": "KNRACC99",
    "StudyDate": "19771123",
    "StudyDescription": "KanarieStudyText",
    "SeriesDescription": "KanarieSeriesText",
    "InstitutionName": "KanarieHospital",
    "ReferringPhysicianName": "KanarieReferrer",
}


@pytest.fixture
def make_study(tmp_path: Path, tiny: Any) -> Callable[..., list[Path]]:
    """Writer of an MR series with canaries: ``make_study(number=0, modality="MR")`` -> its files."""

    def make(number: int = 0, *, modality: Any = "MR", study_uid: str | None = None) -> list[Path]:
        image, _ = tiny.case(number)
        folder = tmp_path / "made" / f"{number}-{modality}"
        volume = Volume(image.round().clip(0)[None], tiny.affine)
        files = write_series(volume, folder, modality=modality, seed=number, study_uid=study_uid)
        for file in files:
            dataset = pydicom.dcmread(file)
            for keyword, value in CANARIES.items():
                setattr(dataset, keyword, value)
            dataset.save_as(file)
        return files

    return make


@pytest.fixture
def words(make_study: Callable[..., list[Path]]) -> Callable[[list[Path]], set[str]]:
    """What must never be told of some files: canaries and UIDs."""

    def collect(files: list[Path]) -> set[str]:
        rows = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
        uids = {uid for row in rows for uid in (row.StudyInstanceUID, row.SeriesInstanceUID, row.SOPInstanceUID)}
        return uids | set(CANARIES.values())

    return collect


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Peer:
    """A node that sends to us and takes results: what it took, and the status that it answers."""

    port: int
    taken: dict[str, bytes] = field(default_factory=dict)
    status: int = 0x0000

    def send(self, port: int, *files: Path, title: str = "MEDSEG", calling: str = "PEER") -> list[int | None]:
        """Send files over one association; the status of each, None where the connection broke."""
        net = need("pynetdicom")
        ae = net.AE(ae_title=calling)
        rows = [pydicom.dcmread(file) for file in files]
        for kind in {(row.SOPClassUID, row.file_meta.TransferSyntaxUID) for row in rows}:
            ae.add_requested_context(*kind)
        association = ae.associate("127.0.0.1", port, ae_title=title)
        if not association.is_established:
            return [None] * len(files)
        answers = [association.send_c_store(row).get("Status") for row in rows]
        association.release()
        return answers


@pytest.fixture
def peer() -> Iterator[Peer]:
    net, events = need("pynetdicom"), need("pynetdicom.events")
    found = Peer(free_port())

    def take(event: Any) -> int:
        if found.status == 0:
            found.taken[str(event.request.AffectedSOPInstanceUID)] = event.encoded_dataset(include_meta=False)
        return found.status

    ae = net.AE(ae_title="PEER")
    for context in net.AllStoragePresentationContexts:
        ae.add_supported_context(context.abstract_syntax)
    server = ae.start_server(("127.0.0.1", found.port), block=False, evt_handlers=[(events.EVT_C_STORE, take)])
    yield found
    server.shutdown()


@pytest.fixture
def port() -> int:
    return free_port()
