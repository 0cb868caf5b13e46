"""Dice on 40 held-out hippocampus cases after a budget of wall time: the whole command, several seeds; or five folds.

    python benchmarks/hippocampus.py --data ../shared/data/hippocampus --budget 10m --seeds 0 1 2
    python benchmarks/hippocampus.py --folds 5 --budget 50m      # of the 160, then the 40: does the estimate hold?
    python benchmarks/hippocampus.py --folds 5 --budget 50m --all                          # of all 200, no test

The 160/40 list (hippocampus_split.json) was chosen once: the sorted case ids shuffled by random.Random(2026), the
first 40 are for testing. Each seed runs `medseg train`, `predict` and `evaluate` as a user would.

--folds: `medseg train --folds 5`, whose budget is that of all five networks together. The estimate is the mean Dice of
the out-of-fold predictions, each case by the one network that has not seen it, with the 95 % interval of a bootstrap
over patients. It is compared with the test cases twice: predicted by the single networks, one after the other and
averaged (what the estimate is of), and by all five together, as the model of the run predicts (usually a little
better). The estimate agrees if the mean of the single networks lies within its interval; that leaves out the
uncertainty of 40 test cases, whose own interval is told, too. The estimate is of the masks before post-processing, the
test of those after it. Wall and processor seconds are told of each command, of all its processes.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from _common import SPLIT, Spent, case_dice, difference, interval, label_dice, machine, medseg, score, test_cases

Row = dict[str, Any]


def times(**commands: Spent) -> Row:
    found: Row = {}
    for name, spent in commands.items():
        found |= {f"{name}_s": spent.wall, f"{name}_cpu_s": spent.cpu}
    return found


def train(data: Path, folder: Path, seed: int, budget: str, *more: str | Path) -> tuple[Spent, int]:
    """Train and return the time and the steps."""
    words = ("--budget", budget, "--seed", str(seed), "--out", folder / "run", "--no-track")
    # A first run: it measures its step times itself.
    spent = medseg("train", data, *more, *words, cache=folder / "cache")
    model = json.loads((folder / "run" / "6_model" / "model.json").read_text(encoding="utf-8"))
    return spent, int(model["training"]["steps"])


def test(data: Path, folder: Path) -> tuple[Spent, tuple[float, float, float], dict[str, float]]:
    """Predict and score the 40 cases; returns the time, mean Dice with its interval, and Dice of each label."""
    words = ("--splits", SPLIT, "--model", folder / "run", "--out", folder / "masks")
    spent = medseg("predict", data, *words)
    score(folder / "masks", data, SPLIT, folder / "scores")
    return spent, interval(case_dice(folder / "scores")), label_dice(folder / "scores")


def one_seed(options: argparse.Namespace, seed: int) -> Row:
    folder, before = options.work / f"seed_{seed}", machine()
    trained, steps = train(options.data, folder, seed, options.budget, "--splits", SPLIT)
    predicted, dice, labels = test(options.data, folder)
    spent = times(train=trained, predict=predicted)
    return {"seed": seed, **spent, "steps": steps, **rounded(labels), "dice": round(dice[0], 4), "machine": before}


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def shown(dice: tuple[float, float, float]) -> str:
    return f"{dice[0]:.4f} (95 % interval {dice[1]:.4f} to {dice[2]:.4f})"


def cross_validate(options: argparse.Namespace, seed: int) -> Row:
    """Cross-validate, print the estimate, and compare it with the test cases where there are any."""
    folder = options.work / f"folds_{options.folds}_{'all' if options.all else 'train'}_{seed}"
    before = machine()
    splits = () if options.all else ("--splits", SPLIT)
    trained, steps = train(options.data, folder, seed, options.budget, "--folds", str(options.folds), *splits)
    known = case_dice(folder / "run" / "7_report")
    estimate = interval(known)
    row = {"seed": seed, "folds": options.folds, "cases": len(known), "steps": steps, **times(train=trained)}
    row |= {"estimate": [round(value, 4) for value in estimate], "machine": before}
    print(f"out-of-fold estimate of {len(known)} cases: {shown(estimate)}", flush=True)
    if options.all:
        return row
    predicted, together, _ = test(options.data, folder)
    alone = single_networks(options.data, folder / "run")
    single, apart = interval(alone), difference(alone, known)
    print(f"40 test cases, single networks: {shown(single)}; all {options.folds} together: {shown(together)}")
    agrees = estimate[1] <= single[0] <= estimate[2]
    print(f"the mean of the single networks lies {'within' if agrees else 'OUTSIDE OF'} the estimate's interval")
    print(f"test less estimate, both uncertain: {shown(apart)}")
    results = {"single": single, "together": together, "difference": apart}
    found = {name: [round(value, 4) for value in values] for name, values in results.items()}
    return {**row, **times(predict=predicted), **found, "agrees": agrees}


def single_networks(data: Path, run: Path) -> dict[str, float]:
    """Return test case -> mean over the networks and labels of the Dice of a network alone."""
    from medseg.inference.predict import Model, load_model, predict_volume
    from medseg.spec import load_dataset
    from medseg.studies import read_study

    model, dataset = load_model(run), load_dataset(data)
    found: dict[str, float] = {}
    for case in dataset.cases:
        if case.id not in test_cases():
            continue
        study = read_study(dataset.spec, case)
        assert study.mask is not None
        dice = []
        for network in model.networks:
            mask = predict_volume(Model(model.bundle, [network], model.device), study.image).array
            for value in dataset.spec.foreground.values():
                predicted, reference = mask == value, study.mask.array == value
                dice.append(2 * float((predicted & reference).sum()) / float(predicted.sum() + reference.sum()))
        found[case.id] = statistics.mean(dice)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/hippocampus"))
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; with --folds 0")
    parser.add_argument("--folds", type=int)
    parser.add_argument("--all", action="store_true", help="with --folds: learn from all 200 cases, test on none")
    parser.add_argument("--work", type=Path, default=Path("/tmp/medseg-hippocampus"))
    options = parser.parse_args()
    if options.all and not options.folds:
        parser.error("--all is for --folds")
    rows = []
    for seed in options.seeds or ([0] if options.folds else [0, 1, 2]):
        one = (cross_validate if options.folds else one_seed)(options, seed)
        rows.append(one)
        print(json.dumps(one), flush=True)
    if not options.folds:
        means = [row["dice"] for row in rows]
        print(f"mean Dice {statistics.mean(means):.4f}, range {min(means):.4f} to {max(means):.4f}, {len(means)} seeds")


if __name__ == "__main__":
    main()
