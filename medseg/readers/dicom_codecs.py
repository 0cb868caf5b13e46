"""CODECS: one decoder for each compressed transfer syntax, none of them under the GPL; what they give is checked.

pydicom takes whichever plugin is installed, pylibjpeg-libjpeg (GPL) among them, and goes on to the next when one
fails. Here each syntax has one decoder, called directly, so that the same file gives the same values everywhere.
Licences: GDCM BSD in python-gdcm Apache-2.0, pyjpegls MIT (CharLS BSD), pylibjpeg-openjpeg MIT (OpenJPEG BSD).
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid

from medseg.readers.dicom_codestream import (
    J2K_START,
    JPEG_LS,
    LOSSLESS_JPEG,
    Codestream,
    j2k_codestream,
    jpeg_codestream,
)
from medseg.readers.dicom_refusals import refuse

Array = NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """What a DICOM header declares about the numbers of one grey picture (PS3.3 C.7.6.3.1, PS3.5 8.1.1).

    Attributes
    ----------
    allocated, stored : bits that a number takes up, and that it uses.
    shift : bits below the used ones (HighBit + 1 - BitsStored), almost always 0.
    """

    rows: int
    columns: int
    allocated: int
    stored: int
    shift: int
    signed: bool

    @property
    def pixels(self) -> int:
        """How many numbers there are."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Codec:
    """How one family of transfer syntaxes is decoded.

    Attributes
    ----------
    module, package : what is imported, and what is installed for it.
    plugin : pydicom's name for it, for colour pictures.
    header : reads what a picture says of itself.
    kinds : frame markers that belong to the syntax.
    bits : numbers of bits that the syntax allows.
    decode : (picture, its header, its syntax) -> its numbers, little endian in whole bytes.
    """

    module: str
    package: str
    plugin: str
    header: Callable[[bytes], Codestream]
    kinds: frozenset[int]
    bits: Collection[int]
    decode: Callable[[bytes, Codestream, str], bytes]


def _gdcm(stream: bytes, picture: Codestream, syntax: str) -> bytes:
    import gdcm

    for silence in (gdcm.Trace.DebugOff, gdcm.Trace.WarningOff, gdcm.Trace.ErrorOff):
        silence()
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(stream)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((picture.columns, picture.rows, 1))
    image.SetDataElement(element)
    grey = gdcm.PhotometricInterpretation.GetPIType("MONOCHROME2")
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(grey))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    # its libjpeg is built three times, for 8, 12 and 16 bits, and is chosen by the bits allocated
    size = next(bits for bits in (8, 12, 16) if picture.bits <= bits)
    used = picture.bits if size > 8 else 8  # it ends the process when fewer than 8 of 8 bits are used
    image.SetPixelFormat(gdcm.PixelFormat(1, size, used, used - 1, 0))
    found = image.GetBuffer()
    if found is None:
        raise ValueError("GDCM cannot decode it")
    return bytes(found.encode("utf-8", "surrogateescape"))


def _charls(stream: bytes, picture: Codestream, syntax: str) -> bytes:
    import jpeg_ls

    return bytes(jpeg_ls.decode_pixel_data(stream)[0])


def _openjpeg(stream: bytes, picture: Codestream, syntax: str) -> bytes:
    from openjpeg.utils import decode as decode_j2k

    # a JP2 file around the codestream is cut off: colour tables and channel definitions have no say here
    return bytes(decode_j2k(stream[stream.find(J2K_START) :], j2k_format=0, reshape=False).tobytes())


_JPEG = Codec("gdcm", "python-gdcm", "gdcm", jpeg_codestream, frozenset({0xC0, 0xC1, 0xC2}), (8, 12), _gdcm)
_JPEG_LOSSLESS = Codec("gdcm", "python-gdcm", "gdcm", jpeg_codestream, frozenset({LOSSLESS_JPEG}), range(2, 17), _gdcm)
_JPEG_LS = Codec("jpeg_ls", "pyjpegls", "pyjpegls", jpeg_codestream, frozenset({JPEG_LS}), range(2, 17), _charls)
_JPEG_2000 = Codec(
    "openjpeg", "pylibjpeg-openjpeg", "pylibjpeg", j2k_codestream, frozenset({0}), range(1, 33), _openjpeg
)

