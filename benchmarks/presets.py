"""What the presets of `medseg predict --quality` cost in Dice, and save in time.

    python benchmarks/presets.py runs/hippocampus            # about 15 minutes on two cores
    python benchmarks/presets.py runs/hippocampus --write    # puts the table into docs/explanation/streaming.md

Hippocampus: the 40 cases of hippocampus_split.json, which RUN (a run folder or bundle) must not have learnt from,
scored against their reference; the same cases with nnU-Net's 3-D model of two folds, which may know some of them: what
counts are the differences. Body: nnU-Net's model of 42 classes on the CT of ../shared/data/ct_body, which has no
reference standard: the mask of `exact` stands for one, and the column says how far a preset moves away from it. Models
of nnU-Net's are imported in bf16, too (`medseg models import --precision bf16`). Seconds are those of the journal, of
each study without loading the model; the median of `--repeats` runs. `--quick` takes two cases, once, and the small
part of the CT.
"""

import argparse
import itertools
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from _common import HERE, case_dice, machine, markdown, medseg, replace_between, score, test_cases

from medseg.inference.presets import QUALITY

NNUNET = "nnunet_models/Dataset004_Hippocampus/nnUNetTrainer__smallPlans__3d_fullres"
BODY = "nnunet_models/Dataset005_Body/nnUNetTrainer__smallResPlans__3d_fullres"
PAGE = HERE.parent / "docs" / "explanation" / "streaming.md"
WAYS = {"exact": ("--quality", "exact"), "exact, no mirroring": ("--no-mirror",)}
WAYS |= {name: ("--quality", name) for name in QUALITY if name != "exact"}
"""Row of the table -> options of the command; the second tells what of `fast` is due to mirroring alone."""
IN_BF16 = ", in bf16"
HEAD = ("data", "preset", "seconds a case", "times faster", "Dice", "difference to exact (worst case)")


def models(model: Path, out: Path) -> dict[str, Path]:
    """Return ending of the rows -> model: one of nnU-Net's is used in bf16, too."""
    if not (model / "plans.json").exists():
        return {"": model}
    imported = out / "in_bf16"
    shutil.rmtree(imported, ignore_errors=True)
    medseg("models", "import", model, "--out", imported, "--precision", "bf16", log=out / "import.log")
    return {"": model, IN_BF16: imported}


def seconds(images: Sequence[Path], model: Path, out: Path, way: str, repeats: int) -> float:
    """Predict in a way into `out`; return the median seconds of a case over all runs."""
    found = []
    for _ in range(repeats):
        shutil.rmtree(out, ignore_errors=True)
        log = out.with_suffix(".log")
        medseg("predict", *images, "--model", model, "--out", out, *WAYS[way], log=log)
        found += [json.loads(file.read_text())["seconds"] for file in (out / "journal").glob("*.json")]
    return statistics.median(found)


def agreement(mask: Path, reference: Path) -> dict[str, float]:
    """Return label -> Dice of two masks, of the labels that one of them has."""
    found, wanted = (np.asarray(nibabel.load(file).dataobj) for file in (mask, reference))
    labels = (np.union1d(np.unique(found), np.unique(wanted))).tolist()
    return {
        str(label): 2.0 * np.count_nonzero((found == label) & (wanted == label))
        / (np.count_nonzero(found == label) + np.count_nonzero(wanted == label))
        for label in labels
        if label
    }  # fmt: skip


def hippocampus(name: str, run: Path, data: Path, out: Path, *, quick: bool, repeats: int) -> list[list[str]]:
    """Return the rows of the hippocampus."""
    cases = sorted(test_cases())[: 2 if quick else None]
    images = [data / "imagesTr" / f"{case}.nii.gz" for case in cases]
    split = out / "split.json"
    split.write_text(json.dumps({"test": cases, "train": []}), encoding="utf-8")
    dice, spent = {}, {}
    for (ending, model), way in itertools.product(models(run, out).items(), WAYS):
        row = way + ending
        spent[row] = seconds(images, model, out / row, way, repeats)
        score(out / row, data, split, out / f"{row}_scores")
        dice[row] = case_dice(out / f"{row}_scores")
    return rows(name, spent, dice)


def body(model: Path, image: Path, out: Path, *, repeats: int) -> list[list[str]]:
    """Return the rows of the body; "cases" are its labels."""
    dice, spent = {}, {}
    for (ending, each), way in itertools.product(models(model, out).items(), WAYS):
        row = way + ending
        spent[row] = seconds([image], each, out / row, way, repeats)
        (mask,) = (out / row).glob("*.nii.gz")
        dice[row] = agreement(mask, next((out / "exact").glob("*.nii.gz")))
    return rows("body, against exact", spent, dice)


def rows(data: str, spent: dict[str, float], dice: dict[str, dict[str, float]]) -> list[list[str]]:
    """Return a row a preset: seconds, Dice, and its differences to exact case by case."""
    table = []
    for name, scores in dice.items():
        exact = dice["exact"]
        differences = [scores[case] - exact[case] for case in scores if case in exact]
        differs = f"{statistics.mean(differences):+.4f} ({min(differences):+.4f})"
        faster, mean = spent["exact"] / spent[name], statistics.mean(scores.values())
        table.append([data, name, f"{spent[name]:.2f}", f"{faster:.1f}", f"{mean:.4f}", differs])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="of medseg train, on the hippocampus without the 40 cases")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/medseg-presets"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the table into the documentation")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    repeats, table = 1 if arguments.quick else arguments.repeats, []
    for part in ("hippocampus", "nnunet", "body"):
        (arguments.out / part).mkdir(parents=True, exist_ok=True)
    data, options = arguments.data / "hippocampus", {"quick": arguments.quick, "repeats": repeats}
    if arguments.run is not None:
        table += hippocampus("hippocampus", arguments.run, data, arguments.out / "hippocampus", **options)
    else:
        print("no RUN: models of nnU-Net's alone", file=sys.stderr)
    model = arguments.data / NNUNET
    table += hippocampus("hippocampus, nnU-Net's model", model, data, arguments.out / "nnunet", **options)
    image = arguments.data / "ct_body" / ("ct_3mm.nii.gz" if arguments.quick else "ct_3mm_112.nii.gz")
    table += body(arguments.data / BODY, image, arguments.out / "body", repeats=repeats)
    text = markdown(HEAD, table)
    where = machine()
    text += f"\n{where['processor']}, {where['threads']} threads, {where['date']}, commit {where['commit']}.\n"
    print(text)
    if arguments.write:
        replace_between(PAGE, "presets", text)


if __name__ == "__main__":
    main()
