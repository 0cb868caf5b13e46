"""Strict YAML: a file becomes a frozen model, or one error that lists every problem with its line.

data_specs/x.yaml:17: labels.liver.vlaue: unknown key, did you mean 'value'?
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from medseg.errors import ConfigError
from medseg.registry import did_you_mean

Location = tuple[str | int, ...]
MAX_KEYS = 100_000
"""No configuration has more keys; a few lines with references to references have billions."""


class Config(BaseModel):
    """Base of everything that is read from YAML or JSON: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def load(model: type[Model], path: Path, *, error: type[ConfigError] = ConfigError) -> Model:
    """Read the YAML file `path` as a `model`.

    Raises
    ------
    error (ConfigError unless told) : the file is missing, is no YAML, or does not fit; every problem is listed
        as ``file:line: key: what is wrong``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: cannot be read ({problem})") from problem
    return parse(model, text, name=str(path), error=error)


def parse(model: type[Model], text: str, *, name: str, error: type[ConfigError] = ConfigError) -> Model:
    """Read YAML `text` as a `model`; `name` stands for the file in messages. Raises as `load` does."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        lines, repeated = _lines(root)
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as problem:
        mark = getattr(problem, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        reason = getattr(problem, "problem", None) or " ".join(str(problem).split())
        raise error(f"{name}:{line}: not valid YAML: {reason}") from problem
    if not isinstance(value, dict):
        raise error(f"{name}:1: expected keys and values, found {type(value).__name__}")
    problems = [(line, f"{_dotted(place)}: this key stands here twice") for place, line in repeated]
    try:
        result = model.model_validate(value)
    except ValidationError as invalid:
        problems += [_describe(model, lines, dict(item)) for item in invalid.errors()]
    if problems:
        raise error("\n".join(f"{name}:{line}: {problem}" for line, problem in sorted(problems)))
    return result


class _Loader(yaml.SafeLoader):
    """Plain values only, and keys are always text: ``on``, ``1`` and ``2024-01-01`` are fine names of labels."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)


def _lines(root: yaml.Node | None) -> tuple[dict[Location, int], list[tuple[Location, int]]]:
    """Map every key path of a YAML document to its line; also list keys that stand twice in one mapping."""
    lines: dict[Location, int] = {(): 1}
    repeated: list[tuple[Location, int]] = []

    def walk(node: yaml.Node, place: Location) -> None:
        if len(lines) > MAX_KEYS:
            raise yaml.YAMLError(f"more than {MAX_KEYS} keys: references (*) that multiply or lead to themselves")
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, child in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key.start_mark)
                here = (*place, key.value)
                line = key.start_mark.line + 1
                if key.value in seen:
                    repeated.append((here, line))
                seen.add(key.value)
                lines[here] = line
                walk(child, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                lines[(*place, index)] = child.start_mark.line + 1
                walk(child, (*place, index))

    if root is not None:
        walk(root, ())
    return lines, repeated


def _describe(model: type[BaseModel], lines: dict[Location, int], item: dict[str, Any]) -> tuple[int, str]:
    """Turn one pydantic error into its line and ``key: what is wrong``."""
    place: Location = tuple(item["loc"])
    known = place
    while known not in lines:
        known = known[:-1]
    text = str(item["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if item["type"] == "extra_forbidden":
        text = f"unknown key{did_you_mean(str(place[-1]), _keys_at(model, place[:-1]))}"
    elif item["type"] == "missing":
        text = "this key is missing"
    elif not isinstance(item.get("input"), dict | list) and item["type"] != "value_error":
        text = f"{text}, found {item.get('input')!r}"
    return lines[known], f"{_dotted(place) or 'file'}: {text}"


def _dotted(place: Location) -> str:
    return ".".join(str(part) for part in place)


def _keys_at(model: Any, place: Location) -> list[str]:
    """Return the keys that the model allows at `place` (empty when any key is allowed)."""
    for part in place:
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(str(part))
            model = _unwrap(field.annotation) if field else None
        else:
            arguments = [argument for argument in typing.get_args(model) if argument is not Ellipsis]
            model = _unwrap(arguments[-1]) if arguments else None
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _unwrap(annotation: Any) -> Any:
    """Return X for ``X | None``, and the annotation itself otherwise."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((a for a in typing.get_args(annotation) if a is not type(None)), None)
    return annotation
