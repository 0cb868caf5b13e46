"""Durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.duration import seconds
from medseg.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("90s", 90),
        ("10m", 600),
        ("1.5h", 5400),
        ("1h30m", 5400),
        (" 1H 30M ", 5400),
        ("2d", 172800),
        ("0.5", 0.5),
        ("1d2h3m4s", 93784),
    ],
)
def test_by_hand(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a duration; write for example"),
        ("soon", "is not a duration"),
        ("-5m", "is not a duration"),
        ("5m!", "is not a duration"),
        ("1:30", "is not a duration"),
        ("nan", "is not a duration"),
        ("5 minutes", "unknown unit 'minutes'; allowed: s, m, h, d"),
        ("5 hh", "did you mean 'h'?"),
        ("0", "longer than nothing"),
        ("0h0m", "longer than nothing"),
        ("9" * 400, "have an end"),
        ("1h30", "each number needs its unit"),
        ("1 0m", "each number needs its unit"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        seconds(text)
    assert message in str(caught.value)


@given(hours=st.integers(0, 99), minutes=st.integers(0, 99), rest=st.integers(1, 99))
def test_parts_add_up(hours: int, minutes: int, rest: int) -> None:
    assert seconds(f"{hours}h{minutes}m{rest}s") == hours * 3600 + minutes * 60 + rest
