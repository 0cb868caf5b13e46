"""Score a folder of predicted masks against a dataset or a folder of reference masks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medseg import config
from medseg.cases import make_case
from medseg.errors import ConfigError, GeometryError, ReadError, SpecError
from medseg.evaluation.label_names import by_name
from medseg.evaluation.metrics import METRICS, Measurement, Pair, measure, measure_failed
from medseg.evaluation.table import Evaluation, Row, Target, make_evaluation, write_evaluation
from medseg.joined import annotated
from medseg.plots import colours_for
from medseg.readers import read_labels
from medseg.readers.nifti import is_nifti, stem
from medseg.readers.picture import is_picture
from medseg.spec import Case, Dataset, Spec, load_dataset, spec_digest
from medseg.studies import read_study
from medseg.volume import Volume, align_to

PROVENANCE = "predictions.json"
"""File beside the predictions that says what made them."""
LEDGER = "ledger"
"""Folder beside the predictions that says how each study went (medseg.batch.ledger)."""
SUFFIXES = (".nii.gz", ".nii", ".png", ".tif", ".tiff")
"""Endings of predicted masks, in the order in which they are looked for."""
_PROVENANCE_KEYS = {
    "model_hash": "model_hash",
    "plan_hash": "plan_hash",
    "dataset_hash": "training_dataset_hash",
    "software": "predicted_by",
    "tta": "mirroring",
    "folds": "folds",
}
"""Key there -> key in the evaluation; others are not taken over, because they might identify."""


@dataclass(frozen=True)
class Reference:
    """What predictions are scored against.

    Attributes
    ----------
    spec : of the dataset; None for a folder of masks without one.
    cases : those to be scored, each with a mask.
    targets : labels and regions.
    provenance : name and digest of the dataset and which part of it this is.
    """

    spec: Spec | None
    cases: tuple[Case, ...]
    targets: tuple[Target, ...]
    provenance: Mapping[str, str]

    def values_known(self, case: Case) -> Set[int]:
        """Return the values that the mask of a case tells of: a label that it does not annotate cannot be scored."""
        if self.spec is None:
            return {value for target in self.targets for value in target.values}
        return set(annotated(self.spec, case).values())

    def read(self, case: Case) -> Volume:
        """Return the reference mask (1, I, J, K), integer label values, on the grid of the case's image."""
        if self.spec is not None and case.images:
            mask = read_study(self.spec, case).mask
        else:
            mask = None if not case.label_files else read_label_map(case.label_files[0], case.id)
        if mask is None:
            raise ReadError(f"case {case.id}: it has no reference mask", code="LABEL_MISSING")
        if self.spec is not None:
            _require_values(mask, self.spec, case.id, "reference mask", self.spec.values, "LABEL_VALUES")
        return mask


def evaluate(
    predictions: Path,
    reference: Path,
    *,
    out: Path,
    spec: Spec | Path | None = None,
    splits: Path | None = None,
    split: Literal["test", "train", "all"] | None = None,
) -> Evaluation:
    """Score ``predictions/<case id>.nii.gz`` and write OUT/cases.csv, OUT/summary.csv and OUT/summary.json.

    Parameters
    ----------
    predictions : folder of label maps (.nii.gz, .nii, .png or .tif) named by case id.
    reference : a dataset (see medseg.spec.load_dataset), or a folder of masks named by case id.
    spec : labels, regions and ignore label for a folder of masks; without it the labels are the values that occur.
    splits : file with lists `train` and `test` that replaces the dataset's own.
    split : which cases; unless told the test cases if the dataset has any, else all. A folder of masks has no split.

    A case without a readable prediction, or one that the ledger of `medseg predict` calls refused or failed, stays in
    the table as failed: Dice 0 is imputed for each label that its reference holds. A reference that cannot be read is
    an error, because nothing can be said without it. Predictions of which no reference case was chosen are not scored;
    summary.json lists their ids.

    Raises
    ------
    ConfigError : NO_PREDICTIONS (not one reference case has a prediction), NO_REFERENCE.
    SpecError, ReadError : the reference is wrong; PREDICTION_VALUES, LABEL_NOT_INTEGER: a prediction is no label map
        of this dataset.
    GeometryError : PREDICTION_GRID, a prediction does not lie on its reference's grid (in any axis order).
    """
    chosen = load_reference(reference, predictions, spec=spec, splits=splits, split=split)
    return evaluate_against(chosen, predictions, out=out)


