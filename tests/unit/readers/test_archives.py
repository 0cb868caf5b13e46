"""Archives: unpacked exactly, or refused with a code; nothing outside the private folder, nothing left behind."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import os
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.errors import ExportError
from medseg.phantom.dicom import write_series
from medseg.readers.archive_members import ARCHIVE_ADVICE
from medseg.readers.archives import LOCK, YOUNG, Limits, sweep_scratch, unpacked
from medseg.readers.dicom_files import SCRATCH_PREFIX, files_below
from medseg.readers.dicom_scan import scan
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume

CONTENT = {"a/one.nii.gz": b"1" * 5000, "a/two.txt": b"2", "b/IM0001": b"", "c": bytes(3000)}
ROOMY = Limits(free=0)


def make_zip(path: Path, content: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as opened:
        for name, data in content.items():
            opened.writestr(name, data)
    return path


def make_tar(path: Path, content: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as opened:  # type: ignore[call-overload]
        for name, data in content.items():
            add(opened, name, data)
    return path


def add(opened: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for key, value in fields.items():
        setattr(entry, key, value)
    opened.addfile(entry, io.BytesIO(data))


MAKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "x.zip": make_zip,
    "stored.zip": lambda path, content: make_zip(path, content, zipfile.ZIP_STORED),
    "x.tar": lambda path, content: make_tar(path, content, "w"),
    "x.tar.gz": make_tar,
    "x.TGZ": make_tar,
    "x.tar.bz2": lambda path, content: make_tar(path, content, "w:bz2"),
    "x.txz": lambda path, content: make_tar(path, content, "w:xz"),
    "zip": make_zip,
    "tar": lambda path, content: make_tar(path, content, "w"),
}


def refused(path: Path, tmp_path: Path, limits: Limits = ROOMY) -> list[str]:
    """Return the codes of what is refused; nothing may be left or lie outside."""
    before = sorted(tmp_path.rglob("*"))
    with unpacked([path], scratch=tmp_path / "scratch", limits=limits) as found:
        inside = tmp_path / "scratch"
        new = [p for p in tmp_path.rglob("*") if p not in before and inside not in p.parents and p != inside]
        assert new == []
        codes = [row.error.code for row in found.refused]
        assert all(ARCHIVE_ADVICE[row.error.code] in str(row.error) for row in found.refused)
        assert not any(word in str(row.error) for row in found.refused for word in ("evil", path.name))
    assert list((tmp_path / "scratch").glob("*")) == []
    return codes


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("in_a_tree", [False, True])
def test_every_kind_is_unpacked_for_the_time_of_the_block(tmp_path: Path, name: str, in_a_tree: bool) -> None:
    (tmp_path / "in").mkdir()
    archive = MAKERS[name](tmp_path / "in" / name, CONTENT)
    given = tmp_path / "in" if in_a_tree else archive
    with unpacked([given], scratch=tmp_path / "scratch", limits=ROOMY) as found:
        assert found.refused == []
        (place,) = (path for path in found.paths if path != given)
        files = files_below(place)
        assert {str(found.origin(file).relative_to(archive)): file.read_bytes() for file in files} == CONTENT
        assert {found.origin(file.parent) for file in files} == {archive / "a", archive / "b", archive}
        assert found.named == ({} if in_a_tree else {place: archive})
        assert (given in found.paths) == in_a_tree
        assert files[0].name == "0000001.nii.gz"
        assert all(file.name[:7].isdigit() and file.parent.name.isdigit() for file in files)
        (folder,) = (tmp_path / "scratch").iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not (tmp_path / "scratch" / "x").exists()


def test_without_archives_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "report.docx").write_bytes(b"PK\x03\x04")
    (tmp_path / "mask.nii.gz").write_bytes(gzip.compress(b"x"))
    with unpacked([tmp_path, tmp_path / "a.txt"], scratch=tmp_path / "scratch") as found:
        assert (found.paths, found.refused) == ([tmp_path, tmp_path / "a.txt"], [])
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("kind", ["x.zip", "x.tar.gz"])
def test_a_series_in_an_archive_is_read_as_outside(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 900, (1, 12, 10, 6)).astype(np.float32)
    files = write_series(Volume(values, np.diag([-0.7, -0.9, 2.5, 1.0])), tmp_path / "in", modality="CT")
    content = {f"Doe^John/{number}": path.read_bytes() for number, path in enumerate(files)}
    extra = {"__MACOSX/Doe^John/._1": b"\0\5\x16\7", "Doe^John/._1.dcm": b"\0\5\x16\7x", ".DS_Store": b"x", "done": b""}
    archive = MAKERS[kind](tmp_path / kind, content | extra)
    with unpacked([archive], scratch=tmp_path, limits=ROOMY) as found:
        (row,) = scan(found.paths).series
        np.testing.assert_array_equal(read_series(row).array, read_series(tmp_path / "in").array)
        assert "Doe" not in str(row.files)


UNSAFE_NAMES = ["/evil", "../evil", "a/../../evil", "..", "C:/evil", "\\evil", "a\\..\\..\\evil", "\\\\host\\evil"]


@pytest.mark.parametrize("name", UNSAFE_NAMES)
@pytest.mark.parametrize("kind", ["x.zip", "x.tar", "x.tar.gz"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    assert refused(MAKERS[kind](tmp_path / kind, {"fine": b"1", name: b"2"}), tmp_path) == ["ARCHIVE_UNSAFE"]


LINKS = {
    "symbolic": {"type": tarfile.SYMTYPE, "linkname": "/etc/evil"},
    "hard": {"type": tarfile.LNKTYPE, "linkname": "fine"},
    "device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
    "block device": {"type": tarfile.BLKTYPE},
    "pipe": {"type": tarfile.FIFOTYPE},
    "with holes": {"type": tarfile.GNUTYPE_SPARSE},
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as opened:
        add(opened, "fine", b"1")
        add(opened, "evil", **LINKS[kind])  # type: ignore[arg-type]
    assert refused(tmp_path / "x.tar", tmp_path)[0] in ("ARCHIVE_UNSAFE", "ARCHIVE_DAMAGED")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip_are_refused(tmp_path: Path, mode: int) -> None:
    entry = zipfile.ZipInfo("evil")
    entry.external_attr = (mode | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as opened:
        opened.writestr(entry, "/etc/evil")
    assert refused(tmp_path / "x.zip", tmp_path) == ["ARCHIVE_UNSAFE"]


def test_a_password_is_said_to_be_the_reason(tmp_path: Path) -> None:
    whole = bytearray(make_zip(tmp_path / "x.zip", {"a": b"1"}).read_bytes())
    for at in (6, whole.index(b"PK\x01\x02") + 8):
        whole[at] |= 1
    (tmp_path / "x.zip").write_bytes(whole)
    assert refused(tmp_path / "x.zip", tmp_path) == ["ARCHIVE_ENCRYPTED"]


def test_other_compressions_of_zip_are_refused(tmp_path: Path) -> None:
    assert refused(make_zip(tmp_path / "x.zip", CONTENT, zipfile.ZIP_LZMA), tmp_path) == ["ARCHIVE_UNSUPPORTED"]


def test_archives_in_archives_are_not_opened_and_not_forgotten(tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "inner.zip", CONTENT).read_bytes()
    archive = make_tar(tmp_path / "x.tar.gz", {"a/inner.zip": inner, "fine.nii": b"1"})
    with unpacked([archive], scratch=tmp_path, limits=ROOMY) as found:
        assert [(row.place, row.error.code) for row in found.refused] == [(archive / "a/inner.zip", "ARCHIVE_NESTED")]
        assert len(files_below(found.paths)) == 2


@pytest.mark.parametrize("name", MAKERS)
def test_archives_cut_anywhere_are_refused(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).bytes(3000)
    whole = MAKERS[name](tmp_path / name, {"a": noise, "b": noise[::-1]}).read_bytes()
    # What follows the end mark of a plain tar is filling.
    last = len(whole) if (".tar" not in name and name != "tar") or "." in name[5:] else 512 * 15
    for at in [0, 3, 40, 300, 513, 1024, len(whole) // 2, last - 30, last - 1]:
        (tmp_path / name).write_bytes(whole[:at])
        known = "." in name or at >= (4 if name == "zip" else 262)  # without an ending its first bytes must say so
        assert refused(tmp_path / name, tmp_path) == ["ARCHIVE_DAMAGED"] * known, at


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.tar.bz2", "x.txz"])
def test_a_changed_byte_is_noticed_by_the_checksum(tmp_path: Path, name: str, rng: np.random.Generator) -> None:
    noise = rng.bytes(20_000)
    whole = MAKERS[name](tmp_path / name, {"a": noise}).read_bytes()
    for at in rng.integers(2000, len(whole) - 3000, 20):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / name).write_bytes(damaged)
        assert refused(tmp_path / name, tmp_path) == ["ARCHIVE_DAMAGED"]


def test_a_broken_header_in_a_tar_does_not_end_it_unseen(tmp_path: Path) -> None:
    whole = bytearray(make_tar(tmp_path / "x.tar", {"a": b"1", "b": b"2", "c": b"3"}, "w").read_bytes())
    whole[1024 + 150] ^= 1  # the checksum of the second header
    (tmp_path / "x.tar").write_bytes(whole)
    assert refused(tmp_path / "x.tar", tmp_path) == ["ARCHIVE_DAMAGED"]


def test_what_is_called_an_archive_and_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_text("hello")
    (tmp_path / "x.tgz").write_bytes(gzip.compress(b"hello"))
    with unpacked([tmp_path], scratch=tmp_path / "scratch") as found:
        assert [row.error.code for row in found.refused] == ["ARCHIVE_DAMAGED", "ARCHIVE_DAMAGED"]


def bomb(path: Path, kind: str, size: int) -> Path:
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened, opened.open("a", "w") as member:
            for _ in range(size >> 20):
                member.write(bytes(1 << 20))
        return path
    entry = tarfile.TarInfo("a")
    entry.size = size
    packer = {"gz": gzip.open, "xz": lzma.open}[kind]
    with packer(path, "wb") as opened:
        opened.write(entry.tobuf())
        for _ in range(size >> 20):
            opened.write(bytes(1 << 20))
        opened.write(bytes(1024))
    return path


@pytest.mark.parametrize("kind", ["zip", "gz", "xz"])
@pytest.mark.parametrize("limits", [Limits(bytes=4 << 20, free=0), Limits(ratio_from=4 << 20, free=0)])
def test_bombs_are_stopped_while_they_unpack(
    tmp_path: Path, kind: str, limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bomb(tmp_path / ("x.zip" if kind == "zip" else f"x.tar.{kind}"), kind, 32 << 20)
    written = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda *a, **k: (written.append(a), real(*a, **k))[1])
    assert refused(path, tmp_path, limits) == ["ARCHIVE_TOO_LARGE"]


def test_a_size_that_is_declared_is_not_believed(tmp_path: Path) -> None:
    whole = bytearray(bomb(tmp_path / "x.zip", "zip", 8 << 20).read_bytes())
    central = whole.index(b"PK\x01\x02")
    whole[central + 24 : central + 28] = (100).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(whole)
    assert refused(tmp_path / "x.zip", tmp_path, Limits(bytes=1 << 20, free=0))[0] in (
        "ARCHIVE_TOO_LARGE",
        "ARCHIVE_DAMAGED",
    )


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_fills_the_memory_is_refused(tmp_path: Path, kind: bytes) -> None:
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = kind, 64 << 20
    with gzip.open(tmp_path / "x.tar.gz", "wb") as opened:
        opened.write(entry.tobuf())
        for _ in range(64):
            opened.write(bytes(1 << 20))
    assert refused(tmp_path / "x.tar.gz", tmp_path) == ["ARCHIVE_UNSAFE"]


def test_a_list_of_members_that_fills_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.readers.archive_members.LONGEST_DIRECTORY", 1000)
    archive = make_zip(tmp_path / "x.zip", {f"name{number}": b"" for number in range(50)})
    assert refused(archive, tmp_path) == ["ARCHIVE_TOO_LARGE"]


def test_members_are_counted(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", {str(number): b"" for number in range(50)})
    assert refused(archive, tmp_path, Limits(members=49, free=0)) == ["ARCHIVE_TOO_LARGE"]
    assert refused(archive, tmp_path, Limits(members=50, free=0)) == []


def test_the_disk_is_not_filled(tmp_path: Path) -> None:
    assert refused(make_zip(tmp_path / "x.zip", CONTENT), tmp_path, Limits(free=1 << 60)) == ["ARCHIVE_TOO_LARGE"]


def test_a_bad_archive_costs_only_itself_and_not_the_budget_of_others(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).bytes(3 << 20)
    make_zip(tmp_path / "in" / "b.zip", {"fine": noise})
    whole = bytearray(make_zip(tmp_path / "in" / "a.zip", {"first": noise}).read_bytes())
    whole[2 << 20] ^= 1
    (tmp_path / "in" / "a.zip").write_bytes(whole)
    with unpacked([tmp_path / "in"], scratch=tmp_path, limits=Limits(bytes=4 << 20, free=0)) as found:
        assert [(row.place.name, row.error.code) for row in found.refused] == [("a.zip", "ARCHIVE_DAMAGED")]
        assert [file.stat().st_size for file in files_below(found.paths[1:])] == [3 << 20]


def test_nothing_is_left_after_an_exception(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", CONTENT)
    with pytest.raises(RuntimeError), unpacked([archive], scratch=tmp_path / "scratch", limits=ROOMY):
        raise RuntimeError
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    make_zip(tmp_path / "x.zip", CONTENT)
    program = (
        "import os, signal, sys; from pathlib import Path; from medseg.readers.archives import unpacked\n"
        "with unpacked([Path(sys.argv[1])], scratch=Path(sys.argv[2])):\n"
        "    print('in', flush=True); sys.stdin.read()\n"
    )
    scratch = tmp_path / "scratch"
    command = [sys.executable, "-c", program, str(tmp_path / "x.zip"), str(scratch)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        (left,) = scratch.iterdir()
        old = time.time() - 2 * YOUNG
        os.utime(left, (old, old))
        sweep_scratch(scratch)
        assert left.exists(), "its process lives"
        other.kill()
    sweep_scratch(scratch)
    assert not left.exists()
    young = scratch / f"{SCRATCH_PREFIX}young"
    young.mkdir()
    sweep_scratch(scratch)
    assert young.exists(), "it may be about to be locked"
    assert LOCK == "lock"


def test_a_scratch_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ExportError, match="cannot be unpacked"),
        unpacked([make_zip(tmp_path / "x.zip", CONTENT)], scratch=tmp_path / "file"),
    ):
        pass


def test_a_disk_without_room_for_folders_costs_the_archive_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, real = make_zip(tmp_path / "x.zip", CONTENT), Path.mkdir

    def full(folder: Path, *args: Any, **options: Any) -> None:
        if folder.name == "00001":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, *args, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    with unpacked([archive], scratch=tmp_path / "scratch") as found:
        assert found.paths == []
        (refused,) = found.refused
    assert refused.error.code == "ARCHIVE_TOO_LARGE"
    assert "No space left" in str(refused.error)


def test_every_code_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs/reference/reason-codes.md").read_text()
    assert [code for code in ARCHIVE_ADVICE if f"`{code}`" not in text] == []
