"""A real archive (Orthanc, DICOMweb and C-STORE): studies come out of it, results go back into it unchanged."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import yaml

from medseg.phantom.dicom import write_series
from medseg.volume import Volume

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
CANARY = "Kanarienvogel^Nele"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Orthanc:
    """A running archive."""

    http: int
    dicom: int
    node: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"dicomweb://127.0.0.1:{self.http}/dicom-web"

    def ask(self, path: str, body: Any = None, accept: str = "*/*") -> bytes:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}", data, {"Accept": accept})
        request.add_header("Authorization", "Basic " + base64.b64encode(b"nele:geheim").decode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def json(self, path: str, body: Any = None) -> Any:
        return json.loads(self.ask(path, body) or b"null")

    def upload(self, *files: Path) -> None:
        for file in files:
            assert self.json("/instances", file.read_bytes())["Status"] == "Success"

    def qido_segs(self) -> list[str]:
        """UIDs of the Segmentations that a search by DICOMweb finds."""
        found = json.loads(self.ask("/dicom-web/instances?Modality=SEG", accept="application/dicom+json"))
        return [row["00080018"]["Value"][0] for row in found]

    def objects(self, modality: str) -> list[bytes]:
        every = self.json("/tools/find", {"Level": "Instance", "Query": {"Modality": modality}})
        return [self.ask(f"/instances/{name}/file") for name in every]

    def studies(self) -> list[str]:
        return list(self.json("/studies"))


@pytest.fixture
def orthanc(program: Callable[[str], str], tmp_path: Path) -> Iterator[Orthanc]:
    if not PLUGIN.exists():
        pytest.skip(f"{PLUGIN} is not installed: make test-system installs it")
    http, dicom, node = free_port(), free_port(), free_port()
    config = {
        "Name": "TEST",
        "StorageDirectory": str(tmp_path / "orthanc"),
        "IndexDirectory": str(tmp_path / "orthanc"),
        "Plugins": [str(PLUGIN)],
        "HttpPort": http,
        "DicomPort": dicom,
        "DicomAet": "ORTHANC",
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"nele": "geheim"},
        "DicomAlwaysAllowStore": True,
        "DicomModalities": {"medseg": ["MEDSEG", "127.0.0.1", node]},
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(config))
    with open(tmp_path / "orthanc.log", "wb") as log:
        process = subprocess.Popen([program("Orthanc"), str(tmp_path / "orthanc.json")], stdout=log, stderr=log)
    found = Orthanc(http, dicom, node, process)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                found.json("/system")
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (tmp_path / "orthanc.log").read_text()
                assert time.monotonic() < end, (tmp_path / "orthanc.log").read_text()
                time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        process.wait(30)


def make_study(folder: Path, tiny: Any, number: int) -> list[Path]:
    image, _ = tiny.case(number)
    files = write_series(
        Volume(image.round().clip(0)[None], tiny.affine), folder, modality="MR", seed=number, patient_id=f"KNR{number}"
    )
    for file in files:
        dataset = pydicom.dcmread(file)
        dataset.PatientName, dataset.StudyDate = CANARY, "20260105"
        dataset.save_as(file)
    return files


def seg_places(dataset: Any, number: int) -> set[tuple[float, ...]]:
    """Where the voxels of a segment lie (RAS, 0.01 mm), by the attributes of its frames alone."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    row, column = np.reshape([float(x) for x in shared.PlaneOrientationSequence[0].ImageOrientationPatient], (2, 3))
    down, right = (float(x) for x in shared.PixelMeasuresSequence[0].PixelSpacing)
    found = set()
    for frame, item in zip(dataset.pixel_array, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        if int(item.SegmentIdentificationSequence[0].ReferencedSegmentNumber) != number:
            continue
        start = np.array([float(x) for x in item.PlanePositionSequence[0].ImagePositionPatient])
        for j, i in np.argwhere(frame):
            point = (start + row * right * i + column * down * j) * (-1, -1, 1)
            found.add(tuple(float(x) + 0.0 for x in np.round(point, 2)))
    return found


def nifti_places(path: Path, value: int) -> set[tuple[float, ...]]:
    mask = nibabel.load(path)
    points = np.argwhere(np.asarray(mask.dataobj) == value) @ mask.affine[:3, :3].T + mask.affine[:3, 3]
    return {tuple(float(x) + 0.0 for x in np.round(point, 2)) for point in points}


def check_result(raw: bytes, out: Path) -> None:
    """What the archive gives back is OUT's file, and shows OUT's mask."""
    (file,) = [file for file in out.glob("*.seg.dcm") if file.read_bytes() == raw]
    dataset = pydicom.dcmread(io.BytesIO(raw))
    assert dataset.PatientName == CANARY  # by design: the archive files it by them
    mask = file.with_name(file.name.replace(".seg.dcm", ".nii.gz"))
    some = [seg_places(dataset, number) for number in (1, 2)]
    assert some == [nifti_places(mask, value) for value in (1, 2)]
    assert any(some)


def tells(folder: Path) -> list[str]:
    """Files of OUT (names included) that name a patient, results and the private folder apart."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "private"]
    return [
        path.name
        for path in files
        if path.suffix != ".dcm" and any(word in path.read_bytes() for word in (b"Kanarie", b"KNR", b"1.2.826"))
    ]


def test_studies_come_by_dicomweb_and_results_go_back(
    orthanc: Orthanc, model: Path, tiny: Any, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSEG_DICOMWEB_USER", "nele")
    monkeypatch.setenv("MEDSEG_DICOMWEB_PASSWORD", "geheim")
    for number in (0, 1):
        orthanc.upload(*make_study(tmp_path / f"in{number}", tiny, number))
    out = tmp_path / "out"
    words = ["--model", model, "--out", out, "--format", "seg,nifti,sr,rtstruct", "--send", orthanc.url]
    told = run("medseg", "predict", f"{orthanc.url}?StudyDate=20260101-20261231&ModalitiesInStudy=MR", *words)
    assert "2 of 2 studies done" in told
    assert not any(word in told for word in ("Kanarie", "KNR", "1.2.826", "geheim"))
    assert len(orthanc.qido_segs()) == 2
    assert [len(orthanc.objects(kind)) for kind in ("SEG", "SR", "RTSTRUCT")] == [2, 2, 2]
    assert len(orthanc.studies()) == 2
    for raw in orthanc.objects("SEG"):
        check_result(raw, out)
    assert tells(out) == []
    # again, with nothing known: what is sent is the same, and the archive holds nothing more
    before = orthanc.json("/statistics")["CountInstances"]
    words[3] = tmp_path / "again"
    run("medseg", "predict", f"{orthanc.url}?ModalitiesInStudy=MR", *words)
    assert orthanc.json("/statistics")["CountInstances"] == before


def test_wrong_credentials_and_no_study(
    orthanc: Orthanc, model: Path, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("medseg", "predict", orthanc.url, "--model", model, "--out", tmp_path / "out")
    assert "PACS_REFUSED" in run(*words, allowed=(1,))
    monkeypatch.setenv("MEDSEG_DICOMWEB_USER", "nele")
    monkeypatch.setenv("MEDSEG_DICOMWEB_PASSWORD", "wrong-geheim")
    told = run(*words, allowed=(1,))
    assert "PACS_REFUSED" in told
    assert "geheim" not in told
    monkeypatch.setenv("MEDSEG_DICOMWEB_PASSWORD", "geheim")
    assert "EMPTY_INPUT" in run(*words, allowed=(1,))


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.2)


@contextmanager
def listening(program: Callable[[str], str], config: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `medseg listen`; it dies without a word where the block has not ended it."""
    command = [program("medseg"), "listen", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("way", ["C-STORE", "STOW-RS"])
def test_studies_come_by_c_store_and_results_go_back(
    way: str, orthanc: Orthanc, model: Path, tiny: Any, tmp_path: Path, program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSEG_DICOMWEB_USER", "nele")
    monkeypatch.setenv("MEDSEG_DICOMWEB_PASSWORD", "geheim")
    for number in (0, 1):
        orthanc.upload(*make_study(tmp_path / f"in{number}", tiny, number))
    node = {"host": "127.0.0.1", "port": orthanc.dicom, "ae_title": "ORTHANC"}
    settings = {
        "port": orthanc.node,
        "calling": ["ORTHANC"],
        "model": str(model),
        "formats": ["seg", "nifti", "sr"],
        "inbox": "inbox",
        "out": "out",
        "quiet_seconds": 1,
        "keep": "0",
        "send": [node if way == "C-STORE" else {"url": orthanc.url}],
    }
    (tmp_path / "listen.yaml").write_text(yaml.safe_dump(settings))
    first, second = orthanc.studies()
    with listening(program, tmp_path / "listen.yaml") as process:
        wait_for(lambda: b"ok" in echo(orthanc), process)
        assert orthanc.json("/modalities/medseg/store", first)["FailedInstancesCount"] == 0
        wait_for(lambda: len(orthanc.qido_segs()) == 1, process)
        assert orthanc.json("/modalities/medseg/store", second)["FailedInstancesCount"] == 0
        wait_for(lambda: len(orthanc.qido_segs()) == 2 and len(orthanc.objects("SR")) == 2, process)
        # whatever the archive routes to us: results are not segmented again
        assert orthanc.json("/modalities/medseg/store", first)["FailedInstancesCount"] == 0
        wait_for(lambda: not list((tmp_path / "inbox" / "studies").iterdir()), process)
        process.terminate()
        told, _ = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert not any(word in told for word in ("Kanarie", "KNR", "1.2.826", "geheim", "Traceback"))
    assert [len(orthanc.objects(kind)) for kind in ("SEG", "SR", "MR")] == [2, 2, 36]
    assert len(orthanc.studies()) == 2
    for raw in orthanc.objects("SEG"):
        if way == "STOW-RS":
            check_result(raw, tmp_path / "out")
        else:  # the file meta information is the archive's own, the object is ours
            (file,) = [file for file in (tmp_path / "out").glob("*.seg.dcm") if same_object(raw, file)]
            check_result(file.read_bytes(), tmp_path / "out")
    assert tells(tmp_path / "out") == []
    assert tells(tmp_path / "inbox") == []
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "stopped"


def echo(orthanc: Orthanc) -> bytes:
    try:
        orthanc.ask("/modalities/medseg/echo", b"")
        return b"ok"
    except urllib.error.HTTPError:
        return b""


def same_object(raw: bytes, file: Path) -> bool:
    return bool(pydicom.dcmread(io.BytesIO(raw)) == pydicom.dcmread(file))
