"""What a queue's jobs may do to who waits for them; tests/system/test_slurm.py has a real queue."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

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
    """Others are asked for in their place, but not for ever; a queue that is deaf says nothing.

    More than twice as many as are wanted must end; how many more do until that is seen depends on the machine.
    """
    program(programs, "sbatch", f"open({str(tmp_path / 'asked')!r}, 'a').write('x'); print('Submitted batch job 7')")
    deaf = tmp_path / "deaf"
    program(
        programs,
        "squeue",
        f"import os; new = not os.path.exists({str(deaf)!r}); open({str(deaf)!r}, 'a'); raise SystemExit(int(new))",
    )
    program(programs, "scancel", "")
    with pytest.raises(BatchError, match=r"^\d+ jobs ended before .* the last one was 7; .*log_directory") as caught:
        start(memory="1GB")
    assert caught.value.code == "WORKER_START"
    ended = int(str(caught.value).split()[0])
    assert 2 * 2 < ended <= len((tmp_path / "asked").read_text()) <= ended + 2


def test_one_job_waits_while_another_is_refused(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a user may have one job at a time; a job that was refused is not one that ended before it called."""
    asked = tmp_path / "asked"
    refuse = "raise SystemExit('sbatch: error: QOSMaxSubmitJobPerUserLimit')"
    count = f"import os; first = not os.path.exists({str(asked)!r}); open({str(asked)!r}, 'a').write('x')"
    program(programs, "sbatch", f"{count}\nif first: print('Submitted batch job 7')\nelse: {refuse}")
    program(programs, "squeue", "print(7)")
    program(programs, "scancel", "")

    def sleep(seconds: float) -> None:
        if asked.exists() and len(asked.read_text()) > 10:
            raise KeyboardInterrupt
        time.sleep(seconds)

    monkeypatch.setattr(queues, "time", SimpleNamespace(sleep=sleep))
    with pytest.raises(KeyboardInterrupt):
        start(memory="1GB")


def test_a_folder_for_certificates_that_is_not_there(programs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BatchError, match=r"^a cluster of kind slurm cannot be started: .*shared_temp_directory"
    ) as caught:
        start(memory="1GB", shared_temp_directory=str(tmp_path / "nowhere"))
    assert caught.value.code == "NO_SCHEDULER"


def test_a_cluster_that_cannot_be_started() -> None:
    with pytest.raises(BatchError, match="a cluster of kind local cannot be started") as caught:
        start("local", host="192.0.2.77")
    assert caught.value.code == "NO_SCHEDULER"
