"""What travels to a worker and back: ids, paths and headers as JSON, never arrays, never code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg import errors
from medseg.batch.study_input import StudyInput
from medseg.errors import MedsegError
from medseg.exporters import usual_format
from medseg.readers.dicom_header import Header
from medseg.readers.dicom_index import SeriesFiles
from medseg.readers.dicom_refusals import Refusal

if TYPE_CHECKING:
    from medseg.bundle import BundleInfo

KINDS: dict[str, type] = {kind.__name__: kind for kind in (StudyInput, SeriesFiles, Header, Refusal)}
"""The only classes that a message may name."""


@dataclass(frozen=True)
class Settings:
    """What all studies of a run share.

    Attributes
    ----------
    out : the output folder.
    model : folder of the bundle.
    info : content of its model.json as it is used here (rules may have been replaced).
    recipe : what results are made by; a worker that loads something else stops.
    mirror, formats, max_memory : as in medseg.batch.run.predict; no format: the usual one of each study.
    """

    out: Path
    model: Path
    info: str = field(repr=False)
    recipe: str
    mirror: bool | None
    formats: tuple[str, ...]
    max_memory: int | None = None

    def formats_of(self, study: StudyInput) -> tuple[str, ...]:
        """Return the formats in which a study is written."""
        return self.formats or (usual_format(study.images[0]),)


KINDS["Settings"] = Settings


def recipe(info: BundleInfo, mirror: bool | None) -> str:
    """Return what results are made by: the digest of the model and the options that change its answer."""
    if info.members and mirror is None:  # each of them as planned, which for the whole is neither with nor without
        return f"{info.digest}+planned"
    tta = info.plan.test_mirroring if mirror is None else mirror
    return f"{info.digest}{'+mirror' if tta else ''}"


def encode(value: Any) -> str:
    """Return one line of JSON for a dataclass of KINDS, or an error of medseg."""
    return json.dumps(_plain(value))


def decode(text: str) -> Any:
    """Return what `encode` was given.

    Raises
    ------
    ValueError, KeyError, TypeError : it is no such line.
    """
    return _rebuilt(json.loads(text))


def _plain(value: Any) -> Any:
    if type(value).__name__ in KINDS:
        known = {row.name: getattr(value, row.name) for row in fields(value)}
        return {"is": type(value).__name__, "of": {name: _plain(each) for name, each in known.items()}}
    if isinstance(value, MedsegError):
        return {"is": "error", "of": [type(value).__name__, value.code, str(value)]}
    if isinstance(value, Path):
        return {"is": "Path", "of": str(value)}
    if isinstance(value, frozenset):
        return {"is": "set", "of": sorted(value)}
    if isinstance(value, Mapping):
        return {"is": "dict", "of": {key: _plain(each) for key, each in value.items()}}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value


def _rebuilt(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_rebuilt(each) for each in value)
    if not isinstance(value, dict):
        return value
    kind, content = value["is"], value["of"]
    if kind == "Path":
        return Path(content)
    if kind == "set":
        return frozenset(content)
    if kind == "error":
        return _error(*content)
    known = {name: _rebuilt(each) for name, each in content.items()}
    return known if kind == "dict" else KINDS[kind](**known)


def _error(name: str, code: str, text: str) -> MedsegError:
    kind = getattr(errors, name)
    if not (isinstance(kind, type) and issubclass(kind, MedsegError)):
        raise ValueError(f"{name!r} is no error of medseg")
    return kind(text, code=code)
