"""A batch: one broken study stops no other, repeating it does what is missing, and every mask is what it says."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medseg.batch import study as batch
from medseg.batch.run import BatchResult, predict
from medseg.batch.status import status
from medseg.bundle import save_bundle
from medseg.errors import BatchError, BundleError, ExportError
from medseg.inference.predict import Model, load_model
from medseg.phantom.dicom import write_series
from medseg.volume import Volume

Saver = Callable[..., Path]


@pytest.fixture(scope="session")
def loaded(model: Path) -> Model:
    return load_model(model)


@pytest.fixture
def images(tmp_path: Path, model: Path) -> Path:
    """A folder with a, b and c."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, case in (("a", "c0"), ("b", "c1"), ("c", "c2")):
        shutil.copyfile(model.parent / "data" / "images" / f"{case}.nii.gz", folder / f"{name}.nii.gz")
    return folder


def states(result: BatchResult) -> dict[str, str]:
    return {entry.id: entry.code or entry.state for entry in result.entries}


def stamps(out: Path) -> dict[str, int]:
    written = ("summary.csv", "summary.html", "predictions.json", "linkage.csv")  # by every run
    kept = [p for p in out.rglob("*") if p.is_file() and p.name not in written]
    return {p.relative_to(out).as_posix(): p.stat().st_mtime_ns for p in kept}


def attempts(out: Path) -> dict[str, int]:
    return {p.stem: json.loads(p.read_text())["attempts"] for p in (out / "journal").glob("*.json")}


def test_every_study_gets_a_mask_on_its_own_grid(loaded: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told: list[tuple[int, int]] = []
    result = predict([images], model=loaded, out=out, progress=lambda *n: told.append(n))
    assert states(result) == {"a": "done", "b": "done", "c": "done"}
    assert result.complete
    assert told == [(1, 3), (2, 3), (3, 3)]
    for name in "abc":
        image, mask = nibabel.load(images / f"{name}.nii.gz"), nibabel.load(out / f"{name}.nii.gz")
        assert np.array_equal(mask.affine, image.affine)
        assert mask.shape == image.shape
        assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2}
    assert sorted(p.name for p in out.iterdir()) == [
        *("a.nii.gz", "b.nii.gz", "c.nii.gz", "journal", "ledger", "predictions.json", "private", "summary.csv")
    ]


def test_the_summary_has_a_row_a_study_with_true_volumes(loaded: Model, images: Path, tmp_path: Path) -> None:
    (images / "b.nii.gz").write_bytes(b"")
    predict([images], model=loaded, out=tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "summary.csv").open()))
    assert [(row["id"], row["state"], row["code"]) for row in rows] == [
        ("a", "done", ""),
        ("b", "refused", "TRUNCATED"),
        ("c", "done", ""),
    ]
    mask = np.asarray(nibabel.load(tmp_path / "out" / "a.nii.gz").dataobj)
    for value, name in ((1, "ball_ml"), (2, "box_ml")):
        assert float(rows[0][name]) == pytest.approx((mask == value).sum() * 1.5 * 1.5 * 2 / 1000, abs=1e-4)
        assert rows[1][name] == ""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def cut_inside(path: Path) -> None:
    """Cut the voxels short inside an intact gzip file."""
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def with_nan(path: Path) -> None:
    image = nibabel.load(path)
    array = np.asarray(image.dataobj).copy()
    array[3, 3, 3] = np.nan
    nibabel.Nifti1Image(array, image.affine).to_filename(path)


def two_channels(path: Path) -> None:
    image = nibabel.load(path)
    array = np.stack([np.asarray(image.dataobj)] * 2, axis=-1)
    nibabel.Nifti1Image(array, image.affine).to_filename(path)


def constant(path: Path) -> None:
    image = nibabel.load(path)
    nibabel.Nifti1Image(np.full(image.shape, 7, np.uint8), image.affine).to_filename(path)


