"""What several benchmarks share: commands with their wall and CPU time, splits, scores, resumable lines of JSON."""

import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SPLIT = HERE / "hippocampus_split.json"
"""160 cases to learn from and 40 to test; see hippocampus.py."""
THREADS = int(os.environ.get("BENCHMARK_THREADS", "2"))
"""Cores that every contender may use."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Spent:
    """Seconds of a command: on the wall clock, and of the processor in it and in all that it started."""

    wall: float
    cpu: float


def limited() -> dict[str, str]:
    """Return an environment in which the numerical libraries use THREADS threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(THREADS))}


def run(
    command: Sequence[str | Path], *, log: Path | None = None, environment: Mapping[str, str] | None = None
) -> Spent:
    """Run a command to its end; its output goes to the terminal, or to the end of a file."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [str(word) for word in command]
    if log is None:
        subprocess.run(words, check=True, env=environment or limited())
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as out:
            done = subprocess.run(
                words, env=environment or limited(), stdout=out, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            raise SystemExit(f"{' '.join(words[:4])} ... ended with {done.returncode}; its words are in {log}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(round(time.monotonic() - began, 1), round(cpu, 1))


def medseg(*arguments: str | Path, log: Path | None = None, cache: Path | None = None) -> Spent:
    """Run a verb of medseg; with `cache` it knows no step times but those that are kept there."""
    environment = limited() if cache is None else {**limited(), "MEDSEG_CACHE": str(cache)}
    return run([sys.executable, "-m", "medseg", *arguments], log=log, environment=environment)


def test_cases() -> set[str]:
    """Return the 40 cases of hippocampus_split.json; the others of the dataset are there to learn from."""
    return set(json.loads(SPLIT.read_text(encoding="utf-8"))["test"])


def inner_split(file: Path, cases: Iterable[str], *, held: int = 32) -> dict[str, list[str]]:
    """Write and return a split of the cases that are not the 40: development must not look at those."""
    left = sorted(set(cases) - test_cases())
    random.Random(2026).shuffle(left)
    split = {"test": sorted(left[:held]), "train": sorted(left[held:])}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(split, indent=1), encoding="utf-8")
    return split


def cases_in(data: Path) -> list[str]:
    """Return the ids of the cases of a folder of the Medical Segmentation Decathlon."""
    return sorted(file.name.removesuffix(".nii.gz") for file in (data / "labelsTr").glob("[!.]*.nii.gz"))


def score(masks: Path, data: Path, split: Path, out: Path) -> None:
    """Score masks of the test cases as `medseg evaluate` does, whoever made them."""
    words = ("--predictions", masks, "--reference", data, "--splits", split, "--out", out, "--no-track")
    medseg("evaluate", *words, log=out.parent / "evaluate.log")


def label_dice(scores: Path) -> dict[str, float]:
    """Return label -> mean Dice of a folder that `medseg evaluate` or a training wrote."""
    from medseg.evaluation.table import load_evaluation

    evaluation = load_evaluation(scores)
    names = {target.name for target in evaluation.targets}
    rows = (row for row in evaluation.summary if row.metric == "dice" and row.label in names)
    return {row.label: row.mean for row in rows if row.mean is not None}


def case_dice(scores: Path) -> dict[str, float]:
    """Return case -> mean Dice of its labels."""
    from medseg.evaluation.table import load_evaluation

    evaluation = load_evaluation(scores)
    found: dict[str, list[float]] = {}
    for target in evaluation.targets:
        for case, value in evaluation.values("dice", target.name).items():
            found.setdefault(case, []).append(value)
    return {case: statistics.mean(values) for case, values in found.items()}


def interval(values: Mapping[str, float]) -> tuple[float, float, float]:
    """Return mean, low and high: the 95 % interval of the bootstrap over patients (a case is a patient here)."""
    from medseg.evaluation.compare import bootstrap_mean

    found = bootstrap_mean(np.array([*values.values()]), [*values], resamples=RESAMPLES, seed=0)
    mean = statistics.mean(values.values())
    return (mean, *found) if found else (mean, float("nan"), float("nan"))


def difference(values: Mapping[str, float], others: Mapping[str, float]) -> tuple[float, float, float]:
    """Return how much higher the mean of `values` is than that of `others`, low and high: both bootstrapped apart."""
    draw = np.random.default_rng(0)
    means = [
        draw.choice([*each.values()], (RESAMPLES, len(each))).mean(1) for each in (values, others)
    ]  # fmt: skip
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return statistics.mean(values.values()) - statistics.mean(others.values()), float(low), float(high)


def machine() -> dict[str, Any]:
    """Return what a figure depends on beside the code."""
    from medseg.device import processor_name

    return {
        "cores": os.cpu_count(),
        "threads": THREADS,
        "processor": processor_name(),
        "python": platform.python_version(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
    }


def _commit() -> str:
    done = subprocess.run(
        ["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


class Lines:
    """Results as lines of JSON: what is there already is not run again."""

    def __init__(self, file: Path, *keys: str) -> None:
        self.file, self.keys = file, keys
        file.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines() if line.strip()]

    def holds(self, **key: Any) -> bool:
        return any(all(row.get(name) == key[name] for name in self.keys) for row in self.rows())

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; the line is written at once, so that a killed run loses one result at most."""
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines) + "\n"


def replace_between(page: Path, name: str, text: str) -> None:
    """Put a generated text between `<!-- NAME: begin -->` and `<!-- NAME: end -->` of a page."""
    content = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, found, rest = content.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page}: no place called {name!r}")
    page.write_text(head + begin + "\n" + text + "\n" + end + tail, encoding="utf-8")
