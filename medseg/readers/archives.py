"""Studies in zip and tar archives: unpacked into a private folder for as long as they are read, then removed.

Files on disk are numbered (``00002/0000017.dcm``): no name of an archive ever becomes one. Archives in archives are not
opened. A bad archive costs only itself: it comes back as a refusal beside the good ones.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from medseg.errors import ExportError, ReadError
from medseg.readers.archive_members import is_tar, is_zip, members, refuse_archive
from medseg.readers.dicom_files import SCRATCH_PREFIX, files_below
from medseg.readers.dicom_header import DICOM_SUFFIXES, may_be_slice
from medseg.readers.picture import SUFFIXES as PICTURE_SUFFIXES

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz")
"""Endings by which archives are known; files without any ending are looked into."""
IMAGE_SUFFIXES = (".nii.gz", ".nii", *PICTURE_SUFFIXES, *DICOM_SUFFIXES)
"""Endings that a file keeps on disk, because readers go by them."""
LOCK = "lock"
YOUNG = 60.0
"""Seconds for which a folder without a lock is left alone."""


@dataclass(frozen=True)
class Limits:
    """How much may be unpacked.

    Attributes
    ----------
    members : of one archive.
    bytes : of all archives together.
    ratio : of unpacked to packed size, asked from `ratio_from` bytes on: small archives of empty masks shrink much.
    free : bytes of the disk that stay free.
    """

    members: int = 200_000
    bytes: int = 256 << 30
    ratio: float = 250.0
    ratio_from: int = 1 << 30
    free: int = 2 << 30


@dataclass(frozen=True)
class Refused:
    """An archive that is not read (also one within another), and why."""

    place: Path
    error: ReadError


@dataclass
class Archives:
    """Paths to read instead of those that were given, and where they come from.

    Attributes
    ----------
    paths : folders of unpacked archives, after the given paths that are no archives.
    refused : archives that cannot be read, and archives in archives.
    named : folder of an archive that was given by itself -> the archive.
    """

    paths: list[Path] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    named: dict[Path, Path] = field(default_factory=dict)
    _origins: dict[Path, Path] = field(default_factory=dict)

    def origin(self, path: Path) -> Path:
        """Return ``ARCHIVE/MEMBER`` for what was unpacked (a file or folder), any other path as it is."""
        return self._origins.get(path, path)

    def note(self, path: Path, origin: Path) -> None:
        """Remember where an unpacked file or folder comes from."""
        self._origins[path] = origin


@contextmanager
def unpacked(paths: Iterable[Path], *, scratch: Path | None = None, limits: Limits | None = None) -> Iterator[Archives]:
    """Unpack the archives among `paths` and in folders among them; inside the `with` block they are folders.

    Parameters
    ----------
    paths : files and folders that exist.
    scratch : folder with room, in which a private one is made (mode 0700) and removed at the end, whatever happens;
        those of processes that were killed are removed, too. Unless told, the system's folder for temporary files.
        Without archives nothing is made.

    Raises
    ------
    ExportError : nothing can be written to `scratch`.
    """
    result, found = Archives(), list[tuple[Path, bool]]()
    for path in paths:
        if path.is_dir():
            result.paths.append(path)
            found += [(file, False) for file in files_below(path) if _is_archive(file)]
        elif _is_archive(path):
            found.append((path, True))
        else:
            result.paths.append(path)
    if not found:
        yield result
        return
    with _private_folder(scratch or Path(tempfile.gettempdir())) as folder:
        budget = _Budget(limits or Limits(), folder)
        for number, (archive, given) in enumerate(dict(found).items(), start=1):
            place = folder / f"{number:05}"
            try:
                budget.begin(archive)
                _unpack(archive, place, budget, result)
            except ReadError as error:
                shutil.rmtree(place, ignore_errors=True)
                budget.give_back()
                result.refused.append(Refused(archive, error))
            else:
                result.paths.append(place)
                result.named |= {place: archive} if given else {}
        yield result


def _is_archive(path: Path) -> bool:
    name = path.name.lower()
    if name.endswith(SUFFIXES):
        return True
    if path.suffix:
        return False
    try:
        with open(path, "rb") as handle:
            head = handle.read(512)
    except OSError:
        return False
    return is_zip(head) or is_tar(head)


def _unpack(archive: Path, place: Path, budget: _Budget, result: Archives) -> None:
    """Unpack one archive; its folders and files are numbered in the order in which they come."""
    _make(place)
    origins: dict[Path, Path] = {place: archive}
    folders: dict[PurePosixPath, Path] = {}
    nested = []
    with members(archive, budget.spend) as rows:
        for number, member in enumerate(rows, start=1):
            budget.count(number)
            name = PurePosixPath(member.name)
            if name.name.startswith("._") or "__MACOSX" in name.parts:  # what macOS adds
                file = None
            else:
                if name.name.lower().endswith(SUFFIXES):
                    nested.append(archive / name)
                folder = folders.setdefault(name.parent, place / f"{len(folders) + 1:05}")
                _make(folder)
                file = folder / f"{number:07}{_ending(name.name)}"
                origins |= {folder: archive / name.parent, file: archive / name}
            _write(member.chunks(), file)
    for file, origin in origins.items():
        result.note(file, origin)
    error = refuse_archive("ARCHIVE_NESTED", "it lies in another archive")
    result.refused += [Refused(inner, error) for inner in nested]


def _ending(name: str) -> str:
    """Return what a member's number ends with: a known ending, or one that says that it is no slice."""
    known = next((suffix for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix)), "")
    if name.startswith("."):
        return ".hidden"
    return known or ("" if may_be_slice(name) or "." not in name else ".other")


