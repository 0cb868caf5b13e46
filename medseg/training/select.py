"""Compare finished runs of the same data and folds, and write the best model or ensemble of them.

    OUT/5_folds/validation/ (out-of-fold masks of an ensemble)  6_model/ (the bundle)  7_report/ (selection.csv, .json)

Every case is predicted by the networks that have not seen it, one of each run; probabilities are averaged on the grid
of the image. The logits of all runs for one case lie in files in OUT, and are read slice by slice.
"""

from __future__ import annotations

import csv
import io
import itertools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medseg.bundle import (
    BUNDLE_FORMAT,
    MODEL_FILE,
    BundleInfo,
    Calibration,
    Member,
    PostStep,
    member_folder,
    open_bundle,
    save_bundle,
    versions,
)
from medseg.device import best_device
from medseg.display import Display
from medseg.errors import ConfigError, TrainingError
from medseg.evaluation.evaluate import dataset_reference, evaluate_against, targets_of
from medseg.evaluation.metrics import METRICS, Pair, measure
from medseg.evaluation.table import Evaluation, Row, make_evaluation
from medseg.exporters.nifti import write_nifti
from medseg.files import write_atomically, write_json, write_text
from medseg.inference.answer import Answer, averaged, kept, logits_at, painted
from medseg.inference.predict import answer_of
from medseg.joined import annotated
from medseg.joining import load_datasets
from medseg.spec import Case, Dataset, Spec
from medseg.studies import Study, read_study
from medseg.targets import known_channels, mean_logits
from medseg.training.choose_steps import StepTrial, evidence_csv, told
from medseg.training.copies import one_patient
from medseg.training.ensembles import MARGIN, MIN_PATIENTS, Candidate, Choice, Repeated, choose, repeat
from medseg.training.finished import DIFFER, Finished, open_runs
from medseg.training.manifest import learning_cases, make_manifest
from medseg.training.temperature import VoxelSample
from medseg.volume import Volume

