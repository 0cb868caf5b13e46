"""Soft-tissue sarcoma from DICOM: T1 MR series and RTSTRUCT contours, cross-validated, after a budget of wall time.

    MEDSEG_DATA=../shared/data python benchmarks/sarcoma.py --budget 15m     # about 17 minutes on two cores
    MEDSEG_DATA=../shared/data python benchmarks/sarcoma.py --quick          # 4 steps, 4 cases: shows that it runs

17 patients of several scanners, one series each (data_specs/sarcoma.yaml). `medseg train --folds 5` reads the DICOM
folders; every figure is of a patient that the network has not seen, in the mask as the network made it, before
post-processing (which is chosen on these very cases). The images as prepared are small (median 147 x 140 x 59 voxels),
where a tumour should be easier to find than in a scan of a whole limb; and 17 patients say little about others.

Dice and volumes are those of RUN/7_report. HD95: of both masks the surface voxels (26-connected erosion), in mm the
95th percentile of their distances to the other surface, of both directions the larger; a missed or imagined tumour has
none and is counted apart. The quality estimate's table is printed where the run has one. A finished run in `--work` is
scored again, not trained again.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import HERE, interval, machine, markdown
from scipy import ndimage

from medseg import api
from medseg.bundle import open_bundle
from medseg.evaluation.table import load_evaluation
from medseg.readers import read_image
from medseg.spec import Dataset, load_dataset
from medseg.studies import read_study

SPEC = HERE.parent / "data_specs" / "sarcoma.yaml"
LABEL = "tumour"
QUICK = (
    "batch_size=2",
    "patch_size=[32, 32, 16]",
    "network.options.features=[4, 8, 8, 8, 8]",
    "test_mirroring=false",
    "validations=1",
)
QUICK_STEPS = 4
QUICK_CASES = ("STS_001", "STS_008", "STS_009", "STS_013", "STS_019")


def hd95(found: Any, truth: Any, spacing: tuple[float, ...]) -> float | None:
    """Return the HD95 in mm of two masks (I, J, K); None where one is empty."""
    if not found.any() or not truth.any():
        return None
    surfaces = [mask & ~ndimage.binary_erosion(mask, np.ones((3, 3, 3))) for mask in (found, truth)]
    away = [ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
    return float(max(np.percentile(away[1][surfaces[0]], 95), np.percentile(away[0][surfaces[1]], 95)))


def train(options: argparse.Namespace, folder: Path) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    length: dict[str, Any] = {"budget": options.budget}
    settings, splits = list(options.set), None
    if options.quick:
        length, splits = {"steps": QUICK_STEPS}, folder / "splits.json"
        settings += QUICK
        splits.write_text(json.dumps({"train": QUICK_CASES[:4], "test": QUICK_CASES[4:]}))
    began = time.monotonic()
    api.train(
        SPEC, out=folder / "run", folds=options.folds, seed=options.seed, settings=settings, splits=splits, **length
    )
    return round(time.monotonic() - began, 1)


def score(dataset: Dataset, run: Path) -> list[dict[str, Any]]:
    """Return a row for each out-of-fold case, the worst first."""
    evaluation = load_evaluation(run / "7_report")
    dice = evaluation.values("dice", LABEL)
    volumes = {name: evaluation.values(f"volume_{name}", LABEL) for name in ("reference", "predicted")}
    masks = {file.name.removesuffix(".nii.gz"): file for file in run.glob("5_folds/*/validation/*.nii.gz")}
    value = dataset.spec.foreground[LABEL]
    rows = []
    for case in dataset.cases:
        if case.id in dice:
            truth = read_study(dataset.spec, case).mask
            assert truth is not None
            found = read_image(masks[case.id]).array[0] == value
            rows.append(
                {
                    "case": case.id,
                    "dice": dice[case.id],
                    "hd95_mm": hd95(found, truth.array[0] == value, truth.spacing),
                    "reference_ml": volumes["reference"][case.id],
                    "predicted_ml": volumes["predicted"][case.id],
                }
            )
    return sorted(rows, key=lambda row: row["dice"])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    mean, low, high = interval({row["case"]: row["dice"] for row in rows})
    distances = [row["hd95_mm"] for row in rows if row["hd95_mm"] is not None]
    ratios = [row["predicted_ml"] / row["reference_ml"] for row in rows]
    return {
        "cases": len(rows),
        "dice_mean": round(mean, 4),
        "dice_interval_95": [round(low, 4), round(high, 4)],
        "dice_median": round(statistics.median(row["dice"] for row in rows), 4),
        "dice_below_0.5": sum(row["dice"] < 0.5 for row in rows),
        "hd95_mm_median": round(statistics.median(distances), 1) if distances else None,
        "without_hd95": len(rows) - len(distances),
        "volume_ratio_median": round(statistics.median(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="15m", help="of the whole training, all folds")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE changes of the plan")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, 4 cases in 2 folds")
    parser.add_argument("--work", type=Path, default=Path("/tmp/medseg-sarcoma"))
    options = parser.parse_args()
    options.folds = 2 if options.quick else options.folds
    folder = options.work / ("quick" if options.quick else f"{options.budget}_{options.folds}_{options.seed}")
    before = machine()
    trained = train(options, folder)
    rows = score(load_dataset(SPEC), folder / "run")
    (folder / "scores.json").write_text(json.dumps(rows, indent=1))
    names = list(rows[0])
    cells = [[row[n] if isinstance(row[n], str | None) else f"{row[n]:.3f}" for n in names] for row in rows]
    print(markdown(["case", "Dice", "HD95, mm", "reference, mL", "predicted, mL"], cells))
    info = open_bundle(folder / "run").info
    told = {"train_s": trained, "steps": info.training["steps"], "postprocess": [str(s) for s in info.postprocess]}
    print(json.dumps({**summary(rows), **told, "machine": before}))
    for name in ("quality.json", "quality.csv"):
        file = folder / "run" / "7_report" / name
        print(f"{name}:\n{file.read_text(encoding='utf-8')}" if file.exists() else f"{name}: the run has none")


if __name__ == "__main__":
    main()
