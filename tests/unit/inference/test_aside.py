"""What another process is asked comes back whole, whatever else that process prints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medseg.errors import BundleError
from medseg.inference.aside import ask

Program = Callable[[str], str]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Return a module that answers with what a function `find` of its source says."""

    def write(source: str) -> str:
        start = "from medseg.inference.aside import answer\nfrom medseg.errors import BundleError"
        text = f"{start}\n{source}\nanswer(find)\n"
        (tmp_path / "aside_of_a_test.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        return "aside_of_a_test"

    return write


@pytest.mark.parametrize(
    "noise",
    ["print('Welcome to library 2.0')", "import os; os.write(1, b'{\"answer\": 7}')", "import os; os.close(1)"],
)
def test_what_a_library_prints_is_no_part_of_the_answer(program: Program, noise: str) -> None:
    name = program(f"{noise}\ndef find(question):\n    print('loading', end='')\n    return question * 2")
    if "close" in noise:
        name = program(f"{noise}\ndef find(question):\n    return question * 2")
    assert ask(name, "ü\udc80", about="m") == "ü\udc80" * 2


def test_a_long_answer(program: Program) -> None:
    assert ask(program("def find(n):\n    return 'x' * n"), 300_000, about="m") == "x" * 300_000


def test_errors_keep_their_code(program: Program) -> None:
    name = program("def find(question):\n    raise BundleError('it is damaged', code='NO_MODEL')")
    with pytest.raises(BundleError, match="it is damaged") as caught:
        ask(name, None, about="m")
    assert caught.value.code == "NO_MODEL"


@pytest.mark.parametrize("ending", ["import os; os._exit(3)", "raise SystemExit(3)"])
def test_an_end_without_an_answer_is_an_error(program: Program, ending: str) -> None:
    with pytest.raises(BundleError, match="m: the process that reads it ended with 3"):
        ask(program(f"def find(question):\n    {ending}"), None, about="m")


def test_the_estimate_of_memory_needs_no_torch_here() -> None:
    source = "import sys, medseg.batch.memory, medseg.batch.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0
