"""Workers and commands are killed at random moments: in the end the same tree of files, each fault with its reason.

The full campaigns (500 studies; 60 kills of workers, the commands at 20 of these moments) run in `make soak`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from medseg import api
from medseg.batch.engines import KEPT, STAGES, Workers

Builder = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder, tiny_plan: Builder) -> Path:
    """A folder with run/, a model that was hardly trained."""
    root = tmp_path_factory.mktemp("campaign")
    data = tiny_dataset(root / "data", cases=4, test=0)
    api.train(data, out=root / "run", steps=2, plan=tiny_plan(data, root / "plan.yaml", steps=2))
    return root


def environment(place: Path) -> dict[str, str]:
    return {**os.environ, "MEDSEG_KEY_FILE": str(place / "campaign.key"), "PYTHONPATH": os.pathsep.join(sys.path)}


@dataclass(frozen=True)
class Inputs:
    """A tree of studies.

    Attributes
    ----------
    codes : name in `tree` of each damaged study -> the reason code that it must get.
    """

    tree: Path
    codes: dict[str, str]


Plant = Callable[[int], Inputs]


@pytest.fixture(scope="module")
def planted(place: Path, plant_studies: Callable[..., dict[str, str]], request: pytest.FixtureRequest) -> Plant:
    """Builder of trees, each made once: of 500 real hippocampi where they are there, else (and of 20) of phantoms."""
    made: dict[int, Inputs] = {}

    def build(count: int) -> Inputs:
        if count not in made:
            image = request.getfixturevalue("phantom_image")
            if count == FULL["total"]:
                try:
                    image = request.getfixturevalue("hippocampus_crop")
                except pytest.skip.Exception as absent:
                    warnings.warn(f"phantoms instead of hippocampi: {absent.msg}", stacklevel=1)
            made[count] = Inputs(place / f"tree{count}", plant_studies(place / f"tree{count}", image, count))
        return made[count]

    return build


def tree(out: Path) -> dict[str, bytes]:
    """All that is not said to differ from run to run."""
    files = [p for p in out.rglob("*") if p.is_file() and "journal" not in p.relative_to(out).parts]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}


def refusals(out: Path) -> dict[str, str]:
    """Return name of file or folder -> code of the studies that are not done, from what stands in OUT alone."""
    places = {row["id"]: Path(row["path"]).name for row in csv.DictReader((out / "private" / "linkage.csv").open())}
    entries = [json.loads(p.read_text()) for p in (out / "ledger").glob("*.json")]
    assert {entry["state"] for entry in entries if entry["code"]} <= {"refused"}
    return {places[entry["id"]]: entry["code"] for entry in entries if entry["state"] != "done"}


def attempts(out: Path) -> dict[str, int]:
    return {p.stem: json.loads(p.read_text())["attempts"] for p in (out / "journal").glob("*.json")}


def command(place: Path, inputs: Inputs, out: Path, *options: str) -> list[str]:
    model = str(place / "run")
    return [sys.executable, "-m", "medseg", "predict", str(inputs.tree), "--model", model, "--out", str(out), *options]


@contextmanager
def running(place: Path, words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(words, env=environment(place), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def workers_below(roots: Sequence[int]) -> list[psutil.Process]:
    """Return the processes that do studies, below these processes."""
    found = []
    for root in roots:
        with contextlib.suppress(psutil.Error):
            for each in psutil.Process(root).children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has just ended
                    if "medseg.batch.child" in " ".join(each.cmdline()):
                        found.append(each)
    return found


def kill_a_worker(roots: Sequence[int], chance: random.Random) -> bool:
    """Kill one of the processes that do studies, below these processes."""
    try:
        chance.choice(workers_below(roots)).send_signal(signal.SIGKILL)
    except (psutil.Error, IndexError):
        return False
    return True


def progress(out: Path) -> int:
    return len(list((out / "ledger").glob("*.json")))


@dataclass(frozen=True)
class Campaign:
    """Kill workers as studies end, and all commands at `commands` of these moments.

    Attributes
    ----------
    words : of the commands, which run side by side.
    roots : processes below which the workers are, where these are not the commands.
    width : studies that may be in flight at a time.
    """

    place: Path
    out: Path
    words: Sequence[Sequence[str]]
    total: int
    kills: int
    commands: int
    seed: int
    width: int
    roots: Sequence[int] = ()

    def disturb(self) -> int:
        """Return how many workers were killed."""
        chance, killed = random.Random(self.seed), 0
        marks = sorted(chance.sample(range(1, self.total), self.kills))
        ends = set(chance.sample(marks, self.commands))
        while marks:
            with contextlib.ExitStack() as stack:
                processes = [stack.enter_context(running(self.place, words)) for words in self.words]
                while marks and any(process.poll() is None for process in processes):
                    below = self.roots or [process.pid for process in processes]
                    if progress(self.out) < marks[0] or not kill_a_worker(below, chance):
                        time.sleep(0.002)
                        continue
                    mark, killed = marks.pop(0), killed + 1
                    if mark in ends:
                        time.sleep(chance.uniform(0, 0.3))
                        break
                if all(process.poll() is not None for process in processes):
                    break
        return killed

    def run(self, undisturbed: Path, codes: dict[str, str]) -> None:
        """Disturb, then let the commands end, and compare."""
        killed = self.disturb()
        assert killed > self.kills // 2
        for words in self.words:
            last = subprocess.run(words, env=environment(self.place), capture_output=True, text=True, check=False)
            assert last.returncode in (0, 3), last.stderr
        if len(self.words) == 1:
            assert last.returncode == 3, last.stderr
            assert f"{self.total - len(codes)} of {self.total} studies done" in last.stdout
        found, expected = tree(self.out), tree(undisturbed)
        assert sorted(found) == sorted(expected)
        assert {name for name in found if found[name] != expected[name]} == set()
        assert refusals(self.out) == codes
        # Only what was in flight is done again: what that worker had, or all that the commands had.
        again = STAGES * killed + self.width * self.commands
        assert sum(attempts(self.out).values()) - self.total <= again


def undisturbed(place: Path, inputs: Inputs) -> Path:
    out = place / f"undisturbed-{inputs.tree.name}"
    if not (out / "summary.csv").exists():
        with pytest.MonkeyPatch.context() as patch:  # one key for all runs gives DICOM studies the same names
            patch.setenv("MEDSEG_KEY_FILE", environment(place)["MEDSEG_KEY_FILE"])
            api.predict(inputs.tree, model=place / "run", out=out)
        assert refusals(out) == inputs.codes
    return out


REDUCED = {"total": 20, "kills": 3, "commands": 1}
FULL = {"total": 500, "kills": 60, "commands": 20}
sizes = pytest.mark.parametrize("size", [REDUCED, pytest.param(FULL, marks=pytest.mark.soak)], ids=["20", "500"])


def test_each_way_to_damage_a_study_has_its_reason(
    place: Path,
    tmp_path: Path,
    plant_studies: Callable[..., dict[str, str]],
    phantom_image: Callable[..., object],
    ways_to_damage: int,
) -> None:
    total = 3 * ways_to_damage
    # NIfTI files are two of three: half of them, and all series.
    codes = plant_studies(tmp_path / "in", phantom_image, total, damaged=[n for n in range(total) if n % 3 < 2])
    assert len(codes) == 2 * ways_to_damage
    api.predict(tmp_path / "in", model=place / "run", out=tmp_path / "out")
    assert refusals(tmp_path / "out") == codes


@sizes
def test_workers_and_commands_killed(place: Path, planted: Plant, tmp_path: Path, size: dict[str, int]) -> None:
    inputs, out = planted(size["total"]), tmp_path / "out"
    words = [command(place, inputs, out, "--workers", "2")]
    campaign = Campaign(place, out, words, seed=1, width=2 * STAGES, **size)
    campaign.run(undisturbed(place, inputs), inputs.codes)


@sizes
def test_workers_and_commands_of_shards_killed(
    place: Path, planted: Plant, tmp_path: Path, size: dict[str, int]
) -> None:
    inputs, out = planted(size["total"]), tmp_path / "out"
    words = [command(place, inputs, out, "--shard", f"{number}/2") for number in (1, 2)]
    campaign = Campaign(place, out, words, seed=2, width=2 * STAGES, **size)
    campaign.run(undisturbed(place, inputs), inputs.codes)


@sizes
def test_workers_of_dask_and_commands_killed(place: Path, planted: Plant, tmp_path: Path, size: dict[str, int]) -> None:
    """A real scheduler and two workers, on this machine; what they guard is killed, and the command."""
    inputs, out = planted(size["total"]), tmp_path / "out"
    calm = undisturbed(place, inputs)
    with dask(place, 2) as (uri, workers):
        words = [command(place, inputs, out, "--scheduler", uri)]
        campaign = Campaign(place, out, words, seed=3, width=2, roots=workers, **size)
        campaign.run(calm, inputs.codes)
        assert len(workers_below(workers)) <= 2 * KEPT, "runs that are over keep no models in memory"


def test_two_shards_and_a_command_share_a_folder(place: Path, planted: Plant, tmp_path: Path) -> None:
    """Two shards at once, then two whole commands at once: no study is done by two."""
    total = 20
    inputs, out = planted(total), tmp_path / "out"
    words = [command(place, inputs, out, "--shard", f"{n}/2") for n in (1, 2)]
    with running(place, words[0]) as one, running(place, words[1]) as two:
        assert {one.wait(), two.wait()} <= {0, 3}
    assert tree(out) == tree(undisturbed(place, inputs))
    assert set(attempts(out).values()) == {1}
    both = tmp_path / "both"
    with running(place, command(place, inputs, both)) as one, running(place, command(place, inputs, both)) as two:
        assert (one.wait(), two.wait()) == (3, 3)
    assert tree(both) == tree(out)
    assert set(attempts(both).values()) == {1}


@contextmanager
def dask(place: Path, workers: int) -> Iterator[tuple[str, list[int]]]:
    """Run a real scheduler and workers on this machine only."""
    address = place / f"scheduler-{time.monotonic_ns()}.json"
    local = ["--host", "127.0.0.1", "--no-dashboard"]
    start = [sys.executable, "-m", "distributed.cli.dask_scheduler", *local, "--port", "0"]
    with running(place, [*start, "--scheduler-file", str(address)]):
        while not address.exists() or not address.read_text().strip():
            time.sleep(0.05)
        uri = json.loads(address.read_text())["address"]
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", uri, *local, "--nthreads", "1"]
        processes = [
            subprocess.Popen(worker, env=environment(place), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(workers)
        ]
        try:
            yield uri, [process.pid for process in processes]
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(60)


def test_a_cluster_of_dask_on_this_machine(place: Path, planted: Plant, tmp_path: Path) -> None:
    inputs, out = planted(20), tmp_path / "out"
    (tmp_path / "cluster.yaml").write_text("kind: local\nworkers: 2\n")
    words = command(place, inputs, out, "--cluster", str(tmp_path / "cluster.yaml"))
    last = subprocess.run(words, env=environment(place), capture_output=True, text=True, check=False)
    assert last.returncode == 3, last.stderr
    assert tree(out) == tree(undisturbed(place, inputs))


def test_no_scheduler_is_an_error_with_a_code(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg.batch import engines
    from medseg.errors import BatchError

    monkeypatch.setattr(engines, "CONNECT_SECONDS", 1.0)
    with pytest.raises(BatchError, match="no Dask scheduler") as caught:
        api.predict(
            place / "data" / "images",
            model=place / "run",
            out=tmp_path / "out",
            workers=Workers(scheduler="tcp://127.0.0.1:9"),
        )
    assert caught.value.code == "NO_SCHEDULER"
