"""The rules of the house, each as one test: where imports go, how long things are, what is written how.

ruff also holds: no print() (T20), no bare or broad except (BLE), docstrings in numpy style (D).
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PRODUCT = sorted(path for folder in ("medseg", "pipelines") for path in (REPOSITORY / folder).rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 400, 60

# What is longer, with the reason why a split would make it worse: "medseg/x.py" or "medseg/x.py::function".
LONGER: dict[str, str] = {}

# Imported on the way to a quick answer, so without what takes a second or more to import.
LIGHT = ["medseg", "medseg.cli", "medseg.checking", "medseg.evaluation", "medseg.readers", "medseg.studies"]
HEAVY = {"torch", "monai", "mlflow"}
HEAVY_FOR_HELP = {*HEAVY, "matplotlib", "pandas", "scipy", "SimpleITK", "nibabel", "pydicom", "skimage", "jinja2"}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def tool(name: str, *arguments: str) -> None:
    """Run a tool that stands beside this interpreter; its findings are the message of the failure."""
    done = run(str(Path(sys.executable).parent / name), *arguments)
    assert done.returncode == 0, f"{name} {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the signature to the end, without the docstring."""
    documented = ast.get_docstring(node) is not None
    text = node.body[0]
    docstring = (text.end_lineno or 0) - text.lineno + 1 if documented else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def test_imports_run_one_way_and_through_the_doors() -> None:
    tool("lint-imports", "--no-logo", "--no-cache")


def test_every_module_has_a_layer() -> None:
    listed = set(re.findall(r"\((\w+)\)", (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")))
    found = {path.stem for path in (REPOSITORY / "medseg").iterdir() if path.suffix == ".py" or is_package(path)}
    assert found - listed - {"__init__"} == set(), "give it a place in the layers of [tool.importlinter]"


def is_package(path: Path) -> bool:
    return (path / "__init__.py").is_file()


def test_ruff_finds_nothing() -> None:
    tool("ruff", "check", "--no-cache", "--output-format=concise", ".")


def test_mypy_strict_finds_nothing() -> None:
    tool("mypy")


def test_spelling() -> None:
    tool("codespell")


def test_no_file_is_too_long() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PRODUCT}
    assert {name: n for name, n in lengths.items() if n > FILE_LINES and name not in LONGER} == {}


def test_no_function_is_too_long() -> None:
    lengths = {f"{name_of(path)}::{node.name}": length(node) for path in PRODUCT for node in functions(path)}
    assert {name: n for name, n in lengths.items() if n > FUNCTION_LINES and name not in LONGER} == {}


def test_exceptions_are_still_needed() -> None:
    for name in LONGER:
        path, _, function = name.partition("::")
        assert (REPOSITORY / path).is_file(), name
        assert not function or function in {node.name for node in functions(REPOSITORY / path)}, name


def test_public_things_say_what_they_are() -> None:
    silent = [
        f"{name_of(path)}::{node.name}"
        for path in PRODUCT
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        if not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert silent == []


def test_no_marks_of_unfinished_work() -> None:
    # The words are put together here so that this file does not find itself.
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX|raise NotImplemented" + r"Error)\b")
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in PRODUCT
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if words.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    require(module)
    assert loaded(f"import {module}") & HEAVY == set()


def test_a_plan_waits_for_no_monai() -> None:
    code = "import medseg.training.plan_from, medseg.training.refusals, medseg.training.start, medseg.training.manifest"
    assert loaded(code) & {"monai", "mlflow"} == set()


def test_help_imports_nothing_heavy() -> None:
    require("medseg.cli")
    code = """
import contextlib, sys
sys.argv = ["medseg", "--help"]
from medseg.cli import main
with contextlib.suppress(SystemExit):
    main()
"""
    assert loaded(code) & HEAVY_FOR_HELP == set()


def require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not written yet")


def loaded(code: str) -> set[str]:
    """Run `code` in a fresh interpreter; return the top packages that it loaded."""
    tell = "\nimport sys; print('\\nloaded', *{name.partition('.')[0] for name in sys.modules})"
    done = run(sys.executable, "-c", code + tell)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_constraints_are_exact_versions_only() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    assert pins == sorted(set(pins), key=lambda pin: pin.partition("==")[0])


def test_readme_names_every_part() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    parts = [path for path in (REPOSITORY / "medseg").iterdir() if path.suffix == ".py" or is_package(path)]
    missing = [path.name for path in parts if path.name != "__init__.py" and not re.search(rf"\b{path.name}\b", text)]
    assert missing == [], "the tree in README.md has one line for each"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_between_files_lead_somewhere(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (REPOSITORY / link).exists()] == []