def evaluate_against(chosen: Reference, predictions: Path, *, out: Path) -> Evaluation:
    """Score predictions against a reference that is known already; writes and raises as `evaluate` does."""
    paths = {case.id: find_prediction(predictions, case.id) for case in chosen.cases}
    if not any(paths.values()):
        example = chosen.cases[0].id
        raise ConfigError(
            f"{predictions}: none of the {len(paths)} reference cases has a prediction here; a prediction is named by "
            f"its case id, for example {example}.nii.gz",
            code="NO_PREDICTIONS",
        )
    rows: list[Row] = []
    told = told_of(predictions)
    names = by_name(told.get("labels"), chosen.spec)
    for case in chosen.cases:
        refusal = _refusal(predictions, case.id)
        predicted = refusal or _read_prediction(paths[case.id], case.id)
        if names is not None and isinstance(predicted, Volume):
            predicted = names.translate(predicted, case.id)
        rows += _score_case(chosen, case, predicted)
    origin = {ours: str(told[key]) for key, ours in _PROVENANCE_KEYS.items() if key in told}
    differing = {} if names is None else names.told
    provenance = {**chosen.provenance, **origin, **differing, "medseg": version("medseg")}
    others = _others(predictions, {case.id for case in chosen.cases})
    evaluation = make_evaluation(chosen.targets, rows, provenance, not_scored=others)
    write_evaluation(evaluation, out)
    return evaluation


def load_reference(
    reference: Path,
    predictions: Path,
    *,
    spec: Spec | Path | None = None,
    splits: Path | None = None,
    split: Literal["test", "train", "all"] | None = None,
) -> Reference:
    """Find the cases to be scored and what is scored in them; parameters and errors as for `evaluate`."""
    if reference.is_dir() and not any((reference / name).exists() for name in ("dataset.yaml", "dataset.json")):
        return _mask_folder(reference, predictions, spec)
    dataset = load_dataset(reference, splits=splits)
    part = split or ("test" if dataset.select("test") else "all")
    cases = dataset.cases if part == "all" else dataset.select(part)
    return dataset_reference(dataset, cases, part)


def dataset_reference(dataset: Dataset, cases: Sequence[Case], part: str) -> Reference:
    """Return the reference that the masks of `cases` are; raise ConfigError(NO_REFERENCE) where none has one."""
    labelled = tuple(case for case in cases if case.mask is not None)
    if not labelled:
        raise ConfigError(
            f"dataset {dataset.spec.name}: none of its {len(cases)} {part} cases has a mask to compare with; "
            "choose another split or add the masks",
            code="NO_REFERENCE",
        )
    provenance = {
        "dataset": dataset.spec.name,
        "dataset_spec_hash": spec_digest(dataset.spec),
        "split": part,
        "cases_without_reference": str(len(cases) - len(labelled)),
    }
    return Reference(dataset.spec, labelled, targets_of(dataset.spec), provenance)


def _mask_folder(folder: Path, predictions: Path, spec: Spec | Path | None) -> Reference:
    masks = sorted(path for path in folder.iterdir() if _is_label_map(path) and not path.name.startswith("."))
    if not masks:
        raise ConfigError(
            f"{folder}: this is neither a dataset nor a folder of .nii, .nii.gz, .png or .tif masks",
            code="NO_REFERENCE",
        )
    if isinstance(spec, Path):
        spec = config.load(Spec, spec, error=SpecError)
    if spec is not None:
        named = [replace(make_case(spec, stem(path), (path,), path), images=()) for path in masks]
        return Reference(spec, tuple(named), targets_of(spec), {"dataset": spec.name, "split": "all"})
    cases = tuple(Case(stem(path), (), path, patient=stem(path)) for path in masks)
    values = _values_found({stem(path): path for path in masks}, predictions)
    colours = colours_for(values)
    targets = tuple(Target(f"label_{value}", (value,), colours[value]) for value in values)
    return Reference(None, cases, targets, {"dataset": "folder of masks", "split": "all"})


def _others(predictions: Path, scored: Set[str]) -> list[str]:
    """Return the ids of the label maps in a folder of predictions that are of no case in `scored`."""
    found = {stem(path) for path in predictions.iterdir() if _is_label_map(path) and not path.name.startswith(".")}
    return sorted(found - scored)


def _is_label_map(path: Path) -> bool:
    return is_nifti(path) or is_picture(path)


def _values_found(masks: Mapping[str, Path], predictions: Path) -> list[int]:
    """Return the label values of all masks and predictions: one that only a prediction holds is a false alarm."""
    found: set[int] = set()
    for case_id, path in masks.items():
        found.update(np.unique(read_label_map(path, case_id).array).tolist())
        predicted = _read_prediction(find_prediction(predictions, case_id), case_id)
        if isinstance(predicted, Volume):
            found.update(np.unique(predicted.array).tolist())
    if not found - {0}:
        raise ConfigError("the masks hold no label, only 0; nothing can be scored", code="NO_REFERENCE")
    return sorted(found - {0})


def targets_of(spec: Spec) -> tuple[Target, ...]:
    """Return the labels of a spec, then its regions (one named like a label is called "NAME (region)")."""
    colours = colours_for(spec.foreground.values(), {row.value: row.color for row in spec.labels.values()})
    labels = [Target(name, (value,), colours[value]) for name, value in spec.foreground.items()]
    regions = [
        Target(
            f"{name} (region)" if name in spec.foreground else name,
            tuple(spec.foreground[label] for label in region.labels),
            colours[spec.foreground[region.paint]],
            region=True,
        )
        for name, region in spec.regions.items()
    ]
    return (*labels, *regions)


