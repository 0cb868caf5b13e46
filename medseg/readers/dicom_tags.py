"""A few attributes of an ordinary DICOM file, some times faster than a parser that keeps all of them.

The walk steps from element to element (PS3.5 section 7.1), skips by length what nobody asked for, and reads no further
than the pixels. It knows the little-endian syntaxes as the standard writes them; at the first oddity (tags out of
order, an unknown VR, text that is not ASCII, numbers that are none, a header that ends early) it gives up, and pydicom
reads the file instead. So it never has an opinion of its own, which tests against pydicom hold it to.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pydicom import uid
from pydicom.datadict import dictionary_VR, tag_for_keyword

CHUNKS = (1 << 14, 1 << 18, 1 << 22)
"""How much of a file is read, and how much more if its header is longer; headers above the last are pydicom's."""
MAX_DEPTH = 20
UNDEFINED = 0xFFFFFFFF
PIXELS = {(0x7FE0, 0x0008), (0x7FE0, 0x0009), (0x7FE0, 0x0010)}
"""Where a header ends."""
META = {0x00020002: ("MediaStorageSOPClassUID", "UI"), 0x00020010: ("TransferSyntaxUID", "UI")}

_SHORT = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_TEXT = {"AE", "AS", "CS", "DA", "DT", "LO", "SH", "TM", "UI"}
_FRACTION, _WHOLE = r" *[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)? *", r" *[+-]?\d+ *"
_NUMBERS = {vr: re.compile(rf"{one}(\\{one})*") for vr, one in {"DS": _FRACTION, "IS": _WHOLE}.items()}
_BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_PRINTABLE = re.compile(rb"[ -~]*")
_TAG, _LENGTH = struct.Struct("<HH"), struct.Struct("<I")
_EXPLICIT, _IMPLICIT = struct.Struct("<HH2sH"), struct.Struct("<HHI")
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNUSUAL = {uid.ExplicitVRBigEndian}

Value = object


class Odd(Exception):  # noqa: N818 - no error: the file is pydicom's to read
    """The file is not as plain as this walk needs."""


class Cut(Odd):
    """The bytes end before the header does."""


class Number:
    """A number as text, which both `float` and `str` take; pydicom's own types do the same, slower."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __float__(self) -> float:
        return float(self.text)


@dataclass
class Tags:
    """Attributes by keyword, with as much of pydicom's Dataset as is needed to read them."""

    values: dict[str, Value] = field(default_factory=dict)
    meta: dict[str, Value] = field(default_factory=dict)

    @property
    def file_meta(self) -> dict[str, Value]:
        """The attributes of the file meta information."""
        return self.meta

    def get(self, keyword: str) -> Value:
        """Return a value: text, a Number, a list of them; "" for an empty one, None for one that is not there."""
        return self.values.get(keyword)

    def __contains__(self, keyword: str) -> bool:
        return keyword in self.values


def wanted_tags(keywords: Iterable[str]) -> dict[int, tuple[str, str]]:
    """Return tag -> (keyword, VR of the dictionary), for `read_tags`."""
    tags = ((tag_for_keyword(word), word) for word in keywords)
    return {tag: (word, dictionary_VR(tag)) for tag, word in tags if tag is not None}


def read_tags(handle: IO[bytes], head: bytes, wanted: dict[int, tuple[str, str]]) -> Tags | None:
    """Return the wanted attributes of a file that begins with a preamble and "DICM"; None if pydicom must read it.

    Parameters
    ----------
    handle : of the file, after `head`.
    head : its first bytes, at least the 132 before the first element; all, if it is shorter.
    """
    tags = Tags()
    try:
        _read(handle, head, wanted, tags)
    except (Odd, zlib.error):
        return None
    return tags


def told_by(path: Path, wanted: dict[int, tuple[str, str]]) -> tuple[Tags, bool]:
    """Return what a damaged file says before its damage, and whether it was merely cut short.

    A file that is cut short is as it was up to its end; in any other damaged file no value is certain.

    Raises
    ------
    OSError : the file cannot be read at all.
    """
    tags, cut = Tags(), False
    with open(path, "rb", buffering=0) as handle:
        head = handle.read(CHUNKS[0])
        if head[128:132] == b"DICM":
            try:
                _read(handle, head, wanted, tags)
            except Cut:
                cut = True
            except (Odd, zlib.error):
                pass
    return tags, cut


def _read(handle: IO[bytes], head: bytes, wanted: dict[int, tuple[str, str]], tags: Tags) -> None:
    """Fill `tags`, reading as much of the file as its header needs."""
    data = head
    for size in CHUNKS:
        more = handle.read(size - len(data)) if len(data) < size else b""
        data += more
        whole = len(data) < size  # the end of the file
        try:
            _parse(data, wanted, tags)
            return
        except Cut:
            if whole:
                raise
            tags.values.clear()
            tags.meta.clear()
    raise Odd


