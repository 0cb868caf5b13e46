"""Seconds and memory to read one CT series (300 slices of 512 x 512, uncompressed) by medseg and by others.

    python benchmarks/dicom_read.py --slices 300 --repeats 3

Each reader runs in a process of its own, in turn, with the files in the page cache; the best of the repeats counts.
"pydicom loop" reads, rescales and stacks every file and checks nothing: the floor for anything built on pydicom.
Peak memory is that of the process, less what it needed after its imports. All give float32 (or float64) HU.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def by_medseg(folder: Path) -> Any:
    from medseg.readers.dicom_series import read_series

    return lambda: read_series(folder).array[0]


def by_pydicom(folder: Path) -> Any:
    import pydicom

    def read() -> Any:
        datasets = [pydicom.dcmread(file) for file in folder.iterdir()]
        datasets.sort(key=lambda dataset: float(dataset.ImagePositionPatient[2]))
        slices = [
            dataset.pixel_array.astype(np.float32) * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
            for dataset in datasets
        ]
        return np.stack(slices).T

    return read


def by_simpleitk(folder: Path) -> Any:
    import SimpleITK

    def read() -> Any:
        names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(names)).T

    return read


def by_highdicom(folder: Path) -> Any:
    import highdicom
    import pydicom

    def read() -> Any:
        datasets = [pydicom.dcmread(file) for file in folder.iterdir()]
        return highdicom.get_volume_from_series(datasets).array.T

    return read


READERS: dict[str, Callable[[Path], Any]] = {
    "medseg": by_medseg,
    "pydicom loop": by_pydicom,
    "SimpleITK": by_simpleitk,
    "highdicom": by_highdicom,
}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(name: str, folder: Path) -> dict[str, Any]:
    read = READERS[name](folder)
    before, began = peak_mib(), time.perf_counter()
    array = read()
    seconds = time.perf_counter() - began
    # positions along an axis may run either way: order does not change these
    return {"seconds": seconds, "mib": peak_mib() - before, "sum": float(array.sum(dtype=np.float64)), "n": array.size}


def write(folder: Path, slices: int) -> None:
    from medseg.phantom.dicom import write_series
    from medseg.volume import Volume

    rng = np.random.default_rng(0)
    noise = rng.integers(-1000, 2000, (1, 512, 512, slices)).astype(np.float32)
    write_series(Volume(noise, np.diag([-0.7, -0.7, 1.0, 1.0])), folder, modality="CT", shuffle=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="series to read instead of a phantom")
    parser.add_argument("--one", choices=READERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not options.folder:
            write(folder, options.slices)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in READERS}
        for _ in range(options.repeats):
            for name in READERS:  # in turn, so that a busy moment hits all of them
                command = [sys.executable, __file__, "--one", name, "--folder", str(folder)]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[name].append(json.loads(run.stdout.splitlines()[-1]))
    voxels = runs["medseg"][0]["n"]
    print(f"{voxels / 2**20:.0f} million voxels, {4 * voxels / 2**20:.0f} MiB as float32")
    print("| reader | s, best | s, all | MiB above imports | values |\n|---|---|---|---|---|")
    for name, found in runs.items():
        seconds = sorted(run["seconds"] for run in found)
        same = all(run["sum"] == runs["medseg"][0]["sum"] for run in found)
        every = ", ".join(f"{value:.2f}" for value in seconds)
        print(f"| {name} | {seconds[0]:.2f} | {every} | {found[0]['mib']:.0f} | {'same' if same else 'OTHER'} |")


if __name__ == "__main__":
    main()
