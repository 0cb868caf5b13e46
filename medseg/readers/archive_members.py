"""The members of a zip or tar archive, one after the other, with nothing taken on trust.

An archive from elsewhere may name files outside its folder, hold links and devices, or a kilobyte that unpacks to a
terabyte. Here names decide nothing but a number, only plain files are given out, and sizes are counted while bytes are
read, never believed. Damage is looked for to the very end: checksums, and a tar that simply stops.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medseg.errors import ReadError

ARCHIVE_ADVICE: dict[str, str] = {
    "ARCHIVE_DAMAGED": "copy it again from its source",
    "ARCHIVE_EMPTY": "give archives with DICOM or NIfTI images",
    "ARCHIVE_ENCRYPTED": "unpack it yourself and give the folder",
    "ARCHIVE_NESTED": "unpack the outer archive yourself and give the folder",
    "ARCHIVE_TOO_LARGE": "free space, give fewer archives at once, or unpack it yourself and give the folder",
    "ARCHIVE_UNSAFE": "ask where it comes from; if it can be trusted, unpack it yourself and give the folder",
    "ARCHIVE_UNSUPPORTED": "pack it as a plain zip or tar.gz, or unpack it yourself and give the folder",
}
"""Every reason why an archive is refused, with what a person can do."""

CHUNK = 1 << 20
LONGEST_HEADER = 1 << 24
"""Bytes of one tar header: longer ones are made to fill the memory."""
LONGEST_DIRECTORY = 1 << 26
"""Bytes of a zip's list of members, which is read at once."""
_ENCRYPTED, _STORED, _DEFLATED = 0x1, 0, 8
_PACKERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError),
    *(EOFError, OSError, ValueError, struct.error, LookupError, OverflowError),
)
"""What the standard library raises on damaged archives."""


def refuse_archive(code: str, text: str) -> ReadError:
    """Return (not raise) the error of a code of ARCHIVE_ADVICE."""
    return ReadError(f"archive refused, {code}: {text}; {ARCHIVE_ADVICE[code]}", code=code)


@dataclass(frozen=True)
class Member:
    """A plain file in an archive.

    Attributes
    ----------
    name : as the archive has it, forward slashes; checked, but still no name for a file on disk.
    chunks : call it once, before the next member, for the bytes in pieces of at most CHUNK.
    """

    name: str
    chunks: Callable[[], Iterator[bytes]]


def is_zip(head: bytes) -> bool:
    """Tell a zip by its first bytes."""
    return head[:4] in (b"PK\x03\x04", b"PK\x05\x06")


def is_tar(head: bytes) -> bool:
    """Tell an unpacked tar by its first 512 bytes."""
    return head[257:262] == b"ustar"


@contextmanager
def members(archive: Path, spend: Callable[[int], None]) -> Iterator[Iterator[Member]]:
    """Open an archive and give its plain files in their order.

    Parameters
    ----------
    spend : called with every number of bytes that is unpacked, before more is; raises to stop.

    Raises
    ------
    ReadError : a code of ARCHIVE_ADVICE, here or while the members are read. Other errors inside the `with` block that
        damaged archives cause become ARCHIVE_DAMAGED, too.
    """
    try:
        with open(archive, "rb") as raw:
            head = raw.read(512)
            raw.seek(0)
            yield _zip_members(raw, spend) if is_zip(head) else _tar_members(raw, head, spend)
    except _DAMAGE as error:
        # Without its text: the standard library quotes names of members.
        raise refuse_archive("ARCHIVE_DAMAGED", f"it cannot be read to its end ({type(error).__name__})") from error


def checked_name(name: str) -> str:
    """Return the name of a member with forward slashes.

    Raises
    ------
    ReadError : ARCHIVE_UNSAFE, the name leads out of the folder.
    """
    plain = name.replace("\\", "/")
    if "\0" in plain or plain.startswith("/") or re.match(r"[A-Za-z]:", plain) or ".." in plain.split("/"):
        raise refuse_archive("ARCHIVE_UNSAFE", "a member is named so that it would be written outside the folder")
    return plain


