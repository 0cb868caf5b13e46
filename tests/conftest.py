"""What every test may use: the real data sets, a seeded generator, a clean environment, ``--no-skips``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import yaml

# The arrays of the tests are tiny: threads that wait for each other cost twenty times more than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
# Read before `clean_environment` clears the MEDSEG_ names.
DATA = Path(os.environ.get("MEDSEG_DATA") or REPOSITORY.parent / "shared" / "data").resolve()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a test that skips fails (`make test-system`)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.data)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    # An expected failure is reported as a skip too; it says `wasxfail` and stays one.
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("--no-skips"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    if report.skipped and collector.config.getoption("--no-skips"):
        _fail(report)
    return report


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: {reason} (a skip is a failure under --no-skips)"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data sets: $MEDSEG_DATA, else ../shared/data; the test skips where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}: set MEDSEG_DATA to the folder that holds hippocampus/ and the others")
    return DATA


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that gives the same numbers in every run and every order of the tests."""
    return np.random.default_rng(20240229)


@pytest.fixture(scope="session", autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run without the user's MLFLOW_* and MEDSEG_* settings, and away from the user's key and cache."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "MEDSEG_"))]:
            patch.delenv(name)
        patch.setenv("MEDSEG_KEY_FILE", str(tmp_path_factory.mktemp("key") / "medseg.key"))
        patch.setenv("MEDSEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test its own place for the key that hides DICOM ids."""
    monkeypatch.setenv("MEDSEG_KEY_FILE", str(tmp_path / "medseg.key"))


TINY_AFFINE = np.array([[-1.5, 0, 0, 30], [0, -1.5, 0, 20], [0, 0, 2.0, -5], [0, 0, 0, 1]])
"""The axes point to the left, posterior and superior: nothing is as the network sees it."""
TINY_SHAPE = (20, 22, 18)


Array = np.ndarray[Any, Any]


def tiny_case(number: int, shape: tuple[int, int, int] = TINY_SHAPE) -> tuple[Array, Array]:
    """An image (float32) with a bright ball and a dark box at places that depend on `number`, and its mask."""
    rng = np.random.default_rng((7, number))
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    centre = np.array([6, 7, 6]) + rng.integers(0, 3, 3)
    corner = np.array([11, 11, 9]) + rng.integers(0, 3, 3)
    ball = ((grid - centre) ** 2).sum(-1) <= 16
    box = ((grid >= corner) & (grid < corner + 5)).all(-1)
    mask = np.zeros(shape, np.uint8)
    mask[box], mask[ball] = 2, 1
    image = 100 + 60.0 * (mask == 1) - 50.0 * (mask == 2) + rng.normal(0, 8, shape)
    return image.astype(np.float32), mask


def save_nifti(path: Path, array: Array, affine: Array = TINY_AFFINE) -> Path:
    """Write an array as NIfTI, as another program would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array, affine).to_filename(path)
    return path


def make_tiny_dataset(root: Path, *, cases: int = 7, test: int = 2, **changes: Any) -> Path:
    """Write dataset.yaml and `cases` cases c0, c1, ... (the last `test` held out); `changes` go into the spec."""
    names = [f"c{i}" for i in range(cases)]
    for number, name in enumerate(names):
        image, mask = tiny_case(number)
        save_nifti(root / "images" / f"{name}.nii.gz", image)
        save_nifti(root / "masks" / f"{name}.nii.gz", mask)
    spec = {
        "name": "tiny",
        "images": "images/{case}.nii.gz",
        "masks": "masks/{case}.nii.gz",
        "channels": {"mr": {"modality": "MR"}},
        "labels": {"ball": {"value": 1, "color": "#d62728"}, "box": 2},
        "splits": {"test": names[cases - test :]},
        **changes,
    }
    (root / "dataset.yaml").write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The parts of tiny datasets: ``case(number, shape)``, ``affine``, ``shape`` and ``save(path, array, affine)``."""
    return SimpleNamespace(case=tiny_case, affine=TINY_AFFINE, shape=TINY_SHAPE, save=save_nifti)


@pytest.fixture(scope="session")
def tiny_dataset() -> Callable[..., Path]:
    """Builder of a dataset whose labels can be learnt in a few seconds: ``tiny_dataset(folder, cases=7, test=2)``."""
    return make_tiny_dataset


def write_study(folder: Path, number: int = 0, *, flair: bool = True, **texts: Any) -> Path:
    """Write a study of two sequences: T1 on the tiny grid, FLAIR on a coarser one that is turned and larger.

    Beside them lie a localizer, noise derived from the T1, and a text file. The ball is bright in T1 alone, the box in
    FLAIR alone. `texts` go to write_series.
    """
    from medseg.phantom.dicom import write_series
    from medseg.regrid import resample_to
    from medseg.volume import Volume

    image, mask = tiny_case(number)
    t1 = Volume(np.where(mask == 2, 100, image).clip(0)[None].round(), TINY_AFFINE)
    affine = np.array([[0, 0, -2.5, 36], [-1.8, 0, 0, 26], [0, 1.6, 0, -11], [0, 0, 0, 1]])
    coarse = Volume(np.zeros((1, 25, 29, 17), np.float32), affine)
    box = resample_to(Volume((mask == 2)[None].astype(np.float32), TINY_AFFINE), coarse)[0]
    noise = np.random.default_rng((8, number)).normal(0, 8, box.shape)
    volumes = {
        "AX T1 POST": t1,
        "COR FLAIR": box.with_array((300 + 200 * box.array + noise).clip(0).round()),
        "SCOUT T1": Volume(t1.array[..., ::6], t1.affine @ np.diag([1, 1, 6, 1])),
        "AX T1 POST NOISE": t1.with_array(t1.array[:, ::-1]),
    }
    if not flair:
        del volumes["COR FLAIR"]
    named = {"modality": "MR", "patient_id": f"DOE^{number}", "seed": number, **texts}
    for place, (name, volume) in enumerate(volumes.items(), start=1):
        files = write_series(volume, folder / f"S{place}", description=name, series_number=place, **named)
        kind = {"SCOUT T1": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "AX T1 POST NOISE": ["DERIVED", "SECONDARY", "NOISE"]}
        for file in files:
            dataset = pydicom.dcmread(file)
            dataset.ImageType = kind.get(name, dataset.ImageType)
            dataset.EchoTime = "110" if name == "COR FLAIR" else "12"
            dataset.save_as(file)
    (folder / "notes.txt").write_text("not an image")
    return folder


TWO_SEQUENCES = {
    "t1": {"modality": "MR", "match": {"SeriesDescription": "(?i)t1.*post", "ImageType": "^ORIGINAL"}},
    "flair": {"modality": "MR", "match": {"EchoTime": [80, None]}},
}
"""The channels of a spec whose rules find the two sequences."""


@pytest.fixture(scope="session")
def two_sequences() -> SimpleNamespace:
    """``write(folder, number)`` writes a DICOM study of two sequences; ``channels`` are the rules that find them."""
    return SimpleNamespace(write=write_study, channels=TWO_SEQUENCES)


TINY_SETTINGS = ("batch_size=2", "validations=3", "test_mirroring=false")


@pytest.fixture(scope="session")
def tiny_plan() -> Callable[..., Path]:
    """Writer of a small plan for a dataset, made without measuring: ``tiny_plan(dataset, file, steps=6)``."""

    def write(
        dataset: Path, file: Path, *, steps: int = 6, dimensions: Any = None, settings: tuple[str, ...] = ()
    ) -> Path:
        from medseg.planning.fingerprint import take_fingerprint
        from medseg.planning.plan import Measured, override, write_plan
        from medseg.planning.planner import decide, draft
        from medseg.spec import load_dataset

        found = load_dataset(dataset)
        fingerprint = take_fingerprint(found.spec, found.select("train"))
        sketch = draft(found.spec, fingerprint, device="cpu", dimensions=dimensions)
        measured = Measured(device="cpu", threads=1, step_seconds={"narrow fp32": 0.01})
        plan, reasons = decide(
            found.spec, fingerprint, sketch, measured, budget_seconds=None, training_seconds=None, steps=steps, seed=0
        )
        stages = len(plan.network.options["features"])
        features = f"network.options.features={[4, 8, 8, 8, 8, 8][:stages]}"
        write_plan(file, override(plan, (*TINY_SETTINGS, features, *settings)), reasons)
        return file

    return write


@pytest.fixture(scope="session")
def model(
    tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Callable[..., Path], tiny_plan: Callable[..., Path]
) -> Path:
    """A run folder with a model of one MR channel, labels ball and box, that was hardly trained."""
    from medseg import api

    root = tmp_path_factory.mktemp("model")
    tiny_dataset(root / "data", cases=4, test=0)
    plan = tiny_plan(root / "data", root / "plan.yaml", steps=30)
    api.train(root / "data", out=root / "run", steps=30, plan=plan)
    return root / "run"


def _axes(*columns: tuple[float, float, float]) -> Array:
    """An affine whose I, J, K step by 0.8, 1.1 and 2.5 mm along these directions (RAS+)."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns).T @ np.diag([0.8, 1.1, 2.5])
    affine[:3, 3] = (12.5, -31.25, 104.0)
    return affine


_C, _S = np.cos(0.3), np.sin(0.3)
_TURN = np.array([[1, 0, 0], [0, _C, -_S], [0, _S, _C]]) @ np.array([[_C, -_S, 0], [_S, _C, 0], [0, 0, 1]])
DICOM_GRIDS = {
    "axial": _axes((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "sagittal": _axes((0, -1, 0), (0, 0, -1), (1, 0, 0)),
    "coronal": _axes((-1, 0, 0), (0, 0, -1), (0, -1, 0)),
    "oblique": _axes(*(_TURN @ np.diag([-1.0, -1.0, 1.0])).T),
    "feet-first": _axes((1, 0, 0), (0, -1, 0), (0, 0, -1)),
    "negated": _axes((1, 0, 0), (0, 1, 0), (0, 0, -1)),
}
"""Ways to slice a patient, by name."""
DICOM_LABELS = {
    "liver": {"value": 1, "color": "#b5523b", "snomed": {"value": "10200004", "meaning": "Liver"}},
    "thing_b": 7,
    "lesion": {"value": 3, "snomed": {"value": "52988006", "meaning": "Lesion"}},
    "absent": {"value": 4, "snomed": {"value": "78961009", "meaning": "Spleen"}},
}


def _join_frames(files: list[Path]) -> None:
    """Replace the files of a classic MR series by one legacy-converted enhanced file in their folder."""
    import pydicom
    from highdicom.legacy import LegacyConvertedEnhancedMRImage
    from pydicom.uid import generate_uid

    classic = [pydicom.dcmread(file) for file in files]
    uids = [str(generate_uid(entropy_srcs=[word, str(classic[0].SeriesInstanceUID)])) for word in ("series", "SOP")]
    whole = LegacyConvertedEnhancedMRImage(classic, uids[0], 1, uids[1], 1)
    for file in files:
        file.unlink()
    whole.save_as(files[0].with_name("enhanced.dcm"))


def make_dicom_result(
    folder: Path,
    grid: str = "axial",
    *,
    labels: Any = None,
    regions: Any = None,
    modality: str = "MR",
    enhanced: bool = False,
    **tags: Any,
) -> Any:
    """Write a series into `folder` (its files get `tags`) and return the Result of a mask without any symmetry on it.

    Its probabilities are noise: no value is that of another voxel. `enhanced`: the series is one file of many frames,
    written by highdicom.

    Label 1 has an L shape with a hole through some slices and an island, 7 touches it, 3 is one voxel, 4 is absent.
    """
    import pydicom

    from medseg.exporters.result import Result
    from medseg.phantom.dicom import write_series
    from medseg.readers.dicom_scan import find_series
    from medseg.readers.dicom_series import read_series
    from medseg.spec import Spec
    from medseg.volume import Volume, align_to

    array = np.zeros((1, 21, 26, 9), np.uint8)
    array[0, 2:8, 3:20, 1:6] = 1
    array[0, 8:15, 3:9, 1:5] = 1
    array[0, 4:6, 6:11, 2:5] = 0
    array[0, 17:20, 20:24, 3:5] = 1
    array[0, 8:12, 9:14, 2:4] = 7
    array[0, 20, 0, 8] = 3
    image = np.random.default_rng(3).integers(0, 4000, array.shape).astype(np.float32)
    files = write_series(Volume(image, DICOM_GRIDS[grid]), folder, modality=modality, shuffle=True)
    for file in files if tags else ():
        dataset = pydicom.dcmread(file)
        for keyword, value in tags.items():
            setattr(dataset, keyword, value)
        dataset.save_as(file)
    if enhanced:
        _join_frames(files)
    (series,) = find_series(folder)
    source = read_series(series)
    mask = align_to(Volume(array, DICOM_GRIDS[grid]), source)
    assert mask is not None
    words = {"name": "torso", "channels": {"mr": {}}, "labels": labels or DICOM_LABELS, "regions": regions or {}}
    spec = Spec.model_validate(words)
    count = len(spec.regions or spec.foreground)
    soft = np.random.default_rng(4).random((count, *mask.shape), np.float32)
    return Result(mask, spec, "5eed" * 16, source, series, mask.with_array(soft))


@pytest.fixture(scope="session")
def dicom_result() -> Callable[..., Any]:
    """Builder of a mask on a DICOM series: ``dicom_result(folder, grid="axial", labels=None, **tags)``."""
    return make_dicom_result


@pytest.fixture(params=sorted(DICOM_GRIDS))
def dicom_grid(request: pytest.FixtureRequest) -> str:
    """Every way to slice a patient in turn."""
    return str(request.param)


MLFLOW_START_SECONDS = 120


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def run_mlflow_server(store: str, artifacts: Path, port: int) -> Iterator[str]:
    """Run a server over the database `store` (a URI) until the block ends; it then dies without a word."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(artifacts)]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # four more processes that nothing here needs
    log = artifacts.with_suffix(f".{port}.log")
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True, cwd=artifacts.parent
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + MLFLOW_START_SECONDS
        while not _answers(f"{uri}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield uri
    finally:
        _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers: they are one process group of their own."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    finally:
        process.wait(10)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def _look(uri: str, run_id: str) -> dict[str, Any]:
    """Collect what the browser would show of a run and of the registry."""
    api = f"{uri}/api/2.0/mlflow"
    run = _ask(f"{api}/runs/get?run_id={run_id}")["run"]
    history = _ask(f"{api}/metrics/get-history?run_id={run_id}&metric_key=dice/anterior")["metrics"]
    table = _ask(f"{uri}/get-artifact?path=test_dice.json&run_uuid={run_id}")
    alias = _ask(f"{api}/registered-models/alias?name=hippocampus&alias=champion")["model_version"]
    return {
        "status": run["info"]["status"],
        "params": {p["key"]: p["value"] for p in run["data"]["params"]},
        "tables": json.loads({t["key"]: t["value"] for t in run["data"]["tags"]}["mlflow.loggedArtifacts"]),
        "tags": {t["key"] for t in run["data"]["tags"]},
        "datasets": [(d["dataset"]["name"], d["tags"][0]["value"]) for d in run["inputs"]["dataset_inputs"]],
        "history": [(m["step"], m["value"]) for m in history],
        "table": table,
        "artifacts": {f["path"].split("-")[0] for f in _ask(f"{api}/artifacts/list?run_id={run_id}")["files"]},
        "champion": (int(alias["version"]), alias["run_id"] == run_id),
    }


EXPECTED_RUN = {
    "status": "FINISHED",
    "params": {"plan.patch": "[64, 64, 64]"},
    "tables": [{"path": "test_dice.json", "type": "table"}],
    "tags": {
        "medseg.run", "mlflow.runName", "mlflow.loggedArtifacts", "medseg.dataset.training",
    },
    "datasets": [("hippocampus", "training")],
    "history": [(0, 0.0), (1, 0.5), (2, 1.0)],
    "table": {"columns": ["case", "dice"], "data": [["case_1", 0.5]]},
    "artifacts": {"plots", "plan.yaml", "test_dice.json", "model"},
    "champion": (1, True),
}  # fmt: skip


def _first_half(run: Any) -> None:
    run.params({"plan": {"patch": [64, 64, 64]}})
    run.dataset("hippocampus", "ab" * 32, "training")
    run.metrics({"dice/anterior": 0.0}, step=0)


def _second_half(run: Any, folder: Path) -> None:
    for epoch in (1, 2):
        run.metrics({"dice/anterior": epoch / 2}, step=epoch)
    run.table("test_dice", [{"case": "case_1", "dice": 0.5}])
    run.text("patch", "plan.yaml")
    picture = folder / "curves.png"
    picture.write_bytes(b"\x89PNG")
    run.artifact(picture, "plots")
    run.register("hippocampus", _bundle(folder), alias="champion", tags={"dice": 0.5})
    run.finish()


def _bundle(folder: Path) -> Path:
    place = folder / "6_model"
    place.mkdir(exist_ok=True)
    (place / "plan.yaml").write_text("patch")
    (place / "weights.safetensors").write_bytes(bytes(5000))
    return place


def _begin(folder: Path, **options: Any) -> Any:
    from medseg import tracking

    return tracking.start(folder, experiment="hippocampus", run_name="seed 1", **options)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Find a port of this machine on which nothing listens."""
    return _free_port


@pytest.fixture(scope="session")
def mlflow_server() -> Callable[..., AbstractContextManager[str]]:
    """Run a real ``mlflow server``: ``with mlflow_server(database_uri, artifacts, port) as uri``."""
    return run_mlflow_server


@pytest.fixture(scope="session")
def tracked() -> SimpleNamespace:
    """A tracked run in two halves, and how a server shows it.

    ``begin(folder)``, ``first_half(run)``, ``second_half(run, folder)``; ``look(uri, run_id)`` gives ``expected``.
    """
    return SimpleNamespace(
        begin=_begin,
        first_half=_first_half,
        second_half=_second_half,
        bundle=_bundle,
        look=_look,
        expected=EXPECTED_RUN,
    )


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``small_file_system("10m")``: a folder that holds no more than so many bytes; the test skips without root."""
    places: list[Path] = []

    def make(size: str) -> Path:
        place = tmp_path / f"small{len(places)}"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("only root may mount a small file system")
        places.append(place)
        return place

    yield make
    for place in places:
        subprocess.run(["umount", str(place)], check=True)
