"""Small files that want gigabytes are refused, and the process that reads them stays small."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from pydicom import uid
from pydicom.encaps import encapsulate, get_frame

from medseg.errors import ReadError
from medseg.phantom import damage
from medseg.phantom.dicom import write_series
from medseg.phantom.hazards import AXIAL, phantom
from medseg.phantom.multiframe import write_multiframe
from medseg.readers import dicom_budget
from medseg.readers.dicom_budget import check_budget, open_dataset

GROWN_MIB = 300

READ = """
import json, resource, sys
from pathlib import Path
from medseg.errors import MedsegError
from medseg.readers.dicom_labels import read_dicom_labels
from medseg.readers.dicom_series import read_series
from medseg.readers.label_request import LabelRequest, Wanted
from medseg.phantom.hazards import phantom

import medseg.readers.dicom_codecs, pydicom.pixels, gdcm, jpeg_ls, openjpeg
request = LabelRequest(phantom(), (Wanted("first", 1),))
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_dicom_labels(folder, request) if folder.name.startswith("SEG") else read_series(folder)
        code = "read"
    except MedsegError as error:
        code = error.code
    found[folder.name] = code, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(json.dumps(found))
"""


def data_start(raw: bytes) -> int:
    """Where the data set begins: after the file meta information, whose length stands first."""
    return 144 + int(struct.unpack("<I", raw[140:144])[0])


def deflate_bomb(path: Path, size: int) -> None:
    """Put `size` zeros into a private element of a deflated file: a flushed block is repeated."""
    raw = path.read_bytes()
    plain = zlib.decompress(raw[data_start(raw) :], -zlib.MAX_WBITS)
    at = plain.index(b"\x20\x00\x0d\x00UI")
    head = plain[:at] + b"\x19\x00\x10\x10OB\0\0" + struct.pack("<I", size)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    out = deflate.compress(head) + deflate.flush(zlib.Z_FULL_FLUSH)
    block = deflate.compress(bytes(2**22)) + deflate.flush(zlib.Z_FULL_FLUSH)
    out += block * (size // 2**22) + deflate.compress(plain[at:]) + deflate.flush()
    path.write_bytes(raw[: data_start(raw)] + out)


def empty_items(path: Path, count: int) -> None:
    raw = path.read_bytes()
    at = raw.index(b"\x20\x00\x0d\x00UI")
    items = b"\x19\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * count
    path.write_bytes(raw[:at] + items + b"\xfe\xff\xdd\xe0\0\0\0\0" + raw[at:])


def huge_codestream(declared: int) -> damage.Damage:
    """Let JPEG 2000 pictures say that they are 60000 x 60000; the data set declares `declared`, or the truth if 0."""

    def change(dataset: pydicom.Dataset) -> None:
        stream = bytearray(get_frame(dataset.PixelData, 0, number_of_frames=1))
        at = stream.index(b"\xff\x4f\xff\x51")
        for place in (8, 24):
            struct.pack_into(">II", stream, at + place, 60000, 60000)
        dataset.PixelData = encapsulate([bytes(stream)])
        if declared:
            dataset.Rows = dataset.Columns = declared

    return damage.then(damage.compressed(uid.JPEG2000Lossless), damage.each(change))


def inflated(size: int) -> damage.Damage:
    return damage.then(damage.rewritten(uid.DeflatedExplicitVRLittleEndian), lambda paths: deflate_bomb(paths[3], size))


def declared(rows: int, syntax: str = "") -> damage.Damage:
    first = damage.compressed(syntax) if syntax else lambda paths: None
    return damage.then(first, damage.each(damage.put(Rows=rows, Columns=rows)))


BOMBS: dict[str, tuple[str, damage.Damage]] = {
    "deflated, 1.5 GiB": ("UNREADABLE", inflated(3 * 2**29)),
    "three million items": ("UNREADABLE", lambda paths: empty_items(paths[3], 3_000_000)),
    "60000 x 60000": ("OVERSIZED", declared(60000)),
    "60000 x 60000, RLE": ("OVERSIZED", declared(60000, uid.RLELossless)),
    "8000 x 8000": ("TRUNCATED", declared(8000)),
    "8000 x 8000, RLE": ("TRUNCATED", declared(8000, uid.RLELossless)),
    "8000 x 8000, JPEG-LS": ("LENGTH_MISMATCH", declared(8000, uid.JPEGLSLossless)),
    "60000 x 60000 in the codestream": ("LENGTH_MISMATCH", huge_codestream(0)),
    "60000 x 60000 in both": ("OVERSIZED", huge_codestream(60000)),
}


FRAMES = {"2147483647 frames": 2**31 - 1, "100000 frames": 100_000}
SEGS: dict[str, tuple[str, Callable[[pydicom.Dataset], object]]] = {
    "SEG, 60000 x 60000": ("TRUNCATED", damage.put(Rows=60000, Columns=60000)),
    "SEG, 60000 x 60000 of 16 bits": ("TRUNCATED", damage.put(Rows=60000, Columns=60000, BitsAllocated=16)),
    "SEG, 2147483647 frames": ("OVERSIZED", damage.put(NumberOfFrames=2**31 - 1)),
}
CODES = {name: code for name, (code, _) in (BOMBS | SEGS).items()} | dict.fromkeys(FRAMES, "UNREADABLE")


def to_seg(dataset: pydicom.Dataset) -> None:
    """Turn an enhanced image into a segmentation of one frame."""
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid.SegmentationStorage
    dataset.SegmentationType, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = "BINARY", 8, 8, 7
    dataset.PixelRepresentation, dataset.NumberOfFrames = 0, 1
    segment, number = pydicom.Dataset(), pydicom.Dataset()
    segment.SegmentNumber, segment.SegmentLabel, number.ReferencedSegmentNumber = 1, "first", 1
    dataset.SegmentSequence = [segment]
    dataset.SharedFunctionalGroupsSequence[0].SegmentIdentificationSequence = [number]
    dataset.PerFrameFunctionalGroupsSequence = dataset.PerFrameFunctionalGroupsSequence[:1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """Read every bomb in one process; name -> code and by how many MiB the process grew."""
    root = tmp_path_factory.mktemp("bombs")
    for name, (_, change) in BOMBS.items():
        change(write_series(phantom(), root / name, modality="CT"))
    for name, frames in FRAMES.items():
        path = write_multiframe([phantom(AXIAL)], root / name / "x.dcm", modality="CT")
        damage.edit(path, damage.put(NumberOfFrames=frames))
    for name, (_, change) in SEGS.items():
        path = write_multiframe([phantom(AXIAL)], root / name / "x.dcm", modality="CT")
        damage.edit(path, damage.both(to_seg, change))
    done = subprocess.run([sys.executable, "-c", READ, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (code, grown) for name, (code, grown) in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", CODES)
def test_bombs_are_refused_within_the_budget(name: str, results: dict[str, tuple[str, int]]) -> None:
    code, grown = results[name]
    assert code == CODES[name]
    assert grown < GROWN_MIB


# ---- the check itself -----------------------------------------------------------------------------------------------


def refused(path: Path, *pixel_bytes: int) -> bool:
    try:
        check_budget(path, *pixel_bytes)
    except ReadError as error:
        return error.code == "OVERSIZED"
    return False


@pytest.fixture
def deflated(tmp_path: Path) -> Path:
    paths = write_series(phantom(), tmp_path, modality="CT")
    damage.rewritten(uid.DeflatedExplicitVRLittleEndian)(paths)
    return paths[0]


def inflated_size(path: Path) -> int:
    raw = path.read_bytes()
    return len(zlib.decompress(raw[data_start(raw) :], -zlib.MAX_WBITS))


def test_the_limit_is_exact(deflated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_budget, "HEADER_BYTES", 0)
    size = inflated_size(deflated)
    assert (refused(deflated, size), refused(deflated, size - 1)) == (False, True)
    monkeypatch.setattr(dicom_budget, "_PIECE", 101)
    assert (refused(deflated, size), refused(deflated, size - 1)) == (False, True)


def test_without_preamble_or_behind_long_meta_information(deflated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever pydicom finds the syntax, the budget does."""
    monkeypatch.setattr(dicom_budget, "HEADER_BYTES", 0)
    size = inflated_size(deflated)
    raw = deflated.read_bytes()
    deflated.write_bytes(raw[132:])
    assert open_dataset(deflated).Rows == 35
    assert refused(deflated, size - 1)
    deflated.write_bytes(raw)
    damage.edit(
        deflated,
        lambda dataset: (
            setattr(dataset.file_meta, "PrivateInformationCreatorUID", "1." + "2" * 60)
            or setattr(dataset.file_meta, "ImplementationVersionName", "x" * 60_000)
        ),
    )
    assert open_dataset(deflated).Rows == 35
    assert refused(deflated, size - 1)
    assert not refused(deflated, size)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian])
def test_items_are_counted_across_pieces(syntax: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_series(phantom(), tmp_path, modality="CT")[0]
    empty_items(path, 50)
    damage.rewritten(syntax)([path])
    monkeypatch.setattr(dicom_budget, "_PIECE", 101)  # no multiple of eight: a mark lies across two pieces
    monkeypatch.setattr(dicom_budget, "MAX_ITEMS", 50)
    assert open_dataset(path).Rows == 35
    monkeypatch.setattr(dicom_budget, "MAX_ITEMS", 49)
    assert refused(path)
