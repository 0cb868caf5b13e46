"""Durations as people write them, and how old this process is."""

from __future__ import annotations

import math
import os
import re
import time
from typing import Any

from medseg.errors import ConfigError
from medseg.registry import did_you_mean

DEFAULT_BUDGET = "1h"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> float:
    """Return the seconds of "90", "90s", "10m", "1.5h", "1h30m" or "2d"; raise ConfigError for anything else."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    written = "".join(number + unit for number, unit in parts)
    if not parts or written != re.sub(r"\s+", "", text.strip().lower()):
        raise ConfigError(f"{text!r} is not a duration; write for example 90s, 10m, 1h30m or 2d")
    if len(parts) > 1 and not all(unit for _, unit in parts):
        raise ConfigError(f"{text!r}: each number needs its unit, one of s, m, h, d; write for example 1h30m")
    total = 0.0
    for number, unit in parts:
        if (unit or "s") not in _SECONDS:
            raise ConfigError(
                f"{text!r}: unknown unit {unit!r}; allowed: s, m, h, d{did_you_mean(unit, list(_SECONDS))}"
            )
        total += float(number) * _SECONDS[unit or "s"]
    if not 0 < total < math.inf:
        raise ConfigError(f"{text!r}: a duration must be longer than nothing and have an end")
    return total


def training_length(*, budget: str | float | None, **others: Any) -> float | None:
    """Return the budget in seconds (the default where no length is given at all); None for a run by `others`."""
    given = [name for name, value in {"budget": budget, **others}.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"give one of budget, {_words(list(others))}, not {' and '.join(given)}")
    for name, value in others.items():
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{name} {value}: at least 1 is needed")
    if given and budget is None:
        return None
    value = DEFAULT_BUDGET if budget is None else budget
    length = seconds(value) if isinstance(value, str) else float(value)
    if not (math.isfinite(length) and length > 0):
        raise ConfigError(f"budget {value}: a duration must be finite and longer than nothing; 90s, 10m or 1h30m")
    return length


def _words(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def process_start() -> float:
    """Return the time.monotonic() at which this process began."""
    import psutil

    age = time.time() - psutil.Process(os.getpid()).create_time()
    return time.monotonic() - max(0.0, float(age))
