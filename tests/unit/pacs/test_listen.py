"""The receiver as a whole, in this process: from C-STORE to results that were confirmed; failures at every step."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pydicom
import pytest

from medseg.batch.run import predict as predict_files
from medseg.errors import BatchError, ConfigError, ExportError
from medseg.inference.predict import Model
from medseg.pacs import listen as listening
from medseg.pacs import need
from medseg.pacs.dimse import Node
from medseg.pacs.listen import Station, listen, make_station
from medseg.pacs.settings import ListenConfig, Target, Tls
from medseg.readers.dicom_identity import identify

Study = Callable[..., list[Path]]
Build = Callable[..., Station]


@pytest.fixture
def settings(tmp_path: Path, port: int, peer: Any) -> Callable[..., ListenConfig]:
    def make(**changes: Any) -> ListenConfig:
        node = {"host": "127.0.0.1", "port": peer.port, "ae_title": "PEER"}
        plain = {"port": port, "model": "x", "inbox": tmp_path / "inbox", "out": tmp_path / "out", "send": [node]}
        plain |= {"quiet_seconds": 1e-6, "keep": "0", "retry_seconds": 1e-6}
        return ListenConfig.model_validate({**plain, **changes})

    return make


@pytest.fixture
def station(settings: Callable[..., ListenConfig], loaded: Model) -> Iterator[Build]:
    started: list[Station] = []

    def start(**changes: Any) -> Station:
        for before in started:
            before.receiver.stop()  # type: ignore[union-attr]
        found = make_station(settings(**changes), loaded)
        found.look_seconds = 0
        assert found.receiver is not None
        found.receiver.start()
        started.append(found)
        return found

    yield start
    for found in started:
        found.receiver.stop()  # type: ignore[union-attr]


def settle(found: Station) -> None:
    """Tick until there is nothing to do."""
    for _ in range(20):
        if not found.tick():
            return
    raise AssertionError("it never comes to rest")


def is_done(found: Station, peer: Any, count: int = 1) -> None:
    assert len(peer.taken) == count
    assert found.inbox.studies() == []
    assert found.outbox.waiting() == []


def test_values_that_pydicom_warns_of_are_not_logged(station: Build, caplog: Any) -> None:
    """pynetdicom sets the identifiers of each message, in its own threads; pydicom quotes those that are invalid."""
    station()
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as shown:
        pydicom.Dataset().SOPInstanceUID = "../../CANARY"
    assert ("CANARY" in caplog.text, [str(warning.message) for warning in shown]) == (False, [])


def test_from_the_scanner_to_the_archive(
    station: Build, peer: Any, port: int, make_study: Study, words: Any, tmp_path: Path, loaded: Model, caplog: Any
) -> None:
    files = [*make_study(0), *make_study(1)]
    found = station()
    with caplog.at_level(logging.DEBUG):
        assert peer.send(port, *files) == [0] * len(files)
        settle(found)
    is_done(found, peer, 2)
    predict_files([tmp_path / "made"], model=loaded, out=tmp_path / "local", formats=["seg"])
    for file in (tmp_path / "local").glob("*.seg.dcm"):
        dataset = pydicom.dcmread(file)
        raw = file.read_bytes()
        assert raw.endswith(peer.taken[dataset.SOPInstanceUID])
        assert (tmp_path / "out" / file.name).read_bytes() == raw
    told = [("log", caplog.text)]
    for root in (tmp_path / "out", tmp_path / "inbox"):
        for path in root.rglob("*"):
            told.append((path.name, path.as_posix()))
            if path.is_file() and path.parent.name != "private" and path.suffix != ".dcm":
                told.append((path.name, path.read_bytes().decode("latin-1")))
    assert [(word, name) for name, text in told for word in words(files) if word in text] == []
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["since_start"] == {"done": 2, "refused": 0, "failed": 0}
    assert status["instances"] == {"received": len(files), "ignored": 0, "refused": 0}
    assert status["inbox"] == {"studies": 0, "held": 0, "failed": 0}


def test_results_that_come_back_are_not_segmented(
    station: Build, peer: Any, port: int, make_study: Study, tmp_path: Path
) -> None:
    found = station()
    peer.send(port, *make_study(0))
    settle(found)
    (raw,) = (tmp_path / "out").glob("*.seg.dcm")
    picture = pydicom.dcmread(make_study(0)[0])
    picture.Manufacturer = "medseg"
    picture.save_as(tmp_path / "picture.dcm")
    ct = make_study(2, modality="CT")
    assert peer.send(port, raw, tmp_path / "picture.dcm", ct[0]) == [0, 0, 0]
    assert found.inbox.studies() == []
    assert found.receiver is not None
    assert found.receiver.tally.ignored == 3


def test_echo_titles_and_syntaxes(station: Build, peer: Any, port: int, make_study: Study, tmp_path: Path) -> None:
    station(calling=["PEER"])
    net = need("pynetdicom")
    ae = net.AE(ae_title="PEER")
    ae.add_requested_context(net.sop_class.Verification)
    association = ae.associate("127.0.0.1", port, ae_title="MEDSEG")
    assert association.send_c_echo().Status == 0
    association.release()
    file = make_study(0)[0]
    assert peer.send(port, file, calling="STRANGER") == [None]
    assert peer.send(port, file, title="OTHER") == [None]
    dataset = pydicom.dcmread(file)
    dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(tmp_path / "rle.dcm")
    assert peer.send(port, file, tmp_path / "rle.dcm") == [0, 0]


def test_late_instances_open_the_study_again(station: Build, peer: Any, port: int, make_study: Study) -> None:
    files = make_study(0)
    found = station(keep="1h")
    peer.send(port, *files[:-2])
    settle(found)
    assert len(peer.taken) == 1
    peer.send(port, *files[-2:])
    settle(found)
    assert len(peer.taken) == 2
    study = found.inbox.studies()[0]
    assert found.inbox.state(study).outcome == "done"  # type: ignore[union-attr]
    peer.send(port, *files)  # what is known already is no reason to begin again
    settle(found)
    assert found.counts["done"] == 2


def test_late_instances_of_deleted_images_are_not_segmented_alone(
    station: Build, peer: Any, port: int, make_study: Study, caplog: Any
) -> None:
    files = make_study(0)
    found = station()
    peer.send(port, *files[:-8])
    settle(found)
    is_done(found, peer)
    peer.send(port, *files[-8:])
    with caplog.at_level(logging.INFO):
        settle(found)
    assert "LATE_INSTANCES" in caplog.text
    assert len(peer.taken) == 1
    peer.send(port, *files)
    settle(found)
    is_done(found, peer, 2)


def test_a_study_that_is_refused_does_not_stop_the_others(
    station: Build, peer: Any, port: int, make_study: Study
) -> None:
    files = make_study(0)
    found = station()
    peer.send(port, *files[:5], *files[7:], *make_study(1))
    settle(found)
    assert (found.counts["refused"], found.counts["done"]) == (1, 1)
    is_done(found, peer)


def test_a_study_at_rest_is_not_looked_at_all_the_time(
    station: Build, peer: Any, port: int, make_study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_study(0)
    found = station(keep="1h")
    found.look_seconds = 1000
    peer.send(port, *files[:-1])
    settle(found)
    looks: list[str] = []
    real = found.inbox.snapshot
    monkeypatch.setattr(found.inbox, "snapshot", lambda study: looks.append(study) or real(study))
    settle(found)
    assert looks == []
    peer.send(port, files[-1])
    settle(found)
    assert looks
    assert found.counts["done"] == 2


def test_an_internal_fault_is_tried_again_and_given_up(
    station: Build, peer: Any, port: int, make_study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("Kanarienvogel")

    found = station(attempts=2)
    with monkeypatch.context() as patch:
        patch.setattr(listening, "predict_files", fail)
        peer.send(port, *make_study(0))
        settle(found)
    assert found.counts["failed"] == 2
    settle(found)
    (study,) = found.inbox.studies()
    assert found.inbox.state(study).code == "INTERNAL"  # type: ignore[union-attr]
    (found.inbox.folder / "states" / f"{study}.json").unlink()  # as the guide says
    settle(found)
    is_done(found, peer)


@pytest.mark.parametrize("status", [0xA700, 0xC000, 0x0124])
def test_a_destination_that_refuses_gets_it_later(
    status: int, station: Build, peer: Any, port: int, make_study: Study
) -> None:
    peer.status = status
    found = station()
    peer.send(port, *make_study(0))
    settle(found)
    assert len(found.outbox.waiting()) == 1
    assert len(found.inbox.studies()) == 1  # the images stay until the results are there
    peer.status = 0
    again = station()  # after a restart
    settle(again)
    is_done(again, peer)


def test_results_go_to_every_destination(
    station: Build, peer: Any, port: int, make_study: Study, archive: Any, caplog: Any
) -> None:
    node = {"host": "127.0.0.1", "port": peer.port, "ae_title": "PEER"}
    down = {"host": "127.0.0.1", "port": 1, "ae_title": "DOWN"}
    found = station(send=[down, node, {"url": archive.url}])
    peer.send(port, *make_study(0))
    settle(found)
    assert (len(peer.taken), len(archive.seg())) == (1, 1)
    assert len(found.outbox.waiting()) == 1
    posts = sum(method == "POST" for method, _, _ in archive.asked)
    settle(found)
    assert sum(method == "POST" for method, _, _ in archive.asked) == posts
    status = json.loads((found.settings.out / "status.json").read_text())
    assert status["destinations"]["DOWN@127.0.0.1:1"] == "no answer"


class Killed(BaseException):
    """The process ends here."""


STEPS = [
    *((listening.Inbox, "record", nth) for nth in (1, 2)),
    (listening, "predict_files", 1),
    (listening.Outbox, "put", 1),
    *((listening.Outbox, "send", nth) for nth in (1, 2)),
    (listening.Inbox, "delete", 1),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("place", "name", "nth"), STEPS, ids=[f"{name}-{nth}" for _, name, nth in STEPS])
def test_killed_at_any_step_nothing_is_lost(
    place: Any,
    name: str,
    nth: int,
    after: bool,
    station: Build,
    peer: Any,
    make_study: Study,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = getattr(place, name)
    calls = 0

    def stop(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and not after:
            raise Killed
        value = real(*arguments, **options)
        if calls == nth:
            raise Killed
        return value

    found = station()
    for file in make_study(0):
        found.inbox.receive(file.read_bytes(), identify(file))
    with monkeypatch.context() as patch:
        patch.setattr(place, name, stop)
        with contextlib.suppress(Killed):
            settle(found)
    again = station()
    settle(again)
    is_done(again, peer)


def test_a_full_disk_is_told_to_the_sender(
    station: Build, peer: Any, port: int, make_study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_study(0)
    found = station()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
        assert peer.send(port, *files[-2:]) == [0xA700, 0xA700]
    peer.send(port, *files[:-2])
    settle(found)
    assert peer.taken == {}  # it would be segmented without its last slices
    peer.send(port, *files)
    settle(found)
    is_done(found, peer)


def test_an_instance_that_is_too_large_is_cut_off(station: Build, peer: Any, port: int, make_study: Study) -> None:
    found = station(max_instance_bytes=1)
    dataset = pydicom.dcmread(make_study(0)[0])
    dataset.Rows, dataset.Columns, dataset.PixelData = 2048, 2048, bytes(2048 * 2048 * 2)
    file = found.settings.out.parent / "large.dcm"
    dataset.save_as(file)
    assert peer.send(port, file) == [None]
    assert found.inbox.studies() == []


def test_something_else_than_dicom_at_the_port(station: Build, peer: Any, port: int, make_study: Study) -> None:
    found = station()
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x01\x00\xff\xff\xff\xff", b"\x04\x00\x00\x00\x00\x04abcd"):
        with socket.create_connection(("127.0.0.1", port), 10) as wire:
            wire.sendall(noise)
    peer.send(port, *make_study(0))
    settle(found)
    is_done(found, peer)


def test_the_loop_ends_in_order(
    settings: Any, loaded: Model, peer: Any, port: int, make_study: Study, caplog: Any
) -> None:
    stop = Event()
    with caplog.at_level(logging.INFO):
        thread = Thread(target=listen, args=(settings(), loaded, stop))
        thread.start()
        wait_for(lambda: peer.send(port, *make_study(0))[0] == 0)
        wait_for(lambda: len(peer.taken) == 1)
        with pytest.raises(BatchError) as error:
            listen(settings(port=port + 1), loaded, stop)
        assert error.value.code == "LOCKED"
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    assert peer.send(port, *make_study(0)[:1]) == [None]
    assert json.loads((settings().out / "status.json").read_text())["state"] == "stopped"
    assert f"listens on 127.0.0.1:{port}" in caplog.text
    assert "reached from the network" not in caplog.text


def test_a_full_disk_does_not_end_the_loop(
    settings: Any, loaded: Model, port: int, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    stop = Event()
    monkeypatch.setattr(Station, "tick", lambda self, stop: (_ for _ in ()).throw(ExportError("x", code="DISK_FULL")))
    thread = Thread(target=listen, args=(settings(host="0.0.0.0"), loaded, stop))
    thread.start()
    wait_for(lambda: caplog.text.count("DISK_FULL") >= 2)
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
    assert "0.0.0.0 is reached from the network, without TLS, from any AE title" in caplog.text


def test_a_port_that_is_taken(settings: Any, loaded: Model, peer: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be listened on"):
        listen(settings(port=peer.port, send=[]), loaded, Event())


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, PEM."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(exist_ok=True)
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    kinds = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *kinds))
    return folder / "cert.pem", folder / "key.pem"


def test_tls_both_ways(station: Build, peer: Any, port: int, make_study: Study, tmp_path: Path) -> None:
    ours, key = certificate(tmp_path / "ours")
    foreign, foreign_key = certificate(tmp_path / "foreign")
    found = station(tls={"certificate": ours, "key": key, "authorities": ours})
    files = make_study(0)
    target = Target(host="127.0.0.1", port=port, ae_title="MEDSEG", authorities=ours)
    Node(target, calling="PEER", tls=Tls(certificate=ours, key=key)).send(files)
    assert found.receiver is not None
    assert found.receiver.tally.received == len(files)
    for tls, authorities in ((None, ours), (Tls(certificate=foreign, key=foreign_key), ours), (None, foreign)):
        stranger = Node(target.model_copy(update={"authorities": authorities}), calling="PEER", tls=tls)
        with pytest.raises(BatchError) as error:
            stranger.send(files[:1])
        assert error.value.code == "PACS_UNREACHABLE"
    assert peer.send(port, files[0]) == [None]  # plain DICOM
    assert found.receiver.tally.received == len(files)
    with pytest.raises(ConfigError, match="certificate or key"):
        station(tls={"certificate": ours, "key": foreign_key})
