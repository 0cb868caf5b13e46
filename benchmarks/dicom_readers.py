"""What DICOM readers make of series with something wrong: medseg, SimpleITK, MONAI, dcm2niix, highdicom, dicom2nifti.

    python benchmarks/dicom_readers.py [--peers medseg simpleitk ...] [--cases "missing slice" ...] [--out matrix.md]

Every case is a small series of known truth (medseg.phantom.hazards). Each reader gets its folder, in a process of its
own, with its defaults, and is judged by voxel values and by where the corners lie. Readers that are not installed are
shown as absent.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np

from medseg.phantom.hazards import HAZARDS, READ, SPLIT, Hazard
from medseg.phantom.verdicts import verdict
from medseg.volume import Volume

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SECONDS = 120
HEALTHY = "shuffled names"
MEMORY = 12 * 2**30
Found = list[Volume]


# ---- the readers: folder -> volumes; what they raise is a refusal ---------------------------------------------------


def medseg(folder: Path) -> Found:
    from medseg.readers.dicom_scan import find_series
    from medseg.readers.dicom_series import read_series

    series = find_series(folder)
    volumes = [read_series(entry) for entry in series if entry.refusal is None]
    refusals = [entry.refusal.code for entry in series if entry.refusal]
    if not volumes:
        raise ValueError(", ".join(refusals))
    for volume in volumes:
        for note in volume.notes:
            print(note, file=sys.stderr)
    print(*refusals, file=sys.stderr)
    return volumes


def simpleitk(folder: Path) -> Found:
    import SimpleITK

    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not names:
        raise ValueError("no series")
    found = []
    for name in names:
        files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), name)
        image = SimpleITK.ReadImage(files if len(files) > 1 else files[0])
        affine = np.eye(4)
        affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
        affine[:3, 3] = image.GetOrigin()
        found.append(_volume(SimpleITK.GetArrayFromImage(image).T, LPS @ affine))
    return found


def monai(folder: Path) -> Found:
    from monai.data import PydicomReader

    reader = PydicomReader()
    data, meta = reader.get_data(reader.read(str(_single(folder) or folder)))
    return [_volume(np.asarray(data), np.asarray(meta["affine"], np.float64))]


def highdicom(folder: Path) -> Found:
    import highdicom as hd
    import pydicom

    if single := _single(folder):
        volume = hd.imread(single).get_volume()
    else:
        files = sorted(path for path in folder.iterdir() if path.suffix != ".txt")
        volume = hd.get_volume_from_series([pydicom.dcmread(path, force=True) for path in files])
    # its axes are slices, rows, columns
    return [_volume(volume.array.transpose(2, 1, 0), LPS @ np.asarray(volume.affine)[:, [2, 1, 0, 3]])]


def dcm2niix(folder: Path) -> Found:
    """Accepts its files only with exit status 0, as its manual asks."""
    with tempfile.TemporaryDirectory() as out:
        command = [_program("dcm2niix"), "-b", "n", "-z", "n", "-f", "%s_%d", "-o", out, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        lines = (line for line in done.stdout.splitlines() if "Warning" in line or "Error" in line)
        print(*lines, sep="\n", file=sys.stderr)
        files = sorted(Path(out).glob("*.nii"))
        if done.returncode or not files:
            left = f", {len(files)} files left behind" if files else ""
            raise ValueError(f"exit status {done.returncode}{left}")
        return [volume for file in files for volume in _nifti(file)]


def dicom2nifti(folder: Path) -> Found:
    from dicom2nifti.convert_dir import convert_directory

    with tempfile.TemporaryDirectory() as out:
        convert_directory(str(folder), out, compression=False, reorient=False)
        files = sorted(Path(out).glob("*.nii"))
        if not files:
            raise ValueError("no file written")
        return [volume for file in files for volume in _nifti(file)]


def _single(folder: Path) -> Path | None:
    files = list(folder.iterdir())
    return files[0] if len(files) == 1 else None


def _program(name: str) -> str:
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}") or name


def _nifti(path: Path) -> Found:
    import nibabel

    image = nibabel.load(path)
    array = np.asarray(image.dataobj)
    times = array[..., None] if array.ndim == 3 else array
    return [_volume(times[..., n], image.affine) for n in range(times.shape[3])]


def _volume(array: np.ndarray, affine: np.ndarray) -> Volume:
    array = np.asarray(array, np.float64)
    return Volume(array.reshape(array.shape if array.ndim == 3 else (*array.shape, 1))[None], affine)


PEERS: dict[str, tuple[Callable[[Path], Found], str, str]] = {
    "medseg": (medseg, "medseg", "medseg.readers.dicom_series"),
    "simpleitk": (simpleitk, "SimpleITK", "SimpleITK"),
    "monai": (monai, "monai", "monai.data"),
    "dcm2niix": (dcm2niix, "dcm2niix", "dcm2niix"),
    "dicom2nifti": (dicom2nifti, "dicom2nifti", "dicom2nifti"),
    "highdicom": (highdicom, "highdicom", "highdicom"),
}
"""Name -> reader, its distribution, the module that is imported before the first case."""


# ---- one case -------------------------------------------------------------------------------------------------------


def attempt(reader: Callable[[Path], Found], hazard: Hazard, folder: Path, answer: Path) -> None:
    """Read in this (forked) process: the answer is a file, what was said goes to another."""
    said = os.open(answer.with_suffix(".said"), os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("always")
    try:
        found = reader(folder)
    except BaseException as error:  # noqa: BLE001 - whatever a reader raises is its refusal
        answer.write_text(json.dumps(["refused", f"{type(error).__name__}: {error}"]))
        return
    answer.write_text(json.dumps(["read", verdict(hazard, found)]))


def judge(peer: str, name: str, folder: Path, usual: frozenset[str]) -> tuple[str, str]:
    """Return one word of WORDS and the details; `usual` are the warnings that a healthy series brings too."""
    kind, details, said = answer_of(peer, name, folder)
    hazard = HAZARDS[name]
    if kind in ("crash", "refused"):
        return kind, details
    right = hazard.outcome in ("read", "split")
    if details == "exact":
        return ("ok" if right else "luck"), ""
    if not details.startswith("wrong"):
        return "ok", details
    return ("warned" if warnings_in(said) - usual else "WRONG"), details


def answer_of(peer: str, name: str, folder: Path) -> tuple[str, str, str]:
    """Return "read", "refused" or "crash", the verdict or the error, and what was said."""
    reader, hazard = PEERS[peer][0], HAZARDS[name]
    answer = folder.with_name(f"{folder.name}.{peer}.json")
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(reader, hazard, folder, answer))
    process.start()
    process.join(SECONDS + 30)
    if process.is_alive():
        process.kill()
        return "crash", "does not end", ""
    if not answer.exists():
        return "crash", f"process ended with {process.exitcode}", ""
    kind, details = json.loads(answer.read_text())
    return kind, details, answer.with_suffix(".said").read_text(errors="replace")


def warnings_in(said: str) -> frozenset[str]:
    """Return the lines that warn, without their numbers and paths."""
    lines = (re.sub(r"\S*/\S*|[\d.-]+", "#", line) for line in said.splitlines())
    return frozenset(line for line in lines if re.search("warn|error", line, re.IGNORECASE))


WORDS = {
    "ok": "exact: every voxel, every corner within 0.01 mm, each part of a series that holds several",
    "refused": "an error, or an exit status that is not 0",
    "luck": "exact, though the files do not say so reliably and the reader remarks nothing",
    "warned": "a wrong result, and a warning on the terminal that a healthy series does not bring",
    "WRONG": "a wrong result and not a word",
    "crash": "the process died, or did not end",
}


def run(peers: list[str], cases: list[str]) -> dict[str, dict[str, tuple[str, str]]]:
    table: dict[str, dict[str, tuple[str, str]]] = {}
    with tempfile.TemporaryDirectory() as work:
        healthy = Path(work) / "healthy"
        HAZARDS[HEALTHY].write(healthy)
        usual = {peer: warnings_in(answer_of(peer, HEALTHY, healthy)[2]) for peer in peers}
        for name in cases:
            folder = Path(work) / f"case{len(table)}"
            folder.mkdir()
            HAZARDS[name].write(folder)
            table[name] = {peer: judge(peer, name, folder, usual[peer]) for peer in peers}
            print(name, {peer: word for peer, (word, _) in table[name].items()}, file=sys.stderr)
    return table


def installed(peer: str) -> bool:
    try:
        importlib.import_module(PEERS[peer][2])
    except ImportError:
        return False
    return True


def required(name: str) -> str:
    outcome = HAZARDS[name].outcome
    return f"refuse: `{outcome}`" if name not in READ and name not in SPLIT else outcome


def cell(word: str, details: str) -> str:
    if word in ("warned", "WRONG"):
        return f"**{word}** {details.removeprefix('wrong: ')}" if word == "WRONG" else f"{word} {details[7:]}"
    return f"{word} ({details})" if word == "ok" and details else word


def markdown(table: dict[str, dict[str, tuple[str, str]]], peers: list[str], absent: list[str]) -> str:
    versions = [f"{PEERS[peer][1]} {metadata.version(PEERS[peer][1])}" for peer in peers]
    lines = [
        f"Measured on {date.today()} with {', '.join(versions)}, Python {sys.version.split()[0]}."
        + (f" Absent: {', '.join(absent)}." if absent else ""),
        "",
        "| case | required | " + " | ".join(peers) + " |",
        "|---|---|" + "---|" * len(peers),
    ]
    for name, row in table.items():
        lines.append(f"| {name} | {required(name)} | " + " | ".join(cell(*row[peer]) for peer in peers) + " |")
    counts = {peer: Counter(row[peer][0] for row in table.values()) for peer in peers}
    lines += ["", f"Of {len(table)} cases:", "", "| | " + " | ".join(peers) + " | meaning |"]
    lines += ["|---|" + "---|" * (len(peers) + 1)]
    for word, meaning in WORDS.items():
        lines.append(f"| {word} | " + " | ".join(str(counts[peer][word]) for peer in peers) + f" | {meaning} |")
    lines.append(
        "| refused what must be read | "
        + " | ".join(str(_too_strict(table, peer)) for peer in peers)
        + " | of the refusals above: cases that can be read exactly |"
    )
    return "\n".join(lines) + "\n"


def _too_strict(table: dict[str, dict[str, tuple[str, str]]], peer: str) -> int:
    return sum(row[peer][0] == "refused" and (name in READ or name in SPLIT) for name, row in table.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--cases", nargs="+", default=list(HAZARDS), choices=list(HAZARDS), metavar="CASE")
    parser.add_argument("--out", type=Path, help="write the table here, else to the terminal")
    parser.add_argument("--json", type=Path, help="write every detail here")
    options = parser.parse_args()
    peers = [peer for peer in options.peers if installed(peer)]
    table = run(peers, options.cases)
    text = markdown(table, peers, [peer for peer in options.peers if peer not in peers])
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
