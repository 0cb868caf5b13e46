"""What a compressed picture says of itself before it is decoded: size, bits, sign, whether its data are complete.

Nothing here decodes. The header of the DICOM object is compared with these facts first, so that a small file can make
no decoder allocate more than the object declares. JPEG: ITU-T T.81 Annex B; JPEG-LS: T.87 Annex C; JPEG 2000 and
HTJ2K: T.800 Annex A.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

LOSSLESS_JPEG, JPEG_LS = 0xC3, 0xF7
J2K_START = b"\xff\x4f\xff\x51"
_SOF = frozenset({*range(0xC0, 0xD0), JPEG_LS} - {0xC4, 0xC8, 0xCC})
_SOS, _EOI, _ALONE = 0xDA, 0xD9, frozenset({0x01, *range(0xD0, 0xD9)})
_SOT, _COD, _TILE_PART = 0xFF90, 0xFF52, 12


@dataclass(frozen=True)
class Codestream:
    """One compressed picture.

    Attributes
    ----------
    kind : marker of its frame header: 0xC0 to 0xCF JPEG, 0xF7 JPEG-LS; 0 for JPEG 2000.
    bits : precision of a sample.
    signed : whether samples are signed; only JPEG 2000 can say so.
    exact : False when it says that it was compressed with loss.
    """

    kind: int
    rows: int
    columns: int
    samples: int
    bits: int
    signed: bool
    exact: bool


def jpeg_codestream(stream: bytes) -> Codestream:
    """Read the frame and scan headers of a JPEG or JPEG-LS picture.

    Raises
    ------
    EOFError : it has no end: the picture is cut short.
    ValueError, struct.error : it is no such picture.
    """
    frame: tuple[int, ...] | None = None
    for marker, at, end in _segments(stream):
        if marker in _SOF:
            if frame is not None:
                raise ValueError("a second frame header")
            frame = (marker, *struct.unpack_from(">BHHB", stream, at))
        elif marker == _SOS:
            if frame is None:
                raise ValueError("a scan before the frame header")
            # after the components: near-lossless error (JPEG-LS) or start, end and point transform
            near, _, transform = struct.unpack_from(">BBB", stream, at + 1 + 2 * stream[at])
            if stream.find(b"\xff\xd9", end) < 0:
                raise EOFError("the compressed picture has no end")
            kind, bits, rows, columns, samples = frame
            loss = {LOSSLESS_JPEG: transform & 15, JPEG_LS: near}.get(kind, 1)
            return Codestream(kind, rows, columns, samples, bits, signed=False, exact=loss == 0)
    raise EOFError("the compressed picture ends in its header")


def _segments(stream: bytes) -> Iterator[tuple[int, int, int]]:
    """Walk the marker segments up to the first scan: (marker, first byte of its content, first byte after it)."""
    if stream[:2] != b"\xff\xd8":
        raise ValueError("no start of image")
    at = 2
    while at + 4 <= len(stream):
        if stream[at] != 0xFF:
            raise ValueError("a marker is expected")
        marker = stream[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _ALONE:
            at += 2
        elif marker == _EOI:
            raise ValueError("an image without a scan")
        else:
            (length,) = struct.unpack_from(">H", stream, at + 2)
            yield marker, at + 4, at + 2 + length
            at += 2 + max(2, length)


def j2k_codestream(stream: bytes) -> Codestream:
    """Read the main header of a JPEG 2000 codestream, in DICOM or (against the standard) inside a JP2 file.

    Raises
    ------
    EOFError : a tile-part is longer than what is there: the picture is cut short.
    ValueError, struct.error : it is no such picture.
    """
    start = stream.find(J2K_START)
    if start < 0:
        raise ValueError("no JPEG 2000 codestream")
    x1, y1, x0, y0, *_, samples = struct.unpack_from(">8IH", stream, start + 8)
    depth, *steps = struct.unpack_from(">3B", stream, start + 42)
    if steps != [1, 1]:
        raise ValueError("a subsampled component")
    at, exact = start + 2, False
    while (marker := struct.unpack_from(">H", stream, at)[0]) != _SOT:
        if marker == _COD:
            exact = stream[at + 13] == 1  # the reversible 5/3 wavelet
        (length,) = struct.unpack_from(">H", stream, at + 2)
        at += 2 + max(2, length)
    _check_tile_parts(stream, at)
    return Codestream(0, y1 - y0, x1 - x0, samples, (depth & 0x7F) + 1, signed=depth > 0x7F, exact=exact)


def _check_tile_parts(stream: bytes, at: int) -> None:
    """Walk the tile-parts by their lengths; the last may say 0 and reach to the end marker."""
    while stream[at : at + 2] == b"\xff\x90":
        length = struct.unpack_from(">I", stream, at + 6)[0] if at + _TILE_PART <= len(stream) else len(stream)
        if length == 0:
            length = stream.rfind(b"\xff\xd9") - at
        if length < _TILE_PART or at + length > len(stream):
            raise EOFError("the compressed picture ends inside a tile")
        at += length
