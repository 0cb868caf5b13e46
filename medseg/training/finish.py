"""What follows the loop: the bundle, its scores on the validation cases, curves, overlays, and the registry."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medseg.bundle import BUNDLE_FORMAT, Bundle, BundleInfo, load_networks, save_bundle, versions
from medseg.display import Display
from medseg.evaluation.evaluate import dataset_reference, evaluate_against
from medseg.exporters.nifti import write_nifti
from medseg.files import write_atomically, write_json
from medseg.inference.predict import Model, predict_volume
from medseg.planning.plan import Plan
from medseg.plots import colours_for, curves_png, three_planes_png
from medseg.readers.nifti import read_nifti
from medseg.spec import Case, Dataset, Spec
from medseg.studies import read_study
from medseg.tracking import Tracker
from medseg.training.loop import Job, Learner
from medseg.training.state import LoopState
from medseg.volume import Volume, reorient

FINISH_SECONDS = 8.0
"""Bundle, tables, plots and registry; measured 5 to 8 s on two cores."""
OVERLAYS = 3


def scoring_factor(plan: Plan) -> float:
    """Return how much longer scoring takes than a validation: it mirrors, reads the sources and restores the grid."""
    return 1.2 * (2 ** len(plan.augmentation.mirror_axes) if plan.test_mirroring else 1)


def time_of_validation(job: Job) -> float:
    """Return the expected seconds of a validation, by an untrained network on a few cases."""
    learner = Learner(job)
    cases = job.validation[:3]
    learner.case_dice(cases[0])  # the first call of a network compiles kernels
    began = time.monotonic()
    for case in cases:
        learner.case_dice(case)
    return (time.monotonic() - began) / len(cases) * len(job.validation)


def finish_run(
    out: Path,
    jobs: Sequence[Job],
    states: Sequence[LoopState],
    dataset_digest: str,
    tracker: Tracker,
    model_name: str,
    display: Display,
) -> Bundle:
    """Write the bundle, score it on the validation cases, draw, and register it; returns the bundle."""
    display.stage("scoring")
    dice, rows = _score(out, jobs, states, display)
    info = make_info(jobs, states, dataset_digest, tracker.run_id)
    info = info.model_copy(update={"training": {**info.training, "dice": dice}})
    bundle = save_bundle(out / "6_model", info, weights_of(states))
    report = out / "7_report"
    for number, (job, state) in enumerate(zip(jobs, states, strict=True)):
        curves = out / "5_folds" / str(_number(job)) / "curves" / "curves.png"
        curves_png(curve_rows(job, state), curves)
        tracker.artifact(curves, f"curves/{number}")
    _overlays(jobs[0], out, report / "overlays")
    tracker.table("validation_cases", rows)
    tracker.metrics({f"final_dice_{name}": value for name, value in dice.items()}, step=states[-1].step)
    tracker.artifact(report / "overlays")
    tags = {"model_digest": bundle.info.digest, "dataset_digest": dataset_digest}
    tracker.register(model_name, bundle.folder, alias="candidate", tags=tags)
    return bundle


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


def _score(
    out: Path, jobs: Sequence[Job], states: Sequence[LoopState], display: Display
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Predict every validation case with the network that has not seen it, on its source grid."""
    found: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    cases_done: set[str] = set()
    total = sum(len(job.validation) for job in jobs)
    for job, state in zip(jobs, states, strict=True):
        place = out / "5_folds" / str(_number(job)) / "validation"
        info = make_info([job], [state], "", None)
        single = save_bundle(place / "model", info, weights_of([state]))
        model = Model(single, [n.to(job.device) for n in load_networks(single)], job.device)
        write_json(place / "predictions.json", info.provenance(None))
        for number, case in enumerate(job.validation):
            mask = predict_volume(model, read_study(job.spec, case).image)
            write_nifti(place / f"{case.id}.nii.gz", mask)
            display.counted(len(cases_done) + number + 1, total)
        reference = dataset_reference(Dataset(job.spec, job.validation), job.validation, "validation")
        evaluation = evaluate_against(reference, place, out=place)
        cases_done.update(evaluation.cases)
        rows += [asdict(row) for row in evaluation.rows]
        for label in job.spec.foreground:
            found.setdefault(label, []).extend(evaluation.values("dice", label).values())
    return {label: float(np.mean(values)) for label, values in found.items() if values}, rows


def _overlays(job: Job, run: Path, folder: Path) -> None:
    """Draw the prediction and the reference of a few validation cases."""
    for case in job.validation[:OVERLAYS]:
        mask = read_nifti(run / "5_folds" / str(_number(job)) / "validation" / f"{case.id}.nii.gz")
        write_overlay(folder / f"{case.id}.png", job.spec, case, mask)


def write_overlay(path: Path, spec: Spec, case: Case, mask: Volume) -> None:
    """Draw three planes of a case with a predicted mask, the reference (where there is one) as outline."""
    study = read_study(spec, case)
    image, found = reorient(study.image, "RAS"), reorient(mask, "RAS")
    reference = None if study.mask is None else reorient(study.mask, "RAS").array[0]
    colours = colours_for(spec.foreground.values(), {label.value: label.color for label in spec.labels.values()})
    content = three_planes_png(image.array[0], found.array[0], image.spacing, colours, reference=reference)
    write_atomically(path, lambda temporary: _put(temporary, content))


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)
