"""Siemens mosaics: each tile lies where the private elements say; without them there is no geometry."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from nibabel.nicom import csareader
from nibabel.nicom.dicomwrappers import wrapper_from_file
from pydicom.dataset import Dataset

from medseg.errors import MedsegError
from medseg.phantom.dicom import write_series
from medseg.readers.dicom_mosaic import csa_values
from medseg.readers.dicom_scan import find_series
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume, align_to

SHAPE = (13, 11, 7)
AFFINE = np.array([[-0.7, 0, 0, 12.5], [0, -0.9, 0, -31.25], [0, 0, 2.5, 101.0], [0, 0, 0, 1.0]])


def csa(values: dict[str, list[str]]) -> bytes:
    """A CSA2 header, as csareader understands it."""
    data = b"SV10\4\3\2\1" + struct.pack("<II", len(values), 77)
    for name, items in values.items():
        vr = {"N": b"IS\0\0", "A": b"SH\0\0"}.get(name[0], b"FD\0\0")
        data += struct.pack("<64si4siii", name.encode(), len(items), vr, 4, len(items), 77)
        for item in items:
            raw = item.encode() + b"\0"
            data += struct.pack("<4i", len(raw), len(raw), 77, len(raw)) + raw + bytes(-len(raw) % 4)
    return data


def phantom(seed: int = 0) -> Volume:
    values = np.random.default_rng(seed).permutation(np.prod(SHAPE)).reshape((1, *SHAPE))
    return Volume(values.astype(np.float32), AFFINE)


def save(
    folder: Path,
    *,
    truth: Volume | None = None,
    reverse: bool = False,
    number: int = 1,
    change: Callable[[Dataset], object] = lambda dataset: None,
    **tags: list[str],
) -> Path:
    """One mosaic of 3 x 3 tiles, the last two of them empty; reversed, its tiles run against the normal."""
    truth = truth or phantom()
    across = 3
    order = range(SHAPE[2])[::-1] if reverse else range(SHAPE[2])
    picture = np.zeros((SHAPE[1] * across, SHAPE[0] * across), np.float32)
    for tile, k in enumerate(order):
        down, right = divmod(tile, across)
        picture[down * SHAPE[1] :, right * SHAPE[0] :][: SHAPE[1], : SHAPE[0]] = truth.array[0, :, :, k].T
    corner = AFFINE.copy()
    corner[:3, 3] += AFFINE[:3, 2] * order[0]
    # the corner of a slice as large as the picture, around the same centre
    corner[:3, 3] -= AFFINE[:3, :2] @ ((across - 1) / 2 * np.array(SHAPE[:2]))
    (file,) = write_series(Volume(picture.T[None, ..., None], corner), folder, modality="MR", seed=number)
    dataset = pydicom.dcmread(file)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
    dataset.SpacingBetweenSlices = 2.5
    dataset.AcquisitionNumber = number
    dataset.SeriesInstanceUID = "1.2.3"
    dataset.private_block(0x19, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", SHAPE[2])
    facts = {
        "NumberOfImagesInMosaic": [str(SHAPE[2])],
        "AcquisitionMatrixText": [f"{SHAPE[0]}*{SHAPE[1]}"],
        "SliceNormalVector": ["0.0", "0.0", "-1.0" if reverse else "1.0"],
        **tags,
    }
    dataset.private_block(0x29, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", csa(facts))
    change(dataset)
    target = folder / f"mosaic{number}.dcm"
    dataset.save_as(target)
    file.unlink()
    return target


@pytest.mark.parametrize("reverse", [False, True])
def test_every_tile_lies_where_it_was(tmp_path: Path, reverse: bool) -> None:
    volume = read_series(save(tmp_path, reverse=reverse))
    aligned = align_to(volume, phantom())
    assert aligned is not None
    np.testing.assert_array_equal(aligned.array, phantom().array)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert volume.notes == ()


@pytest.mark.parametrize("reverse", [False, True])
def test_nibabel_places_the_tiles_as_we_do(tmp_path: Path, reverse: bool) -> None:
    path = save(tmp_path, reverse=reverse)
    theirs = wrapper_from_file(path)
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ theirs.affine
    other = Volume(np.asarray(theirs.get_data(), np.float32)[None], to_ras)
    aligned = align_to(read_series(path), other)
    assert aligned is not None
    np.testing.assert_array_equal(aligned.array, other.array)


def test_each_time_point_is_a_part(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path, truth=phantom(number), number=number)
    entries = find_series(tmp_path)
    assert [(len(entry.headers), entry.part, entry.refusal) for entry in entries] == [(7, "MIXED_SERIES", None)] * 3
    for number, entry in enumerate(entries, start=1):
        np.testing.assert_array_equal(read_series(entry).array, phantom(number).array)


def private(group: int, element: int, value: Any) -> Callable[[Dataset], object]:
    return lambda d: setattr(d[group, element], "value", value)


REFUSED: dict[str, dict[str, Any]] = {
    "no CSA header": {"change": lambda d: d.__delitem__((0x29, 0x1010))},
    "no number of tiles": {"change": lambda d: d.__delitem__((0x19, 0x100A))},
    "two numbers of tiles": {"change": private(0x19, 0x100A, 6)},
    "more tiles than fit": {"change": private(0x19, 0x100A, 10), "NumberOfImagesInMosaic": ["10"]},
    "no tiles": {"change": private(0x19, 0x100A, 0), "NumberOfImagesInMosaic": ["0"]},
    "no normal": {"SliceNormalVector": []},
    "another normal": {"SliceNormalVector": ["0.0", "0.6", "0.8"]},
    "a normal of words": {"SliceNormalVector": ["a", "b", "c"]},
    "a normal that is no number": {"SliceNormalVector": ["nan", "nan", "nan"]},
    "no spacing": {"change": lambda d: delattr(d, "SpacingBetweenSlices")},
    "no position": {"change": lambda d: delattr(d, "ImagePositionPatient")},
    "another creator": {"change": lambda d: setattr(d[0x29, 0x10], "value", "SOMEBODY")},
}


@pytest.mark.parametrize("name", REFUSED)
def test_without_the_facts_it_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(MedsegError) as caught:
        read_series(save(tmp_path, **REFUSED[name]))
    assert caught.value.code == "MOSAIC"


def test_fewer_pixels_than_declared(tmp_path: Path) -> None:
    with pytest.raises(MedsegError) as caught:
        read_series(save(tmp_path, change=lambda d: setattr(d, "PixelData", d.PixelData[:-40])))
    assert caught.value.code == "TRUNCATED"


def test_the_private_header_is_read_as_nibabel_does() -> None:
    facts = {"NumberOfImagesInMosaic": ["35"], "SliceNormalVector": ["0.1", "-0.2", "0.9"], "Empty": []}
    data = csa(facts)
    assert csa_values(data) == {name: tuple(items) for name, items in facts.items()}
    theirs = csareader.read(data)["tags"]
    assert {name: len(tag["items"]) for name, tag in theirs.items()} == {n: len(i) for n, i in facts.items()}


@pytest.mark.parametrize("seed", range(5))
def test_any_bytes_are_values_or_an_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = csa({"NumberOfImagesInMosaic": ["35"], "SliceNormalVector": ["0.1", "-0.2", "0.9"]})
    for _ in range(300):
        data = bytearray(whole[: rng.integers(len(whole) + 1)])
        for _ in range(int(rng.integers(0, 4))):
            if data:
                data[rng.integers(len(data))] = rng.integers(256)
        try:
            csa_values(bytes(data))
        except ValueError:
            continue


@pytest.mark.data
def test_a_real_private_header_is_read_as_nibabel_does(data: Path) -> None:
    dataset = pydicom.dcmread(data / "dicom_hard/dcm_qa_ts/In/1.dcm")
    raw = dataset[0x29, 0x1010].value
    theirs = csareader.read(raw)["tags"]
    ours = csa_values(raw)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 50
    for name, tag in theirs.items():
        for one, other in zip(ours[name], [item for item in tag["items"] if item not in (None, "")], strict=False):
            assert one == str(other).strip() or float(one) == float(other)
