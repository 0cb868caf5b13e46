"""What a picture file says of itself, read before a pixel is decoded or memory for one is asked for.

Sources: PNG (ISO/IEC 15948) chunks, TIFF 6.0 and BigTIFF directories, JPEG by Pillow's header parser. A decoder is
trusted with the pixels only after the facts are known, because decoders answer what they cannot represent in silence:
Pillow drops the lower half of 16-bit colour and swaps the bytes of compressed big-endian TIFF of 32 bits.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from medseg.errors import ReadError

MAX_PAGES = 100_000
_ORIENTATION = 274
_KINDS = {1: "u", 2: "i", 3: "f"}
"""By TIFF's SampleFormat."""
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_TIFF = (b"II\x2a\x00", b"MM\x00\x2a", b"II\x2b\x00", b"MM\x00\x2b")
_PNG_COLOURS = {0: ("grey", 1), 2: ("rgb", 3), 3: ("palette", 1), 4: ("grey", 2), 6: ("rgb", 4)}
"""By PNG's colour type: what it is, and how many samples a pixel has."""
_TIFF_COLOURS = {0: "inverted", 1: "grey", 2: "rgb", 3: "palette", 6: "rgb"}
"""By TIFF's PhotometricInterpretation; 6 is YCbCr, which the decoder makes RGB."""
Format = Literal["PNG", "TIFF", "JPEG"]


@dataclass(frozen=True)
class PictureFacts:
    """Facts of a picture.

    Attributes
    ----------
    width, height : pixels as stored, before its orientation is applied.
    pages : pictures of one size in the file.
    bits, kind : of one sample: 1 to 64; unsigned, signed or float.
    samples : of one pixel, an alpha channel included.
    colours : "grey", "inverted" (0 is white), "rgb" or "palette".
    orientation : 1 to 8 (TIFF 6.0, EXIF); 1 is as stored.
    colour_key : whether one value or colour is declared transparent.
    planar : whether each sample has a plane of its own.
    """

    format: Format
    width: int
    height: int
    bits: int
    samples: int
    colours: str
    pages: int = 1
    kind: str = "u"
    orientation: int = 1
    colour_key: bool = False
    planar: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of all decoded pixels."""
        return self.width * self.height * self.pages * self.samples * max(1, self.bits // 8)


def picture_facts(path: Path) -> PictureFacts:
    """Read the header of a PNG, TIFF or JPEG file, whichever its first bytes say it is.

    Raises
    ------
    ReadError : UNREADABLE (none of the three), TRUNCATED, CORRUPT, UNSUPPORTED_TYPE, MIXED_PAGES.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            file.seek(0)
            if start == _PNG:
                return _png(path, file)
            if start.startswith(_JPEG):
                return _jpeg(path, file)
            if start.startswith(_TIFF):
                return _tiff(path, file)
    except OSError as error:
        raise ReadError(f"{path.name}: cannot be read ({error.strerror or error})") from error
    raise ReadError(f"{path.name}: its first bytes are those of no PNG, TIFF or JPEG file")


def unsupported(path: Path, what: str, advice: str) -> ReadError:
    """Return the refusal of a sound picture of a kind that is not read."""
    return ReadError(f"{path.name}: {what}; {advice}", code="UNSUPPORTED_TYPE")


def _truncated(path: Path) -> ReadError:
    return ReadError(f"{path.name}: the file ends too early; copy it again from its source", code="TRUNCATED")


def _corrupt(path: Path, what: str) -> ReadError:
    return ReadError(f"{path.name}: {what}; copy the file again from its source", code="CORRUPT")


def _png(path: Path, file: BinaryIO) -> PictureFacts:
    """Walk all chunks to the end, each against its CRC: a decoder stops caring after the last pixel."""
    facts = None
    orientation, colour_key = 1, False
    for name, content in _chunks(path, file):
        if name == b"IHDR" and facts is None and len(content) == 13:
            width, height, bits, colour = struct.unpack(">IIBB", content[:10])
            if colour not in _PNG_COLOURS or not (width and height):
                raise _corrupt(path, f"its header declares {width}×{height} pixels of colour type {colour}")
            kind, samples = _PNG_COLOURS[colour]
            facts = PictureFacts("PNG", width, height, bits, samples, kind)
        elif name == b"acTL":
            raise ReadError(
                f"{path.name}: it is an animation of several pictures; save each as a file", code="MIXED_PAGES"
            )
        elif name == b"eXIf":
            orientation = _exif_orientation(content)
        elif name == b"tRNS":
            colour_key = True
    if facts is None:
        raise _corrupt(path, "it has no valid header")
    return replace(facts, orientation=orientation, colour_key=colour_key)


