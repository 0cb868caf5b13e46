"""Pages: escaped, offline, strict about what a template needs; numbers as people read them."""

from __future__ import annotations

import base64
import math

import jinja2
import pytest

from medseg.html import data_uri, number, render, signed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (-1.5, "−1.500"),
        (-0.0001, "0.000"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
        (3, "3.000"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "+0.500"), (-0.5, "−0.500"), (0.0001, "0.000"), (0.0, "0.000"), (None, "–")]
)
def test_signed_numbers(value: float | None, text: str) -> None:
    assert signed(value) == text


def test_data_uris_hold_the_picture() -> None:
    assert data_uri(b"\x89PNG") == "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    assert data_uri("<svg/>").startswith("data:image/svg+xml;base64,")


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("report.html", title="x")
