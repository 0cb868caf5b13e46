"""Named tables (networks, losses, readers, ...) that answer an unknown name with a suggestion.

Others add rows without a fork through entry points of the group ``medseg.<kind>``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from medseg.errors import ConfigError

Row = TypeVar("Row")


class Registry(Generic[Row]):
    """A read-only table of one kind of thing.

    Parameters
    ----------
    kind : what the rows are, in the plural ("networks"); also the entry-point group ``medseg.<kind>``.
    rows : name -> row, in the order in which they are listed.
    """

    def __init__(self, kind: str, rows: Mapping[str, Row]) -> None:
        self.kind = kind
        self._rows = dict(rows)
        self._plugins_read = False

    def _read_plugins(self) -> None:
        if not self._plugins_read:
            self._plugins_read = True
            for point in entry_points(group=f"medseg.{self.kind}"):
                self._rows.setdefault(point.name, point.load())

    def __getitem__(self, name: str) -> Row:
        """Return the row called `name`; raise ConfigError with the list and a suggestion if there is none."""
        if name not in self._rows:
            self._read_plugins()
        try:
            return self._rows[name]
        except KeyError:
            raise ConfigError(
                f"{name!r} is not one of the {self.kind}: {', '.join(self)}{did_you_mean(name, self._rows)}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        self._read_plugins()
        return iter(self._rows)

    def __len__(self) -> int:
        self._read_plugins()
        return len(self._rows)

    def items(self) -> list[tuple[str, Row]]:
        """All rows, plug-ins included, in table order."""
        return [(name, self._rows[name]) for name in self]


def did_you_mean(name: str, allowed: Mapping[str, object] | list[str] | tuple[str, ...]) -> str:
    """Return ``", did you mean 'x'?"`` for the closest allowed word, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(word) for word in allowed], n=1)
    return f", did you mean {close[0]!r}?" if close else ""
