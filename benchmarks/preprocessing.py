"""Preparing cases: medseg against nnU-Net's preprocessing, and the error of medseg's interpolation against scipy.

    python benchmarks/preprocessing.py --peers /work/peers/bin/python --rounds 3

Whole command, in turn: `nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres --verify_dataset_integrity`, and what `medseg
train` does before its first step, in one process, which starts as the program does: plan, then prepare all cases. Once
without known step times, so that the plan measures them (nnU-Net's measures none), and once more with those; and once
as two commands. CT-sized: a CT of a body at 3 mm (122×101×112) is brought to --spacing in memory: nnU-Net's default
resampling of image (order 3) and mask (order 1), medseg's Resample (trilinear) and its splines of order 3, which models
of nnU-Net get. Not the same work: nnU-Net's default is splines where medseg's is trilinear, and it writes compressed
files; the rows say what each did.

Beside seconds of the clock stand those of the processors, of all processes together: other work on the machine changes
them less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PLAN = """
from pathlib import Path
import sys
from medseg.startup import quick_start
quick_start()
from medseg import api
api.plan(Path(sys.argv[1]), out=Path(sys.argv[2]))
"""
PREPARE = """
import sys
from medseg.startup import quick_start
quick_start()
from pathlib import Path
from medseg.planning.plan import read_plan
from medseg.preparation.cache import CaseCache, prepare_cases
from medseg.preparation.path import training_path, up_to_cache
from medseg.spec import load_dataset
data, plan = load_dataset(Path(sys.argv[1])), read_plan(Path(sys.argv[2]))
cache = CaseCache(Path(sys.argv[3]), data.spec, plan)
prepare_cases(up_to_cache(training_path(data.spec, plan, cache)), cache, data.cases)
"""
NNUNET = """
import sys, time
import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
data = np.load(sys.argv[1])
mask = (data > 150).astype(np.int8)
new = [float(x) for x in sys.argv[2].split(",")]
size = [int(x) for x in sys.argv[3].split(",")]
for array, seg, order in ((data, False, 3), (mask, True, 1)):
    began, used = time.monotonic(), time.process_time()
    resample_data_or_seg_to_shape(array, size, (3.0, 3.0, 3.0), new, is_seg=seg, order=order, order_z=0)
    print(time.monotonic() - began, time.process_time() - used)
