"""The folder of a trained nnU-Net v2 model: TRAINER__PLANS__CONFIGURATION with plans.json, dataset.json and fold_*."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from medseg.errors import BundleError, MedsegError
from medseg.nnunet.architecture import our_weights
from medseg.nnunet.plans import Json, make_plan, make_spec, resolved
from medseg.planning.plan import Plan
from medseg.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

    from medseg.nnunet.checkpoint import Checkpoint

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
"""In the order in which they are taken."""


@dataclass(frozen=True)
class Foreign:
    """A model of nnU-Net's in terms of ours.

    Attributes
    ----------
    weights : "fold_0" -> weights under the names of our network, a fold each.
    training : where it comes from; for people.
    previous : the first stage of a cascade.
    """

    spec: Spec
    plan: Plan
    weights: dict[str, dict[str, Tensor]]
    training: dict[str, Any]
    previous: Foreign | None = None


def is_nnunet(path: Path) -> bool:
    """Tell whether a folder looks like a model of nnU-Net v2."""
    return (path / "plans.json").is_file() and (path / "dataset.json").is_file() and any(path.glob("fold_*"))


def read_nnunet(folder: Path, *, folds: Sequence[str] = ()) -> Foreign:
    """Read a trained model.

    Parameters
    ----------
    folds : "0", "1", ..., "all": those of the ensemble; unless told, every numbered one, or `all` where it is alone.

    Raises
    ------
    BundleError : the folder is not complete, its parts contradict each other, or it asks for what is not supported;
        a message names the class or the key.
    """
    try:
        return _read(folder, folds)
    except MedsegError as error:
        if isinstance(error, BundleError):
            raise BundleError(f"{folder.name}: {error}", code=error.code) from error
        raise BundleError(f"{folder.name}: its dataset.json is not one of a model: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ValidationError) as error:
        what = f"{type(error).__name__}: {error}"
        raise BundleError(f"{folder.name}: plans.json or dataset.json is not nnU-Net v2's ({what})") from error


def _read(folder: Path, folds: Sequence[str]) -> Foreign:
    plans, dataset = _json(folder / "plans.json"), _json(folder / "dataset.json")
    files = {fold: _checkpoint(folder, fold) for fold in folds or _folds(folder)}
    from medseg.nnunet.checkpoint import read_checkpoint

    found = {fold: read_checkpoint(file) for fold, file in files.items()}
    first = _same(found)
    configuration = resolved(plans, first.configuration)
    spec = make_spec(plans, dataset)
    plan = make_plan(plans, dataset, configuration, spec, first.mirror_axes)
    training = {
        "program": "nnU-Net v2",
        "trainer": first.trainer,
        "plans": str(plans.get("plans_name", "")),
        "configuration": first.configuration,
        "checkpoints": {fold: file.name for fold, file in files.items()},
    }
    weights = {f"fold_{fold}": our_weights(point.weights, fold=f"fold_{fold}") for fold, point in found.items()}
    previous = _previous(folder, str(configuration["previous_stage"])) if plan.nnunet and plan.nnunet.previous else None
    return Foreign(spec, plan, weights, training, previous)


def _json(file: Path) -> Json:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{file.name}: cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise BundleError(f"{file.name}: an object was expected, found {type(content).__name__}")
    return content


def _folds(folder: Path) -> list[str]:
    names = sorted(path.name.removeprefix("fold_") for path in folder.glob("fold_*") if path.is_dir())
    numbered = [name for name in names if name.isdigit()]
    return sorted(numbered, key=int) or [name for name in names if name == "all"]


def _checkpoint(folder: Path, fold: str) -> Path:
    place = folder / f"fold_{fold}"
    for name in CHECKPOINTS:
        if (place / name).is_file():
            return place / name
    state = "its training has not finished" if place.is_dir() else "it does not exist"
    raise BundleError(
        f"fold_{fold}: it holds neither {' nor '.join(CHECKPOINTS)} ({state}); restore it, or choose the folds with "
        "medseg models import --fold"
    )


def _same(found: dict[str, Checkpoint]) -> Checkpoint:
    """Return the first fold; all must be of one configuration, and mirrored alike."""
    if not found:
        raise BundleError("it holds no fold_0, fold_1, ... and no fold_all")
    first = next(iter(found.values()))
    for fold, other in found.items():
        if (other.configuration, other.mirror_axes) != (first.configuration, first.mirror_axes):
            raise BundleError(
                f"fold_{fold}: configuration {other.configuration}, mirrored axes {other.mirror_axes}; the first fold "
                f"has {first.configuration}, {first.mirror_axes}: folds of one model belong together"
            )
    return first


def _previous(folder: Path, name: str) -> Foreign:
    """Read the first stage of a cascade, which lies beside it: same trainer and plans, other configuration."""
    parts = folder.resolve().name.split("__")
    before = folder.resolve().with_name("__".join([*parts[:-1], name]))
    if len(parts) != 3 or not is_nnunet(before):
        raise BundleError(f"the second stage of a cascade; its first, {before.name}, must lie beside it")
    return read_nnunet(before)
