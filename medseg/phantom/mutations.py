"""Random damage to DICOM files, for campaigns that look for crashes, hangs and wrong geometry.

On the level of the data set (elements deleted, emptied, altered, given another VR, wrapped into sequences, decoys
added) and of bytes (cut, flipped, spliced, lengths changed). The same generator state gives the same damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO

import numpy as np
import pydicom
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag

from medseg.readers.dicom_header import PARSE_ERRORS

Rng = np.random.Generator
Place = tuple[Dataset, BaseTag]

GEOMETRY = (
    *("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns", "NumberOfFrames"),
    *("SliceThickness", "SpacingBetweenSlices", "SliceLocation", "FrameOfReferenceUID", "ContourData"),
    *("SOPInstanceUID", "SeriesInstanceUID", "SOPClassUID", "InstanceNumber", "ImageType"),
    *("SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence", "PlanePositionSequence"),
    *("SegmentSequence", "ReferencedSegmentNumber", "StructureSetROISequence", "ROIContourSequence"),
)
"""Keywords that are hit half of the time: what decides about place, size and identity."""
JUNK = (
    *(b"", b" ", b"nan", b"inf", b"-1", b"0", b"1e400", b"1e-320", b"abc", b"\xff\xfe\x00\x80", b"1\\2\\3\\4\\5\\6\\7"),
    *(
        b"1\\",
        b"\\",
        b"\\\\\\",
        b"999999999999999",
        b" 1 ",
        b"1,5",
        b"0\\0\\0",
        b"nan\\nan\\nan",
        b"1e308\\1e308\\1e308",
    ),
    *(
        b"1e308\\-1e308\\0",
        b"1\\0\\0\\0\\1\\0",
        b"0\\1\\0\\1\\0\\0",
        b"NaN\\0\\0\\0\\1\\0",
        b"0\\0\\0\\0\\0\\0",
        b"\0" * 8,
    ),
    *(b"9" * 1000, b"1.2.3", b"1_0", b"0x10", b"1e1", b"2\\2", b"ORIGINAL\\PRIMARY\\LOCALIZER", b"\xd9\xa3", b"true"),
)
NUMBERS = (0, 1, 2, 7, 8, 255, 4096, 32768, 65535, 60000, 2**31 - 1, 2**32 - 1)
CHARSETS = (b"ISO_IR 999", b"ISO 2022 IR 87", b"\\ISO 2022 IR 149", b"utf8", b"\xff\xff", b"GB18030", b"")
VRS = ("UN", "OB", "OW", "LO", "SQ", "FD", "US", "AT", "PN", "UI", "UT", "DS")


def places(dataset: Dataset) -> Iterator[Place]:
    """Walk to every element, also those inside sequences."""
    for tag in list(dataset.keys()):
        yield dataset, tag
        if isinstance(dataset.get_item(tag).value, Sequence):
            for item in dataset[tag].value:
                yield from places(item)


def mutate_dataset(dataset: Dataset, rng: Rng) -> frozenset[str]:
    """Damage a data set in place at one to three places; returns the keywords that were hit ("" for private ones)."""
    hit: set[str] = set()
    for _ in range(int(rng.integers(1, 4))):
        everywhere = list(places(dataset))
        weighty = [place for place in everywhere if keyword_for_tag(place[1]) in GEOMETRY]
        chosen = weighty if weighty and rng.random() < 0.5 else everywhere
        if not chosen:
            break
        owner, tag = chosen[rng.integers(len(chosen))]
        word = list(OPERATIONS)[rng.integers(len(OPERATIONS))]
        if OPERATIONS[word](owner, tag, rng):
            hit.add(keyword_for_tag(tag))
    return frozenset(hit)


def _raw(owner: Dataset, tag: BaseTag, vr: str, value: bytes) -> None:
    """Put bytes into an element as they will stand in the file, whatever its VR allows."""
    owner[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)


def _vr(owner: Dataset, tag: BaseTag) -> str:
    return str(owner.get_item(tag).VR or "UN")


def _delete(owner: Dataset, tag: BaseTag, rng: Rng) -> bool:
    del owner[tag]
    return True


def _junk(owner: Dataset, tag: BaseTag, rng: Rng) -> bool:
    vr = _vr(owner, tag)
    if vr == "SQ":
        return False
    numbers = {"US": "<u2", "SS": "<i2", "UL": "<u4", "SL": "<i4", "FD": "<f8", "FL": "<f4"}
    if vr in numbers and rng.random() < 0.8:
        number = np.array(NUMBERS[rng.integers(len(NUMBERS))]).astype(numbers[vr])
        _raw(owner, tag, vr, number.tobytes() * int(rng.integers(1, 3)))
    else:
        value = JUNK[rng.integers(len(JUNK))]
        _raw(owner, tag, vr, value + b" " * (len(value) % 2))
    return True


def _nudge(owner: Dataset, tag: BaseTag, rng: Rng) -> bool:
    """Change one number a little or much, negate it, or swap it with its neighbour."""
    if _vr(owner, tag) not in ("DS", "IS"):
        return False
    values = [float(value) for value in np.atleast_1d(np.array(owner[tag].value, dtype=object)) if value is not None]
    if not values:
        return False
    at = int(rng.integers(len(values)))
    kinds: tuple[Callable[[], float], ...] = (
        lambda: values[at] * (1 + 10.0 ** rng.integers(-7, 1)),
        lambda: values[at] + 10.0 ** rng.integers(-5, 3),
        lambda: -values[at],
        lambda: values[at - 1],
        lambda: float(rng.normal()),
    )
    values[at] = kinds[rng.integers(len(kinds))]()
    text = "\\".join(f"{value:.10g}"[:16] for value in values).encode()
    _raw(owner, tag, _vr(owner, tag), text + b" " * (len(text) % 2))
    return True


def _other_vr(owner: Dataset, tag: BaseTag, rng: Rng) -> bool:
    raw = owner.get_item(tag)
    value = raw.value if isinstance(raw.value, bytes) else JUNK[rng.integers(len(JUNK))]
    if len(value) > 1000:
        return False
    _raw(owner, tag, VRS[rng.integers(len(VRS))], value + b" " * (len(value) % 2))
    return True


def _wrap(owner: Dataset, tag: BaseTag, rng: Rng) -> bool:
    """Move an element into a private sequence, some levels deep."""
    inner = Dataset()
    inner[tag] = owner[tag]
    del owner[tag]
    for _ in range(int(rng.integers(0, 4))):
        outer = Dataset()
        outer.private_block(0x0019, "WRAP", create=True).add_new(1, "SQ", [inner])
        inner = outer
    owner.private_block(0x0021, "WRAP", create=True).add_new(1, "SQ", [inner])
    return True


def _decoy(owner: Dataset, tag: BaseTag, rng: Rng) -> bool:
    """Add geometry where it says nothing about this image, and private noise; nothing of the image is hit."""
    other = Dataset()
    other.ImagePositionPatient, other.ImageOrientationPatient = [1, 2, 3], [0, 1, 0, 0, 0, 1]
    other.PixelSpacing, other.Rows, other.Columns, other.NumberOfFrames = [9, 9], 5, 5, 3
    owner.ReferencedImageSequence = [other]
    block = owner.private_block(0x0029, "NOISE", create=True)
    block.add_new(int(rng.integers(1, 200)), "UN", rng.bytes(int(rng.integers(0, 40)) * 2))
    return False


def _charset(owner: Dataset, tag: BaseTag, rng: Rng) -> bool:
    value = CHARSETS[rng.integers(len(CHARSETS))]
    _raw(owner, BaseTag(0x00080005), "CS", value + b" " * (len(value) % 2))
    _raw(owner, BaseTag(0x00100010), "PN", b"\x1b$B\xff\xfe\x1b(B^=^=" + bytes(rng.integers(0, 256, 5).tolist()) + b" ")
    return False


def _items(owner: Dataset, tag: BaseTag, rng: Rng) -> bool:
    """Delete, repeat or swap items of a sequence."""
    if _vr(owner, tag) != "SQ" or not owner[tag].value:
        return False
    items = list(owner[tag].value)
    first, second = (int(n) for n in rng.integers(0, len(items), 2))
    kind = int(rng.integers(4))
    if kind == 0:
        del items[first]
    elif kind == 1:
        items.insert(second, items[first])
    elif kind == 2:
        items[first], items[second] = items[second], items[first]
    else:
        items = items[:1] * int(rng.integers(0, 3))
    owner[tag] = DataElement(tag, "SQ", items)
    return not (kind == 2 and first == second)


Operation = Callable[[Dataset, BaseTag, Rng], bool]
OPERATIONS: dict[str, Operation] = {
    "delete": _delete,
    "junk": _junk,
    "nudge": _nudge,
    "other VR": _other_vr,
    "wrap": _wrap,
    "decoy": _decoy,
    "charset": _charset,
    "items": _items,
}
"""What can happen to one element; each says whether the element itself was hit."""


def rewrite(raw: bytes, change: Callable[[Dataset], frozenset[str]]) -> tuple[bytes, frozenset[str]] | None:
    """Parse a file, change its data set and write it again; None where pydicom cannot write what came out."""
    dataset = pydicom.dcmread(BytesIO(raw), force=True)
    target = BytesIO()
    try:
        hit = change(dataset)
        dataset.save_as(target)
    except PARSE_ERRORS:
        return None
    return target.getvalue(), hit


def mutate_bytes(raw: bytes, rng: Rng, *, header: int, other: bytes) -> bytes:
    """Damage a file as bytes.

    Parameters
    ----------
    header : length of what comes before the pixels; only bytes there are flipped, so that pixels stay what they are.
    other : another file, for splices.
    """
    at = int(rng.integers(128, max(header, 130)))
    few = int(rng.integers(1, 9))
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: raw[: len(raw) * int(rng.integers(0, 16)) // 16],
        lambda: raw[: int(rng.integers(0, len(raw)))],
        lambda: raw[:at] + bytes([raw[at] ^ (1 << int(rng.integers(8)))]) + raw[at + 1 :],
        lambda: raw[:at] + rng.bytes(few) + raw[at + few :],
        lambda: raw[:at] + rng.bytes(few) + raw[at:],
        lambda: raw[:at] + raw[at + few :],
        lambda: raw[:at] + b"\0" * few + raw[at + few :],
        lambda: raw[:at] + other[int(rng.integers(128, len(other))) :],
        lambda: raw[:at] + other[at:],
        lambda: _another_length(raw, rng, header),
    )
    return kinds[rng.integers(len(kinds))]()


def _another_length(raw: bytes, rng: Rng, header: int) -> bytes:
    """Change the stated length of one element, also to "undefined"."""
    starts = [at for vr in (b"SQ", b"DS", b"UI", b"OW", b"OB", b"UN", b"US", b"LO") for at in _all(raw[:header], vr)]
    if not starts:
        return raw
    at = starts[rng.integers(len(starts))]
    wide = raw[at : at + 2] in (b"SQ", b"OW", b"OB", b"UN")
    place, size = (at + 4, 4) if wide else (at + 2, 2)
    lengths = (b"\xff" * size, b"\0" * size, rng.bytes(size), b"\xfe" * size, b"\x01" + b"\0" * (size - 1))
    return raw[:place] + lengths[rng.integers(len(lengths))] + raw[place + size :]


def _all(raw: bytes, word: bytes) -> Iterator[int]:
    at = raw.find(word, 132)
    while at >= 0:
        yield at
        at = raw.find(word, at + 1)
