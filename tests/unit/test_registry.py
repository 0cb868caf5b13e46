"""Tables by name."""

from __future__ import annotations

import pytest

from medseg import registry
from medseg.errors import ConfigError
from medseg.registry import Registry, did_you_mean


@pytest.fixture
def table() -> Registry[int]:
    return Registry("gadgets", {"first": 1, "second": 2})


def test_rows_come_in_the_order_of_the_table(table: Registry[int]) -> None:
    assert table["second"] == 2
    assert list(table) == ["first", "second"]
    assert len(table) == 2
    assert table.items() == [("first", 1), ("second", 2)]
    assert "first" in table
    assert "third" not in table


def test_an_unknown_name_is_answered_with_the_list_and_a_suggestion(table: Registry[int]) -> None:
    with pytest.raises(ConfigError) as caught:
        table["secnod"]
    assert str(caught.value) == "'secnod' is not one of the gadgets: first, second, did you mean 'second'?"


def test_the_table_is_a_copy(table: Registry[int]) -> None:
    rows = {"a": 1}
    made = Registry("gadgets", rows)
    rows["b"] = 2
    assert list(made) == ["a"]


class Point:
    def __init__(self, name: str, value: int) -> None:
        self.name, self.value, self.loads = name, value, 0

    def load(self) -> int:
        self.loads += 1
        return self.value


def test_entry_points_add_rows_once_and_never_replace_ours(
    table: Registry[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {"medseg.gadgets": [Point("third", 3), Point("first", 99)]}
    monkeypatch.setattr(registry, "entry_points", lambda group: points[group])
    # A row of ours needs no plug-in to be imported.
    assert table["first"] == 1
    assert points["medseg.gadgets"][0].loads == 0
    assert table["third"] == 3
    assert list(table) == ["first", "second", "third"]
    assert table["first"] == 1
    assert points["medseg.gadgets"][0].loads == 1


def test_suggestions() -> None:
    assert did_you_mean("vlaue", ["value", "color"]) == ", did you mean 'value'?"
    assert did_you_mean("xyz", ["value", "color"]) == ""
    assert did_you_mean("1", {"10": 0}) == ", did you mean '10'?"
