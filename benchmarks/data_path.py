"""Patches per second of sampling and augmentation: medseg, batchgeneratorsv2 in nnU-Net's loader, TorchIO and MONAI.

    python benchmarks/data_path.py --peers /work/peers/bin/python --cores 2 --rounds 5

Every contender runs in a process of its own, in turn, held to the same cores, on the same prepared cases (in the page
cache or in memory), and gives batches of the same size. Peers run as they are used: as many worker processes of one
thread as there are cores (with one core: none), from nnU-Net's blosc2 files, TorchIO's subjects and MONAI's cached
dictionaries in memory. medseg runs as `medseg train` does: one reader thread, torch on all cores. TRANSFORMS lists what
all do; where a peer lacks one, data_path_peers.py writes it in torch as cheaply as it can.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
TRANSFORMS = """
| step | probability | range | how |
|---|---|---|---|
| case | | uniform | |
| place | 1/3 | centred on a voxel of a label, else anywhere | image float32, mask integer |
| rotation and scale | 0.5, together | -30° to 30° about 3 axes, 0.7 to 1.4 | image trilinear, mask nearest, 0 outside |
| noise | 0.15 | Gaussian, deviation 0 to 0.3 | |
| blur | 0.15 | Gaussian, 0.5 to 1 voxel | |
| brightness | 0.2 | factor 0.75 to 1.25 | |
| contrast | 0.2 | factor 0.75 to 1.25 about the mean | range kept |
| low resolution | 0.15 | 0.5 to 1 of the voxels | nearest down, trilinear up |
| gamma | 0.3 | 0.7 to 1.5, 30 % of it inverted | mean and deviation kept (TorchIO: not) |
| mirroring | 0.5 an axis | 3 axes | |
"""
SETS = {"hippocampus": ((40, 56, 40), 2), "ct": ((128, 128, 128), 2)}
"""Name -> patch, batch, as `medseg plan` has them on two cores (hippocampus) and as nnU-Net has them (CT)."""
PEERS = ("batchgeneratorsv2", "torchio", "monai")


def write_cases(name: str, data: Path, folder: Path, number: int) -> None:
    """Write what all contenders read: N/{image,mask,locations}.npy."""
    import nibabel

    from medseg.preparation.steps import resize_linear

    if name == "hippocampus":
        files = sorted((data / "hippocampus" / "imagesTr").glob("*.nii.gz"))[:number]
        pairs = [(f, data / "hippocampus" / "labelsTr" / f.name) for f in files]
    else:
        pairs = [(data / "ct_body" / "ct_3mm_112.nii.gz", None)] * number
    for index, (image_file, mask_file) in enumerate(pairs):
        image = np.asarray(nibabel.load(image_file).dataobj, dtype=np.float32)
        if mask_file is None:
            import torch

            size = tuple(2 * n for n in image.shape)  # 3 mm -> 1.5 mm
            image = resize_linear(torch.from_numpy(image)[None], size)[0].numpy()  # type: ignore[arg-type]
            mask = ((image > 150).astype(np.uint8) + (image > 300)).astype(np.uint8)
        else:
            mask = np.asarray(nibabel.load(mask_file).dataobj).astype(np.uint8)
        # In the order of medseg's cache, nnU-Net's files and a tensor; NIfTI has the other one.
        image, mask = np.ascontiguousarray((image - image.mean()) / image.std()), np.ascontiguousarray(mask)
        places = [np.argwhere(mask == label) for label in (1, 2)]
        rows = [np.column_stack([np.full(len(p), n), p])[:: max(1, len(p) // 2000)] for n, p in enumerate(places)]
        place = folder / f"{index:03d}"
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / "image.npy", image[None])
        np.save(place / "mask.npy", mask[None])
        np.save(place / "locations.npy", np.concatenate(rows).astype(np.int32))


def medseg_batches(folder: Path, patch: tuple[int, int, int], batch: int):  # type: ignore[no-untyped-def]
    """Yield batches as the training loop makes them."""
    from types import SimpleNamespace

    from monai.transforms import Compose

    from medseg.planning.plan import Augmentation
    from medseg.preparation.augment import augment
    from medseg.preparation.cache import CaseCache
    from medseg.preparation.sampling import SamplePatch
    from medseg.training.loop import read_batch

    names = ("image", "mask", "locations")
    opened = [{n: np.load(p / f"{n}.npy", mmap_mode="r") for n in names} for p in sorted(folder.glob("[0-9]*"))]
    plan = SimpleNamespace(
        seed=0,
        batch_size=batch,
        foreground_share=1 / 3,
        patch_size=patch,
        dimensions=3,
        augmentation=Augmentation(elastic=0),
    )
    cache = CaseCache.__new__(CaseCache)
    path = Compose([cache, SamplePatch(patch)])  # type: ignore[arg-type]
    job = SimpleNamespace(
        plan=plan, train=range(len(opened)), path=path, cache=lambda case: {"case": case, **opened[case]}
    )
    with ThreadPoolExecutor(1) as reader:
        step = 0
        ahead = reader.submit(read_batch, job, 0)  # type: ignore[arg-type]
        while True:
            regions, changes = ahead.result()
            ahead = reader.submit(read_batch, job, step + 1)  # type: ignore[arg-type]
            yield augment(regions, changes)
            step += 1


def timed(batches, seconds: float, warm_up: float) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Return patches per second after warming up, and what the last batch was like."""
    began = time.monotonic()
    next(batches)
    while time.monotonic() - began < warm_up:
        next(batches)
    count, began, spent = 0, time.monotonic(), 0.0
    while spent < seconds:
        images, masks = next(batches)
        count += len(images)
        spent = time.monotonic() - began
    assert images.dtype.is_floating_point
    assert images.shape[2:] == masks.shape[2:]
    foreground = float((masks > 0).float().mean())
    return {"rate": count / spent, "mean": float(images.mean()), "foreground": foreground}