def _write(chunks: Iterator[bytes], file: Path | None) -> None:
    """Write a member; without a file only pass over it, counting."""
    if file is None:
        for _ in chunks:
            pass
        return
    try:
        with open(file, "xb") as handle:
            for chunk in chunks:
                handle.write(chunk)
    except OSError as error:
        if error.errno is None:  # the archive's fault, not the disk's
            raise
        raise _no_room(error) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise _no_room(error) from error


def _no_room(error: OSError) -> ReadError:
    return refuse_archive("ARCHIVE_TOO_LARGE", f"it cannot be unpacked here ({error.strerror})")


class _Budget:
    """Counts bytes while they are written; what an archive declares is not asked."""

    def __init__(self, limits: Limits, folder: Path) -> None:
        self.limits, self.folder = limits, folder
        self.total, self.own, self.packed, self.unchecked = 0, 0, 1, 0

    def begin(self, archive: Path) -> None:
        """Begin an archive."""
        try:
            self.own, self.packed = 0, max(1, archive.stat().st_size)
        except OSError as error:
            raise refuse_archive("ARCHIVE_DAMAGED", f"it cannot be opened ({error.strerror})") from error
        self._look_at_disk()

    def spend(self, size: int) -> None:
        """Count bytes; raise ReadError(ARCHIVE_TOO_LARGE) where they are too many."""
        self.own += size
        self.total += size
        self.unchecked += size
        if self.total > self.limits.bytes:
            raise refuse_archive("ARCHIVE_TOO_LARGE", f"archives unpack to more than {self.limits.bytes >> 20} MiB")
        if self.own > self.limits.ratio_from and self.own > self.limits.ratio * self.packed:
            raise refuse_archive("ARCHIVE_TOO_LARGE", f"it unpacks to more than {self.limits.ratio:g} times its size")
        if self.unchecked > 64 << 20:
            self._look_at_disk()

    def count(self, number: int) -> None:
        """Raise ReadError(ARCHIVE_TOO_LARGE) for a member too many."""
        if number > self.limits.members:
            raise refuse_archive("ARCHIVE_TOO_LARGE", f"it holds more than {self.limits.members} files")

    def give_back(self) -> None:
        """Take back what was counted for an archive whose files were removed."""
        self.total -= self.own

    def _look_at_disk(self) -> None:
        self.unchecked = 0
        if shutil.disk_usage(self.folder).free < self.limits.free:
            raise refuse_archive(
                "ARCHIVE_TOO_LARGE", f"less than {self.limits.free >> 20} MiB of the disk would be left"
            )


@contextmanager
def _private_folder(scratch: Path) -> Iterator[Path]:
    """Make a folder that only this user can enter, held by a lock; remove it, and those whose holder is gone."""
    folder = scratch / f"{SCRATCH_PREFIX}{secrets.token_hex(8)}"
    try:
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        sweep_scratch(scratch)
        folder.mkdir(mode=0o700)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except OSError as error:
        raise ExportError(
            f"archives cannot be unpacked in {scratch} ({error.strerror or error}); choose another --out",
            code="NOT_WRITABLE",
        ) from error
    try:
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def sweep_scratch(scratch: Path) -> None:
    """Remove folders of unpacked archives whose process is gone; a lock ends with its process."""
    for folder in scratch.glob(f"{SCRATCH_PREFIX}*"):
        try:
            # A young one may be between its making and its lock.
            if folder.is_symlink() or time.time() - folder.stat().st_mtime < YOUNG:
                continue
            with FileLock(folder / LOCK, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            continue
