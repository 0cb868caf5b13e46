"""Strict YAML: every problem at once, with its line and a suggestion."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from medseg.config import Config, load, parse
from medseg.errors import ConfigError, SpecError


class Inner(Config):
    value: int = Field(ge=0)
    color: str | None = None


class Outer(Config):
    name: str
    rows: dict[str, Inner] = Field(default_factory=dict)
    items: tuple[Inner, ...] = ()
    ratio: float = 0.5
    maybe: Inner | None = None


def problems(text: str, model: type[Config] = Outer) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(model, text, name="x.yaml")
    return str(caught.value).splitlines()


def test_a_good_file_becomes_a_frozen_model(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("name: µ\nrows:\n  a: {value: 1}\nitems: [{value: 2}]\n", encoding="utf-8")
    made = load(Outer, file)
    assert made == Outer(name="µ", rows={"a": Inner(value=1)}, items=(Inner(value=2),))
    with pytest.raises(ValidationError):
        made.name = "other"


def test_every_problem_is_listed_with_its_line() -> None:
    text = "rows:\n  liver:\n    vlaue: 1\n  spleen:\n    value: -3\nratio: much\nnamex: x\n"
    assert set(problems(text)) == {
        "x.yaml:1: name: this key is missing",
        "x.yaml:2: rows.liver.value: this key is missing",
        "x.yaml:3: rows.liver.vlaue: unknown key, did you mean 'value'?",
        "x.yaml:5: rows.spleen.value: Input should be greater than or equal to 0, found -3",
        "x.yaml:6: ratio: Input should be a valid number, unable to parse string as a number, found 'much'",
        "x.yaml:7: namex: unknown key, did you mean 'name'?",
    }


def test_problems_come_in_the_order_of_the_file() -> None:
    lines = [int(line.split(":")[1]) for line in problems("rows:\n  a: {vlaue: 1}\nratio: much\nnamex: x\n")]
    assert lines == sorted(lines)


def test_problems_within_lists_and_optional_models() -> None:
    assert problems(
        "name: x\nitems:\n  - value: 1\n  - valuex: 2\n    value: 2\nmaybe:\n  colour: red\n  value: 1\n"
    ) == [
        "x.yaml:4: items.1.valuex: unknown key, did you mean 'value'?",
        "x.yaml:7: maybe.colour: unknown key, did you mean 'color'?",
    ]


def test_a_key_that_stands_twice_is_a_problem_and_no_later_one_wins() -> None:
    assert problems("name: a\nrows:\n  a: {value: 1}\n  a: {value: 2}\nname: b\n") == [
        "x.yaml:4: rows.a: this key stands here twice",
        "x.yaml:5: name: this key stands here twice",
    ]


@pytest.mark.parametrize("key", ["1", "true", "on", "2024-01-01", "null", "1.5"])
def test_keys_are_text_whatever_yaml_makes_of_them(key: str) -> None:
    assert parse(Outer, f"name: x\nrows:\n  {key}: {{value: 1}}\n", name="x.yaml").rows[key].value == 1
    [line] = problems(f"name: x\nrows:\n  {key}: {{value: -1}}\n")
    assert line.startswith(f"x.yaml:3: rows.{key}.value: ")


def test_keys_that_are_no_text_at_all_are_refused() -> None:
    assert problems("? [a, b]\n: 1\n")


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_that_are_none_are_refused(value: str) -> None:
    [line] = problems(f"name: x\nratio: {value}\n")
    assert line.startswith("x.yaml:2: ratio: ")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- a\n- b\n", "just text\n", "42"])
def test_a_file_without_keys_is_refused(text: str) -> None:
    [line] = problems(text)
    assert line.startswith("x.yaml:1: expected keys and values")


def test_broken_yaml_is_answered_with_the_line() -> None:
    [line] = problems("name: x\nrows: [1, 2\nratio: 3\n")
    assert line.startswith("x.yaml:3: not valid YAML")
    [line] = problems("name: 'never ends\n")
    assert "not valid YAML" in line
    [line] = problems("name: \x00\n")
    assert "not valid YAML" in line


def test_yaml_cannot_run_code() -> None:
    [line] = problems("name: !!python/object/apply:os.system ['echo hello']\n")
    assert "not valid YAML" in line


def test_references_that_lead_to_themselves_or_multiply_are_refused() -> None:
    [line] = problems("name: x\nrows: &a\n  b: *a\n")
    assert "not valid YAML" in line
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    [line] = problems(laughs)
    assert "references" in line


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        load(Outer, tmp_path / "none.yaml", error=SpecError)
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(SpecError, match="cannot be read"):
        load(Outer, tmp_path / "bytes.yaml", error=SpecError)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Outer, tmp_path)


def test_merge_keys_and_anchors_work() -> None:
    made = parse(Outer, "name: x\nrows:\n  a: &a {value: 1}\n  b:\n    <<: *a\n    color: red\n", name="x.yaml")
    assert made.rows["b"] == Inner(value=1, color="red")
