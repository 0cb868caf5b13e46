"""Trees of small studies, some damaged, for campaigns over many: from real hippocampi, or from phantoms."""

from __future__ import annotations

import gzip
import itertools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from medseg.phantom.dicom import write_series
from medseg.volume import Volume

Image = tuple[NDArray[np.float32], NDArray[np.float64]]
"""Values (I, J, K) and affine."""
AFFINE = np.array([[-1.5, 0, 0, 30], [0, -1.5, 0, 20], [0, 0, 2.0, -5], [0, 0, 0, 1]])
CROP = (28, 28, 20)


@pytest.fixture(scope="session")
def plant_studies() -> Callable[..., dict[str, str]]:
    """Write a tree of studies, see `plant`."""
    return plant


@pytest.fixture(scope="session")
def ways_to_damage() -> int:
    """In how many ways NIfTI files and DICOM series are damaged: so many studies of each kind are needed for all."""
    return max(len(NIFTI_FAULTS), len(DICOM_FAULTS))


@pytest.fixture(scope="session")
def phantom_image() -> Callable[[int], Image]:
    """Builder of generated images: noise, each another one."""
    return lambda number: (np.random.default_rng(number).integers(50, 200, (16, 18, 8)).astype(np.float32), AFFINE)


@pytest.fixture(scope="session")
def hippocampus_crop(data: Path) -> Callable[[int], Image]:
    """Builder of crops of real hippocampi, each of another image or from another place in it."""
    images = sorted((data / "hippocampus" / "imagesTr").glob("hippocampus_*.nii.gz"))

    def crop(number: int) -> Image:
        image = nibabel.load(images[number % len(images)])
        values = np.asarray(image.dataobj, np.float32)
        shift = number // len(images) % 4
        start = np.array([min(2 * shift, n - size) for n, size in zip(values.shape, CROP, strict=True)])
        affine = image.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start
        return values[tuple(slice(a, a + size) for a, size in zip(start, CROP, strict=True))], affine

    return crop


def plant(
    tree: Path, image: Callable[[int], Image], count: int, *, damaged: Sequence[int] | None = None
) -> dict[str, str]:
    """Write studies 0 to `count` - 1, each third one DICOM; return name in the tree -> code of those that are damaged.

    The `damaged` ones (one of twenty unless told) are so in turn in all ways that there are.
    """
    damaged = range(7, count, 20) if damaged is None else damaged
    tables = {"p": itertools.cycle(DICOM_FAULTS.values()), "n": itertools.cycle(NIFTI_FAULTS.values())}
    codes = {}
    for number in range(count):
        values, affine = image(number)
        if number % 3 == 0:
            place = tree / f"p{number}"
            # Values of some hippocampi are above a million; a series holds 16 bits.
            stored = np.rint(values * min(1.0, 60000 / values.max()))
            write_series(Volume(stored[None], affine), place, modality="MR", seed=number, patient_id=f"P{number}")
        else:
            place = tree / f"n{number}.nii.gz"
            place.parent.mkdir(parents=True, exist_ok=True)
            nibabel.Nifti1Image(values, affine).to_filename(place)
        if number in damaged:
            damage, codes[place.name] = next(tables[place.name[0]])
            damage(place)
    return codes


def _rewrite(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change the bytes within an intact gzip file."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    change(raw)
    path.write_bytes(gzip.compress(raw, mtime=0))


def _with_dims(*dims: int) -> Callable[[Path], None]:
    return lambda path: _rewrite(path, lambda raw: struct.pack_into("<8h", raw, 40, 3, *dims, 1, 1, 1, 1))


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _values(change: Callable[[NDArray[np.float32]], NDArray[Any]]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        image = nibabel.load(path)
        nibabel.Nifti1Image(change(image.get_fdata(dtype=np.float32)), image.affine).to_filename(path)

    return damage


def _nan(values: NDArray[np.float32]) -> NDArray[np.float32]:
    values[3, 3, 3] = np.nan
    return values


def _tags(change: Callable[[pydicom.Dataset, int], object], *, files: slice = slice(None)) -> Callable[[Path], None]:
    """Change the header of some slices: `change` gets the dataset and the number of the slice."""

    def damage(folder: Path) -> None:
        for number, file in enumerate(sorted(folder.iterdir())[files]):
            dataset = pydicom.dcmread(file)
            change(dataset, number)
            dataset.save_as(file)

    return damage


def _lean(dataset: pydicom.Dataset, number: int) -> None:
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, float(y) + 0.4 * number, z]


def _slice(change: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: (change(sorted(folder.iterdir())[3]), None)[1]


Fault = tuple[Callable[[Path], object], str]
"""What is done to a file or folder, and the reason code that it must get."""

NIFTI_FAULTS: dict[str, Fault] = {
    "empty": (lambda path: path.write_bytes(b""), "TRUNCATED"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-50]), "TRUNCATED"),
    "gzip of nothing": (lambda path: path.write_bytes(b"\x1f\x8b broken"), "TRUNCATED"),
    "text": (lambda path: path.write_text("This is no image, whatever its name says.\n" * 20), "UNREADABLE"),
    "one bit": (_flip, "CORRUPT"),
    "NaN": (_values(_nan), "NON_FINITE"),
    "constant": (_values(np.zeros_like), "CONSTANT_IMAGE"),
    "two channels": (_values(lambda values: np.stack([values, values], axis=-1)), "CHANNEL_COUNT"),
    "negative size": (_with_dims(16, -18, 8), "CORRUPT"),
    "huge size": (_with_dims(30000, 30000, 30000), "OVERSIZED"),
    "larger than the file": (_with_dims(90, 90, 90), "TRUNCATED"),
    "no orientation": (
        lambda path: _rewrite(path, lambda raw: struct.pack_into("<2h", raw, 252, 0, 0)),
        "NO_ORIENTATION",
    ),
    "flat": (lambda path: _rewrite(path, lambda raw: struct.pack_into("<4f", raw, 312, 0, 0, 0, 0)), "BAD_AFFINE"),
    "complex": (_values(lambda values: values.astype(np.complex64)), "UNSUPPORTED_TYPE"),
}
DICOM_FAULTS: dict[str, Fault] = {
    "cut slice": (_slice(lambda file: file.write_bytes(file.read_bytes()[:-90])), "TRUNCATED"),
    "empty slice": (_slice(lambda file: file.write_bytes(b"")), "UNREADABLE"),
    "lost slice": (_slice(Path.unlink), "MISSING_SLICES"),
    "header cut": (_slice(lambda file: file.write_bytes(file.read_bytes()[:400])), "UNREADABLE"),
    "leaning": (_tags(_lean), "GANTRY_TILT"),
    "no pixel spacing": (_tags(lambda dataset, _: dataset.__delattr__("PixelSpacing")), "NO_PIXEL_SPACING"),
    "no position": (_tags(lambda dataset, _: dataset.__delattr__("ImagePositionPatient")), "NO_POSITION"),
    "two patients": (_tags(lambda d, _: setattr(d, "PatientID", "Q"), files=slice(2)), "MIXED_PATIENT"),
    "planning": (_tags(lambda d, _: setattr(d, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])), "LOCALIZER"),
}
