"""A real Slurm on this machine: studies on jobs of its queue, shards in an array, a training that is interrupted."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors import safe_open

from medseg import api
from medseg.batch.engines import Workers
from medseg.batch.locks import study_lock

Builder = Callable[..., Path]
SECONDS = 600
STUDIES = 8
CONFIGURATION = """
ClusterName=medseg
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
"""Two CPUs; a job of `urgent` takes them from jobs of `main`."""


def until(what: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Wait until `what` is true, while `process` runs."""
    end = time.monotonic() + SECONDS
    while not what():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"not within {SECONDS} s"
        time.sleep(0.02)


@dataclass(frozen=True)
class Slurm:
    """Daemons that run while the test does, and how its programs are called."""

    folder: Path
    environment: dict[str, str]

    def call(self, *words: object) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def jobs(self) -> list[str]:
        """Return the ids of the jobs that wait or run."""
        return self.call("squeue", "--noheader", "--format=%A").split()

    def running(self) -> list[str]:
        """Return the ids of the jobs that run."""
        return self.call("squeue", "--noheader", "--format=%A", "--states=RUNNING").split()

    def state(self, job: str) -> str:
        found = re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))
        assert found
        return found[1]

    @contextmanager
    def medseg(self, *words: object) -> Iterator[subprocess.Popen[str]]:
        """Run a command of medseg on this machine, which is the one that submits."""
        command = [sys.executable, "-m", "medseg", *map(str, words)]
        process = subprocess.Popen(
            command, env=self.environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def slurm(program: Callable[[str], str], free_port: Callable[[], int]) -> Iterator[Slurm]:
    """Start munged, slurmctld and slurmd as this user; in /tmp itself, since names of sockets must be short."""
    programs = [program(name) for name in ("munged", "slurmctld", "slurmd")]
    with tempfile.TemporaryDirectory(prefix="medseg-slurm-") as name, ExitStack() as stack:
        folder = Path(name)
        for each in ("spool", "state", "home"):
            (folder / each).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        ports = free_port(), free_port()
        words = {"host": socket.gethostname(), "user": getpass.getuser(), "ports": ports, "folder": folder}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**words))
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "HOME": str(folder / "home")}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        files = [f"--{kind}-file={folder / 'munge'}.{kind}" for kind in ("key", "pid", "log", "seed")]
        started = (
            [programs[0], "--foreground", "--force", f"--socket={folder / 'munge.socket'}", *files],
            [programs[1], "-D"],
            [programs[2], "-D", "-N", "localhost"],
        )
        made = Slurm(folder, environment)
        for command in started:
            stack.enter_context(daemon(command, folder, environment))
        until(lambda: "idle" in subprocess.run(["sinfo"], env=environment, capture_output=True, text=True).stdout)
        yield made
        for job in made.jobs():
            made.call("scancel", job)
        until(lambda: not made.jobs())


@contextmanager
def daemon(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    with open(folder / f"{Path(command[0]).name}.out", "w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def place(slurm: Slurm, tiny_dataset: Builder, tiny_plan: Builder) -> Path:
    """The folder of Slurm with data/, plan.yaml, run/ (a model), and local/, what a local worker made of the images."""
    folder = slurm.folder
    tiny_dataset(folder / "data", cases=STUDIES, test=0)
    plan = tiny_plan(folder / "data", folder / "plan.yaml", steps=2)
    api.train(folder / "data", out=folder / "run", steps=2, plan=plan)
    found = api.predict(folder / "data/images", model=folder / "run", out=folder / "local", workers=Workers())
    assert found.complete
    return folder


def tree(out: Path) -> dict[str, bytes]:
    files = [p for p in out.rglob("*") if p.is_file() and "journal" not in p.relative_to(out).parts]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}


def entries(out: Path) -> int:
    return len(list((out / "ledger").glob("*.json")))


def attempts(out: Path) -> list[int]:
    return [json.loads(p.read_text())["attempts"] for p in (out / "journal").glob("*.json")]


def documented(repository: Path, page: str, pattern: str, changes: dict[str, str]) -> str:
    """Return what a page of the documentation tells to run, with places of the test; each is there once."""
    found = re.search(pattern, (repository / "docs/how-to" / page).read_text(), re.DOTALL)
    assert found
    text = found[1]
    for old, new in changes.items():
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    return text


def end_processes(job: str) -> None:
    """SIGKILL all processes of a job, as if its machine's memory was full."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_JOB_ID") == job:
                process.kill()


def test_studies_on_jobs_that_are_cancelled_and_killed(slurm: Slurm, place: Path) -> None:
    """The command is killed, then one job cancelled and the other killed: nothing is lost, no job is left.

    The test holds the lock of one study until then, so that no run is too fast for it.
    """
    options = {"memory": "1GB", "walltime": "01:00:00", "log_directory": str(place / "logs")}
    (place / "cluster.yaml").write_text(yaml.safe_dump({"kind": "slurm", "workers": 2, "options": options}))
    out = place / "out"
    words = ("predict", "data/images", "--model", "run", "--out", out, "--cluster", "cluster.yaml")
    with ExitStack() as lock:
        assert lock.enter_context(study_lock(out, "c7"))
        with slurm.medseg(*words) as process:
            until(lambda: entries(out) >= 1, process)
            process.kill()
        left = set(slurm.jobs())
        certificates = set((place / "home").iterdir())
        with slurm.medseg(*words) as process:
            until(lambda: left.isdisjoint(slurm.jobs()), process)  # workers without their command end by themselves
            until(lambda: len(slurm.running()) == 2, process)
            first, second = slurm.running()
            slurm.call("scancel", first)
            end_processes(second)
            until(lambda: {first, second}.isdisjoint(slurm.jobs()), process)
            until(lambda: len(slurm.running()) == 2, process)
            lock.close()
            said, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said + errors
    assert f"{STUDIES} of {STUDIES} studies done" in said
    assert tree(out) == tree(place / "local")
    assert sum(attempts(out)) <= STUDIES + 6, "two studies were in flight at each of three deaths, at most"
    until(lambda: not slurm.jobs())
    assert set((place / "home").iterdir()) == certificates, "the run that was not killed left none"


def test_a_queue_that_refuses_jobs(slurm: Slurm, place: Path) -> None:
    (place / "refused.yaml").write_text("kind: slurm\nworkers: 1\noptions: {memory: 1GB, queue: nowhere}")
    with slurm.medseg(
        "predict", "data/images", "--model", "run", "--out", "refused", "--cluster", "refused.yaml"
    ) as process:
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "[QUEUE]" in errors
    assert "invalid partition" in errors
    assert "Traceback" not in errors


def test_shards_in_an_array(slurm: Slurm, place: Path, repository: Path) -> None:
    changes = {
        "1-8": "1-2", "/8'": "/2'", "medseg predict /archive": f"{sys.executable} -m medseg predict data/images",
        "runs/organs": "run", "--out masks": "--out shards",
    }  # fmt: skip
    slurm.call(*shlex.split(documented(repository, "batch.md", r"\$ (sbatch [^\n]*)\n", changes)))
    until(lambda: not slurm.jobs())
    said = [file.read_text() for file in sorted(place.glob("slurm-*_?.out"))]
    assert tree(place / "shards") == tree(place / "local"), said
    assert attempts(place / "shards") == [1] * STUDIES
    assert len(said) == 2


STATE = "5_folds/0/checkpoint/state.safetensors"
STEPS = 300


def test_a_training_that_is_interrupted(
    slurm: Slurm,
    repository: Path,
    free_port: Callable[[], int],
    tiny_dataset: Builder,
    tiny_plan: Builder,
) -> None:
    """Slurm's signal before the time limit, then a job that takes the machine: the training goes on each time."""
    folder = slurm.folder
    run = folder / "trained"
    tiny_dataset(folder / "few", cases=4, test=0)
    tiny_plan(folder / "few", folder / "few.yaml", steps=STEPS, settings=("validations=15",))
    changes = {
        "--nodes=2": "--nodes=1",
        "--gpus-per-node=4 ": "",
        "--cpus-per-task=32": "--cpus-per-task=2",
        "torchrun": f"{sys.executable} -m torch.distributed.run",
        "--nproc-per-node=4": "--nproc-per-node=2",
        ":29500": f":{free_port()}",
        "/data/spec.yaml": "few",
        "--steps 20000": f"--steps {STEPS} --plan few.yaml --no-track",
        "/scratch/run": str(run),
    }
    script = documented(repository, "many-devices.md", r"```sh\n(#!/bin/bash.*?)```", changes)
    (folder / "train.sh").write_text(script)
    job = slurm.call("sbatch", "--parsable", folder / "train.sh").strip()
    until((run / STATE).exists)
    slurm.call("scancel", "--signal=USR1", job)  # as Slurm does at --signal=USR1@120
    until(lambda: slurm.state(job) == "PENDING")
    first = step(run)
    until(lambda: step(run) > first)
    urgent = slurm.call("sbatch", "--parsable", "--partition=urgent", "--cpus-per-task=2", "--wrap=true").strip()
    until(lambda: slurm.state(urgent) == "COMPLETED")
    second = step(run)
    until(lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"))
    said = (folder / f"slurm-{job}.out").read_text()
    assert slurm.state(job) == "COMPLETED", said
    assert (run / "done.json").exists(), said
    assert 0 < first < second < STEPS, said
    assert said.count("the checkpoint is written, the same command goes on") >= 2, said


def test_a_training_that_fails_is_not_started_again(slurm: Slurm, repository: Path) -> None:
    script = documented(
        repository,
        "many-devices.md",
        r"```sh\n(#!/bin/bash.*?)```",
        {"--nodes=2": "--nodes=1", "--gpus-per-node=4 --cpus-per-task=32": "", "torchrun": "false", "/scratch": "."},
    )
    (slurm.folder / "fails.sh").write_text(script)
    job = slurm.call("sbatch", "--parsable", slurm.folder / "fails.sh").strip()
    until(lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"))
    assert slurm.state(job) == "FAILED"
    assert "Restarts=0" in slurm.call("scontrol", "show", "job", job)


def step(run: Path) -> int:
    """Return the step of a checkpoint."""
    with safe_open(run / STATE, framework="pt") as state:
        return int(json.loads(state.metadata()["state"])["step"])
