"""Prepared cases on disk, memory-mapped: a patch is read without loading its case.

One folder a case, named by a digest of everything that the content depends on: source files, spec, the plan's
preparation. ``meta.json`` is written last: without it the folder counts as absent. A case written by an earlier
process is verified against its digests when it is first opened; a damaged one is prepared again. So nothing waits for
the disk: what a power cut takes is noticed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform
from numpy.typing import NDArray

from medseg.cases import source_digest
from medseg.errors import MedsegError
from medseg.files import digest, file_digest, write_atomically, write_json
from medseg.planning.plan import Plan
from medseg.spec import Case, Spec, spec_digest

CACHE_FORMAT = 1
LOCATIONS_PER_CLASS = 2000
_FILES = ("image.npy", "mask.npy", "locations.npy")


class CaseCache(Transform):
    """Last step of the deterministic part: writes a prepared case, or opens it.

    Called with prepared data it stores them; called with a Case it opens the stored arrays:
    {"case", "image": (C, I, J, K) float32, "mask": (1, I, J, K), "locations": (N, 4) class index, i, j, k}, all
    memory-mapped and read-only.
    """

    def __init__(self, folder: Path, spec: Spec, plan: Plan) -> None:
        self.folder = folder
        self.spec = spec
        self._recipe = digest([CACHE_FORMAT, spec_digest(spec), plan.preparation])
        self._open: dict[str, dict[str, Any]] = {}
        self._places: dict[str, Path] = {}

    def place(self, case: Case) -> Path:
        """Return the folder of a case, by what its files held when it was first asked for."""
        if case.id not in self._places:
            self._places[case.id] = self.folder / f"{case.id}-{digest([self._recipe, source_digest(case)])[:16]}"
        return self._places[case.id]

    def __call__(self, data: Case | Mapping[str, Any]) -> dict[str, Any]:
        """Store prepared data, or open a case that was stored."""
        if isinstance(data, Case):
            return self._open.get(data.id) or self.open(data)
        return self._map(data["case"], self._store(data))

    def open(self, case: Case) -> dict[str, Any]:
        """Memory-map a stored case."""
        return self._map(case, self.place(case))

    def _map(self, case: Case, place: Path) -> dict[str, Any]:
        arrays = {name.removesuffix(".npy"): mapped(place / name) for name in _FILES}
        self._open[case.id] = {"case": case, **arrays}
        return self._open[case.id]

    def holds(self, case: Case) -> bool:
        """Tell whether a case is stored and undamaged (reads it once)."""
        place = self.place(case)
        try:
            meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
            return bool(meta == {"files": {name: file_digest(place / name) for name in _FILES}})
        except (OSError, ValueError):
            return False

    def content(self, case: Case) -> str:
        """Return the digest of the prepared arrays of a case that is open."""
        return digest(json.loads((self.place(case) / "meta.json").read_text(encoding="utf-8"))["files"])

    def _store(self, data: Mapping[str, Any]) -> Path:
        place = self.place(data["case"])
        shutil.rmtree(place, ignore_errors=True)
        mask = np.asarray(data["mask"])
        content = {
            "image.npy": np.asarray(data["image"], dtype=np.float32),
            "mask.npy": mask,
            "locations.npy": class_locations(self.spec, mask[0]),
        }
        for name, array in content.items():
            write_atomically(place / name, _npy_writer(array), synced=False)
        write_json(place / "meta.json", {"files": {name: file_digest(place / name) for name in _FILES}}, synced=False)
        return place


def prepare_cases(
    path: Callable[..., Any],
    cache: CaseCache,
    cases: tuple[Case, ...],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run the deterministic part `path` (which ends in `cache`) on the cases that the cache does not hold yet.

    Raises
    ------
    MedsegError : a case cannot be prepared; the message names it.
    """
    for number, case in enumerate(cases):
        if cache.holds(case):
            cache.open(case)
        else:
            try:
                path(case)
            except RuntimeError as error:  # MONAI wraps what a transform raises
                if isinstance(error.__cause__, MedsegError):
                    raise error.__cause__ from None
                raise
        progress(number + 1, len(cases))


def class_locations(spec: Spec, mask: NDArray[Any]) -> NDArray[np.int32]:
    """Return up to LOCATIONS_PER_CLASS voxels of each label, evenly spread: rows (label number, i, j, k).

    The label number counts the foreground labels of the spec from 0.
    """
    rows = [np.zeros((0, 4), np.int32)]
    for number, value in enumerate(spec.foreground.values()):
        found = np.flatnonzero(mask == value)
        spread = np.linspace(0, len(found) - 1, min(len(found), LOCATIONS_PER_CLASS)).round().astype(np.int64)
        places = np.unravel_index(found[spread], mask.shape)
        rows.append(np.column_stack([np.full(len(spread), number), *places]).astype(np.int32))
    return np.concatenate(rows)


def mapped(path: Path) -> NDArray[Any]:
    """Return the array of an .npy file, memory-mapped and read-only, without an open file behind it.

    numpy's own maps keep their file open, three a case: a process may have 1024 open files on most systems, and a
    dataset has more cases than a third of that.
    """
    stored = np.load(path, mmap_mode="r")
    # Private maps count as memory where the system promises no more than it has (vm.overcommit_memory=2); torch opens
    # the file of a shared one for writing.
    shared = os.access(path, os.W_OK)
    raw = torch.from_file(str(path), shared=shared, size=path.stat().st_size, dtype=torch.uint8).numpy()
    array: NDArray[Any] = (
        raw[stored.offset :].view(stored.dtype).reshape(stored.shape, order="F" if np.isfortran(stored) else "C")
    )
    array.flags.writeable = False
    return array


def _npy_writer(array: NDArray[Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.save(file, array)

    return write
