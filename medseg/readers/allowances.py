"""What a person may allow a reader to correct by resampling; without it such a series is refused.

Light on purpose: specs and the command line name these words without loading a reader.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, get_args

from medseg.errors import ConfigError
from medseg.registry import did_you_mean

Allowance = Literal["tilt", "irregular"]
ALLOWANCES: tuple[Allowance, ...] = get_args(Allowance)

CORRECTABLE: dict[str, Allowance] = {
    "GANTRY_TILT": "tilt",
    "IRREGULAR_SPACING": "irregular",
    "MISSING_SLICES": "irregular",
}
"""Reason code of a refusal -> what must be allowed for the series to be corrected instead."""
BEYOND: dict[str, Allowance] = {
    "GAP_TOO_WIDE": "irregular",
    "PART_INCOMPLETE": "irregular",
    "SLICES_ASIDE": "irregular",
    "TILT_TOO_STEEP": "tilt",
}
"""Reason code of a refusal of what is allowed but goes too far -> the allowance that was asked for."""
NOTES: dict[str, Allowance] = {"SPACING_REGULARISED": "irregular", "TILT_CORRECTED": "tilt"}
"""Note of a volume -> the allowance that it made use of."""


def choose_allowances(words: Iterable[str]) -> frozenset[Allowance]:
    """Return what is meant by words like "tilt,irregular"; nothing for no word.

    Raises
    ------
    ConfigError : a word is none of ALLOWANCES.
    """
    chosen: set[Allowance] = set()
    for name in (part.strip() for word in words for part in word.split(",")):
        known = next((allowance for allowance in ALLOWANCES if allowance == name), None)
        if known is None and name:
            hint = did_you_mean(name, list(ALLOWANCES))
            raise ConfigError(f"allow: {name!r} is nothing that can be allowed{hint}; known: {', '.join(ALLOWANCES)}")
        chosen |= {known} if known else set()
    return frozenset(chosen)


def still_true(*, code: str, notes: Collection[str], allow: Collection[Allowance]) -> bool:
    """Tell whether a study that ended with `code` (empty: done) and `notes` would end so again with `allow`.

    A refusal that can now be corrected would not, nor would a correction that is no longer allowed.
    """
    used = {NOTES[note] for note in notes if note in NOTES} | ({BEYOND[code]} if code in BEYOND else set())
    return used <= set(allow) and CORRECTABLE.get(code) not in allow
