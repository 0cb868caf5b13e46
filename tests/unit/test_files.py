"""Writing: a final name never holds half a file, whatever goes wrong, and nothing is left lying about."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from medseg import files
from medseg.errors import ExportError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_what_is_written_is_there_and_nothing_else(tmp_path: Path) -> None:
    files.write_text(tmp_path / "new" / "a.txt", "µ\n")
    assert names(tmp_path) == ["a.txt", "new"]
    assert (tmp_path / "new" / "a.txt").read_bytes() == "µ\n".encode()


def test_an_existing_file_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a much longer text than the new one")
    files.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_the_temporary_name_keeps_the_suffix_and_stays_in_the_folder(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        temporary.write_bytes(b"x")

    files.write_atomically(tmp_path / "mask.nii.gz", write)
    assert seen[0].parent == tmp_path
    assert seen[0].name.endswith("mask.nii.gz")
    assert seen[0].name.startswith(files.PARTIAL_PREFIX)


def test_the_longest_name_that_is_allowed_can_be_written(tmp_path: Path) -> None:
    name = "é" * 121 + "x.nii.gz"
    assert len(os.fsencode(name)) == 250
    files.write_text(tmp_path / name, "x")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, "DISK_FULL"), (errno.EDQUOT, "DISK_FULL"), (errno.EACCES, "NOT_WRITABLE")]
)
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, number: int, code: str) -> None:
    (tmp_path / "a.txt").write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(ExportError, match=r"^a\.txt: cannot be written") as caught:
        files.write_atomically(tmp_path / "a.txt", write)
    assert caught.value.code == code
    assert str(tmp_path) not in str(caught.value)
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_what_is_not_synced_waits_for_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda handle: pytest.fail("synced"))
    files.write_json(tmp_path / "a.json", [1], synced=False)
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_after_the_writing_leaves_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(ExportError):
        files.write_text(tmp_path / "a.txt", "text")
    assert names(tmp_path) == []


def test_an_interruption_or_a_bug_leaves_nothing_and_passes_through(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt, ValueError):

        def write(temporary: Path, error: type[BaseException] = error) -> None:
            temporary.write_bytes(b"half")
            raise error

        with pytest.raises(error):
            files.write_atomically(tmp_path / "a.txt", write)
        assert names(tmp_path) == []


def test_a_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError):
        files.write_atomically(tmp_path / "a.txt", lambda temporary: None)
    assert names(tmp_path) == []


def test_a_file_in_the_place_of_a_folder_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError) as caught:
        files.write_text(tmp_path / "file" / "a.txt", "text")
    assert caught.value.code == "NOT_WRITABLE"


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_a_mode_is_set_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    replace = os.replace

    def spy(source: Path, target: Path) -> None:
        modes.append(source.stat().st_mode & 0o777)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", spy)
    files.write_text(tmp_path / "key", "secret", mode=0o600)
    assert modes == [0o600]
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_a_private_file_is_never_readable_by_others(tmp_path: Path) -> None:
    """Also while it is being written: a secret that was world-readable for a moment is no secret."""
    modes: list[int] = []

    def write(temporary: Path) -> None:
        temporary.write_text("secret")
        modes.append(temporary.stat().st_mode & 0o077)

    files.write_atomically(tmp_path / "key", write, mode=0o600)
    assert modes == [0]


def test_json_is_sorted_and_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  1.5,\n  null\n ],\n "b": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "b.json", {"a": float("nan")})
    assert names(tmp_path) == ["a.json"]


def test_digests(tmp_path: Path) -> None:
    assert files.digest({"b": 1, "a": 2}) == files.digest({"a": 2, "b": 1})
    assert files.digest({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    (tmp_path / "a").write_bytes(b"abc")
    assert files.file_digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def put_and_fail(file: Path) -> None:
    file.write_text("new")
    raise ExportError("half way")


def test_staged_files_take_their_places_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "c").write_text("other")
    with pytest.raises(ExportError), files.staged(tmp_path) as aside:
        put_and_fail(aside / "a")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old", "c": "other"}
    with files.staged(tmp_path) as aside:
        assert list(aside.iterdir()) == []
        for name in "ab":
            (aside / name).write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new", "b": "new", "c": "other"}


def test_a_folder_of_staged_files_that_was_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / f"{files.PARTIAL_PREFIX}01234567"
    left.mkdir()
    (left / "a").touch()
    (left / f"{files.PARTIAL_PREFIX}76543210-b").touch()
    (tmp_path / f"{files.PARTIAL_PREFIX}link").symlink_to(tmp_path / "kept", target_is_directory=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "c").touch()
    files.sweep(tmp_path, deep=False)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["c", "kept"]


def test_no_room_for_staged_files_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("pathlib.Path.mkdir", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(ExportError, match="No space") as caught, files.staged(tmp_path) as aside:
                (aside / "a").touch()
        assert caught.value.code == "DISK_FULL"
        assert not list(tmp_path.rglob(f"{files.PARTIAL_PREFIX}*"))
