"""Offline HTML pages: the one door to jinja2.

A page is one file: CSS stands in it, pictures are data URIs, nothing is fetched. Text is escaped unless a template
marks it safe, and a value that a template needs and does not get is an error.
"""

from __future__ import annotations

import base64
import math
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def data_uri(content: bytes | str) -> str:
    """Return a PNG (bytes) or an SVG (text) as a data URI for ``<img src>``."""
    kind, raw = ("svg+xml", content.encode("utf-8")) if isinstance(content, str) else ("png", content)
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode('ascii')}"


def number(value: float | int | None, digits: int = 3) -> str:
    """Return a number with `digits` decimals, a dash for one that does not exist."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    text = f"{value:.{digits}f}"
    # A rounded nothing has no sign.
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def signed(value: float | None, digits: int = 3) -> str:
    """Return `number` with a plus sign before positive values."""
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 and float(f"{value:.{digits}f}") > 0 else text


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(data_uri=data_uri, number=number, signed=signed)
    return environment


def render(template: str, **values: Any) -> str:
    """Return the page made from a template of medseg/templates/ (``"report.html"``).

    Raises
    ------
    jinja2.TemplateNotFound, jinja2.UndefinedError : a mistake in the program, not in the input.
    """
    return _environment().get_template(template).render(**values)
