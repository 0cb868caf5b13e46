"""Dice against minutes on 40 held-out hippocampus cases: medseg, nnU-Net and loops as in MONAI's tutorials.

    python benchmarks/learning_curve.py --peers /work/peers/bin/python --budgets 2m 5m 10m 30m --seeds 0
    python benchmarks/learning_curve.py --plot                       # only table and picture from the results

Everybody learns from the same 160 cases (hippocampus_split.json), on the same cores, with schedules that end at the
same wall time, one after the other; masks of all are scored by `medseg evaluate`. The time of a contender begins with
its files as they are: reading, planning and preprocessing count (nnU-Net's are done once and taken off each budget);
predicting the test cases does not, and is told beside it. medseg keeps 16 of the 160 cases for choosing, the others
learn from all. Who they are: _nnunet_peer.py, _monai_peer.py. About four hours a seed with the four contenders that run
unless told. Results are lines of JSON in --work; what is there is not run again.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import (
    SPLIT,
    Lines,
    Spent,
    case_dice,
    cases_in,
    interval,
    label_dice,
    machine,
    markdown,
    medseg,
    score,
    test_cases,
)
from _contenders import Monai, NnUNet

Row = dict[str, Any]
LEAST_SECONDS = 5.0
"""Of training that must be left for a peer after its preparation."""


def learn_medseg(seconds: float, seed: int, folder: Path, options: argparse.Namespace) -> Row:
    common = ("--splits", SPLIT)
    words = ("--budget", f"{seconds:g}s", "--seed", str(seed), "--out", folder / "run", "--no-track")
    trained = medseg("train", options.data, *common, *words, log=folder / "train.log", cache=folder / "cache")
    words = ("--model", folder / "run", "--out", folder / "masks")
    predicted = medseg("predict", options.data, *common, *words, log=folder / "predict.log")
    told = json.loads((folder / "run" / "6_model" / "model.json").read_text(encoding="utf-8"))["training"]
    return timed(trained, predicted, steps=told["steps"])


def learn_nnunet(seconds: float, seed: int, folder: Path, options: argparse.Namespace) -> Row:
    peer = NnUNet(options.peers, options.work / "nnunet")
    prepared = peer.prepare(options.data, *learning_and_test(options.data))
    left = seconds - prepared.wall
    if left < LEAST_SECONDS:
        return {"prepare_s": prepared.wall}
    name = f"{seconds:g}s_{seed}"
    shutil.rmtree(peer.work / name, ignore_errors=True)
    trained, told = peer.train(name, folder / "train.log", seconds=left, seed=seed)
    predicted = peer.predict(name, folder / "masks", folder / "predict.log")
    whole = Spent(round(prepared.wall + trained.wall, 1), round(prepared.cpu + trained.cpu, 1))
    return timed(whole, predicted, steps=told["steps"]) | {"prepare_s": prepared.wall, "step_s": told["step_s"]}


def learn_monai(recipe: str) -> Callable[[float, int, Path, argparse.Namespace], Row]:
    def learn(seconds: float, seed: int, folder: Path, options: argparse.Namespace) -> Row:
        peer = Monai(options.peers, recipe)
        train, test = learning_and_test(options.data)
        trained, told = peer.train(options.data, train, folder, seconds=seconds, seed=seed)
        predicted = peer.predict(options.data, test, folder)
        return timed(trained, predicted, steps=told["steps"]) | {"step_s": told["step_s"]}

    return learn


CONTENDERS = {
    "medseg": learn_medseg,
    "nnunet": learn_nnunet,
    "monai_dynunet": learn_monai("dynunet"),
    "monai_adamw": learn_monai("adamw"),
    "monai_unet": learn_monai("unet"),
}
NAMES = {
    "medseg": "medseg",
    "nnunet": "nnU-Net 2.8.1, schedule ending at the time",
    "monai_dynunet": "MONAI, DynUNet pipeline (SGD)",
    "monai_adamw": "MONAI, DynUNet with AdamW",
    "monai_unet": "MONAI, spleen tutorial (UNet, Adam)",
}


def timed(trained: Spent, predicted: Spent, *, steps: int) -> Row:
    return {
        "steps": steps,
        "train_s": trained.wall,
        "train_cpu_s": trained.cpu,
        "predict_s": predicted.wall,
        "predict_cpu_s": predicted.cpu,
    }


def learning_and_test(data: Path) -> tuple[list[str], list[str]]:
    test = test_cases()
    return [name for name in cases_in(data) if name not in test], sorted(test)


def one(contender: str, budget: str, seed: int, options: argparse.Namespace) -> Row:
    from medseg.duration import seconds

    before = machine()
    folder = options.work / f"{contender}_{budget}_{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left has used time that nobody counted
    found = CONTENDERS[contender](seconds(budget), seed, folder, options)
    key = {"contender": contender, "minutes": seconds(budget) / 60, "seed": seed}
    if not (folder / "masks").exists():
        return {**key, **found, "machine": before}
    score(folder / "masks", options.data, SPLIT, folder / "scores")
    dice = interval(case_dice(folder / "scores"))
    return {
        **key,
        **found,
        "dice": round(dice[0], 4),
        "interval": [round(value, 4) for value in dice[1:]],
        **{f"dice_{label}": round(value, 4) for label, value in label_dice(folder / "scores").items()},
        "load_after": machine()["load"][0],
        "machine": before,
    }


def table(rows: list[Row]) -> str:
    """Return the table of docs/reference/benchmarks.md: a line for each contender and time, seeds in one."""
    lines = []
    for contender, name in NAMES.items():
        for minutes in sorted({row["minutes"] for row in rows if row["contender"] == contender}):
            group = [row for row in rows if (row["contender"], row["minutes"]) == (contender, minutes)]
            lines.append([name, f"{minutes:g}", *_cells([row for row in group if "dice" in row])])
    head = ["", "minutes", "seeds", "mean Dice", "steps", "wall s", "CPU s", "predicting 40 cases, s"]
    return markdown(head, lines)


def _cells(group: list[Row]) -> list[str]:
    if not group:
        return ["–", "no time left after its preparation", *["–"] * 4]
    dice = [row["dice"] for row in group]
    spread = f" ({min(dice):.4f} to {max(dice):.4f})" if len(dice) > 1 else ""
    keys = ("steps", "train_s", "train_cpu_s", "predict_s")
    means = [f"{statistics.mean(row[key] for row in group):.0f}" for key in keys]
    return [str(len(dice)), f"{statistics.mean(dice):.4f}{spread}", *means]


def plot(rows: list[Row], file: Path) -> None:
    """Draw mean Dice over minutes, a line for each contender, seeds as points."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for contender in CONTENDERS:
        own = sorted((row["minutes"], row["dice"]) for row in rows if row["contender"] == contender and "dice" in row)
        if not own:
            continue
        times = sorted({minutes for minutes, _ in own})
        means = [statistics.mean(dice for minutes, dice in own if minutes == time) for time in times]
        (line,) = axes.plot(times, means, label=NAMES[contender])
        axes.plot(*zip(*own, strict=True), "o", color=line.get_color(), markersize=4)
    axes.set(
        xscale="log", xlabel="minutes of wall time, all included", ylabel="mean Dice of 40 test cases", ylim=(0, 1)
    )
    ticks = sorted({row["minutes"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    for suffix in (".svg", ".png"):
        figure.savefig(file.with_suffix(suffix), dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/hippocampus"))
    parser.add_argument("--peers", type=Path, help="Python of the environment that scripts/install_peers.sh makes")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS)[:4])
    parser.add_argument("--budgets", nargs="+", default=["2m", "5m", "10m", "30m"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--plot", action="store_true", help="run nothing")
    parser.add_argument("--work", type=Path, default=Path("/tmp/medseg-curve"))
    options = parser.parse_args()
    options.work, options.data = options.work.resolve(), options.data.resolve()
    lines = Lines(options.work / "results.jsonl", "contender", "minutes", "seed")
    if not options.plot:
        if options.peers is None and options.contenders != ["medseg"]:
            parser.error("--peers is needed for all but medseg")
        run_all(lines, options)
    rows = lines.rows()
    text = table(rows)
    (options.work / "table.md").write_text(text, encoding="utf-8")
    plot(rows, options.work / "curve")
    print(f"{text}\n{options.work}/table.md, curve.svg, curve.png")


def run_all(lines: Lines, options: argparse.Namespace) -> None:
    from medseg.duration import seconds

    for seed in options.seeds:
        for budget in options.budgets:
            for contender in options.contenders:
                if not lines.holds(contender=contender, minutes=seconds(budget) / 60, seed=seed):
                    lines.add(one(contender, budget, seed, options))


if __name__ == "__main__":
    main()
