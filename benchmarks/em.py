"""Pixel error, V_rand and V_info on the ISBI 2012 pictures (24 slices), cross-validated, after a budget of wall time.

    MEDSEG_DATA=../shared/data python benchmarks/em.py --budget 10m --folds 4

Folds are blocks of neighbouring slices (00 to 06, ...), because slices next to each other look alike: interleaved
folds would test on what is nearly the training data. Within a fold medseg keeps its own validation slices of the
training ones; nothing is chosen on a test slice. Two figures a score: at probability 0.5, and the best over the
challenge's thresholds 0, 0.1, ... 1, which is chosen on the test slices as the challenge does (optimistic). The spec
keeps the full resolution, since membranes are a few pixels wide.
Scores: medseg/evaluation/em.py. Means of the slices' scores.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from medseg import api
from medseg.evaluation.em import StackScores, stack_scores
from medseg.inference.predict import load_model, predict_soft
from medseg.spec import Case, Dataset, load_dataset
from medseg.studies import read_study

SPEC = Path(__file__).parents[1] / "data_specs" / "em_isbi2012.yaml"
SCORES = {"pixel_error": min, "v_rand": max, "v_info": max}


def blocks(cases: tuple[Case, ...], folds: int) -> list[list[str]]:
    return [list(part) for part in np.array_split(sorted(case.id for case in cases), folds)]


def one_fold(dataset: Dataset, test: list[str], folder: Path, options: argparse.Namespace) -> dict[str, object]:
    train = [case.id for case in dataset.cases if case.id not in test]
    splits = folder / "splits.json"
    folder.mkdir(parents=True, exist_ok=True)
    splits.write_text(json.dumps({"train": train, "test": [str(name) for name in test]}))
    began = time.monotonic()
    result = api.train(
        SPEC, out=folder / "run", budget=options.budget, splits=splits, seed=options.seed, settings=options.set
    )
    trained, began = time.monotonic() - began, time.monotonic()
    model = load_model(folder / "run")
    studies = [read_study(dataset.spec, case) for case in dataset.cases if case.id in test]
    soft = [predict_soft(model, study.image)[1].array[0, :, :, 0].T for study in studies]
    predicted = time.monotonic() - began
    cells = [study.mask.array[0, :, :, 0].T > 0 for study in studies if study.mask is not None]
    rows = stack_scores(soft, cells)
    half = next(row for row in rows if row.threshold == 0.5)
    return {
        "test": [str(name) for name in test],
        "steps": result.steps,
        "train_s": round(trained, 1),
        "predict_s": round(predicted, 1),
        "at_0.5": rounded(half),
        "best": {name: round(best(getattr(row, name) for row in rows), 4) for name, best in SCORES.items()},
        "thresholds": [asdict(row) for row in rows],
    }


def rounded(row: StackScores) -> dict[str, float]:
    return {name: round(getattr(row, name), 4) for name in SCORES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="10m", help="of each fold's training")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the folds to run (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE changes of the plan")
    parser.add_argument("--work", type=Path, default=Path("/tmp/medseg-em"))
    options = parser.parse_args()
    dataset = load_dataset(SPEC)
    found = []
    for number, test in enumerate(blocks(dataset.cases, options.folds)):
        if options.only and number not in options.only:
            continue
        load = os.getloadavg()[0]
        row = one_fold(dataset, test, options.work / f"fold_{number}", options)
        found.append(row)
        shown = {key: value for key, value in row.items() if key != "thresholds"}
        print(json.dumps({"fold": number, "load": [round(load, 1), round(os.getloadavg()[0], 1)], **shown}), flush=True)
        (options.work / "scores.json").write_text(json.dumps(found, indent=1))
    for kind in ("at_0.5", "best"):
        values = {name: [row[kind][name] for row in found] for name in SCORES}
        text = ", ".join(f"{n} {statistics.mean(v):.4f} ({min(v):.4f} to {max(v):.4f})" for n, v in values.items())
        print(f"{kind}: {text}; {len(found)} fold(s), budget {options.budget} each")


if __name__ == "__main__":
    main()
