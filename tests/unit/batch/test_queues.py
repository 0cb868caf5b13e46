"""What a queue's jobs may do to who waits for them; tests/system/test_slurm.py has a real queue."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("dask_jobqueue")

from medseg.batch import queues
from medseg.batch.cluster import ClusterConfig
from medseg.batch.engines import Workers, started
from medseg.errors import BatchError, ConfigError


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder where alone programs are found; jobs are looked at often."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(queues, "LOOK_SECONDS", 0.1)
    monkeypatch.setitem(queues.DEFAULTS, "shared_temp_directory", str(tmp_path))
    return folder


def program(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(f"#!{sys.executable}\n{text}\n")
    file.chmod(0o755)


def start(kind: str = "slurm", **options: object) -> None:
    config = ClusterConfig.model_validate({"kind": kind, "workers": 2, "options": options})
    with started(Workers(cluster=config)):
        pytest.fail("no worker can have come")


@pytest.mark.parametrize("kind", ["slurm", "pbs", "sge", "lsf"])
def test_options_that_the_queue_does_not_know(programs: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"options of kind {kind}.*'colour'$"):
        start(kind, memory="1GB", colour="red")


def test_options_that_are_missing(programs: Path) -> None:
    with pytest.raises(ConfigError, match=r"how much cores and memory per job you want to use$"):
        start()


def test_a_machine_without_the_queue(programs: Path) -> None:
    with pytest.raises(BatchError, match=r"slurm: .*No such file.*sbatch") as caught:
        start(memory="1GB")
    assert caught.value.code == "QUEUE"


def test_a_refused_job(programs: Path) -> None:
    program(programs, "sbatch", "raise SystemExit('sbatch: error: invalid account')")
    with pytest.raises(BatchError, match=r"^slurm: sbatch: error: invalid account; change options") as caught:
        start(memory="1GB")
    assert caught.value.code == "QUEUE"


def test_jobs_that_end_before_their_worker_calls(programs: Path, tmp_path: Path) -> None:
    """As many as were asked for, twice in their place, and not one more for ever; a queue that is deaf says nothing."""
    program(programs, "sbatch", f"open({str(tmp_path / 'asked')!r}, 'a').write('x'); print('Submitted batch job 7')")
    deaf = tmp_path / "deaf"
    program(
        programs,
        "squeue",
        f"import os; new = not os.path.exists({str(deaf)!r}); open({str(deaf)!r}, 'a'); raise SystemExit(int(new))",
    )
    program(programs, "scancel", "")
    with pytest.raises(BatchError, match=r"^6 jobs ended before .* the last one was 7; .*log_directory") as caught:
        start(memory="1GB")
    assert caught.value.code == "WORKER_START"
    assert 6 <= len((tmp_path / "asked").read_text()) <= 10
