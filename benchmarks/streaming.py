"""Whole-process wall time and peak memory of predicting a body CT: medseg, nnU-Net and MONAI with the same weights.

    python benchmarks/streaming.py --data ../shared/data --peers /work/peers/bin --z 100 200 400 800

The image is the first 112·z/400 slices of ct_body/ct_3mm_112.nii.gz, resampled by scipy.ndimage.zoom(order=1) to
512×512×z; beyond z = 400 they are followed by their mirror image. Memory is the peak of the process tree, sampled every
50 ms (resident set sizes, shared pages counted in each). nnU-Net: nnUNetv2_predict -f all -step_size 0.5 --disable_tta,
with -npp/-nps 0 and 1. BENCHMARK_THREADS cores each (default 2). `--only medseg nnunet0 ...` picks.
`--wide 118` predicts with a head of 118 channels, 512×512×800, under --max-memory 4GiB: with random weights, or, with
`--minutes 4`, trained that long (_wide_model.py).
`--quick` takes 128×128×20 instead, to try the script itself.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import psutil
from _common import limited, machine
from _wide_model import widened
from scipy import ndimage

FOLDER = "Dataset005_Body/nnUNetTrainer__smallResPlans__3d_fullres"
MONAI = """
import sys, json, torch, nibabel, numpy as np
from pathlib import Path
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, Invertd, Spacingd, EnsureChannelFirstd, LoadImaged, ScaleIntensityRanged
from medseg.inference.predict import load_model
model = load_model(Path(sys.argv[1]), device=torch.device("cpu"))
row = next(iter(model.bundle.info.plan.normalisation.values()))
low, high = ((x - row.mean) / row.deviation for x in (row.low, row.high))
steps = Compose([
    LoadImaged("image", image_only=True), EnsureChannelFirstd("image"),
    # As nnU-Net: the voxels cover the same extent before and after; the default keeps the centre of the first one.
    Spacingd("image", pixdim=(3.0, 3.0, 3.0), mode="bilinear", scale_extent=True),
    ScaleIntensityRanged("image", a_min=row.low, a_max=row.high, b_min=low, b_max=high, clip=True),
])
data = steps({"image": sys.argv[2]})
with torch.inference_mode():
    patch = tuple(reversed(model.bundle.info.plan.patch_size))
    network = lambda x: model.networks[0](x.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
    logits = SlidingWindowInferer(patch, sw_batch_size=1, overlap=0.5, mode="gaussian")(data["image"][None], network)[0]
    data["pred"] = logits
    back = Invertd("pred", steps, orig_keys="image", nearest_interp=False, to_tensor=True)(data)["pred"]
    mask = back.argmax(0).to(torch.uint8).numpy()
nibabel.save(nibabel.Nifti1Image(mask, nibabel.load(sys.argv[2]).affine), sys.argv[3])
"""


def make_image(data: Path, out: Path, z: int, plane: int) -> Path:
    """Write the CT of this size, unless it is there."""
    file = out / f"ct_{plane}_{z}" / "ct_0000.nii.gz"
    if file.exists():
        return file
    source = nibabel.load(data / "ct_body" / "ct_3mm_112.nii.gz")
    whole = np.asarray(source.dataobj).astype(np.float32)
    array = np.concatenate([whole, whole[:, :, ::-1]], axis=2)[:, :, : max(1, 112 * z // 400)]
    factors = [n / m for n, m in zip((plane, plane, z), array.shape, strict=True)]
    made = ndimage.zoom(array, factors, order=1).round().astype(np.int16)
    affine = source.affine @ np.diag([*(m / n for n, m in zip(made.shape, array.shape, strict=True)), 1.0])
    file.parent.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(made, affine), file)
    return file


def processor_seconds() -> float:
    """Return what ended processes of this one have used, with the processes that they waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def watched(command: list[str], environment: dict[str, str]) -> tuple[int, float, float]:
    """Run a command; return its exit code, seconds, and GiB of its process tree at the peak."""
    began, peak = time.monotonic(), 0
    # Not a pipe: nobody reads it before the end, and progress bars of a thousand cases fill it.
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            tree = [root, *root.children(recursive=True)]
        except psutil.Error:
            tree = []
        for each in tree:
            try:
                total += each.memory_info().rss
            except psutil.Error:
                continue
        peak = max(peak, total)
        time.sleep(0.05)
    if process.returncode:
        errors.seek(0)
        print(errors.read().decode(errors="replace")[-600:], file=sys.stderr)
    errors.close()
    return process.returncode, time.monotonic() - began, peak / 2**30


def contenders(image: Path, model: Path, out: Path, peers: Path | None, limit: str) -> dict[str, list[str]]:
    medseg = [
        sys.executable,
        "-m",
        "medseg",
        "predict",
        str(image),
        "--model",
        str(model),
        "--out",
        str(out / "medseg"),
    ]
    rows = {"medseg": [*medseg, "--no-mirror", *(["--max-memory", limit] if limit else [])]}
    rows["monai"] = [sys.executable, "-c", MONAI, str(model), str(image), str(out / "monai.nii.gz")]
    if peers is not None:
        for count in (0, 1):
            options = "-d 5 -c 3d_fullres -p smallResPlans -f all -step_size 0.5 --disable_tta -device cpu"
            options += f" -npp {count} -nps {count}"
            places = ["-i", str(image.parent), "-o", str(out / f"nnunet{count}")]
            rows[f"nnunet{count}"] = [str(peers / "nnUNetv2_predict"), *places, *options.split()]
    return rows


def mask_of(name: str, out: Path) -> np.ndarray | None:
    files = [out / "monai.nii.gz"] if name == "monai" else sorted((out / name).glob("*.nii.gz"))
    return np.asarray(nibabel.load(files[0]).dataobj) if files and files[0].exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/medseg-streaming"))
    parser.add_argument("--peers", type=Path, help="bin folder of an environment with nnunetv2")
    parser.add_argument("--z", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--wide", type=int, default=0, help="channels of a wider head")
    parser.add_argument("--minutes", type=float, default=0.0, help="of training for --wide; 0: random weights")
    parser.add_argument("--max-memory", default="")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    plane, depths = (128, [20]) if arguments.quick else (512, arguments.z)
    model, limit = arguments.data / "nnunet_models" / FOLDER, arguments.max_memory
    if arguments.wide:
        place = arguments.out / "nnunet" / f"Dataset005_Body{arguments.wide}_{arguments.minutes:g}" / Path(FOLDER).name
        place.parent.mkdir(parents=True, exist_ok=True)
        body = arguments.data / "ct_body" / "ct_3mm_112.nii.gz"
        model = widened(model, place, arguments.wide, image=body, minutes=arguments.minutes)
        limit = limit or "4GiB"
        depths = depths if arguments.quick else [800]
    results = model.resolve().parents[1]
    environment = {**limited(), "nnUNet_results": str(results), "nnUNet_raw": "/tmp", "nnUNet_preprocessed": "/tmp"}
    print(json.dumps(machine()))
    print("| z | program | exit | seconds | of processors | peak GiB | less image and mask | differs from nnunet |")
    print("|---|---|---|---|---|---|---|---|")
    for z in depths:
        image = make_image(arguments.data, arguments.out, z, plane)
        out = arguments.out / f"out_{plane}_{z}_{arguments.wide}_{arguments.minutes:g}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        rows = contenders(image, model, out, arguments.peers, limit)
        arrays, masks = plane * plane * z * 3 / 2**30, {}
        for name in sorted(rows, key=lambda each: not each.startswith("nnunet")):
            if arguments.only and name not in arguments.only:
                continue
            used = processor_seconds()
            code, seconds, peak = watched(rows[name], environment)
            used = processor_seconds() - used
            masks[name] = mask_of(name, out)
            reference = next((masks[n] for n in ("nnunet0", "nnunet1") if masks.get(n) is not None), None)
            found = masks[name]
            differs = ""
            if reference is not None and found is not None:
                inside = (reference > 0) | (found > 0)
                differs = f"{100 * (reference != found)[inside].mean():.4f} % of foreground"
            figures = f"{seconds:.1f} | {used:.1f} | {peak:.2f} | {peak - arrays:.2f}"
            print(f"| {z} | {name} | {code} | {figures} | {differs} |", flush=True)


if __name__ == "__main__":
    main()
