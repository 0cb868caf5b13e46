"""Bodies of many parts: whatever the pieces in which they come, the same files; cut anywhere, an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.pacs.multipart import Body, BrokenBodyError, boundary_of, save_parts


def pieces(body: bytes, size: int) -> Iterator[bytes]:
    return (body[start : start + size] for start in range(0, len(body), size))


def save(body: bytes, folder: Path, size: int = 7, boundary: bytes = b"xyz") -> list[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    return [file.read_bytes() for file in save_parts(pieces(body, size), boundary, folder, spent=lambda count: None)]


@settings(max_examples=80, deadline=None)
@given(
    parts=st.lists(st.binary(max_size=60).map(lambda raw: raw.replace(b"--xyz", b"")), max_size=4),
    size=st.integers(1, 40),
    preamble=st.sampled_from([b"", b"\r\n", b"ignore me\r\n"]),
)
def test_any_pieces_give_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], size: int, preamble: bytes
) -> None:
    body = preamble + b"".join(b"--xyz \r\nContent-Type: application/dicom; x=y\r\n\r\n%b\r\n" % p for p in parts)
    assert save(body + b"--xyz--\r\nepilogue", tmp_path_factory.mktemp("parts"), size) == parts


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file, raw in zip(files, (b"\r\n--", b"DICM" * 50), strict=True):
        file.write_bytes(raw)
    body = Body(files)
    whole = b"".join(body)
    assert (len(whole), whole) == (len(body), b"".join(body))
    boundary = boundary_of(body.content_type)
    assert save(whole, tmp_path / "out", 5, boundary) == [b"\r\n--", b"DICM" * 50]


def test_cut_anywhere_it_is_no_whole_body(tmp_path: Path) -> None:
    body = b"--xyz\r\nContent-Type: application/dicom\r\n\r\nabc\r\n--xyz\r\n\r\ndef\r\n--xyz--"
    assert save(body, tmp_path / "x") == [b"abc", b"def"]
    for end in range(len(body)):
        with pytest.raises(BrokenBodyError):
            save(body[:end], tmp_path / "x")
        assert all(file.read_bytes() in (b"abc", b"def") for file in (tmp_path / "x").iterdir())


@pytest.mark.parametrize(
    "body",
    [
        b"--xyz\r\nContent-Type: text/html\r\n\r\nabc\r\n--xyz--",
        b"--xyzzy\r\n\r\nabc\r\n--xyz--",
        b"--xyz\r\nX: " + b"y" * 70000 + b"\r\n\r\nabc\r\n--xyz--",
        b"",
    ],
)
def test_other_bodies_are_refused(tmp_path: Path, body: bytes) -> None:
    with pytest.raises(BrokenBodyError):
        save(body, tmp_path / "x", 1000)


def test_boundary_of() -> None:
    assert boundary_of('Multipart/Related; type="application/dicom"; boundary="a b"') == b"a b"
    assert boundary_of("multipart/related;boundary=ab;x=1") == b"ab"
    for text in ("application/json", "multipart/related", "text/html; boundary=a"):
        with pytest.raises(BrokenBodyError):
            boundary_of(text)


def test_bytes_are_counted_before_they_are_written(tmp_path: Path) -> None:
    def spend(count: int) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        save_parts([b"--xyz\r\n\r\nabc\r\n--xyz--"], b"xyz", tmp_path, spent=spend)
