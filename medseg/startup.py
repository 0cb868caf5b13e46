"""What processes of medseg's own do before they import torch and MONAI: a quicker start, and large pages.

`import monai` imports whatever is installed of some twenty optional libraries, for experiment tracking, plots and
tables among others; that takes longer than the rest of MONAI (benchmarks/startup.py). MONAI works without each of
them. A program that imports medseg gets MONAI as it is: it may use those parts itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

UNUSED = (
    "bs4",
    "ignite",
    "matplotlib",
    "mlflow",
    "pandas",
    "scipy.optimize",
    "scipy.signal",
    "scipy.sparse",
    "scipy.spatial",
    "skimage",
    "sklearn",
    "tensorboard",
)
"""What MONAI takes for not installed; medseg imports those of them that it needs afterwards, itself."""


LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Torch asks Linux for pages of 2 MiB for its large tensors where this is 1: see decision 0022."""


def quick_start() -> None:
    """Let the first `import monai` of this process leave out what is `UNUSED`; nothing is imported by this call.

    Tensors lie on large pages, in this process and those that it starts, unless the environment says otherwise.
    """
    os.environ.setdefault(LARGE_PAGES, "1")
    if "monai" not in sys.modules and not any(isinstance(finder, _MonaiFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MonaiFinder())


@contextmanager
def _absent(names: Sequence[str]) -> Iterator[None]:
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type] # None stands for "cannot be imported"
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


class _MonaiFinder(MetaPathFinder):
    """Finds MONAI where it is, once, with a loader that leaves things out."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where the module is, for `monai` alone."""
        if fullname != "monai":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Sparing(spec.loader)
        return spec


class _Sparing(Loader):
    """Loads a module while what is `UNUSED` cannot be imported."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the usual loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module."""
        with _absent(UNUSED):
            self._loader.exec_module(module)
