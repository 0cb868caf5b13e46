"""Studies of an archive: found, fetched, segmented and sent back; every way in which an archive may fail."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medseg.batch.run import BatchResult
from medseg.batch.run import predict as predict_files
from medseg.errors import BatchError, ConfigError, ExportError
from medseg.inference.predict import Model
from medseg.pacs import archive as remote
from medseg.pacs.predict import predict
from medseg.pacs.web import Patience
from medseg.readers.nifti import read_nifti

Study = Callable[..., list[Path]]
QUICK = Patience(connect=5, silence=5, whole=30, attempts=3, pause=0.01)


@pytest.fixture
def run(archive: Any, loaded: Model, tmp_path: Path) -> Callable[..., BatchResult]:
    def start(*inputs: str | Path, send: bool = False, **options: Any) -> BatchResult:
        options = {"formats": ["seg,nifti"], "patience": QUICK, **options}
        targets = [archive.url] if send else []
        return predict(inputs or [archive.url], model=loaded, out=tmp_path / "out", send=targets, **options)

    return start


def of(result: BatchResult) -> list[tuple[str, str]]:
    return sorted((entry.state, entry.code) for entry in result.entries)


def test_there_and_back(
    archive: Any, run: Any, make_study: Study, words: Any, tmp_path: Path, loaded: Model, caplog: Any, capfd: Any
) -> None:
    files = [*make_study(0), *make_study(1)]
    archive.add(*files)
    with caplog.at_level(logging.DEBUG):
        result = run(send=True)
    assert of(result) == [("done", "")] * 2
    assert len(archive.seg()) == 2
    # the same masks, names and bytes as from files
    local = predict_files([tmp_path / "made"], model=loaded, out=tmp_path / "local", formats=["seg,nifti"])
    assert [entry.outputs for entry in local.entries] == [entry.outputs for entry in result.entries]
    for entry in result.entries:
        assert np.array_equal(
            read_nifti(tmp_path / "out" / f"{entry.id}.nii.gz").array,
            read_nifti(tmp_path / "local" / f"{entry.id}.nii.gz").array,
        )
        (found,) = [
            row
            for row in archive.seg()
            if archive.objects[row.SOPInstanceUID] == (tmp_path / "out" / f"{entry.id}.seg.dcm").read_bytes()
        ]
        assert found.Modality == "SEG"
    # nothing is left, nothing is told
    assert [path.name for path in tmp_path.iterdir() if "scratch" in path.name] == []
    told = [("log", caplog.text), ("terminal", "".join(capfd.readouterr()))]
    told += [(path.name, path.as_posix()) for path in (tmp_path / "out").rglob("*")]
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and path.parent.name != "private" and path.suffix != ".dcm":
            told.append((path.name, path.read_bytes().decode("latin-1")))
    assert [(word, name) for name, text in told for word in words(files) if word in text] == []
    private = tmp_path / "out" / "private" / "archive.csv"
    assert private.stat().st_mode & 0o077 == 0
    assert pydicom.dcmread(files[0]).SeriesInstanceUID in private.read_text()


def test_a_repeated_run_fetches_and_sends_nothing(archive: Any, run: Any, make_study: Study, tmp_path: Path) -> None:
    archive.add(*make_study(0))
    first = run(send=True)
    tree = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    archive.asked.clear()
    assert run(send=True).entries == first.entries
    assert [(method, accept["Accept"]) for method, _, accept in archive.asked if "json" not in accept["Accept"]] == []
    assert not any(method == "POST" for method, _, _ in archive.asked)
    assert tree == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    # one more slice in the archive: the study is another one
    files = make_study(0)
    extra = pydicom.dcmread(files[-1])
    step = float(extra.ImagePositionPatient[2]) - float(pydicom.dcmread(files[-2]).ImagePositionPatient[2])
    extra.ImagePositionPatient[2] += step
    extra.SOPInstanceUID = extra.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    extra.save_as(tmp_path / "extra.dcm")
    archive.add(tmp_path / "extra.dcm")
    again = run(send=True)
    assert of(again) == [("done", "")]
    assert again.entries[0].outputs != first.entries[0].outputs
    assert len(archive.seg()) == 2


def test_sending_again_changes_nothing(archive: Any, run: Any, make_study: Study, tmp_path: Path) -> None:
    archive.add(*make_study(0))
    run(send=True)
    before = dict(archive.objects)
    shutil.rmtree(tmp_path / "out")
    assert of(run(send=True)) == [("done", "")]
    assert archive.objects == before


def test_one_study_and_one_series(archive: Any, run: Any, make_study: Study) -> None:
    files = [*make_study(0), *make_study(1)]
    archive.add(*files)
    row = pydicom.dcmread(files[0])
    one = run(f"{archive.url}/studies/{row.StudyInstanceUID}")
    assert of(one) == [("done", "")]
    assert run(f"{archive.url}/studies/{row.StudyInstanceUID}/series/{row.SeriesInstanceUID}").entries == one.entries
    assert len(run(f"{archive.url}?PatientID=KNR4711").entries) == 2
    with pytest.raises(BatchError, match="no study") as error:
        run(f"{archive.url}?PatientID=Nobody")
    assert error.value.code == "EMPTY_INPUT"
    assert of(run(f"{archive.url}/studies/1.2.3")) == [("failed", "PACS_NOT_FOUND")]


def test_other_modalities_are_not_fetched(archive: Any, run: Any, make_study: Study) -> None:
    ct = make_study(0, modality="CT")
    study = pydicom.dcmread(ct[0]).StudyInstanceUID
    archive.add(*ct)
    assert of(run()) == [("refused", "NO_MATCHING_SERIES")]
    archive.add(*make_study(1, study_uid=study))
    assert of(run()) == [("done", "")]
    assert not any("json" not in h["Accept"] and pydicom.dcmread(ct[0]).SeriesInstanceUID in path
                   for _, path, h in archive.asked)  # fmt: skip


def test_files_can_be_sent_too(archive: Any, run: Any, make_study: Study) -> None:
    folder = make_study(0)[0].parent
    assert of(run(folder, send=True)) == [("done", "")]
    assert len(archive.seg()) == 1
    with pytest.raises(ConfigError, match="--format seg"):
        run(folder, send=True, formats=["nifti"])


def test_many_studies_come_in_pages(archive: Any, monkeypatch: pytest.MonkeyPatch, make_study: Study) -> None:
    monkeypatch.setattr(remote, "PAGE", 2)
    for number in range(5):
        archive.add(make_study(number)[0])
    web = remote.Web(remote_address(archive), patience=QUICK)
    assert len(remote.find_studies(web)) == 5
    search = archive.search
    archive.search = lambda path, query: search(path, {k: v for k, v in query.items() if k not in ("limit", "offset")})
    assert len(remote.find_studies(web)) == 5


def remote_address(archive: Any) -> Any:
    from medseg.pacs.address import parse_address

    return parse_address(archive.url)


def is_fetch(path: str) -> bool:
    return path.startswith("/studies/") and "/series/" in path and not path.endswith("instances")


def cut(archive: Any, path: str, *, told: bool) -> tuple[int, str, bytes, int]:
    """An answer that ends in the middle; `told`: the header promises no more than comes."""
    kind, body = archive.body(path)
    half = body[: len(body) // 2]
    return 200, kind, half, len(half if told else body)


ANSWERS: dict[str, tuple[Any, str]] = {
    "busy": (lambda archive, path: (503, "text/plain", b"PHI of KNR4711"), "PACS_UNREACHABLE"),
    "forbidden": (lambda archive, path: (403, "text/plain", b""), "PACS_REFUSED"),
    "gone": (lambda archive, path: (404, "text/plain", b""), "PACS_NOT_FOUND"),
    "elsewhere": (lambda archive, path: (302, "text/plain", b""), "PACS_REFUSED"),
    "nothing": (lambda archive, path: (204, "text/plain", b""), "INCOMPLETE_RETRIEVAL"),
    "a page": (lambda archive, path: (200, "text/html", b"<html>log in</html>"), "PACS_ANSWER"),
    "broken off": (lambda archive, path: cut(archive, path, told=False), "PACS_UNREACHABLE"),
    "cut": (lambda archive, path: cut(archive, path, told=True), "PACS_ANSWER"),
    "pictures": (lambda archive, path: (200, *archive.body(path, kind="image/jpeg")), "PACS_ANSWER"),
    "noise": (lambda archive, path: (200, *archive.body(path, change=lambda raw: b"noise")), "PACS_ANSWER"),
    "one less": (lambda archive, path: (200, *archive.body(path, drop=1)), "INCOMPLETE_RETRIEVAL"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_retrieval_that_fails(
    name: str, archive: Any, run: Any, make_study: Study, words: Any, tmp_path: Path
) -> None:
    answer, code = ANSWERS[name]
    files = make_study(0)
    archive.add(*files)
    archive.trouble = lambda method, path, before: answer(archive, path) if is_fetch(path) else None
    result = run(send=True)
    assert of(result) == [("failed", code)]
    assert [word for word in words(files) if word in result.entries[0].message] == []
    assert list((tmp_path / "out").glob("*.nii.gz")) == []
    assert archive.seg() == []
    archive.trouble = lambda method, path, before: None
    assert of(run(send=True)) == [("done", "")]  # the same command goes on
    assert not list((tmp_path / "out" / "ledger").glob("study-*"))


@pytest.mark.parametrize("name", ["busy", "broken off", "cut"])
def test_trouble_that_passes(name: str, archive: Any, run: Any, make_study: Study) -> None:
    archive.add(*make_study(0))
    archive.trouble = lambda method, path, before: (
        None if before >= 2 else ANSWERS[name][0](archive, path) if is_fetch(path) else (500, "text/plain", b"")
    )
    assert [entry.message for entry in run(send=True).entries] == [""]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ((401, "text/plain", b"KNR4711"), "PACS_REFUSED"),
        ((404, "text/plain", b""), "PACS_NOT_FOUND"),
        ((500, "text/plain", b"KNR4711"), "PACS_UNREACHABLE"),
        ((200, "text/html", b"<html>"), "PACS_ANSWER"),
        ((200, "application/dicom+json", b"[{"), "PACS_ANSWER"),
        ((200, "application/dicom+json", b'{"a": 1}'), "PACS_ANSWER"),
        ((200, "application/dicom+json", b"[" * 100_000), "PACS_ANSWER"),
        ((200, "application/dicom+json", b'[{"0020000D": {"vr": "UI", "Value": ["../../etc"]}}]'), "PACS_ANSWER"),
    ],
)
def test_a_search_that_fails(answer: Any, code: str, archive: Any, run: Any) -> None:
    archive.trouble = lambda method, path, before: answer
    with pytest.raises(BatchError) as error:
        run()
    assert error.value.code == code
    assert "KNR" not in str(error.value)
    assert f"127.0.0.1:{archive.port}" in str(error.value)


def test_an_archive_that_does_not_answer(archive: Any, run: Any) -> None:
    archive.delay = 1
    with pytest.raises(BatchError, match="in time") as error:
        run(patience=replace(QUICK, silence=0.05, attempts=2))
    assert error.value.code == "PACS_UNREACHABLE"
    with pytest.raises(BatchError, match="no connection"):
        run("dicomweb://127.0.0.1:1/x")


def test_it_gives_up_when_the_archive_is_down(archive: Any, run: Any, make_study: Study) -> None:
    for number in range(5):
        archive.add(*make_study(number)[:1])
    archive.trouble = lambda method, path, before: (500, "text/plain", b"") if is_fetch(path) else None
    with pytest.raises(BatchError, match="3 studies in a row") as error:
        run()
    assert error.value.code == "PACS_UNREACHABLE"
    assert sum(is_fetch(path) for _, path, _ in archive.asked) == 3 * QUICK.attempts


def test_credentials_are_sent_and_never_told(
    archive: Any, run: Any, make_study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    archive.add(*make_study(0))
    monkeypatch.setenv("MEDSEG_DICOMWEB_TOKEN", "geheim123")
    with caplog.at_level(logging.DEBUG):
        run(send=True)
    assert {headers.get("Authorization") for _, _, headers in archive.asked} == {"Bearer geheim123"}
    assert "geheim123" not in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"geheim123" in path.read_bytes()]


def test_a_full_disk_stops_the_run(archive: Any, run: Any, make_study: Study, monkeypatch: Any) -> None:
    archive.add(*make_study(0))
    full = shutil.disk_usage("/")._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(ExportError) as error:
        run()
    assert error.value.code == "DISK_FULL"


def test_a_study_that_is_too_large(archive: Any, make_study: Study, tmp_path: Path) -> None:
    archive.add(*make_study(0))
    web = remote.Web(remote_address(archive), patience=QUICK)
    study = remote.look_up(web, remote.find_studies(web)[0], ())
    with pytest.raises(BatchError) as error:
        remote.retrieve(web, study, tmp_path, max_bytes=5000)
    assert error.value.code == "STUDY_TOO_LARGE"
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.dcm") if "made" not in path.parts) <= 5000


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (lambda archive: archive.refuse.update(SEG=0xC000), "SEND_REFUSED"),
        (lambda archive: setattr(archive, "change", spoil_pixels), "SEND_UNCONFIRMED"),
        (lambda archive: setattr(archive, "store", lose_segs(archive)), "SEND_UNCONFIRMED"),
        (lambda archive: setattr(archive, "trouble", no_posts), "PACS_UNREACHABLE"),
    ],
)
def test_a_result_counts_when_the_archive_has_it(
    fault: Any, code: str, archive: Any, run: Any, make_study: Study, tmp_path: Path
) -> None:
    archive.add(*make_study(0))
    fault(archive)
    result = run(send=True)
    assert of(result) == [("failed", code)]
    # the mask itself is done, and only sending is made up for
    (case,) = [json.loads(path.read_text()) for path in (tmp_path / "out" / "ledger").iterdir()]
    assert case["state"] == "done"
    archive.refuse.clear()
    archive.__dict__.pop("store", None)
    archive.change, archive.trouble = (lambda raw: raw), (lambda method, path, before: None)
    archive.asked.clear()
    assert of(run(send=True)) == [("done", "")]
    assert not any(is_fetch(path) and "/instances/" not in path for _, path, _ in archive.asked)


def spoil_pixels(raw: bytes) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(raw))
    if dataset.Modality != "SEG":
        return raw
    dataset.PixelData = bytes(len(dataset.PixelData))
    text = io.BytesIO()
    dataset.save_as(text)
    return text.getvalue()


def lose_segs(archive: Any) -> Any:
    """Say that all was stored, and keep none of it."""
    store = archive.store

    def forget(kind: str, body: bytes) -> Any:
        answer = store(kind, body)
        for row in archive.seg():
            del archive.objects[row.SOPInstanceUID]
        return answer

    return forget


def no_posts(method: str, path: str, before: int) -> Any:
    return (500, "text/plain", b"") if method == "POST" else None


def test_an_archive_may_file_a_result_under_its_own_records(archive: Any, run: Any, make_study: Study) -> None:
    def correct(raw: bytes) -> bytes:
        dataset = pydicom.dcmread(io.BytesIO(raw))
        if dataset.Modality == "SEG":
            dataset.PatientName, dataset.AccessionNumber = "Corrected", "1"
            dataset.add_new(0x00081190, "UR", "http://archive")
        text = io.BytesIO()
        dataset.save_as(text)
        return text.getvalue()

    archive.add(*make_study(0))
    archive.change = correct
    assert of(run(send=True)) == [("done", "")]