def find_prediction(predictions: Path, case_id: str) -> Path | None:
    """Return the label map of a case in a folder of predictions, None where there is none."""
    candidates = (predictions / f"{case_id}{suffix}" for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def read_label_map(path: Path, case_id: str) -> Volume:
    """Read a mask as (1, I, J, K) int32.

    Raises
    ------
    ReadError, GeometryError : it cannot be read, or has several channels (NOT_3D).
    SpecError : LABEL_NOT_INTEGER.
    """
    volume = read_labels(path)
    if volume.array.shape[0] != 1:
        raise ReadError(f"case {case_id}: the mask has {volume.array.shape[0]} channels, not one", code="NOT_3D")
    array = volume.array.astype(np.int32)
    if not np.array_equal(array, volume.array):
        example = float(volume.array[array != volume.array][0])
        raise SpecError(
            f"case {case_id}: {path.name} holds {example:g}; label values are whole numbers (are these probabilities?)",
            code="LABEL_NOT_INTEGER",
        )
    return volume.with_array(array)


def _refusal(predictions: Path, case_id: str) -> str | None:
    """Return why `medseg predict` could not segment a case, None where it did or where there is no ledger.

    A mask beside such an entry is left from an earlier run and is not this model's.
    """
    path = predictions / LEDGER / f"{case_id}.json"
    if not path.exists():
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        state, code = str(entry["state"]), str(entry["code"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: this ledger entry is damaged ({error}); predict the case again", code="BAD_LEDGER"
        ) from error
    return None if state == "done" else code or "PREDICTION_MISSING"


def _read_prediction(path: Path | None, case_id: str) -> Volume | str:
    """Return the predicted label map, or the reason code why there is none."""
    if path is None:
        return "PREDICTION_MISSING"
    try:
        return read_label_map(path, case_id)
    except (ReadError, GeometryError) as error:
        return error.code


def align_prediction(prediction: Volume, reference: Volume, case_id: str) -> Volume:
    """Return the prediction in the reference's axis order; raise GeometryError(PREDICTION_GRID) on another grid."""
    aligned = align_to(prediction, reference)
    if aligned is None:
        raise GeometryError(
            f"case {case_id}: the prediction has a grid of {prediction.grid}, the reference one of "
            f"{reference.grid}; a prediction must lie on the grid of its image (is it another case's?)",
            code="PREDICTION_GRID",
        )
    return aligned


def _score_case(reference: Reference, case: Case, predicted: Volume | str) -> Iterator[Row]:
    """Yield the rows of one case, target by target; `predicted` is a reason code where there is no prediction."""
    truth = reference.read(case)
    if isinstance(predicted, Volume):
        predicted = align_prediction(predicted, truth, case.id)
        if reference.spec is not None:
            allowed = reference.spec.values - {reference.spec.ignore}
            _require_values(predicted, reference.spec, case.id, "prediction", allowed, "PREDICTION_VALUES")
    ignore = None if reference.spec is None else reference.spec.ignore
    counted = np.True_ if ignore is None else truth.array[0] != ignore
    in_mm = truth.unit == "mm" if reference.spec is None else reference.spec.unit == "mm"
    voxel = truth.voxel_volume / 1000 if in_mm else 1.0
    known = reference.values_known(case)
    for target in reference.targets:
        if not known >= set(target.values):
            continue
        present = np.isin(truth.array[0], target.values)
        if isinstance(predicted, Volume):
            pair = Pair(np.isin(predicted.array[0], target.values) & counted, present, voxel)
            found = {name: measure(metric, pair) for name, metric in METRICS.items()}
        else:
            found = {name: measure_failed(metric, present, voxel, predicted) for name, metric in METRICS.items()}
        for name, measurement in found.items():
            unit = METRICS[name].unit
            yield _table_row(case, target, name, unit if in_mm or unit != "mL" else "voxels", measurement)


def _table_row(case: Case, target: Target, metric: str, unit: str, found: Measurement) -> Row:
    return Row(case.id, case.patient, target.name, metric, unit, found.value, found.status, found.reason)


def _require_values(mask: Volume, spec: Spec, case_id: str, what: str, allowed: Set[int], code: str) -> None:
    """Refuse a mask with values that the dataset does not have: another model's, or another dataset's."""
    if foreign := sorted(set(np.unique(mask.array).tolist()) - allowed):
        raise SpecError(
            f"case {case_id}: the {what} holds the value(s) {', '.join(map(str, foreign[:5]))}; the spec {spec.name} "
            f"allows {', '.join(map(str, sorted(allowed)))}",
            code=code,
        )


def told_of(predictions: Path) -> dict[str, Any]:
    """Return what predictions.json says about the model; nothing where there is none."""
    path = predictions / PROVENANCE
    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: this is not valid JSON ({error}); predict again", code="BAD_PROVENANCE") from error
    return told if isinstance(told, dict) else {}
