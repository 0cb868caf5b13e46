"""Studies that crash, hang or eat memory cost themselves only, whoever does the others."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from medseg.batch import isolation
from medseg.batch.engines import Workers
from medseg.batch.isolation import Child, Limits
from medseg.batch.job import Settings, encode, recipe
from medseg.batch.ledger import Ledger
from medseg.batch.run import BatchResult, predict
from medseg.batch.study_input import StudyInput
from medseg.bundle import open_bundle
from medseg.errors import BatchError, BundleError

FAULTS = Path(__file__).parent / "faults"
LIMIT = 1500 << 20


@pytest.fixture(autouse=True)
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FAULTS))


@pytest.fixture
def images(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """Builder of a folder with one image for each name."""

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / "images").mkdir(exist_ok=True)
            shutil.copyfile(model.parent / "data" / "images" / "c0.nii.gz", tmp_path / "images" / f"{name}.nii.gz")
        return tmp_path / "images"

    return make


def states(result: BatchResult) -> dict[str, str]:
    return {entry.id: entry.code or entry.state for entry in result.entries}


def attempts(out: Path) -> dict[str, int]:
    return {p.stem: json.loads(p.read_text())["attempts"] for p in (out / "journal").glob("*.json")}


def tree(out: Path) -> dict[str, bytes]:
    files = [p for p in out.rglob("*") if p.is_file() and "journal" not in p.parts]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}


def test_each_fault_costs_one_study(model: Path, images: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = images("a", "hang", "hog", "once", "z"), tmp_path / "out"
    found = states(predict([folder], model=model, out=out, workers=Workers(2, timeout=6.0, memory=LIMIT)))
    assert found == {"a": "done", "hang": "TIMEOUT", "hog": "MEMORY", "once": "done", "z": "done"}
    assert attempts(out) == {"a": 1, "hang": 1, "hog": 1, "once": 2, "z": 1}
    assert not list(out.rglob(".partial-*"))


def test_poison_ends_as_such_and_the_next_run_tries_it_once(
    model: Path, images: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = images("a", "poison", "z"), tmp_path / "out"
    for count in (3, 4):
        found = states(predict([folder], model=model, out=out, workers=Workers()))
        assert found == {"a": "done", "poison": "POISON", "z": "done"}
        assert attempts(out) == {"a": 1, "poison": count, "z": 1}


def test_what_the_workers_wrote_is_what_this_process_writes(
    model: Path, images: Callable[..., Path], tmp_path: Path
) -> None:
    folder = images("a", "b", "c")
    (folder / "b.nii.gz").write_bytes(b"\x1f\x8b broken")
    predict([folder], model=model, out=tmp_path / "here")
    predict([folder], model=model, out=tmp_path / "there", workers=Workers(2))
    assert tree(tmp_path / "here") == tree(tmp_path / "there")


def test_a_study_that_killed_the_command_is_done_last_and_guarded(
    model: Path, images: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = images("a", "poison", "z"), tmp_path / "out"
    code = (
        "from pathlib import Path; from medseg.batch.run import predict; import sys;"
        "r = predict([Path(sys.argv[1])], model=Path(sys.argv[2]), out=Path(sys.argv[3]));"
        "print({e.id: e.code or e.state for e in r.entries})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAULTS), *sys.path])}
    words = [sys.executable, "-c", code, str(folder), str(model), str(out)]
    first = subprocess.run(words, env=environment, check=False)
    assert first.returncode == -signal.SIGKILL
    second = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert "{'a': 'done', 'poison': 'POISON', 'z': 'done'}" in second.stdout
    assert attempts(out) == {"a": 1, "poison": 3, "z": 1}, "the death of the command itself does not count"


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def make(limits: Limits | None = None) -> Child:
        made.append(Child(limits or Limits()))
        return made[-1]

    yield make
    for each in made:
        each.close()


def request(model: Path, out: Path, image: Path, **changes: str) -> tuple[str, str]:
    bundle = open_bundle(model)
    info = bundle.info
    settings = Settings(out, bundle.folder, info.model_dump_json(), recipe(info, None), None, ("nifti",))
    settings = Settings(**{**vars(settings), **changes})
    return encode(settings), encode(StudyInput(image.name.removesuffix(".nii.gz"), (image,), None, image))


def test_the_model_is_loaded_once(
    model: Path, images: Callable[..., Path], tmp_path: Path, child: Callable[..., Child]
) -> None:
    folder, worker, stages = images("a", "b"), child(), []
    real = worker._message

    def listen() -> object:
        message = real()
        stages.append((message or {}).get("stage"))
        return message

    worker._message = listen  # type: ignore[method-assign, assignment]
    for name in ("a", "b"):
        outcome = worker.run(*request(model, tmp_path / "out", folder / f"{name}.nii.gz"))
        assert outcome.entry is not None
        assert outcome.entry.state == "done"
        assert outcome.fresh
    assert [stage for stage in stages if stage] == [
        *("checking", "loading", "reading", "predicting", "writing"),
        *("checking", "reading", "predicting", "writing"),
    ]
    known = worker.run(*request(model, tmp_path / "out", folder / "a.nii.gz"))
    assert known.entry == Ledger(tmp_path / "out").read("a")
    assert not known.fresh


def test_another_model_stops_the_run(
    model: Path, images: Callable[..., Path], tmp_path: Path, child: Callable[..., Child]
) -> None:
    with pytest.raises(BundleError, match="another version of medseg"):
        child().run(*request(model, tmp_path / "out", images("a") / "a.nii.gz", recipe="0" * 64))


def test_a_model_that_is_larger_than_the_limit_stops_the_run(
    model: Path, images: Callable[..., Path], tmp_path: Path, child: Callable[..., Child]
) -> None:
    with pytest.raises(BatchError, match="the model alone") as caught:
        child(Limits(bytes=64 << 20)).run(*request(model, tmp_path / "out", images("a") / "a.nii.gz"))
    assert caught.value.code == "MEMORY_LIMIT"


def test_a_worker_that_cannot_start_stops_the_run(
    model: Path,
    images: Callable[..., Path],
    tmp_path: Path,
    child: Callable[..., Child],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(isolation, "PROGRAM", "medseg.batch.no_such_program")
    monkeypatch.setattr(isolation, "STARTS", 2)
    with pytest.raises(BatchError, match="2 times in a row") as caught:
        child().run(*request(model, tmp_path / "out", images("a") / "a.nii.gz"))
    assert caught.value.code == "WORKER_START"


def test_a_command_with_many_open_files_has_workers(
    model: Path, images: Callable[..., Path], tmp_path: Path, child: Callable[..., Child]
) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        outcome = child().run(*request(model, tmp_path / "out", images("a") / "a.nii.gz"))
    assert outcome.entry is not None
    assert outcome.entry.state == "done"


@pytest.mark.parametrize("fate", ["hang", "stuck"])
def test_a_worker_ends_with_who_started_it(model: Path, images: Callable[..., Path], tmp_path: Path, fate: str) -> None:
    folder, out = images(fate), tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAULTS), *sys.path])}
    words = [sys.executable, "-m", "medseg", "predict", str(folder), "--model", str(model), "--out", str(out)]
    command = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = Ledger(out)
    while not journal.in_flight(fate):
        assert command.poll() is None
        time.sleep(0.05)
    workers = psutil.Process(command.pid).children(recursive=True)
    assert workers
    command.kill()
    command.wait()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert len(gone) == len(workers)


@pytest.mark.parametrize("quality", ["exact", "fast"])
def test_who_guards_workers_never_loads_torch(model: Path, tmp_path: Path, quality: str) -> None:
    """It would be 300 MiB beside the workers, for nothing."""
    image, out = model.parent / "data" / "images" / "c0.nii.gz", tmp_path / "out"
    code = (
        "import sys; from medseg import api\n"
        f"done = api.predict({str(image)!r}, model={str(model)!r}, out={str(out)!r}, workers=1, quality={quality!r})\n"
        "assert done.complete\n"
        "sys.exit(str({'torch', 'monai'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stderr.strip() == ""
    assert (out / "c0.nii.gz").exists()


@pytest.mark.parametrize("told", ["", "ACTIVE"])
def test_threads_of_a_worker_sleep_while_they_wait_unless_told(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    if told:
        monkeypatch.setenv("OMP_WAIT_POLICY", told)
    else:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    child = Child(Limits())
    child.start()
    try:
        assert child._process is not None
        assert psutil.Process(child._process.pid).environ()["OMP_WAIT_POLICY"] == (told or "PASSIVE")
    finally:
        child.close()
