"""Walk to the files below some paths, whatever lies there: links, pipes, what may not be opened, any name."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from medseg.errors import ReadError

SCRATCH_PREFIX = ".medseg-unpacked-"
"""Begins the names of folders with unpacked archives, which are no input where they lie beside one."""


@dataclass
class Tree:
    """What a walk met.

    Attributes
    ----------
    files : regular files and links to such, each once, in the order of their names.
    locked : folders that may not be listed, links to what is not there.
    skipped : kind of what is not looked into -> how many ("linked folders", "pipes and devices").
    """

    files: list[Path] = field(default_factory=list)
    locked: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def files_below(paths: Path | Iterable[Path]) -> list[Path]:
    """Return the files of `walk` alone."""
    return walk(paths).files


def walk(paths: Path | Iterable[Path]) -> Tree:
    """Find the files below `paths`; an empty folder gives an empty Tree.

    Linked folders below a path are not followed, so that no loop and no other disk is entered; a path that is itself a
    link is. Links to files are followed. Pipes, sockets and devices are never opened.

    Raises
    ------
    ReadError : NOT_FOUND, a path does not exist.
    """
    tree, seen = Tree(), set[str]()
    for path in [paths] if isinstance(paths, Path) else paths:
        if not path.exists():
            raise ReadError(f"{path.name}: this file or folder does not exist", code="NOT_FOUND")
        if path.is_dir():
            _enter(str(path), tree, seen)
        else:
            _other(str(path), path.stat().st_mode, tree, seen)
    return tree


def _enter(root: str, tree: Tree, seen: set[str]) -> None:
    """Walk one folder, files and folders in the order of their names; a tree may be deeper than Python's stack."""
    open_folders = [iter(_listed(root, tree))]
    while open_folders:
        entry = next(open_folders[-1], None)
        if entry is None:
            open_folders.pop()
        elif entry.is_file(follow_symlinks=False):
            _add(entry.path, tree, seen)
        elif entry.is_symlink():
            _linked(entry.path, tree, seen)
        elif not entry.is_dir(follow_symlinks=False):
            tree.skipped["pipes and devices"] += 1
        elif not entry.name.startswith(SCRATCH_PREFIX):
            open_folders.append(iter(_listed(entry.path, tree)))


def _listed(folder: str, tree: Tree) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        tree.locked.append(Path(folder))
        return []


def _linked(place: str, tree: Tree, seen: set[str]) -> None:
    try:
        mode = os.stat(place).st_mode
    except OSError:  # to nothing, or in a loop to itself
        tree.locked.append(Path(place))
    else:
        _other(place, mode, tree, seen)


def _other(place: str, mode: int, tree: Tree, seen: set[str]) -> None:
    if stat.S_ISREG(mode):
        _add(place, tree, seen)
    else:
        tree.skipped["linked folders" if stat.S_ISDIR(mode) else "pipes and devices"] += 1


def _add(place: str, tree: Tree, seen: set[str]) -> None:
    if place not in seen:
        seen.add(place)
        tree.files.append(Path(place))