FAULTS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "cut": (cut, {"TRUNCATED"}),
    "cut inside": (cut_inside, {"TRUNCATED"}),
    "one bit": (flip, {"CORRUPT"}),
    "empty": (lambda path: path.write_bytes(b""), {"TRUNCATED"}),
    "text": (lambda path: path.write_text("no image"), {"TRUNCATED", "UNREADABLE"}),
    "NaN": (with_nan, {"NON_FINITE"}),
    "channels": (two_channels, {"CHANNEL_COUNT"}),
    "constant": (constant, {"CONSTANT_IMAGE"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_study_is_reported_and_the_others_are_done(
    loaded: Model, images: Path, tmp_path: Path, fault: str
) -> None:
    damage, codes = FAULTS[fault]
    damage(images / "b.nii.gz")
    out = tmp_path / "out"
    result = predict([images], model=loaded, out=out)
    found = states(result)
    assert found.pop("b") in codes
    assert found == {"a": "done", "c": "done"}
    entry = json.loads((out / "ledger" / "b.json").read_text())
    assert entry["state"] == "refused"
    assert entry["message"]
    assert str(tmp_path) not in entry["message"]
    assert not list(out.glob("b*")), "no file stands under the name of a study that has no mask"
    assert not list(out.rglob(".partial-*"))


def test_repeating_touches_nothing_that_is_done(loaded: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (images / "b.nii.gz").write_bytes(b"")
    predict([images], model=loaded, out=out)
    before = stamps(out)
    again = predict([images], model=loaded, out=out)
    assert stamps(out) == before
    assert attempts(out) == {"a": 1, "b": 1, "c": 1}
    assert states(again) == {"a": "done", "b": "TRUNCATED", "c": "done"}


def test_two_runs_into_two_folders_write_the_same_bytes(loaded: Model, images: Path, tmp_path: Path) -> None:
    def tree(out: Path) -> dict[str, bytes]:
        files = [p for p in out.rglob("*") if p.is_file() and p.parent.name != "journal"]
        return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}

    for name in ("one", "two"):
        predict([images], model=loaded, out=tmp_path / name)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_only_what_changed_is_done_again(loaded: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict([images], model=loaded, out=out)
    (out / "a.nii.gz").write_bytes(b"damaged")
    (out / "ledger" / "b.json").write_text("{")
    shutil.copyfile(images / "a.nii.gz", images / "c.nii.gz")
    shutil.copyfile(images / "a.nii.gz", images / "d.nii.gz")
    result = predict([images], model=loaded, out=out)
    assert result.complete
    assert attempts(out) == {"a": 2, "b": 2, "c": 2, "d": 1}
    masks = {name: (out / f"{name}.nii.gz").read_bytes() for name in "acd"}
    assert masks["a"] == masks["c"] == masks["d"]


def test_a_repaired_input_is_done(loaded: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (images / "b.nii.gz").write_bytes(b"")
    predict([images], model=loaded, out=out)
    shutil.copyfile(images / "a.nii.gz", images / "b.nii.gz")
    assert predict([images], model=loaded, out=out).complete
    assert attempts(out) == {"a": 1, "b": 2, "c": 1}


def test_the_mask_of_an_input_that_broke_does_not_stay(loaded: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict([images], model=loaded, out=out)
    (images / "b.nii.gz").write_bytes(b"")
    assert states(predict([images], model=loaded, out=out))["b"] == "TRUNCATED"
    assert not (out / "b.nii.gz").exists()


def test_another_model_or_mirroring_does_all_again(loaded: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict([images], model=loaded, out=out)
    first = json.loads((out / "predictions.json").read_text())
    predict([images], model=loaded, out=out, mirror=True)
    assert attempts(out) == {"a": 2, "b": 2, "c": 2}
    assert json.loads((out / "predictions.json").read_text()) == {**first, "tta": True}
    predict([images], model=other_model(loaded, tmp_path / "other"), out=out, mirror=True)
    assert attempts(out) == {"a": 3, "b": 3, "c": 3}
    assert json.loads((out / "predictions.json").read_text())["model_hash"] != first["model_hash"]


def test_the_summary_says_which_model_made_each_mask(loaded: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict([images], model=loaded, out=out, mirror=False)
    first = json.loads((out / "predictions.json").read_text())["model_hash"]
    predict([images / "a.nii.gz"], model=other_model(loaded, tmp_path / "other"), out=out, mirror=True)
    second = json.loads((out / "predictions.json").read_text())["model_hash"]
    rows = {row["id"]: row["model_digest"] for row in csv.DictReader((out / "summary.csv").open())}
    assert rows == {"a": f"{second}+mirror", "b": first, "c": first}
    page = (out / "journal" / "summary.html").read_text()
    assert f"{second}+mirror" in page
    assert first in page


def test_masks_of_another_model_that_stay_are_told(loaded: Model, images: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "out", list[str]()
    predict([images], model=loaded, out=out, warn=told.append)
    predict([images], model=loaded, out=out, mirror=True, warn=told.append)
    predict([images / "a.nii.gz"], model=loaded, out=out, mirror=True, warn=told.append)
    assert told == []
    predict([images / "a.nii.gz"], model=loaded, out=out, warn=told.append)
    assert len(told) == 1
    assert told[0].startswith("2 masks in out were made by another model or other options")


def test_a_run_that_stops_says_what_is_left(loaded: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict([images], model=loaded, out=out, progress=stop)
    assert (status(out).done, status(out).total) == (2, 3)
    predict([images / "a.nii.gz"], model=loaded, out=out)
    assert (status(out).done, status(out).total) == (2, 2)


def test_a_run_with_other_options_is_not_joined(loaded: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict([images], model=loaded, out=out)
    before = stamps(out)

    def meanwhile(*_: int) -> None:
        with pytest.raises(BatchError, match="is at work"):
            predict([images], model=loaded, out=out, mirror=True)

    predict([images], model=loaded, out=out, progress=meanwhile)
    assert stamps(out) == before
    assert not json.loads((out / "predictions.json").read_text())["tta"]


def other_model(model: Model, folder: Path) -> Path:
    """Write the same network with other weights."""
    state = {key: value * 0.5 for key, value in model.networks[0].state_dict().items()}
    return save_bundle(folder, model.bundle.info, {"fold_0.safetensors": state}).folder


def test_what_killed_runs_left_is_swept_and_nothing_else(loaded: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ours = [out / ".partial-01234567-a.nii.gz", out / "ledger" / ".partial-01234567-a.json"]
    others = [out / "another-run" / ".partial-01234567-state.safetensors", out / "notes.txt"]
    for file in (*ours, *others):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
    predict([images], model=loaded, out=out)
    assert not any(file.exists() for file in ours)
    assert all(file.exists() for file in others)


def test_the_linkage_table_is_private_and_keeps_earlier_studies(loaded: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = tmp_path / "more"
    more.mkdir()
    shutil.copyfile(images / "a.nii.gz", more / "d.nii.gz")
    predict([images], model=loaded, out=out)
    predict([more], model=loaded, out=out)
    file = out / "private" / "linkage.csv"
    rows = {row["id"]: row["path"] for row in csv.DictReader(file.open())}
    assert rows == {
        **{name: str(images / f"{name}.nii.gz") for name in "abc"},
        "d": str(more / "d.nii.gz"),
    }
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_want_of_memory_is_told_as_such(
    loaded: Model, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, calls = batch.predict_case, iter(range(10))

    def breaks(*args: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(batch, "predict_case", breaks)
    assert states(predict([images], model=loaded, out=tmp_path / "out")) == {"a": "done", "b": "MEMORY", "c": "done"}


def test_smaller_batches_are_noted(
    loaded: Model, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls, out = batch.predict_case, iter(range(10)), tmp_path / "out"

    def cramped(*args: Any, **options: Any) -> Any:
        return replace(real(*args, **options), windows=2 if next(calls) == 1 else 0)

    monkeypatch.setattr(batch, "predict_case", cramped)
    result = predict([images], model=loaded, out=out)
    assert [entry.notes for entry in result.entries] == [(), ("SMALLER_BATCHES",), ()]
    assert [row["notes"] for row in csv.DictReader((out / "summary.csv").open())] == ["", "SMALLER_BATCHES", ""]
    facts = {name: json.loads((out / "journal" / f"{name}.json").read_text()) for name in "abc"}
    assert {name: each.get("windows_at_once") for name, each in facts.items()} == {"a": None, "b": 2, "c": None}


def test_an_error_of_ours_stops_no_other_and_is_tried_again(
    loaded: Model, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = batch.predict_case, tmp_path / "out"
    calls = iter(range(10))

    def breaks(*args: Any, **options: Any) -> Volume:
        if next(calls) == 1:
            raise RuntimeError(f"secret of {images}/b.nii.gz")
        return real(*args, **options)

    monkeypatch.setattr(batch, "predict_case", breaks)
    result = predict([images], model=loaded, out=out)
    assert states(result) == {"a": "done", "b": "INTERNAL", "c": "done"}
    assert "RuntimeError" in result.entries[1].message
    assert "secret" not in (out / "ledger" / "b.json").read_text()
    assert predict([images], model=loaded, out=out).complete
    assert attempts(out) == {"a": 1, "b": 2, "c": 1}
    monkeypatch.setattr(batch, "predict_case", lambda *args, **options: 1 / 0)
    monkeypatch.setenv("MEDSEG_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        predict([images], model=loaded, out=tmp_path / "debug")


def test_a_network_that_answers_nan_is_a_refusal(loaded: Model, images: Path, tmp_path: Path) -> None:
    state = {key: value * np.nan for key, value in loaded.networks[0].state_dict().items()}
    broken = save_bundle(tmp_path / "nan", loaded.bundle.info, {"fold_0.safetensors": state})
    result = predict([images], model=broken.folder, out=tmp_path / "out")
    assert set(states(result).values()) == {"NON_FINITE"}
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize("damage", ["flip", "missing", "text", "format", "unfinished", "absent"])
def test_a_model_that_cannot_be_used_is_named_before_anything_is_written(
    model: Path, images: Path, tmp_path: Path, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(model, run)
    info, weights = run / "6_model" / "model.json", run / "6_model" / "fold_0.safetensors"
    words = {
        "flip": r"fold_0\.safetensors: damaged",
        "missing": r"fold_0\.safetensors: missing",
        "text": r"model\.json: damaged",
        "format": "bundle format 99",
        "unfinished": "its training has not finished: run the same medseg train command",
        "absent": "does not exist",
    }[damage]
    if damage == "flip":
        flip(weights)
    elif damage == "missing":
        weights.unlink()
    elif damage == "text":
        info.write_text("{")
    elif damage == "format":
        info.write_text(info.read_text().replace('"format": 1', '"format": 99'))
    else:
        shutil.rmtree(run / "6_model" if damage == "unfinished" else run)
    with pytest.raises(BundleError, match=words):
        predict([images], model=run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Full disk


def full(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_names_the_case_and_leaves_nothing_half_written(
    loaded: Model, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real, count = nibabel.Nifti1Image.to_stream, iter(range(10))

    def write(image: nibabel.Nifti1Image, stream: Any) -> None:
        real(image, stream)
        if next(count) == 1:
            full()

    with monkeypatch.context() as patch:
        patch.setattr(nibabel.Nifti1Image, "to_stream", write)
        result = predict([images], model=loaded, out=out)
    (failed,) = result.select("failed")
    assert (failed.id, failed.code) == ("b", "DISK_FULL")
    assert failed.message.startswith("b.nii.gz: cannot be written (No space left")
    assert "b.nii.gz" not in [p.name for p in out.glob("*.nii.gz")]
    assert not list(out.rglob(".partial-*"))
    assert predict([images], model=loaded, out=out).complete
    assert attempts(out)["a"] == 1, "what was done stays done"


@pytest.fixture
def small_disk(small_file_system: Callable[[str], Path]) -> Path:
    return small_file_system("256k")


@pytest.mark.parametrize("free", [0, 4096, 8192, 16384, 24576])
def test_a_disk_that_is_really_full(loaded: Model, images: Path, small_disk: Path, free: int) -> None:
    filler = small_disk / "filler"
    with open(filler, "wb") as file:
        file.write(b"x" * (256 * 1024 - free - 4096))
    out = small_disk / "out"
    for number in range(12):
        shutil.copyfile(images / "a.nii.gz", images / f"m{number:02}.nii.gz")
    with pytest.raises(ExportError, match="cannot be written") as caught:
        predict([images], model=loaded, out=out)
    assert caught.value.code == "DISK_FULL"
    for mask in out.glob("*.nii.gz"):
        nibabel.load(mask).get_fdata()
    assert not list(out.rglob(".partial-*"))
    filler.unlink()
    assert predict([images], model=loaded, out=out).complete


# DICOM


def write(folder: Path, seed: int = 0, axes: str = "axial") -> list[Path]:
    values = np.random.default_rng(seed).integers(50, 200, (1, 20, 22, 12)).astype(np.float32)
    volume = Volume(values, np.array([[-1.5, 0, 0, 30], [0, -1.5, 0, 20], [0, 0, 2.0, -5], [0, 0, 0, 1]]))
    return write_series(volume, folder, modality="MR", plane=axes, seed=seed, patient_id=f"P{seed}", shuffle=True)  # type: ignore[arg-type]


def test_a_mixed_tree_gives_one_mask_a_study_and_names_what_is_unreadable(
    loaded: Model, images: Path, tmp_path: Path
) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    shutil.copytree(images, tree / "nifti")
    write(tree / "p1" / "axial", 1)
    write(tree / "p1" / "sagittal", 2, "sagittal")
    cut_series = write(tree / "p2" / "cut", 3)
    cut_series[4].write_bytes(cut_series[4].read_bytes()[:-100])
    (tree / "p3").mkdir()
    (tree / "p3" / "IM0001.dcm").write_bytes(b"\0" * 128 + b"DICM" + bytes(range(200)))
    (tree / "p4").mkdir()
    (tree / "p4" / "readme.txt").write_text("no study")
    result = predict([tree], model=loaded, out=out)
    by_origin = {result.origins[entry.id].relative_to(tree).as_posix(): entry for entry in result.entries}
    found = {origin: entry.code or entry.state for origin, entry in by_origin.items()}
    assert found.pop("p2/cut") in ("TRUNCATED", "UNREADABLE")
    assert found.pop("p3") == "UNREADABLE"
    assert found == {
        **{f"nifti/{name}.nii.gz": "done" for name in "abc"},
        "p1/axial": "done",
        "p1/sagittal": "done",
    }
    from medseg.readers import read_image

    for origin in ("p1/axial", "p1/sagittal"):
        mask = read_image(out / f"{by_origin[origin].id}.nii.gz")
        image = read_image(tree / origin)
        assert mask.shape == image.shape
        assert np.allclose(mask.affine, image.affine, atol=1e-4)
    again = stamps(out)
    predict([tree], model=loaded, out=out)
    assert stamps(out) == again