def _parse(data: bytes, wanted: dict[int, tuple[str, str]], tags: Tags) -> None:
    at = _walk(data, 132, META, tags.meta, explicit=True, last_group=2)
    syntax = uid.UID(str(tags.meta.get("TransferSyntaxUID", "")))
    if not syntax.is_transfer_syntax or syntax.is_private or syntax in _UNUSUAL:
        raise Odd
    if syntax.is_deflated:
        data, at = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[at:], CHUNKS[-1]), 0
    explicit = not syntax.is_implicit_VR
    if not explicit and data[at + 4 : at + 6].isalpha():
        raise Odd
    at = _walk(data, at, wanted, tags.values, explicit=explicit)
    if _TAG.unpack_from(data, at) not in PIXELS:
        raise Odd


def _walk(
    data: bytes,
    at: int,
    wanted: dict[int, tuple[str, str]],
    found: dict[str, Value],
    *,
    explicit: bool,
    last_group: int = 0x7FDF,
) -> int:
    """Collect the wanted elements up to those of groups above `last_group`; return where these begin."""
    size, before = len(data), -1
    unpack, short = _EXPLICIT.unpack_from, _SHORT if explicit else frozenset()
    while True:
        if at + 8 > size:
            raise Cut
        group, element, vr, length = unpack(data, at)
        if group > last_group:
            return at
        if vr in short:  # most are: this loop takes half of the time of a scan
            tag = group << 16 | element
            at += 8
        else:
            tag, vr, length, at = _element(data, at, explicit=explicit)
        if tag <= before:
            raise Odd
        before = tag
        if length == UNDEFINED:
            if tag in wanted or vr not in (b"SQ", b""):
                raise Odd
            at = _after_items(data, at, explicit=explicit, depth=1)
            continue
        start, at = at, at + length
        if at > size:
            raise Cut
        if tag in wanted:
            word, usual = wanted[tag]
            found[word] = _value(data[start:at], vr.decode("ascii") or usual)


def _element(data: bytes, at: int, *, explicit: bool) -> tuple[int, bytes, int, int]:
    """Return tag, VR (empty where it is implicit), length and where the value begins."""
    if not explicit:
        group, element, length = _IMPLICIT.unpack_from(data, at)
        return group << 16 | element, b"", length, at + 8
    group, element, vr, length = _EXPLICIT.unpack_from(data, at)
    if vr in _SHORT:
        return group << 16 | element, vr, length, at + 8
    if group == 0xFFFE:  # items and their ends have no VR
        return group << 16 | element, b"", _LENGTH.unpack_from(data, at + 4)[0], at + 8
    if vr not in _LONG:
        raise Odd
    if at + 12 > len(data):
        raise Cut
    return group << 16 | element, vr, _LENGTH.unpack_from(data, at + 8)[0], at + 12


def _after_items(data: bytes, at: int, *, explicit: bool, depth: int) -> int:
    """Return where a sequence of undefined length ends."""
    while True:
        if at + 8 > len(data):
            raise Cut
        tag, _, length, at = _element(data, at, explicit=explicit)
        if tag == _SEQUENCE_END:
            return at
        if tag != _ITEM or depth > MAX_DEPTH:
            raise Odd
        at = _after_item(data, at, explicit=explicit, depth=depth) if length == UNDEFINED else at + length


def _after_item(data: bytes, at: int, *, explicit: bool, depth: int) -> int:
    """Return where an item of undefined length ends."""
    while True:
        if at + 8 > len(data):
            raise Cut
        tag, vr, length, at = _element(data, at, explicit=explicit)
        if tag == _ITEM_END:
            return at
        if tag >> 16 == _ITEM >> 16:
            raise Odd
        if length != UNDEFINED:
            at += length
        elif vr in (b"SQ", b""):
            at = _after_items(data, at, explicit=explicit, depth=depth + 1)
        else:
            raise Odd


def _value(raw: bytes, vr: str) -> Value:
    """Return a value as pydicom would, as far as `float` and `str` tell."""
    if vr in _BINARY:
        code = _BINARY[vr]
        count, left = divmod(len(raw), struct.calcsize(code))
        if left:
            raise Odd
        numbers = struct.unpack(f"<{count}{code}", raw)
        return "" if not numbers else numbers[0] if len(numbers) == 1 else list(numbers)
    raw = raw.rstrip(b"\0 ")
    if not (vr in _TEXT or vr in _NUMBERS) or _PRINTABLE.fullmatch(raw) is None:
        raise Odd
    text = raw.decode("ascii")
    if vr in _NUMBERS and text:
        if _NUMBERS[vr].fullmatch(text) is None:
            raise Odd
        return [Number(part.strip()) for part in text.split("\\")] if "\\" in text else Number(text.strip())
    return text.split("\\") if "\\" in text else text