def _zip_members(raw: IO[bytes], spend: Callable[[int], None]) -> Iterator[Member]:
    _check_directory(raw)
    with zipfile.ZipFile(raw) as opened:
        for entry in opened.infolist():
            name = checked_name(entry.orig_filename)
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise refuse_archive("ARCHIVE_UNSAFE", "it holds a link or a device")
            if entry.is_dir() or kind == stat.S_IFDIR:
                continue
            if entry.flag_bits & _ENCRYPTED:
                raise refuse_archive("ARCHIVE_ENCRYPTED", "it is protected by a password")
            if entry.compress_type not in (_STORED, _DEFLATED):
                raise refuse_archive("ARCHIVE_UNSUPPORTED", f"zip compression {entry.compress_type} is not read")
            yield Member(name, lambda entry=entry: _zip_chunks(opened, entry, spend))  # type: ignore[misc]


def _zip_chunks(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, spend: Callable[[int], None]) -> Iterator[bytes]:
    with opened.open(entry) as content:  # its CRC is checked at its end
        while chunk := content.read(CHUNK):
            spend(len(chunk))
            yield chunk


def _check_directory(raw: IO[bytes]) -> None:
    """Refuse a zip whose list of members would fill the memory (APPNOTE 4.3.14 to 4.3.16)."""
    size = raw.seek(0, io.SEEK_END)
    raw.seek(max(0, size - (1 << 16) - 98))
    tail = raw.read()
    raw.seek(0)
    ends = [tail[at.end() :] for at in re.finditer(b"PK\x05\x06", tail)]
    long_ends = [tail[at.end() :] for at in re.finditer(b"PK\x06\x06", tail)]
    sizes = [int.from_bytes(end[8:12], "little") for end in ends]
    sizes = [size for size in sizes if size != 0xFFFFFFFF]
    sizes += [int.from_bytes(end[36:44], "little") for end in long_ends]
    if any(LONGEST_DIRECTORY < length <= size for length in sizes):
        raise refuse_archive("ARCHIVE_TOO_LARGE", "its list of members alone is larger than 64 MiB")


class _Counted(io.RawIOBase):
    """A stream that counts what is read or skipped, and gives no more at once than a header or chunk needs."""

    def __init__(self, stream: Any, spend: Callable[[int], None]) -> None:
        self.stream, self.spend, self.at = stream, spend, 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LONGEST_HEADER:
            raise refuse_archive("ARCHIVE_UNSAFE", "a header in it is longer than 16 MiB")
        found = bytes(self.stream.read(size))
        self.at += len(found)
        self.spend(len(found))
        return found

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation
        while offset > self.at:  # reading is what skipping costs in a packed stream
            if not self.read(min(CHUNK, offset - self.at)):
                break
        if offset < self.at:
            self.at = self.stream.seek(offset)
        return self.at

    def tell(self) -> int:
        return self.at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _tar_members(raw: IO[bytes], head: bytes, spend: Callable[[int], None]) -> Iterator[Member]:
    opener = next((opener for magic, opener in _PACKERS.items() if head.startswith(magic)), None)
    stream = _Counted(raw if opener is None else opener(raw), spend)
    with tarfile.open(fileobj=stream, mode="r:") as opened:
        for entry in opened:
            name = checked_name(entry.name)
            if entry.isdir():
                continue
            if not entry.isreg() or entry.issparse():
                raise refuse_archive("ARCHIVE_UNSAFE", "it holds a link, a device or a file with holes")
            yield Member(name, lambda entry=entry: _tar_chunks(opened, entry))  # type: ignore[misc]
        # The standard library takes a broken header, and the end of the file, for the end of the archive.
        stream.seek(opened.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError
    while stream.read(CHUNK):  # to the checksum
        pass


def _tar_chunks(opened: tarfile.TarFile, entry: tarfile.TarInfo) -> Iterator[bytes]:
    content = opened.extractfile(entry)
    while content is not None and (chunk := content.read(CHUNK)):
        yield chunk
