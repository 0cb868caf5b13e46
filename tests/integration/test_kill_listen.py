"""SIGKILL of a receiver: what it confirmed to the sender ends as a result in the archive, whenever it dies."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import yaml
from pynetdicom import AE, AllStoragePresentationContexts, evt

from medseg import api
from medseg.phantom.dicom import write_series
from medseg.volume import Volume

Builder = Callable[..., Path]
STUDIES = 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: Any, tiny_dataset: Builder, tiny_plan: Builder) -> Path:
    """A folder with run/, studies in in0/, in1/, ... and the results that they must have in undisturbed/."""
    root = tmp_path_factory.mktemp("kill")
    data = tiny_dataset(root / "data", cases=4, test=0)
    api.train(data, out=root / "run", steps=2, plan=tiny_plan(data, root / "plan.yaml", steps=2))
    for number in range(STUDIES):
        image, _ = tiny.case(number)
        volume = Volume(image.round().clip(0)[None], tiny.affine)
        write_series(volume, root / "in" / str(number), modality="MR", seed=number)
    api.predict(root / "in", model=root / "run", out=root / "undisturbed", formats=["seg"])
    return root


@pytest.fixture
def archive() -> Iterator[tuple[int, dict[str, bytes]]]:
    """A node that takes results: its port, and what it has."""
    taken: dict[str, bytes] = {}

    def take(event: Any) -> int:
        taken[str(event.request.AffectedSOPInstanceUID)] = event.encoded_dataset(include_meta=False)
        return 0

    ae = AE(ae_title="ARCHIVE")
    for context in AllStoragePresentationContexts:
        ae.add_supported_context(context.abstract_syntax)
    port = free_port()
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, take)])
    yield port, taken
    server.shutdown()


@pytest.fixture
def config(place: Path, archive: Any, tmp_path: Path) -> Path:
    settings = {
        "port": free_port(),
        "model": str(place / "run"),
        "inbox": "inbox",
        "out": "out",
        "quiet_seconds": 0.5,
        "retry_seconds": 0.1,
        "attempts": 9,
        "keep": "0",
        "send": [{"host": "127.0.0.1", "port": archive[0], "ae_title": "ARCHIVE"}],
    }
    (tmp_path / "listen.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "listen.yaml"


class Sender:
    """A scanner: sends what has not been confirmed until it has."""

    def __init__(self, config: Path, files: list[Path]) -> None:
        self.port = int(yaml.safe_load(config.read_text())["port"])
        self.left = list(files)
        self.confirmed: list[Path] = []

    def send(self, limit: int = 10**6) -> None:
        """Send up to `limit` instances over one association, as far as it holds."""
        ae = AE(ae_title="SCANNER")
        ae.add_requested_context(pydicom.uid.MRImageStorage, pydicom.uid.ExplicitVRLittleEndian)
        association = ae.associate("127.0.0.1", self.port, ae_title="MEDSEG")
        for file in self.left[:limit] if association.is_established else []:
            try:
                status = association.send_c_store(pydicom.dcmread(file)).get("Status")
            except RuntimeError:
                break
            if status == 0:
                self.confirmed.append(file)
        if association.is_established:
            association.release()
        self.left = [file for file in self.left if file not in self.confirmed]


def start(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "medseg", "listen", str(config)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def until(process: subprocess.Popen[bytes], what: Callable[[], bool], act: Callable[[], object] = lambda: None) -> None:
    end = time.monotonic() + 180
    while not what():
        assert process.poll() is None
        assert time.monotonic() < end
        act()
        time.sleep(0.01)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 10).close()
    except OSError:
        return False
    return True


def ends_well(config: Path, place: Path, sender: Sender, taken: dict[str, bytes]) -> None:
    """Start it a last time: every study is sent, segmented, delivered and cleared away, and SIGTERM ends it."""
    process = start(config)
    inbox, out = config.parent / "inbox", config.parent / "out"
    try:
        until(process, lambda: answers(sender.port))  # before that it knows no SIGTERM
        until(process, lambda: not sender.left, sender.send)
        until(process, lambda: len(taken) == STUDIES)
        until(process, lambda: not [*(inbox / "studies").iterdir(), *(out / "outbox").iterdir()])
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    for file in (place / "undisturbed").glob("*.seg.dcm"):
        raw = file.read_bytes()
        assert raw.endswith(taken[str(pydicom.dcmread(file).SOPInstanceUID)])
        assert raw in [path.read_bytes() for path in out.glob("*.seg.dcm")]  # ids depend on the key of the test


def test_killed_while_receiving_and_while_segmenting(place: Path, config: Path, archive: Any, tmp_path: Path) -> None:
    sender = Sender(config, sorted((place / "in").rglob("*.dcm")))
    inbox = tmp_path / "inbox" / "studies"
    process = start(config)
    until(process, lambda: bool(sender.confirmed), lambda: sender.send(10))
    kill(process)
    there = [pydicom.dcmread(path) for path in inbox.glob("*/*/[!.]*.dcm")]
    assert [file.name for file in sender.confirmed if pydicom.dcmread(file) not in there] == []
    process = start(config)
    until(process, lambda: not sender.left, sender.send)
    until(process, lambda: any((tmp_path / "out").glob("*.seg.dcm")))
    kill(process)
    ends_well(config, place, sender, archive[1])


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(place: Path, config: Path, archive: Any, seed: int) -> None:
    chance = random.Random(seed)
    sender = Sender(config, sorted((place / "in").rglob("*.dcm")))
    for _ in range(5):
        process = start(config)
        end = time.monotonic() + chance.uniform(3, 12)
        until(process, lambda end=end: time.monotonic() > end, lambda: sender.send(chance.randrange(1, 25)))
        kill(process)
    ends_well(config, place, sender, archive[1])
