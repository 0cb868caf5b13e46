"""Finished runs as candidates: what of them is needed, and whether they can be compared at all."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from medseg.bundle import Bundle, load_networks, open_bundle
from medseg.errors import TrainingError
from medseg.inference.predict import Model
from medseg.training.request import read_json

FOLDS = "7_report/folds.csv"
DIFFER = "RUNS_DIFFER"


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes
    ----------
    name : of its folder, as people tell it from the others.
    bundle : its model.
    folds : case -> number of the fold that validated it.
    """

    name: str
    bundle: Bundle
    data_digest: str
    folds: Mapping[str, int]

    @property
    def validation_known(self) -> tuple[int | None, ...]:
        """Return of each network how many of its validation cases it had learnt from before it was fine-tuned.

        None where the model that it began with does not tell; nothing for a run that began with random weights.
        """
        start = self.bundle.info.training.get("start") or {}
        return tuple(start.get("validation_cases_seen_before", ()))

    def model(self, fold: int, device: torch.device) -> Model:
        """Return the model with the one network that has not seen the cases of a fold, with the run's temperature."""
        file = f"fold_{sorted(set(self.folds.values())).index(fold)}.safetensors"
        info = self.bundle.info
        alone = replace(self.bundle, info=info.model_copy(update={"weights": {file: info.weights[file]}}))
        return Model(alone, [network.to(device) for network in load_networks(alone)], device)


def open_runs(folders: Sequence[Path]) -> list[Finished]:
    """Open runs of the same data and folds.

    Raises
    ------
    TrainingError : a folder holds no finished run; RUNS_DIFFER, also where a run knew its validation cases before.
    BundleError : a model is damaged.
    """
    names = _names(folders)
    runs = [_open(folder, name) for folder, name in zip(folders, names, strict=True)]
    first = runs[0]
    seen: dict[str, str] = {}
    for run in runs:
        if known := sum(count or 0 for count in run.validation_known):
            raise TrainingError(
                f"{run.name} was fine-tuned from a model that had learnt from {known} of its validation cases: their "
                "Dice is too good to compare it with others; leave it out, or fine-tune a model of the same data, "
                "--folds and --seed",
                code=DIFFER,
            )
        if run.data_digest != first.data_digest:
            raise TrainingError(
                f"{run.name} learnt from other data than {first.name} (cases, masks, splits or labels differ); only "
                "runs of the same dataset can be compared",
                code=DIFFER,
            )
        if odd := sorted(case for case in {*run.folds, *first.folds} if run.folds.get(case) != first.folds.get(case)):
            raise TrainingError(
                f"{run.name} has other folds than {first.name} ({len(odd)} case(s), for example {odd[0]}): what one "
                "has not seen the other has; train all with the same --folds and --seed",
                code=DIFFER,
            )
        same = seen.setdefault(run.bundle.info.digest, run.name)
        if same != run.name:
            raise TrainingError(f"{run.name} and {same} are the same model; give each once", code=DIFFER)
    return runs


def _open(folder: Path, name: str) -> Finished:
    if not (folder / "done.json").exists() or not (folder / FOLDS).exists():
        raise TrainingError(
            f"{folder}: no finished run of medseg train lies here; give run folders (RUN, not RUN/6_model), and finish "
            "a run by the same command that began it"
        )
    bundle = open_bundle(folder)
    folds = _read_folds(folder / FOLDS)
    if len(set(folds.values())) != len(bundle.info.weights):
        raise TrainingError(
            f"{folder}: {FOLDS} names {len(set(folds.values()))} fold(s), the model has {len(bundle.info.weights)}; "
            "restore the run"
        )
    return Finished(name, bundle, str(read_json(folder / "1_dataset.json").get("digest")), folds)


def _read_folds(file: Path) -> dict[str, int]:
    try:
        with open(file, encoding="utf-8", newline="") as table:
            found = {row["case"]: int(row["fold"]) for row in csv.DictReader(table)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{file}: damaged ({type(error).__name__}: {error}); restore the run") from error
    if not found:
        raise TrainingError(f"{file}: damaged (it names no case); restore the run")
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the names of the folders, with a number where two are called the same."""
    names = [folder.resolve().name for folder in folders]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({n})" for n, name in enumerate(names, start=1)]
