"""The fast walk over headers against pydicom: the same answer on everything, damaged files included, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from medseg.phantom.dicom import write_series
from medseg.readers import dicom_header
from medseg.readers.dicom_header import PARSE_ERRORS, WANTED, quiet, read_header
from medseg.readers.dicom_tags import CHUNKS, read_tags, told_by
from medseg.volume import Volume

SHAPE = (12, 10, 3)
Answer = tuple[bool, str, str]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Answer]]:
    """Return whether the walk read a file, what `read_header` says of it, and what it says by pydicom alone."""
    taken: list[bool] = []

    def spy(*arguments: object) -> object:
        found = read_tags(*arguments)  # type: ignore[arg-type]
        taken.append(found is not None)
        return found

    def ask(path: Path) -> Answer:
        said = []
        taken.clear()
        for way in (spy, lambda *_: None):
            monkeypatch.setattr(dicom_header, "read_tags", way)
            try:
                said.append(repr(sorted(vars(read_header(path)).items())))
            except PARSE_ERRORS as error:
                said.append(type(error).__name__)
            except TypeError:  # vars(None): no DICOM
                said.append("None")
        return any(taken), said[0], said[1]

    with quiet():
        yield ask


@pytest.fixture
def file(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 900, (1, *SHAPE)).astype(np.float32)
    path = write_series(Volume(values, np.diag([-0.7, -0.9, 2.5, 1.0])), tmp_path, modality="CT")[1]
    dataset = pydicom.dcmread(path)
    inner = Dataset()
    inner.CodeValue, inner.SeriesInstanceUID, inner.Rows = "X", "1.2.666", 7
    outer = Dataset()
    outer.PurposeOfReferenceCodeSequence = Sequence([inner])
    dataset.ReferencedImageSequence = Sequence([outer, outer])
    block = dataset.private_block(0x0029, "VENDOR", create=True)
    block.add_new(1, "OB", bytes(range(200)))
    block.add_new(2, "SQ", Sequence([outer]))
    dataset.DiffusionBValue, dataset.TemporalPositionIndex, dataset.EchoTime = 800.5, 3, "10.50"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.save_as(path)
    return path


def rewrite(path: Path, change: Callable[[Dataset], object]) -> Path:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)
    return path


def undefined(dataset: Dataset) -> None:
    for element in dataset.iterall():
        if element.VR == "SQ":
            element.is_undefined_length = True
            for item in element.value:
                item.is_undefined_length_sequence_item = True


def syntax(name: str) -> Callable[[Dataset], object]:
    def change(dataset: Dataset) -> None:
        if name in (JPEGLSLossless, RLELossless):
            dataset.compress(name, generate_instance_uid=False)
        dataset.file_meta.TransferSyntaxUID = name

    return change


def set_to(**values: object) -> Callable[[Dataset], object]:
    return lambda dataset: [setattr(dataset, word, value) for word, value in values.items()]


PLAIN: dict[str, Callable[[Dataset], object]] = {
    "as written": lambda dataset: None,
    "implicit": syntax(ImplicitVRLittleEndian),
    "deflated": syntax(DeflatedExplicitVRLittleEndian),
    "JPEG-LS": syntax(JPEGLSLossless),
    "RLE": syntax(RLELossless),
    "undefined lengths": undefined,
    "implicit, undefined lengths": lambda d: (undefined(d), syntax(ImplicitVRLittleEndian)(d)),
    "padded": set_to(Modality="CT  ", Manufacturer=" A  B ", ImageType=["DERIVED ", " PRIMARY"]),
    "empty": set_to(InstanceNumber=None, RescaleSlope=None, Manufacturer="", ImageType=None, PixelSpacing=None),
    "several where one belongs": set_to(RescaleSlope=["1", "2"], EchoNumbers=["1", "2"], Manufacturer=["A", "B"]),
    "one where several belong": set_to(PixelSpacing="1", ImageType="DERIVED"),
    "exponents": set_to(RescaleSlope="1.e-1", RescaleIntercept="-1.024E+3", PixelSpacing=[".5", "+0.50"]),
    "text where a number belongs": lambda d: d.add_new("RescaleSlope", "LO", "one"),
    "a long private value": lambda d: d.private_block(0x0029, "VENDOR").add_new(9, "OB", bytes(2 * CHUNKS[0])),
}


@pytest.mark.parametrize("name", PLAIN)
def test_ordinary_files_are_read_by_the_walk_and_as_pydicom_reads_them(
    name: str, file: Path, answers: Callable[[Path], Answer]
) -> None:
    taken, own, theirs = answers(rewrite(file, PLAIN[name]))
    assert taken
    assert own == theirs
    assert "1.2.666" not in own, "what stands in a sequence is not the file's"


ODD: dict[str, Callable[[Dataset], object]] = {
    "big endian": syntax(ExplicitVRBigEndian),
    "another language": set_to(SpecificCharacterSet="ISO_IR 100", Manufacturer="Bär"),
    "lookup table": lambda d: setattr(d, "ModalityLUTSequence", Sequence([Dataset()])),
    "no pixels": lambda d: d.__delitem__("PixelData"),
    "a fraction as integer": lambda d: d.add_new("InstanceNumber", "UT", "1.5"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_left_to_pydicom(name: str, file: Path, answers: Callable[[Path], Answer]) -> None:
    if name == "big endian":
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        dataset["PixelData"].VR = "OW"
        pydicom.dcmwrite(file, dataset, implicit_vr=False, little_endian=False)
    else:
        rewrite(file, ODD[name])
    taken, own, theirs = answers(file)
    assert not taken
    assert own == theirs


def test_damaged_numbers_are_left_to_pydicom(file: Path, answers: Callable[[Path], Answer]) -> None:
    whole = file.read_bytes()
    slope = whole.index(b"\x28\x00\x53\x10DS") + 8
    for junk in (b"x", b"\xe9", b"\0", b"1_"):
        file.write_bytes(whole[:slope] + junk + whole[slope + len(junk) :])
        taken, own, theirs = answers(file)
        assert not taken
        assert own == theirs


def test_a_number_that_never_ends_does_not_take_long(file: Path, answers: Callable[[Path], Answer]) -> None:
    """Seen by the time limit of whoever runs this: a pattern that goes back would need hours."""
    rewrite(file, syntax(ImplicitVRLittleEndian))
    whole = file.read_bytes()
    at = whole.index(b"\x28\x00\x53\x10") + 4
    size = int.from_bytes(whole[at : at + 4], "little")
    for junk in (b"1" * (1 << 21) + b"x", b"1.5\\" * (1 << 19) + b"x "):
        file.write_bytes(whole[:at] + len(junk).to_bytes(4, "little") + junk + whole[at + 4 + size :])
        taken, own, theirs = answers(file)
        assert not taken
        assert own == theirs


def test_elements_out_of_order_or_repeated_are_left_to_pydicom(file: Path, answers: Callable[[Path], Answer]) -> None:
    whole = file.read_bytes()
    slope = whole.index(b"\x28\x00\x53\x10DS")
    end = slope + 8 + int.from_bytes(whole[slope + 6 : slope + 8], "little")
    file.write_bytes(whole[:end] + whole[slope:end] + whole[end:])
    assert not answers(file)[0]
    modality = whole.index(b"\x08\x00\x60\x00CS")
    file.write_bytes(whole[:modality] + whole[slope:end] + whole[modality:])
    taken, own, theirs = answers(file)
    assert not taken
    assert own == theirs


@pytest.mark.parametrize("name", ["as written", "implicit", "undefined lengths", "deflated"])
def test_damaged_headers_never_get_another_answer(
    name: str, file: Path, answers: Callable[[Path], Answer], rng: np.random.Generator
) -> None:
    whole = rewrite(file, PLAIN[name]).read_bytes()
    top = len(whole) - (0 if name == "deflated" else 2 * SHAPE[0] * SHAPE[1])
    read_by_the_walk = 0
    for _ in range(250):
        at, junk = int(rng.integers(132, top)), rng.bytes(int(rng.integers(1, 6)))
        cut, changed, inserted = whole[:at], whole[:at] + junk + whole[at + len(junk) :], whole[:at] + junk + whole[at:]
        file.write_bytes((cut, changed, changed, inserted)[rng.integers(4)])
        taken, own, theirs = answers(file)
        # A deflated stream that breaks among its pixels is refused when they are read.
        assert own == theirs or (name == "deflated" and theirs == "error")
        read_by_the_walk += taken
    assert 10 < read_by_the_walk < 240


@pytest.mark.data
def test_real_files_get_the_same_answer(data: Path, answers: Callable[[Path], Answer]) -> None:
    files = [path for name in ("dicom_hard", "dicom_objects") for path in (data / name).rglob("*") if path.is_file()]
    said = [answers(path) for path in sorted(files)]
    assert [path for path, (_, own, theirs) in zip(sorted(files), said, strict=True) if own != theirs] == []
    assert sum(taken for taken, *_ in said) > 150


def test_a_deflated_bomb_is_not_unpacked_by_the_walk(file: Path) -> None:
    import zlib

    rewrite(file, syntax(ExplicitVRLittleEndian))
    whole = file.read_bytes()
    meta = pydicom.filereader.read_partial(open(file, "rb"), stop_when=lambda *_: True).file_meta  # noqa: SIM115
    start = 132 + 12 + meta.FileMetaInformationGroupLength
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    element = b"\x09\x00\x01\x10OB\0\0" + (2**30).to_bytes(4, "little")
    body = packer.compress(element) + b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    head = whole[:start].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    head = head.replace(b"UI\x14\x00" + b"1.2.840.10008.1.2.1.99", b"UI\x16\x00" + b"1.2.840.10008.1.2.1.99")
    file.write_bytes(head + body)
    tags, cut = told_by(file, WANTED)
    assert (tags.values, cut) == ({}, True)


def test_what_a_damaged_file_tells(file: Path) -> None:
    whole = file.read_bytes()
    uid = str(pydicom.dcmread(file).SeriesInstanceUID)
    at = whole.index(b"\x28\x00\x11\x00US")
    file.write_bytes(whole[:at])
    tags, cut = told_by(file, WANTED)
    assert (tags.get("SeriesInstanceUID"), cut) == (uid, True)
    file.write_bytes(whole[:at] + b"\xff" * 40 + whole[at:])
    tags, cut = told_by(file, WANTED)
    assert (tags.get("SeriesInstanceUID"), cut) == (uid, False)
    file.write_bytes(whole[:200])
    assert told_by(file, WANTED)[0].get("SeriesInstanceUID") is None
    file.write_bytes(b"")
    assert told_by(file, WANTED)[0].values == {}