CODECS: dict[str, Codec] = {
    uid.JPEGBaseline8Bit: _JPEG,
    uid.JPEGExtended12Bit: _JPEG,
    uid.JPEGLossless: _JPEG_LOSSLESS,
    uid.JPEGLosslessSV1: _JPEG_LOSSLESS,
    uid.JPEGLSLossless: _JPEG_LS,
    uid.JPEGLSNearLossless: _JPEG_LS,
    uid.JPEG2000Lossless: _JPEG_2000,
    uid.JPEG2000: _JPEG_2000,
    uid.HTJ2KLossless: _JPEG_2000,
    uid.HTJ2KLosslessRPCL: _JPEG_2000,
    uid.HTJ2K: _JPEG_2000,
}
"""Transfer syntax -> decoder; RLE and the uncompressed ones need none."""


def codec_for(syntax: str) -> Codec:
    """Return the decoder of a compressed syntax; raise ReadError(NO_DECODER) where there is none."""
    codec = CODECS.get(syntax)
    if codec is None or importlib.util.find_spec(codec.module) is None:
        raise refuse("NO_DECODER", f"no decoder for {uid.UID(syntax).name} is installed")
    return codec


def check_picture(stream: bytes, syntax: str, layout: Layout, who: str, *, samples: int = 1) -> Codestream:
    """Compare what a compressed picture says of itself with what is declared, before anything decodes it.

    Raises
    ------
    ReadError : NO_DECODER, LENGTH_MISMATCH, CODESTREAM_MISMATCH.
    EOFError, ValueError, struct.error : its header is damaged.
    """
    codec = codec_for(syntax)
    picture = codec.header(stream)
    if (picture.rows, picture.columns) != (layout.rows, layout.columns):
        raise refuse(
            "LENGTH_MISMATCH",
            f"the compressed picture of {who} is {picture.columns}x{picture.rows}, "
            f"declared are {layout.columns}x{layout.rows}",
        )
    # GDCM writes 12-bit JPEG as 16-bit pictures that no process allows, with every number 32768 too high
    fits = picture.bits in codec.bits and picture.bits <= layout.allocated
    if picture.samples != samples or picture.kind not in codec.kinds or not fits:
        raise refuse(
            "CODESTREAM_MISMATCH",
            f"the compressed picture of {who} has {picture.samples} samples of {picture.bits} bits (kind "
            f"{picture.kind:#x}), declared are {samples} of {layout.stored} as {uid.UID(syntax).name}",
        )
    return picture


def decode(stream: bytes, syntax: str, layout: Layout, who: str) -> tuple[Array, bool]:
    """Decode one compressed grey picture.

    Parameters
    ----------
    stream : all fragments of the frame.
    who : the slice in words, for messages.

    Returns
    -------
    values : (rows, columns), whole numbers with their sign, as PixelRepresentation and BitsStored declare them.
    exact : False when the picture says that it was compressed with loss.

    Raises
    ------
    ReadError : NO_DECODER, LENGTH_MISMATCH (another size), CODESTREAM_MISMATCH (another kind, sign or number of bits).
    EOFError, ValueError, struct.error, RuntimeError : the picture is cut short or damaged.
    """
    codec = codec_for(syntax)
    picture = check_picture(stream, syntax, layout, who)
    size = next(bytes_ for bytes_ in (1, 2, 4) if picture.bits <= 8 * bytes_)
    data = codec.decode(stream, picture, syntax)
    if len(data) != size * layout.pixels:
        raise refuse("LENGTH_MISMATCH", f"the picture of {who} decodes to {len(data)} bytes")
    values = np.frombuffer(data, f"<{'i' if picture.signed else 'u'}{size}").reshape(layout.rows, layout.columns)
    return _with_sign(values, picture, layout, who), picture.exact


