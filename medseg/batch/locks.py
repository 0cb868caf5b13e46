"""Locks below OUT/journal/locks, by which runs that share a folder keep out of each other's way.

The system gives a lock back when its process ends, however it ends: nothing is ever to be cleaned up by hand. They work
between machines where the shared file system knows POSIX locks (NFS 4, Lustre with ``flock``, GPFS).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medseg.errors import ExportError

FOLDER = Path("journal") / "locks"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system answers that has no locks: there only one run may use the folder."""
_held: dict[Path, list[int]] = {}
"""Folder -> handle and number of users: closing any handle of a file gives back all record locks of this process."""
_held_lock = threading.Lock()


@contextmanager
def present(out: Path, *, sweep: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold OUT together with others; `sweep` is called at begin and end if nobody else holds it then.

    Raises
    ------
    ExportError : the lock cannot be written.
    """
    handle = _open(out, "run")
    try:
        _sweep_alone(handle, sweep)
        _flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        # Given back first: of two that end at once, at least the later one then finds itself alone.
        _flock(handle, fcntl.LOCK_UN)
        with contextlib.suppress(OSError):
            _sweep_alone(handle, sweep)
        os.close(handle)


def in_use(out: Path) -> bool:
    """Tell whether a run holds OUT now; also to somebody who may only read it (not on NFS, which then says no)."""
    return is_held(out / FOLDER / "run")


@contextmanager
def holding(file: Path) -> Iterator[None]:
    """Hold a file that exists, so that others can tell that this process lives."""
    handle = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        _flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def is_held(file: Path) -> bool:
    """Tell whether a process holds a file; not where there is none, or where the file system has no locks."""
    try:
        handle = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        handle = os.open(file, os.O_RDONLY)
    try:
        return not _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EBADF:  # NFS gives no such lock of a file that is only read
            return False
        raise
    finally:
        os.close(handle)


@contextmanager
def alone(out: Path, name: str) -> Iterator[None]:
    """Wait until nobody else holds the lock `name` of OUT, and hold it."""
    handle = _open(out, name)
    try:
        _flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def study_lock(out: Path, study: str) -> Iterator[bool]:
    """Try to hold one study of OUT; gives False where another process works on it."""
    # One byte of one file for each study: thousands of lock files would have to be removed again.
    place = int.from_bytes(hashlib.sha256(study.encode()).digest()[:7], "big")
    with _shared_handle(out) as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                yield False
                return
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):
                fcntl.lockf(handle, fcntl.LOCK_UN, 1, place)


@contextmanager
def _shared_handle(out: Path) -> Iterator[int]:
    folder = out.resolve()
    with _held_lock:
        row = _held.setdefault(folder, [-1, 0])
        if row[1] == 0:
            row[0] = _open(out, "studies")
        row[1] += 1
    try:
        yield row[0]
    finally:
        with _held_lock:
            row[1] -= 1
            if row[1] == 0:
                os.close(row[0])
                del _held[folder]


def _open(out: Path, name: str) -> int:
    try:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        return os.open(out / FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        code = "DISK_FULL" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "NOT_WRITABLE"
        raise ExportError(f"{out}: cannot be written ({error.strerror}); choose another --out", code=code) from error


def _sweep_alone(handle: int, sweep: Callable[[], None]) -> None:
    if _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
        try:
            sweep()
        finally:
            _flock(handle, fcntl.LOCK_UN)


def _flock(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True
