"""configs/inference.json as plain values: references are followed, nothing is executed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from medseg.errors import BundleError

Json = dict[str, Any]
NAMES = ("inference.json", "inference.yaml", "inference.yml")
DEEP = 32
"""Levels of references and nested values; more are a loop or a trap."""
MANY = 100_000
"""Values after references were followed; they can double at every level."""
LARGEST = 1 << 12
"""Of a number in the arguments of a network: channels, blocks, sides of windows."""


def config_file(folder: Path) -> Path | None:
    """Return the inference config of a bundle's folder; None where there is none."""
    files = (folder / "configs" / name for name in NAMES)
    return next((file for file in files if file.is_file()), None)


def read_config(file: Path) -> Json:
    """Read a JSON or YAML file that holds an object; raise BundleError if it cannot be read or holds something else."""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise BundleError(f"{file.name}: cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise BundleError(f"{file.name}: an object was expected, found {type(content).__name__}")
    return content


def resolved(config: Mapping[str, Any], key: str) -> Any:
    """Return a value of the config with its references ("@key::inner") replaced by what they name.

    Expressions ("$...") stay text, also where a reference leads to one: whoever reads the value refuses it.

    Raises
    ------
    BundleError : the key, or one that is referred to, is missing, or references form a loop.
    """
    return _replaced(config, _found(config, key), 0, itertools.count(1))


def _found(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.replace("#", "::").split("::"):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise BundleError(f"the inference config has no {key!r}; it is needed to predict") from error
    return value


def _replaced(config: Mapping[str, Any], value: Any, depth: int, counter: Iterator[int]) -> Any:
    if depth > DEEP or next(counter) > MANY:
        raise BundleError("references of the inference config form a loop, lie too deep, or multiply")
    if isinstance(value, dict):
        return {key: _replaced(config, item, depth + 1, counter) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(config, item, depth + 1, counter) for item in value]
    if isinstance(value, str) and value.startswith("@"):
        return _replaced(config, _found(config, value[1:]), depth + 1, counter)
    return value


def plain(value: Any, where: str) -> Any:
    """Return a value that holds neither expressions nor things to be built; raise BundleError naming `where`.

    Nor numbers above LARGEST: a network of that many blocks is built until the memory is full.
    """
    if isinstance(value, dict):
        if "_target_" in value:
            raise BundleError(f"{where}: it builds {value['_target_']}, and only plain values are read here")
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, where) for item in value]
    if isinstance(value, str) and value.startswith(("$", "%")):
        raise BundleError(f"{where}: {value!r} is code, which is not run; write the value itself into the config")
    if isinstance(value, int | float) and abs(value) > LARGEST:
        raise BundleError(f"{where}: {value} is more than any size of a network ({LARGEST})")
    return value
