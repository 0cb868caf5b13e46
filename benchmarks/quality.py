"""How well a finished training knows its own errors, and whether it notices degraded images.

    python benchmarks/quality.py runs/hippocampus ../shared/data/hippocampus --cases 40

From RUN (`medseg train DATASET --folds 5 --out RUN`) and its DATASET: the table of 7_report/quality.json; then, each
case predicted by the network that has not seen it, the share of clean images that is flagged, and of the same images
with noise, motion, wrong contrast, cropped, or of lost orientation (medseg.phantom.degrade). `--test` takes the
held-out cases of the dataset and all networks instead, and adds expected against real Dice of cases that nothing has
seen.
`--quick` takes two cases.
"""

import argparse
import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg.bundle import open_bundle
from medseg.inference.predict import Model, load_model, predict_case
from medseg.phantom.degrade import DEGRADATIONS
from medseg.quality.apply import deviation, typicals
from medseg.quality.summary import correlations, worst_found
from medseg.spec import Case, Dataset, load_dataset
from medseg.studies import read_study
from medseg.training.quality import label_dice


def table(summary: dict[str, Any]) -> None:
    kind = f"{summary['folds']} folds" if summary["folds"] > 1 else "one split"
    print(f"{summary['cases']} cases of {summary['patients']} patients, {kind}; each patient left out of the fit")
    print(f"{'label':24} {'n':>4} {'Pearson (95 %)':>24} {'Spearman (95 %)':>24} {'error':>7} {'by volume alone':>16}")
    for label, row in summary["labels"].items():
        line(label, row, row["volume_only"], row["mean_absolute_error"])
    line("mean of the labels", summary["case_mean"], summary["case_mean_volume_only"], None)
    for name, words in (
        ("worst", "lowest expected Dice"),
        ("worst_volume_only", "by the volume alone"),
        ("worst_by_flag", "by the flag"),
    ):
        row = summary[name]
        if row:
            found = f"{row['found']} of the {row['worst']} worst ({row['share']:.0%})"
            print(f"{words}: {found} are among the {row['looked_at']} looked at")
    print(f"flagged: {json.dumps(summary['flagged'])}")


def line(label: str, row: dict[str, Any], volume: dict[str, Any], error: float | None) -> None:
    cells = [interval(row, name) for name in ("pearson", "spearman")]
    last = "" if error is None else f"{error:.3f}"
    print(f"{label:24} {row['n']:4d} {cells[0]:>24} {cells[1]:>24} {last:>7} {short(volume['spearman']):>16}")


def interval(row: dict[str, Any], name: str) -> str:
    edges = row[f"{name}_ci95"]
    return short(row[name]) + (f" ({edges[0]:.2f} to {edges[1]:.2f})" if edges else "")


def short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def own_models(run: Path) -> tuple[dict[str, int], dict[int, Model]]:
    """Return case -> fold that validated it, and fold -> its network with the estimate of the whole model."""
    folds = {row["case"]: int(row["fold"]) for row in csv.DictReader((run / "7_report" / "folds.csv").open())}
    whole = open_bundle(run).info
    models = {}
    for fold in sorted(set(folds.values())):
        bundle = open_bundle(run / "5_folds" / str(fold) / "validation" / "model")
        info = bundle.info.model_copy(update={"quality": whole.quality, "postprocess": whole.postprocess})
        models[fold] = load_model(replace(bundle, info=info))
    return folds, models


def chosen(dataset: Dataset, known: set[str] | None, count: int) -> list[Case]:
    cases = [case for case in dataset.cases if case.mask is not None]
    cases = list(dataset.select("test")) if known is None else [case for case in cases if case.id in known]
    drawn = np.random.default_rng(0).permutation(len(cases))[:count]
    return [cases[n] for n in sorted(drawn)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--splits", type=Path)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    report = options.run / "7_report" / "quality.json"
    if not report.exists():
        parser.error(f"{options.run} has no quality estimate: too few validation cases, or a run of before")
    table(json.loads(report.read_text()))
    folds, models = ({}, {0: load_model(options.run)}) if options.test else own_models(options.run)
    dataset = load_dataset(options.dataset, splits=options.splits)
    cases = chosen(dataset, None if options.test else set(folds), 2 if options.quick else options.cases)
    degraded(dataset, cases, folds, models, unseen=options.test)


def degraded(
    dataset: Dataset, cases: list[Case], folds: dict[str, int], models: dict[int, Model], *, unseen: bool
) -> None:
    flagged = dict.fromkeys(("clean", *DEGRADATIONS), 0)
    worse: dict[str, list[float]] = {kind: [] for kind in flagged}
    told, real, patients = [], [], []
    began = time.monotonic()
    for number, case in enumerate(cases):
        model = models[folds.get(case.id, 0)]
        quality = model.bundle.info.quality
        assert quality is not None
        study = read_study(dataset.spec, case)
        for kind in flagged:
            image = study.image
            if kind != "clean":
                image = DEGRADATIONS[kind](image, np.random.default_rng(number))
            found = predict_case(model, image)
            assert found.quality is not None
            flagged[kind] += found.quality.review
            worse[kind].append(deviation(found.quality.dice, typicals(quality)) or 0.0)
            if kind == "clean" and study.mask is not None:
                dice = label_dice(found.mask, study.mask, dataset.spec)
                told.append(worse[kind][-1])
                real.append(deviation(dice, typicals(quality)) or 0.0)
                patients.append(case.patient)
    print(f"\n{len(cases)} cases, {'all networks, held out' if unseen else 'the network that has not seen them'}")
    for kind, count in flagged.items():
        shift = float(np.mean(worse[kind]))
        print(f"{kind:10} {count:3d} of {len(cases)} flagged ({count / len(cases):.0%}), expected Dice {shift:+.3f}")
    if unseen:
        print("expected against real Dice:", json.dumps(correlations(np.array(told), np.array(real), patients, 0)))
        print("the worst tenth:", json.dumps(worst_found(np.array(real), np.array(told))))
    print(f"{(time.monotonic() - began) / (len(cases) * len(flagged)):.2f} s a prediction")


if __name__ == "__main__":
    main()
