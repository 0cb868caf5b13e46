"""Pixel error, V_rand and V_info on the ISBI 2012 pictures (24 slices), cross-validated, after a budget of wall time.

    MEDSEG_DATA=../shared/data python benchmarks/em.py --budget 10m      # four folds: about 42 minutes on two cores
    MEDSEG_DATA=../shared/data python benchmarks/em.py --total 40m       # the same budget for all folds together
    MEDSEG_DATA=../shared/data python benchmarks/em.py --quick           # 4 steps of one fold: shows that it runs

The slices are of one block of tissue, and those next to each other look alike. So folds are blocks of neighbouring
slices (00 to 06, ...): interleaved folds would test on what is nearly the training data. A block still touches training
slices at its ends, and all folds are of one animal: other tissue may well score lower. Within a fold medseg keeps two
of the training slices for its own validation; nothing is trained or chosen on a test slice, save in the row "best".

Every score three times: at probability 0.5; at the threshold of 0, 0.1, ... 1 that is best on the validation slices;
and at the one that is best on the test slices ("best"), which is how the challenge counts, and optimistic. Beside it,
what a picture without any membrane would score. The spec keeps the full resolution: membranes are a few pixels wide.
Scores: medseg/evaluation/em.py (Arganda-Carreras 2015), means of the slices' scores. `--work` holds runs and
scores.jsonl; folds that are in it are not run again.
"""

import argparse
import csv
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _common import HERE, Lines, machine, markdown

from medseg import api
from medseg.duration import seconds
from medseg.evaluation.em import StackScores, stack_scores
from medseg.inference.predict import Model, load_model, predict_soft
from medseg.spec import Case, Dataset, load_dataset
from medseg.studies import read_study

SPEC = HERE.parent / "data_specs" / "em_isbi2012.yaml"
SCORES = {"pixel_error": min, "v_rand": max, "v_info": max}
KINDS = ("no membrane", "at 0.5", "chosen", "best")
QUICK = (
    "batch_size=2",
    "patch_size=[64, 64, 1]",
    "network.options.features=[4, 8, 8, 8, 8, 8]",
    "test_mirroring=false",
    "validations=1",
)
QUICK_STEPS = 4


def blocks(cases: Iterable[Case], folds: int) -> list[list[str]]:
    """Return the test slices of each fold: neighbours."""
    return [[str(name) for name in part] for part in np.array_split(sorted(case.id for case in cases), folds)]


def train(test: list[str], dataset: Dataset, folder: Path, options: argparse.Namespace) -> tuple[int, float]:
    """Train without the test slices; return steps and seconds."""
    splits = folder / "splits.json"
    folder.mkdir(parents=True, exist_ok=True)
    left = [case.id for case in dataset.cases if case.id not in test]
    splits.write_text(json.dumps({"train": left, "test": test}))
    length = {"steps": QUICK_STEPS} if options.quick else {"budget": options.budget}
    settings = [*options.set, *(QUICK if options.quick else ())]
    began = time.monotonic()
    result = api.train(SPEC, out=folder / "run", splits=splits, seed=options.seed, settings=settings, **length)
    return result.steps, round(time.monotonic() - began, 1)


def scored(model: Model, dataset: Dataset, names: Iterable[str]) -> tuple[list[StackScores], StackScores]:
    """Return the scores of these slices at each threshold, and those of pictures that are all cell."""
    kept = set(names)
    soft, cells = [], []
    for case in dataset.cases:
        if case.id in kept:
            study = read_study(dataset.spec, case)
            assert study.mask is not None
            soft.append(predict_soft(model, study.image)[1].array[0, :, :, 0].T)
            cells.append(study.mask.array[0, :, :, 0].T > 0)
    nothing = stack_scores([np.ones_like(picture) for picture in soft], cells, thresholds=[0.5])
    return stack_scores(soft, cells), nothing[0]


def at(rows: Iterable[StackScores], threshold: float) -> StackScores:
    return next(row for row in rows if row.threshold == threshold)


def one_fold(dataset: Dataset, test: list[str], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    steps, trained = train(test, dataset, folder, options)
    model = load_model(folder / "run")
    with open(folder / "run" / "7_report" / "folds.csv", encoding="utf-8") as table:
        validation = [row["case"] for row in csv.DictReader(table)]
    held, _ = scored(model, dataset, validation)
    began = time.monotonic()
    rows, nothing = scored(model, dataset, test)
    chosen = {
        name: next(row.threshold for row in held if getattr(row, name) == best(getattr(r, name) for r in held))
        for name, best in SCORES.items()
    }
    found = {
        "no membrane": {name: getattr(nothing, name) for name in SCORES},
        "at 0.5": {name: getattr(at(rows, 0.5), name) for name in SCORES},
        "chosen": {name: getattr(at(rows, chosen[name]), name) for name in SCORES},
        "best": {name: best(getattr(row, name) for row in rows) for name, best in SCORES.items()},
    }
    return {
        "test": test,
        "validation": validation,
        "steps": steps,
        "train_s": trained,
        "score_s": round(time.monotonic() - began, 1),
        "scores": {kind: {name: round(value, 4) for name, value in row.items()} for kind, row in found.items()},
        "thresholds": [asdict(row) for row in rows],
    }


def show(rows: list[dict[str, Any]]) -> None:
    table: list[list[object]] = []
    for row in rows:
        for kind in KINDS:
            where = f"{row['fold']}: {row['test'][0]} to {row['test'][-1]}, {row['steps']} steps"
            table.append([where, kind, *(f"{row['scores'][kind][name]:.4f}" for name in SCORES)])
    for kind in KINDS:
        values = [[row["scores"][kind][name] for row in rows] for name in SCORES]
        cells = [f"{statistics.mean(v):.4f} ({min(v):.4f} to {max(v):.4f})" for v in values]
        table.append([f"mean of {len(rows)} fold(s)", kind, *cells])
    print(markdown(["fold", "threshold", "pixel error", "V_rand (thinned)", "V_info (thinned)"], table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="10m", help="of each fold's training")
    parser.add_argument("--total", help="budget of all folds together, instead of --budget")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the folds to run (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE changes of the plan")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps of the first fold")
    parser.add_argument("--work", type=Path, default=Path("/tmp/medseg-em"))
    options = parser.parse_args()
    if options.total:
        options.budget = seconds(options.total) / options.folds
    if options.quick:
        options.only, options.work = [0], options.work / "quick"
    dataset = load_dataset(SPEC)
    key = {"budget": str(options.budget), "folds": options.folds, "seed": options.seed, "set": options.set}
    lines = Lines(options.work / "scores.jsonl", "fold", *key)
    wanted = range(options.folds) if options.only is None else options.only
    for number in wanted:
        if not lines.holds(fold=number, **key):
            folder = options.work / f"{options.folds}_{options.budget}_{options.seed}" / f"fold_{number}"
            row = one_fold(dataset, blocks(dataset.cases, options.folds)[number], folder, options)
            lines.add({"fold": number, **key, **row, "machine": machine()})
    show([row for row in lines.rows() if row["fold"] in wanted and all(row[name] == key[name] for name in key)])


if __name__ == "__main__":
    main()