MOST = 5
"""Runs at once: all their ensembles are tried, 26 of 5 runs."""


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes
    ----------
    model : folder of the bundle.
    repeated : the rule applied without each fold in turn; None for a single split.
    table : one row a candidate, the best first.
    """

    model: Path
    choice: Choice
    repeated: Repeated | None
    table: tuple[Mapping[str, Any], ...]


def select_model(
    datasets: Path | Sequence[Path],
    runs: Sequence[Path],
    *,
    out: Path,
    splits: Path | None = None,
    display: Display | None = None,
) -> Selection:
    """Choose among runs and their ensembles by out-of-fold Dice (see medseg.training.ensembles), and write the model.

    Parameters
    ----------
    datasets, splits : that all runs learnt from.
    runs : 2 to MOST finished run folders of `medseg train`.
    out : folder for the model and the tables; it predicts like a run.

    Raises
    ------
    ConfigError : too few or too many runs; `out` holds a model already.
    SpecError, TrainingError, BundleError : the dataset or a run cannot be used; RUNS_DIFFER.
    ExportError : `out` cannot be written; DISK_FULL.
    """
    if not 2 <= len(runs) <= MOST:
        raise ConfigError(f"{len(runs)} run(s) to choose from: give 2 to {MOST}")
    if (out / "6_model" / MODEL_FILE).exists():
        raise ConfigError(f"{out} holds a model already; choose another --out")
    found = open_runs(runs)
    paths = (datasets,) if isinstance(datasets, Path) else tuple(datasets)
    dataset = load_datasets(paths, splits=splits)
    manifest = make_manifest(dataset)
    if manifest["digest"] != found[0].data_digest:
        raise TrainingError(
            f"{found[0].name} learnt from other data than {' '.join(map(str, paths))} (with these splits) holds; give "
            "the dataset and the --splits of its training",
            code=DIFFER,
        )
    shutil.rmtree(out / "6_model", ignore_errors=True)  # of a command that was killed
    cases = one_patient(dataset, learning_cases(dataset), manifest)
    work = _Work(dataset.spec, found, tuple(c for c in cases if c.id in found[0].folds), out)
    with display or Display(None) as shown:
        for run in found:
            if None in run.validation_known:
                shown.say(
                    f"{run.name} was fine-tuned from a model that does not tell what it learnt from: if the cases here "
                    "are among it, its Dice is too good, and so is that of its ensembles"
                )
        shown.stage("predicting out of fold")
        candidates = work.candidates(shown)
        choice, repeated = choose(candidates), repeat(candidates, found[0].folds)
        chosen = [run for run in found if run.name in choice.chosen.names]
        table = _table(choice)
        _write(out / "7_report", choice, repeated, table)  # before the model, with which a selection is complete
        if len(chosen) == 1:
            _copy(chosen[0].bundle.folder, out / "6_model")
            open_bundle(out)  # what was copied is what was read
        else:
            shown.stage("scoring the ensemble")
            work.ensemble(chosen, out, shown)
        for line in describe(choice, repeated, table):
            shown.say(line)
    return Selection(out / "6_model", choice, repeated, table)


@dataclass(frozen=True)
class _Work:
    """A selection in progress: `cases` are those that every run has validated, `out` is where answers are kept."""

    spec: Spec
    runs: Sequence[Finished]
    cases: tuple[Case, ...]
    out: Path

    def predictions(self, runs: Sequence[Finished], shown: Display) -> Iterator[tuple[Case, Study, Iterator[Answer]]]:
        """Yield each case with an iterator of what each run's network says that has not seen it."""
        device, folds = best_device(), self.runs[0].folds
        done = 0
        for fold in sorted(set(folds.values())):
            models = [run.model(fold, device) for run in runs]
            for case in self.cases:
                if folds[case.id] == fold:
                    study = read_study(self.spec, case)
                    yield case, study, (kept(answer_of(model, study.image), self.out) for model in models)
                    done += 1
                    shown.counted(done, len(self.cases))

    def candidates(self, shown: Display) -> list[Candidate]:
        """Score every run and every ensemble of them."""
        numbers = range(len(self.runs))
        groups = [group for size in numbers for group in itertools.combinations(numbers, size + 1)]
        rows: dict[tuple[int, ...], list[Row]] = {group: [] for group in groups}
        seconds = np.zeros(len(self.runs))
        for case, study, each in self.predictions(self.runs, shown):
            answers: list[Answer] = []
            for number in numbers:
                began = time.monotonic()
                answers.append(next(each))
                mask = painted(answers[number])
                seconds[number] += time.monotonic() - began
                rows[number,] += dice_rows(self.spec, case, study, mask)
            for group in groups:
                if len(group) > 1:
                    rows[group] += dice_rows(self.spec, case, study, averaged([answers[n] for n in group]))
        seconds /= len(self.cases)
        return [
            Candidate(
                tuple(self.runs[n].name for n in group),
                _evaluation(self.spec, rows[group]),
                sum(len(self.runs[n].bundle.info.weights) for n in group),
                float(sum(seconds[n] for n in group)),
            )
            for group in groups
        ]

    def ensemble(self, runs: Sequence[Finished], out: Path, shown: Display) -> None:
        """Write the bundle of an ensemble, with post-processing and temperature of its own, and its tables."""
        place, plan = out / "5_folds" / "validation", runs[0].bundle.info.plan
        trial = StepTrial(self.spec, plan.fingerprint)
        sample = VoxelSample(self.spec, cases=len(self.cases), seed=plan.seed)
        for case, study, each in self.predictions(runs, shown):
            assert study.mask is not None, "cases without a mask do not learn"
            answers = list(each)
            mask = study.image.with_array(averaged(answers))
            write_nifti(place / f"{case.id}.nii.gz", mask)
            trial.add(mask, study.mask, annotated(self.spec, case))
            sample.add(partial(mean_at, answers), mask.array, study.mask, known_channels(self.spec, case))
            del answers  # and their files with them, before those of the next case are written
        steps, evidence = trial.choose()
        members = []
        for number, run in enumerate(runs):
            _copy(run.bundle.folder, out / "6_model" / member_folder(number))
            info = run.bundle.info
            members.append(Member(name=run.name, digest=info.digest, networks=len(info.weights)))
        reference = dataset_reference(Dataset(self.spec, self.cases), self.cases, "validation")
        evaluation = evaluate_against(reference, place, out=out / "7_report")
        info = _info(runs, members, steps, sample.fit(), evaluation)
        write_json(place / "predictions.json", info.provenance(None))
        folds = [f"{case},{fold}" for case, fold in self.runs[0].folds.items()]
        write_text(out / "7_report" / "folds.csv", "\n".join(["case,fold", *folds]) + "\n")
        write_text(out / "7_report" / "postprocess.csv", evidence_csv(evidence))
        save_bundle(out / "6_model", info, {})
        open_bundle(out)  # what was copied is what was read
        shown.say(told(steps, trial, folds=len(set(self.runs[0].folds.values()))))


def mean_at(answers: Sequence[Answer], voxels: NDArray[np.int64]) -> Tensor:
    """Return the mean of calibrated probabilities at some voxels of the image, as logits (K, M)."""
    return mean_logits(answers[0].info.spec, (logits_at(each, voxels) / each.info.temperature for each in answers))


def _copy(source: Path, target: Path) -> None:
    """Copy a bundle; its model.json comes last, so that half a copy is none."""
    files = sorted((file for file in source.rglob("*") if file.is_file()), key=lambda file: file.name == MODEL_FILE)
    for file in files:
        write_atomically(target / file.relative_to(source), partial(shutil.copyfile, file))