def _with_sign(values: Array, picture: Codestream, layout: Layout, who: str) -> Array:
    """Bring decoded numbers to the sign that the header declares, or refuse where two readings are possible.

    Encoders write signed numbers as such (JPEG 2000 only), as their bits below BitsStored, or with the sign extended
    to the bits of the codestream; all three are met.
    """
    low, high = int(values.min()), int(values.max())
    limit = 1 << layout.stored
    if layout.shift:
        doubt = "its bits are not the lowest ones"
    elif picture.signed or not layout.signed:
        # numbers below zero where none are declared, or bits that are declared unused; loss may overshoot a little
        most = limit if picture.exact else limit + limit // 8
        doubt = "its numbers do not fit the declared bits" if (low < 0 and not layout.signed) or high >= most else ""
    elif high < min(limit, 1 << picture.bits) // 2:
        return values
    elif picture.bits < layout.stored:
        doubt = "it has fewer bits than declared, and one of them may be the sign"
    else:
        stretched = _extend(values, layout.stored)
        whole = np.bitwise_and(stretched, (1 << picture.bits) - 1)
        if high < limit or np.array_equal(whole, values):
            return stretched
        doubt = "its numbers do not fit the declared bits"
    if doubt:
        raise refuse(
            "CODESTREAM_MISMATCH",
            f"the compressed picture of {who} has {picture.bits} bits{' with sign' * picture.signed}, declared are "
            f"{layout.stored}{' with sign' * layout.signed}: {doubt}",
        )
    return values


def _extend(values: Array, bits: int) -> Array:
    """Take the lowest `bits` of unsigned numbers as signed ones."""
    low = np.bitwise_and(values.astype(np.int64), (1 << bits) - 1)
    return np.asarray(low - ((low >> (bits - 1)) << bits))


def own_bits(array: Array, layout: Layout) -> Array:
    """Keep the BitsStored bits below HighBit (others may hold overlays) and extend the sign."""
    if layout.stored == layout.allocated:
        return array
    size = array.dtype.itemsize
    raw = array.view(np.dtype(f"u{size}").newbyteorder(array.dtype.byteorder)).astype(f"u{size}", copy=False)
    if layout.signed:  # to the top, and back with copies of the sign
        top = raw << (layout.allocated - layout.stored - layout.shift)
        return np.asarray(top.view(f"i{size}") >> (layout.allocated - layout.stored))
    return np.asarray((raw >> layout.shift) & ((1 << layout.stored) - 1))


def decode_rle(stream: bytes, layout: Layout) -> bytes:
    """Decode one grey RLE picture to little-endian bytes (PS3.5 Annex G).

    Each byte of a number has its own segment, the highest first. A segment that gives more than one byte a pixel is
    cut off there, so that the memory is bounded by the declared size.

    Raises
    ------
    EOFError : a segment gives too few bytes.
    ValueError, struct.error : the header of the picture is damaged.
    """
    count, *offsets = struct.unpack_from("<16I", stream)
    size = layout.allocated // 8
    if count != size:
        raise ValueError(f"{count} segments where {size} are needed")
    ends = [*offsets[1:count], len(stream)]
    planes = np.empty((layout.pixels, size), np.uint8)
    for number, (start, end) in enumerate(zip(offsets[:count], ends, strict=True)):
        planes[:, size - 1 - number] = np.frombuffer(_unpack(stream[start:end], layout.pixels), np.uint8)
    return planes.tobytes()


def _unpack(segment: bytes, wanted: int) -> bytes:
    """Undo PackBits until `wanted` bytes are there."""
    found = bytearray()
    at = 0
    while len(found) < wanted:
        if at + 1 >= len(segment):
            raise EOFError("an RLE segment is cut short")
        head = segment[at]
        if head < 128:
            found += segment[at + 1 : at + 2 + head]
            at += 2 + head
        elif head > 128:
            found += segment[at + 1 : at + 2] * (257 - head)
            at += 2
        else:
            at += 1
    return bytes(found[:wanted])
