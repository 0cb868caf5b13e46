"""Bodies of many parts (multipart/related, RFC 2046 section 5.1; PS3.18 section 8.6), read and written as streams.

A body is never held in memory: its parts go to numbered files, and files become a body chunk by chunk.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAX_HEAD = 64 * 1024
"""Bytes of the headers of one part; nobody needs more."""
CHUNK = 1024 * 1024


class BrokenBodyError(ValueError):
    """The body ends early or does not have the form of its content type; the message quotes nothing of it."""


def boundary_of(content_type: str) -> bytes:
    """Return the boundary that a header Content-Type names; raise BrokenBodyError where it is no multipart/related."""
    found = re.search(r'boundary="([^"]{1,200})"|boundary=([^";,\s]{1,200})', content_type, re.IGNORECASE)
    if not content_type.lower().startswith("multipart/related") or found is None:
        raise BrokenBodyError("it is not multipart/related with a boundary")
    return (found[1] or found[2]).encode("latin-1")


@dataclass
class _Buffer:
    """Bytes that have come and are not yet spoken for."""

    chunks: Iterator[bytes]
    data: bytearray = field(default_factory=bytearray)

    def more(self) -> None:
        for chunk in self.chunks:
            if chunk:
                self.data += chunk
                return
        raise BrokenBodyError("the body ends before its last boundary")

    def take(self, count: int) -> bytes:
        taken = bytes(self.data[:count])
        del self.data[:count]
        return taken

    def until(self, mark: bytes, put: Callable[[bytes], object], limit: int | None = None) -> None:
        """Give everything before `mark` to `put`, and drop the mark; at most `limit` bytes where one is set."""
        given = 0
        while (place := self.data.find(mark)) < 0:
            ready = max(0, len(self.data) - len(mark) + 1)
            given += ready
            put(self.take(ready))
            if limit is not None and given > limit:
                raise BrokenBodyError("a part has no end of its headers")
            self.more()
        put(self.take(place))
        self.take(len(mark))


def save_parts(
    chunks: Iterable[bytes], boundary: bytes, folder: Path, *, first: int = 0, spent: Callable[[int], None]
) -> list[Path]:
    """Write each part of a body into ``folder/<number>.dcm``, numbered from `first`; return the files.

    Parameters
    ----------
    spent : is told the bytes before they are written; may raise to stop.

    Raises
    ------
    BrokenBodyError : the body ends early, or a part is not application/dicom. Files of complete parts stay.
    OSError : a file cannot be written.
    """
    buffer = _Buffer(iter(chunks), bytearray(b"\r\n"))  # the first boundary may begin the body
    mark = b"\r\n--" + boundary
    buffer.until(mark, lambda preamble: None)
    files: list[Path] = []
    while not _is_last(buffer):
        _check_head(buffer)
        file = folder / f"{first + len(files):06d}.dcm"
        with open(file, "xb") as handle:

            def put(piece: bytes, write: Callable[[bytes], object] = handle.write) -> None:
                spent(len(piece))
                write(piece)

            try:
                buffer.until(mark, put)
            except BrokenBodyError:
                file.unlink()
                raise
        files.append(file)
    return files


def _is_last(buffer: _Buffer) -> bool:
    """Read what follows a boundary: two dashes after the last one, else the end of its line."""
    while len(buffer.data) < 2:
        buffer.more()
    if buffer.data[:2] == b"--":
        return True
    blank: list[bytes] = []
    buffer.until(b"\r\n", blank.append, MAX_HEAD)
    if b"".join(blank).strip():
        raise BrokenBodyError("a boundary is followed by something else than the end of its line")
    return False


def _check_head(buffer: _Buffer) -> None:
    head: list[bytes] = [b"\r\n"]
    buffer.data[:0] = b"\r\n"  # a part without headers begins with the empty line
    buffer.until(b"\r\n\r\n", head.append, MAX_HEAD)
    kind = re.search(rb"\r\ncontent-type:\s*([^;\s]+)", b"".join(head), re.IGNORECASE)
    if kind is not None and kind[1].lower() != b"application/dicom":
        raise BrokenBodyError("a part is not application/dicom")


@dataclass(frozen=True)
class Body:
    """Files as one request body, which can be read several times.

    Attributes
    ----------
    content_type : for the header of the request.
    """

    files: Sequence[Path]
    boundary: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def content_type(self) -> str:
        """The Content-Type of the request."""
        return f'multipart/related; type="application/dicom"; boundary={self.boundary}'

    @property
    def _head(self) -> bytes:
        return f"--{self.boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()

    @property
    def _end(self) -> bytes:
        return f"--{self.boundary}--\r\n".encode()

    def __len__(self) -> int:
        return len(self._end) + sum(len(self._head) + file.stat().st_size + 2 for file in self.files)

    def __iter__(self) -> Iterator[bytes]:
        for file in self.files:
            yield self._head
            with open(file, "rb") as handle:
                while chunk := handle.read(CHUNK):
                    yield chunk
            yield b"\r\n"
        yield self._end
