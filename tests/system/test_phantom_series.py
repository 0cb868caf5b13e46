"""The DICOM that the phantom writes is DICOM to others: validator, converter and archive."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg.phantom.dicom import write_series
from medseg.readers import read_image
from medseg.volume import Volume

MODALITIES = ["CT", "MR", "PT"]


def oblique_volume(modality: str) -> Volume:
    """A volume without any symmetry, turned out of the patient's axes, of three different spacings."""
    rng = np.random.default_rng(7)
    low, high = {"CT": (-1000, 1500), "MR": (0, 4000), "PT": (0, 30000)}[modality]
    array = rng.integers(low, high, size=(1, 11, 13, 7)).astype(np.float32)
    turn = rotation(0.3) @ np.diag([-1.0, -1.0, 1.0])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.8, 1.1, 2.5])
    affine[:3, 3] = (12.5, -31.25, 104.0)
    return Volume(array=array, affine=affine)


def rotation(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return about_x @ about_z


@pytest.mark.parametrize("modality", MODALITIES)
def test_validator_finds_no_error(run: Callable[..., str], tmp_path: Path, modality: str) -> None:
    for path in write_series(oblique_volume(modality), tmp_path, modality=modality):
        findings = [line for line in run("dciodvfy", path, allowed=(0, 1)).splitlines() if line.startswith("Error")]
        assert findings == []


@pytest.mark.parametrize("modality", MODALITIES)
def test_converter_sees_the_same_voxels_in_the_same_place(
    run: Callable[..., str], tmp_path: Path, modality: str
) -> None:
    volume = oblique_volume(modality)
    (tmp_path / "out").mkdir()
    write_series(volume, tmp_path / "in", modality=modality, shuffle=True)
    run("dcm2niix", "-b", "n", "-z", "n", "-f", "x", "-o", tmp_path / "out", tmp_path / "in")
    (path,) = (tmp_path / "out").glob("*.nii")
    theirs = nibabel.as_closest_canonical(nibabel.load(path))
    ours = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.array[0], volume.affine))
    assert np.allclose(theirs.affine, ours.affine, atol=1e-3)
    # PT stores a slope per slice, so values keep four to five digits.
    tolerance = 1.0 if modality == "PT" else 0.0
    assert np.allclose(theirs.get_fdata(), ours.get_fdata(), rtol=0, atol=tolerance)


@pytest.fixture
def archive(program: Callable[[str], str], tmp_path: Path) -> Iterator[str]:
    """A fresh Orthanc on free ports; the address of its REST interface."""
    web, dicom = free_port(), free_port()
    settings = {
        "StorageDirectory": str(tmp_path / "storage"),
        "IndexDirectory": str(tmp_path / "storage"),
        "HttpPort": web,
        "DicomPort": dicom,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [],
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    with open(tmp_path / "orthanc.log", "wb") as log:
        server = subprocess.Popen([program("Orthanc"), str(tmp_path / "orthanc.json")], stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{web}/system", server, tmp_path / "orthanc.log")
        yield f"http://127.0.0.1:{web}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            fetch(url)
            return
        except urllib.error.URLError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


def fetch(url: str, data: bytes | None = None) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=30) as answer:
        body: bytes = answer.read()
    return body


@pytest.mark.parametrize("modality", MODALITIES)
def test_archive_gives_back_the_same_volume(archive: str, tmp_path: Path, modality: str) -> None:
    written = write_series(oblique_volume(modality), tmp_path / "in", modality=modality, shuffle=True)
    for path in written:
        fetch(f"{archive}/instances", path.read_bytes())
    (tmp_path / "back").mkdir()
    instances = json.loads(fetch(f"{archive}/instances"))
    assert len(instances) == len(written)
    for number, instance in enumerate(instances):
        (tmp_path / "back" / f"{number}.dcm").write_bytes(fetch(f"{archive}/instances/{instance}/file"))
    before, after = read_image(tmp_path / "in"), read_image(tmp_path / "back")
    assert np.array_equal(before.array, after.array)
    assert np.array_equal(before.affine, after.affine)
