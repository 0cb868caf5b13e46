"""Faults for worker processes: Python imports this file at its start where its folder is on PYTHONPATH.

A study whose id contains one of the words below meets its fate when it is read; "once" fates happen only where their
mark (a file beside the image) does not exist yet. A file NAME.nii.met beside the image says that it begins.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from types import ModuleType
from typing import Any

WHERE = "medseg.batch.study"


def hang() -> None:
    time.sleep(3600)


def hog() -> None:
    rows = []
    while True:
        rows.append(bytearray(b"x" * (50 << 20)))
        time.sleep(0.01)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """As a decoder that hangs and never gives the interpreter's lock back."""
    import re

    # Time that doubles with each letter; (a|b)+ would not do: alternatives of one letter are taken as one set.
    re.match(r"(a+)+$", "a" * 60 + "c")


FATES = {"hang": hang, "hog": hog, "poison": die, "stuck": stop}


class Loader(importlib.abc.Loader):
    def __init__(self, real: Any) -> None:
        self.real = real

    def create_module(self, spec: Any) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        read = module.read_study

        def read_study(study: Any, spec: Any) -> Any:
            if "once" in study.id:
                mark = study.images[0].with_suffix(".mark")
                if not mark.exists():
                    mark.touch()
                    die()
            for word, fate in FATES.items():
                if word in study.id:
                    study.images[0].with_suffix(".met").touch()
                    fate()
            return read(study, spec)

        module.read_study = read_study  # type: ignore[attr-defined]


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != WHERE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = Loader(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
