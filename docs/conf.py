"""Sphinx settings; `make docs` builds with -W, so a warning fails."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = PROJECT["name"]
version = release = PROJECT["version"]
author = "medseg developers"
copyright = author

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "decisions/template.md"]
nitpicky = True

html_theme = "furo"
html_title = f"medseg {version}"


def list_modules() -> str:
    """Return the page that lists every module with the first line of its docstring."""
    lines = ["# Modules", "", "Made from the first line of each module's docstring.", ""]
    for package in ("medseg", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            name = path.relative_to(ROOT).as_posix().removesuffix("/__init__.py")
            lines += [f"`{name}`", f": {text.partition(chr(10))[0].replace('<', '&lt;')}", ""]
    return "\n".join(lines)


(ROOT / "docs" / "reference" / "modules.md").write_text(list_modules(), encoding="utf-8")
