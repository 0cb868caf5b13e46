"""Studies that crash, hang or eat memory cost themselves only, whoever does the others."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from medseg.batch import isolation, process
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
    found = states(predict([folder], model=model, out=out, workers=Workers(2, timeout=15.0, memory=LIMIT)))
    assert found == {"a": "done", "hang": "TIMEOUT", "hog": "MEMORY", "once": "done", "z": "done"}
    tried = attempts(out)
    assert tried["hang"] == 1
    assert tried["once"] == 2
    # What one worker had besides is begun again: once for the hang, once for the hog, once for the death.
    assert tried["hog"] <= 2
    assert max(tried["a"], tried["z"]) <= 4
    assert not list(out.rglob(".partial-*"))


def test_poison_ends_as_such_and_the_next_run_tries_it_once(
    model: Path, images: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = images("a", "poison", "z"), tmp_path / "out"
    for count in (3, 4):
        found = states(predict([folder], model=model, out=out, workers=Workers()))
        assert found == {"a": "done", "poison": "POISON", "z": "done"}
        tried = attempts(out)
        assert tried["poison"] == count
        assert max(tried["a"], tried["z"]) <= 2, "they may have been in flight with it"


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
    real = worker.process.message

    def listen(seconds: float) -> dict[str, Any] | None:
        message = real(seconds)
        stages.append((message or {}).get("stage"))
        return message

    worker.process.message = listen  # type: ignore[method-assign]
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


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Let workers begin with this program."""

    def program(code: str) -> None:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "stand_in.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path / "bin"))
        monkeypatch.setattr(process, "PROGRAM", "stand_in")
        monkeypatch.setattr(isolation, "PAUSE_SECONDS", 0.01)

    return program


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import no_such_library", "status 1, and said last: ModuleNotFoundError: No module named 'no_such_library'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"was killed \(SIGKILL\)"),
        ("import os; os.abort()", "signal SIGABRT ended it"),
    ],
)
def test_a_worker_that_cannot_start_stops_the_run_and_says_how_it_ended(
    model: Path,
    images: Callable[..., Path],
    tmp_path: Path,
    child: Callable[..., Child],
    monkeypatch: pytest.MonkeyPatch,
    starts: Callable[[str], None],
    code: str,
    how: str,
) -> None:
    starts(code)
    monkeypatch.setattr(isolation, "STARTS", 2)
    with pytest.raises(BatchError, match=f"2 times in a row .*{how}") as caught:
        child().run(*request(model, tmp_path / "out", images("a") / "a.nii.gz"))
    assert caught.value.code == "WORKER_START"


def test_what_hinders_a_start_may_pass(
    model: Path,
    images: Callable[..., Path],
    tmp_path: Path,
    child: Callable[..., Child],
    starts: Callable[[str], None],
) -> None:
    """The first three starts fail; the fourth is slow."""
    starts(
        "import sys, time; from pathlib import Path\n"
        "count = Path(__file__).with_name('count')\n"
        "count.write_text((count.read_text() if count.exists() else '') + 'x')\n"
        "if len(count.read_text()) < 4: sys.exit('not yet')\n"
        "time.sleep(1)\n"
        "from medseg.batch import child; child.main(int(sys.argv[1]), int(sys.argv[2]))\n"
    )
    outcome = child().run(*request(model, tmp_path / "out", images("a") / "a.nii.gz"))
    assert outcome.entry is not None
    assert outcome.entry.state == "done"


def test_a_command_with_many_open_files_has_workers(
    model: Path, images: Callable[..., Path], tmp_path: Path, child: Callable[..., Child]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 1200:
        pytest.skip("this system lets nobody open 1200 files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1050)]
    try:
        outcome = child().run(*request(model, tmp_path / "out", images("a") / "a.nii.gz"))
    finally:
        for each in held:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert outcome.entry is not None
    assert outcome.entry.state == "done"


def test_nobody_waits_for_a_worker_that_reads_nothing(
    child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch, starts: Callable[[str], None]
) -> None:
    """What is known of a large series does not fit into a pipe, and its guard must see the time pass."""
    starts("import time; time.sleep(600)")
    monkeypatch.setattr(isolation, "START_SECONDS", 1.0)
    with pytest.raises(BatchError, match="did not load the model"):
        child().run("", "x" * (1 << 20))


def test_messages_larger_than_a_pipe_arrive_whole_and_in_order(
    child: Callable[..., Child], starts: Callable[[str], None]
) -> None:
    starts(
        "import hashlib, json, sys, time\n"
        "time.sleep(0.5)\n"
        "for line in sys.stdin.buffer: print(json.dumps(hashlib.sha256(line).hexdigest()), flush=True)\n"
    )
    worker = child().process
    worker.start()
    sent = [["a" * 300_000, n] for n in range(3)]
    for each in sent:
        worker.send(each)
    found: list[object] = []
    while len(found) < len(sent):
        message = worker.message(1.0)
        assert message is not None
        found += [message] if message else []
    assert found == [hashlib.sha256(json.dumps(each).encode() + b"\n").hexdigest() for each in sent]


@pytest.mark.parametrize("fate", ["hang", "stuck"])
def test_a_worker_ends_with_who_started_it(model: Path, images: Callable[..., Path], tmp_path: Path, fate: str) -> None:
    folder, out = images(fate), tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAULTS), *sys.path])}
    words = [sys.executable, "-m", "medseg", "predict", str(folder), "--model", str(model), "--out", str(out)]
    command = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / f"{fate}.nii.met").exists():
        assert command.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    assert command.poll() is None
    assert Ledger(out).in_flight(fate)
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
        found: dict[str, str] = {}
        while not found:  # the system may show a process before its environment
            found = psutil.Process(child.process.pid).environ()
        assert found["OMP_WAIT_POLICY"] == (told or "PASSIVE")
    finally:
        child.close()
