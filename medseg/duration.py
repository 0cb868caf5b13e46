"""Durations as people write them, and how old this process is."""

from __future__ import annotations

import math
import os
import re
import time

from medseg.errors import ConfigError
from medseg.registry import did_you_mean

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


def process_start() -> float:
    """Return the time.monotonic() at which this process began."""
    import psutil

    age = time.time() - psutil.Process(os.getpid()).create_time()
    return time.monotonic() - max(0.0, float(age))
