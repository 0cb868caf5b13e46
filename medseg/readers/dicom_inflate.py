"""How large a deflated DICOM file becomes, measured before pydicom unpacks it as a whole."""

from __future__ import annotations

import zlib
from pathlib import Path

from pydicom.filereader import _read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medseg.readers.dicom_refusals import refuse

HEADER_BYTES = 64 * 2**20
"""More than any header of an image needs."""
_PIECE = 1 << 16


def check_inflated(path: Path, pixel_bytes: int) -> None:
    """Refuse a deflated file that holds far more than the pixels that it declares; other files are not looked at.

    A megabyte may inflate to a gigabyte. Inflated in pieces of which each is thrown away: 64 MiB at most are held.

    Raises
    ------
    ReadError : OVERSIZED.
    zlib.error and other PARSE_ERRORS : the file is damaged.
    """
    with open(path, "rb") as handle:
        head = handle.read(4096)
        if head[128:132] != b"DICM" or DeflatedExplicitVRLittleEndian.encode() not in head:
            return
        handle.seek(132)
        if _read_file_meta_info(handle).get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        stream, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while piece := handle.read(_PIECE):
            size += len(stream.decompress(piece))
            if size > pixel_bytes + HEADER_BYTES:
                raise refuse(
                    "OVERSIZED",
                    f"a deflated file holds more than {(pixel_bytes + HEADER_BYTES) / 2**20:.0f} MiB, its pixels are "
                    f"{pixel_bytes / 2**20:.1f} MiB",
                )
