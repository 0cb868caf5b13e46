"""Scripts of benchmarks/ as modules, found as they find each other when they are run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def load(repository: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Return name -> module; they are forgotten afterwards, since their names are common words."""
    folder = repository / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "").parent == folder:
                del sys.modules[name]
