"""Writing files so that a final name never holds half a file, and hashing them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg.errors import ExportError

PARTIAL_PREFIX = ".partial-"
TAIL = 50
"""Characters of a file's name that its temporary name ends with (up to 200 bytes; a name has 255 at most)."""


def write_atomically(
    path: Path, write: Callable[[Path], None], *, mode: int | None = None, synced: bool = True
) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, then rename it to `path`.

    The temporary name ends like `path` because several libraries choose the format by the suffix. Not `synced`, a file
    outlives the process, not a power cut: for what is verified when it is read, and can be made again.

    Raises
    ------
    ExportError : the disk is full or the folder not writable; nothing is left behind.
    """
    # Of a long name only the end: a name that is just allowed must not become too long by what stands before it.
    temporary = path.with_name(f"{PARTIAL_PREFIX}{uuid.uuid4().hex[:8]}-{path.name[-TAIL:]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if mode is not None:
            # Before the first byte: what is private must not be readable while it is written.
            temporary.touch(mode=mode, exist_ok=False)
        write(temporary)
        if synced:
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, path)
        if synced:
            sync_folder(path.parent)
    except OSError as error:
        raise _refused(path.name, error) from error
    finally:
        # What hinders this removal has hindered the writing too, and that is what must be told.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give an empty folder inside `folder`; the files that are in it when the block ends take their places in `folder`.

    If the block raises, what stands in `folder` stays as it is, under the same names too.

    Raises
    ------
    ExportError : the disk is full or the folder not writable.
    """
    aside = folder / f"{PARTIAL_PREFIX}{uuid.uuid4().hex[:8]}"
    try:
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            raise _refused(folder.name, error) from error
        yield aside
        for file in sorted(aside.iterdir()):
            try:
                os.replace(file, folder / file.name)
            except OSError as error:
                raise _refused(file.name, error) from error
        sync_folder(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _refused(name: str, error: OSError) -> ExportError:
    return ExportError(
        f"{name}: cannot be written ({error.strerror or error}); nothing was left under this name. "
        "Free space or choose another --out, then run the same command again.",
        code="DISK_FULL" if is_full(error) else "NOT_WRITABLE",
    )


def is_full(error: OSError) -> bool:
    """Tell whether there was no space (or quota) left; numpy says so without a number."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "requested and" in str(error))


def sweep(folder: Path, *, deep: bool = True) -> None:
    """Remove what killed processes left half written in `folder` and (`deep`) below it."""
    pattern = f"{PARTIAL_PREFIX}*"
    for leftover in sorted(folder.rglob(pattern) if deep else folder.glob(pattern)) if folder.is_dir() else ():
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, mode: int | None = None, synced: bool = True) -> None:
    """Write `text` (UTF-8) atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write, mode=mode, synced=synced)


def write_json(path: Path, value: Any, *, mode: int | None = None, synced: bool = True) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", mode=mode, synced=synced)


def canonical_json(value: Any) -> bytes:
    """Return the one byte string that stands for `value`, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def place_of(path: Path) -> Path:
    """Return where a path leads, absolute and without links; of links that lead in a circle, the path itself.

    `Path.resolve` raises RuntimeError for those.
    """
    return Path(os.path.realpath(path))


def legible(path: Path | str) -> str:
    """Return a path as text that can be printed and stored: control characters, and bytes that are no text, escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)


def sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut (POSIX; other systems do not allow it)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