def child(options: argparse.Namespace) -> None:
    import torch

    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: options.cores]))
    patch, batch = SETS[options.set]
    if options.child == "medseg":
        torch.set_num_threads(options.cores)
        batches = medseg_batches(options.work / options.set, patch, batch)
    else:
        sys.path.insert(0, str(HERE))
        import data_path_peers

        torch.set_num_threads(1)
        workers = 0 if options.cores == 1 else options.cores
        batches = data_path_peers.MAKERS[options.child](options.work / options.set, patch, batch, workers)
    print(json.dumps(timed(batches, options.seconds, options.warm_up)), flush=True)
    for worker in multiprocessing.active_children():  # those of the peers wait for ever
        worker.kill()
    os._exit(0)


def run(name: str, options: argparse.Namespace) -> dict[str, float]:
    python = sys.executable if name == "medseg" else options.peers
    command = [python, str(Path(__file__).resolve()), "--child", name]
    for key in ("set", "work", "cores", "seconds", "warm_up"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.cores if name == "medseg" else 1)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--peers", default="/work/peers/bin/python", help="interpreter of scripts/install_peers.sh")
    parser.add_argument("--set", choices=SETS, default="hippocampus")
    parser.add_argument("--cases", type=int, default=None, help="default 40 of hippocampus, 4 of CT")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--warm-up", type=float, default=3)
    parser.add_argument("--work", type=Path, default=Path("/tmp/medseg-data-path"))
    parser.add_argument("--only", nargs="+", default=["medseg", *PEERS])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    folder = options.work / options.set
    if not (folder / "000").exists():
        write_cases(options.set, options.data, folder, options.cases or {"hippocampus": 40, "ct": 4}[options.set])
    print(TRANSFORMS)
    rates: dict[str, list[float]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name in options.only:
            found = run(name, options)
            rates[name].append(found["rate"])
            print(f"{name:18} {found['rate']:8.1f} patches/s  mean {found['mean']:+.2f}, foreground "
                  f"{found['foreground']:.3f}, load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    patch, batch = SETS[options.set]
    print(f"\n{options.set}: patches {patch} in batches of {batch}, {options.cores} cores, {options.rounds} rounds\n")
    print("| contender | patches/s, median | all | medseg is faster by |\n|---|---|---|---|")
    for name in options.only:
        every = ", ".join(f"{r:.1f}" for r in sorted(rates[name]))
        ratios = [a / b for a, b in zip(rates.get("medseg", rates[name]), rates[name], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.median(rates[name]):.1f} | {every} | {ratio} |")


if __name__ == "__main__":
    main()