def _chunks(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    file.seek(len(_PNG))
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise _truncated(path)
        length, name = struct.unpack(">I4s", head)
        content, crc = file.read(length), file.read(4)
        if len(content) < length or len(crc) < 4:
            raise _truncated(path)
        if zlib.crc32(name + content) != int.from_bytes(crc, "big"):
            raise _corrupt(path, "a checksum (CRC) does not hold")
        if name == b"IEND":
            return
        yield name, content


def _exif_orientation(content: bytes) -> int:
    """Return the orientation of an EXIF block, which is a small TIFF; 1 where it says none."""
    try:
        tags = _directory(io.BytesIO(content), 0)[0]
    except (SyntaxError, struct.error, ValueError, TypeError, Warning):
        return 1
    return _valid_orientation(tags.get(_ORIENTATION, 1))


def _valid_orientation(value: Any) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _jpeg(path: Path, file: BinaryIO) -> PictureFacts:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata that is not used
            # Not Image.open, which guesses other formats.
            picture = JpegImageFile(file)
            orientation = _valid_orientation(picture.getexif().get(_ORIENTATION, 1))
    except Exception as error:
        raise _corrupt(path, f"its JPEG header is damaged ({error})") from error
    if picture.mode not in ("L", "RGB"):
        raise unsupported(path, f"JPEG of {picture.mode} colours", "save it as RGB or grey")
    width, height = picture.size
    colours, samples = ("grey", 1) if picture.mode == "L" else ("rgb", 3)
    return PictureFacts("JPEG", width, height, 8, samples, colours, orientation=orientation)


Tags = ImageFileDirectory_v2


def _directory(file: BinaryIO, offset: int) -> tuple[Tags, int]:
    """Return the tags of a TIFF directory and the offset of the next one, 0 after the last.

    `offset` 0 is the first one, where the header says it lies.
    """
    file.seek(0)
    header = file.read(8)
    if header[2] == 43 or header[3] == 43:
        header += file.read(8)
    tags = ImageFileDirectory_v2(header)
    file.seek(offset or tags.next)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns where a directory is cut off, and goes on
        tags.load(file)
        dict(tags.items())  # decodes every value
    return tags, tags.next


def _tiff(path: Path, file: BinaryIO) -> PictureFacts:
    size = file.seek(0, io.SEEK_END)
    offset, seen = 0, set[int]()
    first: PictureFacts | None = None
    description = ""
    while offset or first is None:
        try:
            tags, following = _directory(file, offset)
        except Exception as error:
            raise _corrupt(path, f"a directory is damaged ({error})") from error
        facts = _page(path, tags, size)
        if first is None:
            first, description = facts, str(tags.get(270, ""))
        elif facts != first:
            raise ReadError(
                f"{path.name}: its pages differ in size or kind (a pyramid, a preview?); save each as a file",
                code="MIXED_PAGES",
            )
        if following in seen or len(seen) >= MAX_PAGES:
            raise _corrupt(path, "its pages form a circle or are too many")
        seen.add(following)
        offset = following
    assert first is not None
    _one_axis(path, description, len(seen))
    return replace(first, pages=len(seen))


def _page(path: Path, tags: Tags, size: int) -> PictureFacts:
    """Return the facts of one page whose pixels lie within the `size` bytes of the file."""
    width, height = tags.get(256), tags.get(257)
    bits, kinds = tags.get(258, (1,)), tags.get(339, (1,))
    samples, photometric = tags.get(277, 1), tags.get(262)
    if not (isinstance(width, int) and isinstance(height, int) and min(width, height, samples) > 0 and bits):
        raise _corrupt(path, f"it declares {width}×{height} pixels of {samples} samples")
    if len(set(bits)) > 1 or len(set(kinds)) > 1 or kinds[0] not in _KINDS or photometric not in _TIFF_COLOURS:
        what = f"TIFF of bits {bits}, sample format {kinds}, colours {photometric}"
        raise unsupported(path, what, "save it as grey or RGB with one type for all samples")
    for offsets, counts in ((273, 279), (324, 325)):
        for start, count in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False):
            if start + count > size:
                raise _truncated(path)
    return PictureFacts(
        "TIFF",
        width,
        height,
        bits[0],
        samples,
        _TIFF_COLOURS[photometric],
        kind=_KINDS[kinds[0]],
        orientation=_valid_orientation(tags.get(_ORIENTATION, 1)),
        planar=samples > 1 and tags.get(284) == 2,
    )


def _one_axis(path: Path, description: str, pages: int) -> None:
    """Refuse stacks whose pages are more than slices, as ImageJ and OME write them into the description."""
    if description.startswith("ImageJ="):
        told = dict(re.findall(r"^(channels|frames|images)=(\d+)$", description, re.MULTILINE))
        images = int(told.pop("images", pages))
    else:
        told = dict(re.findall(r'\b(SizeC|SizeT)="(\d+)"', description))
        images = pages
    several = [f"{name} {number}" for name, number in told.items() if int(number) > 1 and pages > 1]
    if several:
        raise ReadError(
            f"{path.name}: its {pages} pages are more than slices ({', '.join(several)}); save each channel and time "
            "point as a file of its own",
            code="MIXED_PAGES",
        )
    if images > pages:
        raise unsupported(
            path, f"{images} pictures behind {pages} page(s), as ImageJ stores large stacks", "save BigTIFF"
        )
