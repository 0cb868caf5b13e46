"""Tests against real programs: all are marked `system`; `make test-system` installs the programs and forbids skips."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Debian puts servers in sbin; pip puts programs beside the interpreter.
PLACES = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

Run = Callable[..., str]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.system)


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """Return the path of a program by name; the test skips where it is not installed."""

    def find(name: str) -> str:
        path = shutil.which(name, path=PLACES)
        if path is None:
            pytest.skip(f"{name} is not installed: make test-system installs it")
        return path

    return find


@pytest.fixture(scope="session")
def run(program: Callable[[str], str]) -> Run:
    """Run a program and return what it printed (both streams); its exit status must be one of `allowed`."""

    def start(name: str, *arguments: object, allowed: tuple[int, ...] = (0,)) -> str:
        command = [program(name), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode in allowed, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return start
