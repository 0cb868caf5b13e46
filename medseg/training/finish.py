"""What follows the loop: the bundle, its scores on the validation cases, curves, overlays, and the registry."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medseg.bundle import (
    BUNDLE_FORMAT,
    Bundle,
    BundleInfo,
    Calibration,
    PostStep,
    load_networks,
    save_bundle,
    versions,
)
from medseg.display import Display
from medseg.evaluation.evaluate import dataset_reference, evaluate_against
from medseg.evaluation.table import make_evaluation, write_evaluation
from medseg.exporters.nifti import write_nifti
from medseg.files import write_atomically, write_json, write_text
from medseg.inference.answer import kept, logits_at, painted
from medseg.inference.predict import Model, answer_of, notes_for
from medseg.joined import annotated
from medseg.plots import colours_for, curves_png, three_planes_png
from medseg.quality.model import QualityModel
from medseg.quality.page import write_quality
from medseg.quality.shape import label_shapes
from medseg.quality.signs import Notes
from medseg.readers.nifti import read_nifti
from medseg.spec import Case, Dataset, Spec
from medseg.studies import read_study
from medseg.targets import known_channels
from medseg.tracking import Tracker
from medseg.training.choose_steps import StepTrial, evidence_csv, told
from medseg.training.drawn import write_drawn
from medseg.training.loop import Job
from medseg.training.quality import Seen, fit_seen
from medseg.training.quality import told as quality_told
from medseg.training.start_told import basis_of, seen_by, start_facts, validation_seen
from medseg.training.state import LoopState
from medseg.training.temperature import LogitsAt, VoxelSample
from medseg.volume import Volume, reorient, shown_axes

OVERLAYS = 3
TRYING_SECONDS, TRYING_SHARE = 1.0, 0.1
"""What trying post-processing may take under a budget, beside the predictions."""


def finish_run(
    out: Path,
    jobs: Sequence[Job],
    states: Sequence[LoopState],
    dataset_digest: str,
    tracker: Tracker,
    model_name: str,
    display: Display,
    *,
    hurry: bool,
) -> Bundle:
    """Score the networks on the validation cases, write the bundle, draw, and register it; returns the bundle.

    `hurry`: whether there is a budget, so that post-processing is tried only as long as it takes little.
    """
    display.stage("scoring")
    scored = _score(out, jobs, states, dataset_digest, display, hurry=hurry)
    steps, evidence = scored.trial.choose()
    calibration = scored.sample.fit()
    info = make_info(jobs, states, dataset_digest, tracker.run_id)
    report = out / "7_report"
    quality = _judge(jobs, scored, steps, report, display)
    update = {
        "training": {**info.training, "dice": scored.dice, **start_facts(jobs)},
        "postprocess": steps,
        "calibration": calibration,
        "quality": quality,
        "seen": {f"fold_{i}.safetensors": seen_by(job) for i, job in enumerate(jobs)},
    }
    bundle = save_bundle(out / "6_model", info.model_copy(update=update), weights_of(states))
    write_text(report / "postprocess.csv", evidence_csv(evidence))
    basis = basis_of(jobs)
    display.say(told(steps, scored.trial, folds=len(jobs), basis=basis))
    if calibration is not None:
        display.say(_calibrated(calibration, basis))
        tracker.metrics(
            {name: getattr(calibration, name) for name in ("temperature", "ece_before", "ece_after")},
            step=states[-1].step,
        )
    for number, (job, state) in enumerate(zip(jobs, states, strict=True)):
        curves = out / "5_folds" / str(_number(job)) / "curves"
        curves_png(curve_rows(job, state), curves / "curves.png")
        write_drawn(curves / "draws.csv", job.spec, job.plan, job.train, steps=state.step, seen=state.seen)
        write_json(curves / "pace.json", {**asdict(state.pace), "data_share": state.pace.data_share})
        for file in sorted(curves.iterdir()):
            tracker.artifact(file, f"curves/{number}")
        display.say(f"fold {_number(job)}: {state.pace}" if len(jobs) > 1 else str(state.pace))
    _overlays(jobs[0], out, report / "overlays")
    tracker.table("validation_cases", scored.rows)
    tracker.metrics({f"final_dice_{name}": value for name, value in scored.dice.items()}, step=states[-1].step)
    tracker.artifact(report / "overlays")
    tags = {"model_digest": bundle.info.digest, "dataset_digest": dataset_digest}
    tracker.register(model_name, bundle.folder, alias="candidate", tags=tags)
    return bundle


def _calibrated(found: Calibration, basis: str) -> str:
    return (
        f"calibration: temperature {found.temperature:g}, expected calibration error {found.ece_before:.4f} before, "
        f"{found.ece_after:.4f} after ({found.voxels} voxels of {found.cases} {basis})"
    )


def _judge(
    jobs: Sequence[Job], scored: Scored, steps: Sequence[PostStep], report: Path, display: Display
) -> QualityModel | None:
    """Fit what will say how good a mask is, and write how well it does on cases that it has not seen.

    Cases that a fine-tuned network had learnt from before are left out: nothing follows from their Dice for new ones.
    """
    spec, plan = jobs[0].spec, jobs[0].plan
    known = {case for job in jobs for case in validation_seen(job) or ()}
    fresh = [one for one in scored.seen if one.case.id not in known]
    fitted = fit_seen(fresh, spec, steps, scored.case_dice, folds=len(jobs), mirror=plan.test_mirroring)
    summary = None if fitted is None else write_quality(report, fitted, seed=plan.seed)
    display.say(quality_told(summary, cases=len(fresh), known=len(known)))
    return None if fitted is None else fitted.model


def make_info(
    jobs: Sequence[Job], states: Sequence[LoopState], dataset_digest: str, tracking_run: str | None
) -> BundleInfo:
    """Describe the model that `jobs` and `states` make; its weights are not written yet."""
    job = jobs[0]
    return BundleInfo(
        format=BUNDLE_FORMAT,
        name=job.spec.name,
        plan=job.plan,
        spec=job.spec.model_copy(update={"root": "."}),
        weights={f"fold_{i}.safetensors": "" for i in range(len(states))},
        dataset_digest=dataset_digest,
        training={
            "steps": sum(state.step for state in states),
            "seconds": round(sum(state.seconds for state in states), 1),
            "cases": len({case.id for job in jobs for case in (*job.train, *job.validation)}),
        },
        versions=versions(),
        tracking_run=tracking_run,
    )


def weights_of(states: Sequence[LoopState]) -> dict[str, Any]:
    """Return file name -> the weights that validated best."""
    return {f"fold_{i}.safetensors": state.best for i, state in enumerate(states)}


def curve_rows(job: Job, state: LoopState) -> list[dict[str, Any]]:
    """Return the rows from which curves are drawn: one a step, one a validation."""
    steps = [
        {"step": i + 1, "loss": loss, "lr": job.plan.learning_rate * factor}
        for i, (loss, factor) in enumerate(zip(state.losses, state.factors, strict=True))
    ]
    return [*steps, *state.validations]


def _number(job: Job) -> int:
    return int(job.checkpoint.parent.parent.name)


@dataclass
class Scored:
    """What the validation cases have told so far; `rows` are those of the tracked table.

    `case_dice` is label -> case id -> Dice, `seen` what was noted of each case.
    """

    trial: StepTrial
    sample: VoxelSample
    dice: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    case_dice: dict[str, dict[str, float]] = field(default_factory=dict)
    predicting: float = 0.0
    trying: float = 0.0

    def add(
        self, case: Case, file: Path, notes: Notes, at: LogitsAt, mask: Volume, reference: Volume, *, hurry: bool
    ) -> None:
        """Learn from one case, whose mask lies in `file`, and whose logits `at` gives."""
        spec = self.trial.spec
        self.seen.append(Seen(case, file, notes, label_shapes(reference, spec)))
        self.sample.add(at, mask.array, reference, known_channels(spec, case))
        began = time.monotonic()
        self.trial.complete &= not hurry or self.trying < TRYING_SECONDS + TRYING_SHARE * self.predicting
        if self.trial.complete:
            self.trial.add(mask, reference, annotated(spec, case))
        self.trying += time.monotonic() - began


def _score(
    out: Path,
    jobs: Sequence[Job],
    states: Sequence[LoopState],
    dataset_digest: str,
    display: Display,
    *,
    hurry: bool,
) -> Scored:
    """Predict every validation case with the network that has not seen it, on its source grid.

    Masks and tables of each fold are written beside it, one table of all folds into 7_report.
    """
    spec, plan = jobs[0].spec, jobs[0].plan
    total = sum(len(job.validation) for job in jobs)
    scored = Scored(StepTrial(spec, plan.fingerprint), VoxelSample(spec, cases=total, seed=plan.seed))
    evaluations, folds = [], []
    for job, state in zip(jobs, states, strict=True):
        place = out / "5_folds" / str(_number(job)) / "validation"
        info = make_info([job], [state], dataset_digest, None)
        single = save_bundle(place / "model", info, weights_of([state]))
        model = Model(single, [n.to(job.device) for n in load_networks(single)], job.device)
        write_json(place / "predictions.json", single.info.provenance(None))
        for case in job.validation:
            _score_case(model, case, place, scored, hurry=hurry)
            folds.append(f"{case.id},{_number(job)}")
            display.counted(len(folds), total)
        reference = dataset_reference(Dataset(spec, job.validation), job.validation, "validation")
        evaluations.append(evaluate_against(reference, place, out=place))
    rows = sorted((row for evaluation in evaluations for row in evaluation.rows), key=lambda row: row.case)
    first = evaluations[0]
    told = {key: value for key, value in first.provenance.items() if key.startswith(("dataset", "split", "medseg"))}
    whole = make_evaluation(first.targets, rows, {**told, "folds": str(len(jobs))})
    write_evaluation(whole, out / "7_report")
    write_text(out / "7_report" / "folds.csv", "\n".join(["case,fold", *folds]) + "\n")
    scored.rows = [asdict(row) for row in rows]
    scored.case_dice = {label: whole.values("dice", label) for label in spec.foreground}
    scored.dice = {label: float(np.mean(list(rows.values()))) for label, rows in scored.case_dice.items() if rows}
    return scored


def _score_case(model: Model, case: Case, place: Path, scored: Scored, *, hurry: bool) -> None:
    """Predict one validation case and learn from it."""
    study = read_study(model.bundle.info.spec, case)
    began = time.monotonic()
    notes, at, mask = noted_prediction(model, study.image, place)
    file = place / f"{case.id}.nii.gz"
    write_nifti(file, mask)
    scored.predicting += time.monotonic() - began
    assert study.mask is not None, "cases without a mask do not learn"
    scored.add(case, file, notes, at, mask, study.mask, hurry=hurry)


def noted_prediction(model: Model, image: Volume, place: Path) -> tuple[Notes, LogitsAt, Volume]:
    """Predict as the finished model will; return what was noted, the logits, and the mask on the grid of `image`.

    The logits lie in a file in `place` for as long as these are held.
    """
    info = model.bundle.info
    notes = notes_for(model, mirror=info.plan.test_mirroring)
    answer = kept(answer_of(model, image, notes=notes), place)
    return notes, partial(logits_at, answer), image.with_array(painted(answer))


def _overlays(job: Job, run: Path, folder: Path) -> None:
    """Draw the prediction and the reference of a few validation cases."""
    for case in job.validation[:OVERLAYS]:
        mask = read_nifti(run / "5_folds" / str(_number(job)) / "validation" / f"{case.id}.nii.gz")
        write_overlay(folder / f"{case.id}.png", job.spec, case, mask)


def write_overlay(path: Path, spec: Spec, case: Case, mask: Volume) -> None:
    """Draw three planes of a case with a predicted mask, the reference (where there is one) as outline."""
    study = read_study(spec, case)
    axes = shown_axes(study.image.unit)
    image, found = reorient(study.image, axes), reorient(mask, axes)
    reference = None if study.mask is None else reorient(study.mask, axes).array[0]
    colours = colours_for(spec.foreground.values(), {label.value: label.color for label in spec.labels.values()})
    letters = study.image.unit == "mm"
    content = three_planes_png(
        image.array[0], found.array[0], image.spacing, colours, reference=reference, letters=letters
    )
    write_atomically(path, lambda temporary: _put(temporary, content))


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)
