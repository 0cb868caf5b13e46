"""Dice on 40 held-out hippocampus cases after a budget of wall time: the whole command, several seeds.

    python benchmarks/hippocampus.py --data ../shared/data/hippocampus --budget 10m --seeds 0 1 2

The 160/40 list (hippocampus_split.json) was chosen once: the sorted case ids shuffled by random.Random(2026), the
first 40 are for testing. Each seed runs `medseg train`, `predict` and `evaluate` as a user would.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SPLIT = Path(__file__).with_name("hippocampus_split.json")


def run(*arguments: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "medseg", *arguments], check=True)
    return time.monotonic() - began


def one_seed(data: Path, budget: str, seed: int, work: Path) -> dict[str, float]:
    folder = work / f"seed_{seed}"
    common = ("--splits", str(SPLIT))
    trained = run(
        "train", str(data), *common, "--budget", budget, "--seed", str(seed), "--out", str(folder / "run"), "--no-track"
    )
    predicted = run("predict", str(data), *common, "--model", str(folder / "run"), "--out", str(folder / "masks"))
    run(
        "evaluate", "--predictions", str(folder / "masks"), "--reference", str(data), *common,
        "--out", str(folder / "scores"), "--no-track",
    )  # fmt: skip
    with open(folder / "scores" / "summary.csv", encoding="utf-8") as table:
        dice = {row["label"]: float(row["mean"]) for row in csv.DictReader(table) if row["metric"] == "dice"}
    model = json.loads((folder / "run" / "6_model" / "model.json").read_text())
    return {"seed": seed, "train_s": trained, "predict_s": predicted, "steps": model["training"]["steps"], **dice}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/hippocampus"))
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("/tmp/medseg-hippocampus"))
    options = parser.parse_args()
    rows = [one_seed(options.data, options.budget, seed, options.work) for seed in options.seeds]
    for row in rows:
        print(json.dumps({k: round(v, 4) for k, v in row.items() if not isinstance(v, str)}))
    means = [statistics.mean(row[label] for label in ("Anterior", "Posterior")) for row in rows]
    print(f"mean Dice {statistics.mean(means):.4f}, range {min(means):.4f} to {max(means):.4f}, {len(means)} seeds")


if __name__ == "__main__":
    main()