def _info(
    runs: Sequence[Finished],
    members: Sequence[Member],
    steps: Sequence[PostStep],
    calibration: Calibration | None,
    evaluation: Evaluation,
) -> BundleInfo:
    first, trainings = runs[0].bundle.info, [run.bundle.info.training for run in runs]
    values = {label: list(evaluation.values("dice", label).values()) for label in first.spec.foreground}
    return BundleInfo(
        format=BUNDLE_FORMAT,
        name=first.name,
        plan=first.plan,
        spec=first.spec,
        weights={},
        dataset_digest=runs[0].data_digest,
        training={
            "steps": sum(told["steps"] for told in trainings),
            "seconds": round(sum(told["seconds"] for told in trainings), 1),
            "cases": trainings[0]["cases"],
            "dice": {label: float(np.mean(found)) for label, found in values.items() if found},
        },
        versions=versions(),
        postprocess=tuple(steps),
        calibration=calibration,
        members=tuple(members),
    )


def dice_rows(spec: Spec, case: Case, study: Study, found: Any) -> list[Row]:
    """Return the Dice of each label as `medseg evaluate` counts it; `found` (1, I, J, K) are label values."""
    reference: Volume | None = study.mask
    assert reference is not None, "cases without a mask do not learn"
    truth, metric = reference.array[0], METRICS["dice"]
    counted = np.True_ if spec.ignore is None else truth != spec.ignore
    rows = []
    for label, value in annotated(spec, case).items():
        got = measure(metric, Pair((found[0] == value) & counted, truth == value, 1.0))
        rows.append(Row(case.id, case.patient, label, metric.id, metric.unit, got.value, got.status, got.reason))
    return rows


def _evaluation(spec: Spec, rows: Sequence[Row]) -> Evaluation:
    return make_evaluation([target for target in targets_of(spec) if not target.region], rows, {})


def _table(choice: Choice) -> tuple[dict[str, Any], ...]:
    """Return a row for each candidate, the highest mean Dice first."""
    table = []
    for row in sorted(choice.candidates, key=lambda row: -row.dice):
        labels = [told for told in row.evaluation.summary if told.label in {t.name for t in row.evaluation.targets}]
        gain = choice.gains.get(row.name)
        table.append(
            {
                "model": row.name,
                "dice": row.evaluation.mean_dice,
                **{f"dice {told.label}": told.mean for told in labels},
                **{f"n {told.label}": told.n_used for told in labels},
                "gain": gain and gain.mean_difference,
                "low": gain and gain.ci_low,
                "high": gain and gain.ci_high,
                "better": gain and gain.wins,
                "worse": gain and gain.losses,
                "networks": row.networks,
                "seconds": round(row.seconds, 3),
                "chosen": row is choice.chosen,
            }
        )
    return tuple(table)


def _write(report: Path, choice: Choice, repeated: Repeated | None, table: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_text(report / "selection.csv", text.getvalue())
    content = {
        "chosen": list(choice.chosen.names),
        "best_single": choice.best.name,
        "level": choice.level,
        "margin": MARGIN,
        "min_patients": MIN_PATIENTS,
        "repeated": repeated and {"dice": repeated.dice, "chosen": dict(repeated.counts)},
        "table": [dict(row) for row in table],
    }
    write_json(report / "selection.json", content)


def describe(choice: Choice, repeated: Repeated | None, table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table and the choice as lines for people."""
    labels = [key for key in table[0] if key.startswith("dice ")]
    width = max(len(str(row["model"])) for row in table)
    head = "  ".join(
        [f"{'':2}{'model':{width}}", f"{'Dice':>6}", *(f"{k[5:]:>9.9}" for k in labels), "gain (interval)"]
    )
    lines = [f"{head}{'':14}networks  s/case"]
    for row in table:
        gain = "best single one" if row["gain"] is None else f"{row['gain']:+.4f}"
        if row["low"] is not None:
            gain += f" ({row['low']:+.4f} to {row['high']:+.4f})"
        figures = "  ".join([f"{_figure(row['dice']):>6}", *(f"{_figure(row[key]):>9}" for key in labels)])
        mark = "* " if row["chosen"] else "  "
        lines.append(f"{mark}{row['model']:{width}}  {figures}  {gain:29}{row['networks']:>8}  {row['seconds']:>6.2f}")
    cases, patients = len(choice.best.evaluation.cases), len({r.patient for r in choice.best.evaluation.rows})
    lines.append(
        f"mean Dice of {cases} out-of-fold cases of {patients} patients, before post-processing; gain over the best "
        f"single one with its {100 * choice.level:.4g} % interval; s/case with one network of each"
    )
    lines.append(f"chosen: {choice.chosen.name} ({_reason(choice, patients)})")
    if repeated is not None and repeated.dice is not None:
        picks = ", ".join(f"{name} {count}x" for name, count in repeated.counts.items())
        lines.append(f"the same rule without each fold in turn chose {picks}; Dice {repeated.dice:.4f} on that fold")
    return lines


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _reason(choice: Choice, patients: int) -> str:
    if choice.chosen is not choice.best:
        return "its gain is beyond noise"
    if patients < MIN_PATIENTS:
        return f"an ensemble needs at least {MIN_PATIENTS} patients to show that it is better"
    return f"no ensemble gains {MARGIN:g} or more beyond noise"
