"""Open one DICOM file within a budget of memory: small files exist that pydicom blows up to gigabytes.

Two kinds are known. A deflated data set shrinks up to a thousandfold and is unpacked as a whole before its first
element is seen; and an empty item of a sequence takes 8 bytes on disk and about a hundred times that as an object.
"""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import FileDataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medseg.readers.dicom_refusals import refuse

HEADER_BYTES = 64 * 2**20
"""More than any header of an image needs."""
MOST_INFLATED = 2**30
"""Larger deflated files (whole multi-frame objects) are not read."""
MAX_ITEMS = 2_000_000
"""Most items of sequences: 100 000 frames with 20 functional groups each."""
_ITEM = b"\xfe\xff\x00\xe0"
_PIECE = 1 << 16


def open_dataset(path: Path, *, pixel_bytes: int = MOST_INFLATED, **how: Any) -> FileDataset:
    """Parse a file like `pydicom.dcmread(path, force=True, **how)`, after `check_budget`.

    Raises
    ------
    ReadError : OVERSIZED.
    PARSE_ERRORS : the file is damaged.
    """
    check_budget(path, pixel_bytes)
    return pydicom.dcmread(path, force=True, **how)


def check_budget(path: Path, pixel_bytes: int = MOST_INFLATED) -> None:
    """Refuse a deflated file that holds far more than `pixel_bytes`, and any file with more than MAX_ITEMS items.

    Inflated in pieces of which each is thrown away: 64 MiB at most are held. Other files cost one look at their file
    meta information, and those that are large enough for so many items a search for them.

    Raises
    ------
    ReadError : OVERSIZED.
    zlib.error and other PARSE_ERRORS : the file is damaged.
    """
    start = _deflated_from(path)
    if start is not None:
        _check_inflated(path, start, pixel_bytes + HEADER_BYTES)
    elif path.stat().st_size > 2 * len(_ITEM) * MAX_ITEMS:
        with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            found = at = 0
            while found <= MAX_ITEMS and (at := raw.find(_ITEM, at)) >= 0:
                found, at = found + 1, at + len(_ITEM)
            _check_items(found)


def _deflated_from(path: Path) -> int | None:
    """Return where the deflated data set begins, as pydicom finds it, also without preamble; None: not deflated."""
    with open(path, "rb") as handle:
        if handle.read(2) == b"\x08\x00":
            return None
        handle.seek(0)
        read_preamble(handle, force=True)
        meta = read_dataset(handle, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        deflated = meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian
        return handle.tell() if deflated else None


def _check_inflated(path: Path, start: int, allowed: int) -> None:
    size = items = 0
    tail = b""
    with open(path, "rb") as handle:
        handle.seek(start)
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        while packed := handle.read(_PIECE):
            piece = tail + stream.decompress(packed)
            size += len(piece) - len(tail)
            items += piece.count(_ITEM)
            tail = piece[1 - len(_ITEM) :]
            _check_items(items)
            if size > allowed:
                raise refuse("OVERSIZED", f"a deflated file holds more than {allowed / 2**20:.0f} MiB")


def _check_items(items: int) -> None:
    if items > MAX_ITEMS:
        raise refuse("OVERSIZED", f"a file holds more than {MAX_ITEMS} items of sequences")
