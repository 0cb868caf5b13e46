"""Pictures compressed by DCMTK, an encoder of another house, are read as DCMTK itself decodes them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medseg.phantom.dicom import write_series
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume

SHAPE = (45, 41, 3)
LOSSLESS = {
    "lossless, another predictor": ("dcmcjpeg", "+el", "+sv", "4"),
    "lossless, first predictor": ("dcmcjpeg", "+e1"),
    "JPEG-LS": ("dcmcjpls", "+el"),
}
LOSSY = {
    "extended, 12 bits": ("dcmcjpeg", "+ee", "+q", "95", "+bt"),
    "near-lossless": ("dcmcjpls", "+en", "+md", "2"),
}
BITS = {
    "unsigned 6": (6, False),
    "signed 10": (10, True),
    "unsigned 12": (12, False),
    "signed 12": (12, True),
    "unsigned 16": (16, False),
    "signed 16": (16, True),
}


def smooth(low: int, high: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    ramp = np.linspace(low, high, int(np.prod(SHAPE))).reshape(SHAPE)
    return np.clip(np.rint(ramp + rng.normal(0, (high - low) / 80, SHAPE)), low, high)


def write(folder: Path, truth: np.ndarray, stored: int, signed: bool) -> list[Path]:
    files = write_series(
        Volume(np.abs(truth)[None].astype(np.float32), np.diag([-1.0, -1, 3, 1])), folder, modality="MR"
    )
    for k, file in enumerate(files):
        dataset = pydicom.dcmread(file)
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = stored, stored - 1, int(signed)
        dataset.PixelData = truth[:, :, k].T.astype("<i2" if signed else "<u2").tobytes()
        dataset.save_as(file)
    return files


def compressed(
    folder: Path, truth: np.ndarray, stored: int, signed: bool, how: tuple[str, ...], program: Callable[[str], str]
) -> np.ndarray:
    """Write a series compressed by DCMTK; return (I, J, K) as DCMTK decodes it."""
    encoder, *options = how
    decoder = {"dcmcjpeg": "dcmdjpeg", "dcmcjpls": "dcmdjpls"}[encoder]
    plain = folder.with_name("plain")
    theirs = []
    for file in write(folder, truth, stored, signed):
        subprocess.run([program(encoder), *options, str(file), str(file)], check=True)
        assert pydicom.dcmread(file).file_meta.TransferSyntaxUID.is_encapsulated
        subprocess.run([program(decoder), str(file), str(plain)], check=True)
        theirs.append(pydicom.dcmread(plain).pixel_array.T)
    return np.stack(theirs, axis=-1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_pictures_of_dcmtk(name: str, bits: str, tmp_path: Path, program: Callable[[str], str]) -> None:
    stored, signed = BITS[bits]
    low = -(1 << (stored - 1)) if signed else 0
    truth = smooth(low, low + (1 << stored) - 1)
    theirs = compressed(tmp_path / "series", truth, stored, signed, LOSSLESS[name], program)
    np.testing.assert_array_equal(theirs, truth)
    np.testing.assert_array_equal(read_series(tmp_path / "series").array[0], truth)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_pictures_of_dcmtk(name: str, tmp_path: Path, program: Callable[[str], str]) -> None:
    truth = smooth(0, 4095)
    theirs = compressed(tmp_path / "series", truth, 12, False, LOSSY[name], program)
    assert 0 < np.abs(theirs.astype(float) - truth).max() < 60
    volume = read_series(tmp_path / "series")
    np.testing.assert_array_equal(volume.array[0], theirs)
    assert "LOSSY" in volume.notes
