"""Whole runs of many studies with one worker: against their own stages measured alone, and against nnU-Net.

    python benchmarks/throughput.py --data ../shared/data --peers /work/peers/bin
    python benchmarks/throughput.py --quick --peers /work/peers/bin         # tiny images, to try the script itself

body: --studies CTs of 256×256×128 (ct_body/ct_3mm_112.nii.gz resampled by scipy.ndimage.zoom(order=1), each rolled by
another number of slices), the body model of nnunet_models, without mirroring. First one process does all studies stage
by stage: reading (hash of the input, header, array), network (all from the array to the mask), writing (NIfTI, its
hash, volumes); what is summed is the time of the stages alone, without starting the process and loading the model. Then
`medseg predict --workers 1` does the same studies: its wall time is that of the whole command.

crops: --crops images of the hippocampus (those of the data set, and the same mirrored), `medseg predict --workers 1`
against `nnUNetv2_predict` with the same weights (folds 0 and 1), both without mirroring, steps of half a window, whole
commands; nnU-Net with -npp/-nps 0 and 1, of which the better one counts. BENCHMARK_THREADS cores each (default 2).
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from _common import limited, machine, markdown
from scipy import ndimage
from streaming import watched

BODY = "Dataset005_Body/nnUNetTrainer__smallResPlans__3d_fullres"
HIPPOCAMPUS = "Dataset004_Hippocampus/nnUNetTrainer__smallPlans__3d_fullres"
SIZE, QUICK_SIZE = (256, 256, 128), (64, 64, 32)
LIMIT = 1.15
"""Of the sum of the stages, what the command may take."""


def make_bodies(data: Path, folder: Path, count: int, size: tuple[int, ...]) -> None:
    """Write the CTs, unless they are there."""
    source = nibabel.load(data / "ct_body" / "ct_3mm_112.nii.gz")
    array = np.asarray(source.dataobj).astype(np.float32)
    factors = [n / m for n, m in zip(size, array.shape, strict=True)]
    made = ndimage.zoom(array, factors, order=1).round().astype(np.int16)
    affine = source.affine @ np.diag([*(m / n for n, m in zip(made.shape, array.shape, strict=True)), 1.0])
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        file = folder / f"body{number:03}_0000.nii.gz"
        if not file.exists():
            nibabel.save(nibabel.Nifti1Image(np.roll(made, number, axis=2), affine), file)


def make_crops(data: Path, folder: Path, count: int) -> None:
    """Write hippocampi: as they are, then mirrored along one axis after the other."""
    files = sorted(file for file in (data / "hippocampus" / "imagesTr").glob("[!.]*.nii.gz"))
    ways = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        place = folder / f"crop{number:04}_0000.nii.gz"
        if not place.exists():
            image = nibabel.load(files[number % len(files)])
            array = np.flip(np.asarray(image.dataobj), ways[number // len(files) % len(ways)])
            nibabel.save(nibabel.Nifti1Image(array, image.affine, image.header), place)


def stages(model: Path, images: Path, out: Path) -> dict[str, float]:
    """Do all studies in this process, stage by stage; return the seconds of each stage, all studies summed."""
    from medseg.startup import quick_start

    quick_start()  # as the command does
    from medseg.batch.study import read_study, volumes
    from medseg.batch.study_input import StudyInput
    from medseg.exporters.nifti import write_nifti
    from medseg.files import file_digest
    from medseg.inference.predict import load_model, predict_case

    began = time.monotonic()
    loaded = load_model(model)
    spent = {"loading": time.monotonic() - began, "reading": 0.0, "network": 0.0, "writing": 0.0}
    spec = loaded.bundle.info.spec
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(images.glob("*.nii.gz")):
        study = StudyInput(file.name.removesuffix("_0000.nii.gz"), (file,), None, file)
        began = time.monotonic()
        study.digest()
        image = read_study(study, spec)
        read = time.monotonic()
        mask = predict_case(loaded, image, mirror=False).mask
        predicted = time.monotonic()
        write_nifti(out / f"{study.id}.nii.gz", mask)
        file_digest(out / f"{study.id}.nii.gz")
        volumes(spec, mask)
        ended = time.monotonic()
        spent["reading"] += read - began
        spent["network"] += predicted - read
        spent["writing"] += ended - predicted
    return spent


def predicted(images: Path, model: Path, out: Path) -> float:
    """Run the command; return its seconds."""
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "medseg", "predict", str(images), "--model", str(model), "--out", str(out)]
    code, seconds, _ = watched([*words, "--workers", "1", "--no-mirror"], limited())
    if code:
        raise SystemExit(f"medseg predict ended with {code}")
    return seconds


def body(data: Path, work: Path, count: int, size: tuple[int, ...]) -> None:
    model, images = data / "nnunet_models" / BODY, work / f"body_{size[0]}_{count}"
    make_bodies(data, images, count, size)
    alone = work / "stages.json"
    script = [sys.executable, __file__, "--stages", str(alone), str(model), str(images), str(work / "alone")]
    code, _, _ = watched(script, limited())
    if code:
        raise SystemExit(f"the stages alone ended with {code}")
    spent = json.loads(alone.read_text())
    seconds = predicted(images, model, work / "body_masks")
    total = spent["reading"] + spent["network"] + spent["writing"]
    row = [f"{spent[name]:.1f} s" for name in ("loading", "reading", "network", "writing")]
    ratio = f"{seconds / total:.3f} ({'at most' if seconds <= LIMIT * total else 'MORE THAN'} {LIMIT})"
    head = ["studies", "loading", "reading", "network", "writing", "reading to writing", "the command", "ratio"]
    print(markdown(head, [[count, *row, f"{total:.1f} s", f"{seconds:.1f} s", ratio]]))


def crops(data: Path, work: Path, count: int, peers: Path | None, numbers: Sequence[int]) -> None:
    model, images = data / "nnunet_models" / HIPPOCAMPUS, work / f"crops_{count}"
    make_crops(data, images, count)
    rows, results = [], data.resolve() / "nnunet_models"
    seconds = predicted(images, model, work / "crop_masks")
    rows.append(["medseg predict --workers 1", f"{seconds:.1f} s", f"{60 * count / seconds:.0f}", ""])
    for processes in numbers if peers is not None else ():
        out = work / f"nnunet{processes}"
        shutil.rmtree(out, ignore_errors=True)
        options = "-d 4 -c 3d_fullres -p smallPlans -f 0 1 -step_size 0.5 --disable_tta -device cpu"
        options += f" -npp {processes} -nps {processes}"
        words = [str(peers / "nnUNetv2_predict"), "-i", str(images), "-o", str(out), *options.split()]
        places = {"nnUNet_results": str(results), "nnUNet_raw": str(work), "nnUNet_preprocessed": str(work)}
        code, taken, _ = watched(words, {**limited(), **places})
        name = f"nnUNetv2_predict -npp {processes} -nps {processes}"
        rows.append([name, f"{taken:.1f} s", f"{60 * count / taken:.0f}", differing(work / "crop_masks", out)])
        if code:
            rows[-1][1:] = [f"ended with {code}", "", ""]
    print(markdown(["crops", "seconds", "studies a minute", "differs from medseg"], rows))


def differing(ours: Path, theirs: Path) -> str:
    """Return the share of voxels that differ, of those that are foreground for one of both."""
    inside = different = 0
    for file in sorted(theirs.glob("*.nii.gz")):
        mine = ours / file.name.replace(".nii.gz", "_0000.nii.gz")  # to medseg the ending is part of the name
        a, b = (np.asarray(nibabel.load(place).dataobj) for place in (mine, file))
        inside, different = inside + int(((a > 0) | (b > 0)).sum()), different + int((a != b).sum())
    return f"{100 * different / max(1, inside):.4f} % of {inside} voxels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/medseg-throughput"))
    parser.add_argument("--peers", type=Path, help="bin folder of an environment with nnunetv2")
    parser.add_argument("--studies", type=int, default=40)
    parser.add_argument("--crops", type=int, default=1000)
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1], help="of nnU-Net's -npp and -nps")
    parser.add_argument("--only", choices=("body", "crops"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stages", nargs=4, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stages:
        told, *places = arguments.stages
        told.write_text(json.dumps(stages(*places)))
        return
    if arguments.quick:
        arguments.studies, arguments.crops = 2, 6
    print(json.dumps(machine()))
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.only != "crops":
        body(arguments.data, arguments.work, arguments.studies, QUICK_SIZE if arguments.quick else SIZE)
    if arguments.only != "body":
        crops(arguments.data, arguments.work, arguments.crops, arguments.peers, arguments.processes)


if __name__ == "__main__":
    main()
