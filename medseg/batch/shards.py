"""Parts of a list of studies, for several commands that share one list and one folder without any engine."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from medseg.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count` parts."""

    number: int = 1
    count: int = 1

    def holds(self, study: str) -> bool:
        """Tell whether a study is in this part: by its id alone, so that studies that come later move no other."""
        return int.from_bytes(hashlib.sha256(study.encode()).digest()[:8], "big") % self.count == self.number - 1


def parse_shard(text: str) -> Shard:
    """Return the shard of "2/8", the second of eight.

    Raises
    ------
    ConfigError : it is no such text.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard {text!r}: write i/n with i from 1 to n, for example 2/8")
    return Shard(int(match[1]), int(match[2]))