"""
Seconds = tuple[float, float]
"""By the clock, and of processors."""


def timed(work: Callable[[], Any]) -> tuple[Any, Seconds]:
    """Return what a function in this process returns, and what it took."""
    began, used = time.monotonic(), time.process_time()
    result = work()
    return result, (time.monotonic() - began, time.process_time() - used)


def ct_rows(data: Path, peers: str, spacing: float, work: Path) -> dict[str, Seconds]:
    """Return seconds of each way, and print medseg's errors against scipy."""
    import nibabel
    import torch
    from scipy import ndimage

    from medseg.planning.plan import Interpolation
    from medseg.preparation.splines import resize
    from medseg.preparation.steps import resize_linear

    image = np.asarray(nibabel.load(data / "ct_body" / "ct_3mm_112.nii.gz").dataobj, dtype=np.float32)[None]
    size = tuple(round(n * 3 / spacing) for n in image.shape[1:])
    np.save(work / "ct.npy", image)
    x = torch.from_numpy(image)
    mask = (x > 150).to(torch.uint8)
    rule = Interpolation(order=3, order_z=0)
    found: dict[str, Seconds] = {}
    linear, found["medseg, image trilinear"] = timed(lambda: resize_linear(x, size))  # type: ignore[arg-type]
    _, found["medseg, mask trilinear"] = timed(lambda: resize_linear(mask, size, labels=True))  # type: ignore[arg-type]
    cubic, found["medseg, image by splines of order 3"] = timed(lambda: resize(x, size, rule, None))
    zoom = [b / a for a, b in zip(image.shape[1:], size, strict=True)]
    for name, order, ours in (("trilinear", 1, linear), ("splines of order 3", 3, cubic)):
        exact = ndimage.zoom(image[0].astype(np.float64), zoom, order=order, mode="nearest", grid_mode=True)
        exact = exact.clip(image.min(), image.max())
        error = np.abs(ours[0].numpy() - exact)
        print(f"{name}: error against scipy in double precision: largest {error.max():.2g} HU, mean {error.mean():.2g}")
    arguments = [str(work / "ct.npy"), ",".join([str(spacing)] * 3), ",".join(map(str, size))]
    done = subprocess.run([peers, "-c", NNUNET, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    *_, image_seconds, image_used, mask_seconds, mask_used = (float(word) for word in done.stdout.split())
    return {
        **found,
        "nnU-Net, image by splines of order 3": (image_seconds, image_used),
        "nnU-Net, mask order 1": (mask_seconds, mask_used),
    }


def raw_dataset(data: Path, work: Path, number: int) -> Path:
    """Write the first cases in nnU-Net's layout, which both read; returns its folder."""
    folder = work / "raw" / "Dataset004_Hippocampus"
    shutil.rmtree(work / "raw", ignore_errors=True)
    files = sorted((data / "hippocampus" / "imagesTr").glob("*.nii.gz"))[:number]
    for kind, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (folder / kind).mkdir(parents=True)
        for file in files:
            source = data / "hippocampus" / kind / file.name
            shutil.copy(source, folder / kind / file.name.replace(".nii.gz", ending))
    facts = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
        "numTraining": len(files),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder


def command_rows(peers: str, folder: Path, work: Path, cores: int) -> dict[str, Seconds]:
    """Return seconds of each whole command, from nothing."""

    def run(*command: str) -> Seconds:
        shutil.rmtree(work / "cache", ignore_errors=True)
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return time.monotonic() - began, used

    for name in ("step times", "preprocessed", "results"):
        shutil.rmtree(work / name, ignore_errors=True)
    environment = {**os.environ, "nnUNet_raw": str(folder.parent), "nnUNet_preprocessed": str(work / "preprocessed"),
                   "nnUNet_results": str(work / "results"), "MEDSEG_CACHE": str(work / "step times")}  # fmt: skip
    (work / "preprocessed").mkdir()
    places = (str(folder), str(work / "plan.yaml"), str(work / "cache"))
    both = (sys.executable, "-c", PLAN + PREPARE, *places)
    found = {
        "medseg, plan and cases, step times measured": run(*both),
        "medseg, plan and cases, step times known": run(*both),
        "medseg plan (a command of its own, step times known)": run(
            sys.executable, "-m", "medseg", "plan", places[0], "--out", places[1]
        ),
        "medseg, cases (a process of its own)": run(sys.executable, "-c", PREPARE, *places),
    }
    entry = str(Path(peers).with_name("nnUNetv2_plan_and_preprocess"))
    options = ("-d", "4", "-c", "3d_fullres", "-np", str(cores), "-npfp", str(cores), "--verify_dataset_integrity")
    return {**found, "nnU-Net, plan and cases": run(entry, *options)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--peers", default="/work/peers/bin/python", help="interpreter of scripts/install_peers.sh")
    parser.add_argument("--spacing", type=float, default=1.3, help="of the CT, in mm")
    parser.add_argument("--cases", type=int, default=200, help="of hippocampus, for the whole command")
    parser.add_argument("--cores", type=int, default=2, help="processes of nnU-Net")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/tmp/medseg-preprocessing"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Seconds]] = {}
    folder = raw_dataset(options.data, options.work, options.cases)
    for _ in range(options.rounds):
        found = ct_rows(options.data, options.peers, options.spacing, options.work)
        found |= command_rows(options.peers, folder, options.work, options.cores)
        for name, seconds in found.items():
            rows.setdefault(name, []).append(seconds)
    print(f"\nCT to {options.spacing} mm: seconds a case; whole commands: seconds for {options.cases} cases\n")
    print("| way | s, median | all | of processors, median |\n|---|---|---|---|")
    for name, every in rows.items():
        walls, used = zip(*every, strict=True)
        each = ", ".join(f"{s:.2f}" for s in walls)
        print(f"| {name} | {statistics.median(walls):.2f} | {each} | {statistics.median(used):.2f} |")


if __name__ == "__main__":
    main()
