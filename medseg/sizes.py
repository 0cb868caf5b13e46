"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from medseg.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def size(text: str) -> int:
    """Return the bytes of "4GiB", "4G", "512MB" or "2000000"; raise ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS or not (amount := int(float(match[1]) * _UNITS[match[2]])):
        raise ConfigError(f"{text!r} is no amount of memory; write for example 512MiB, 4GiB or 4GB")
    return amount


def said(amount: float) -> str:
    """Return bytes as a person says them: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "bytes" or amount >= 10 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
