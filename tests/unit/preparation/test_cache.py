"""The cache: what is opened is what was prepared, or it is prepared again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from medseg.cases import source_digest
from medseg.errors import MedsegError, ReadError
from medseg.planning.plan import Plan
from medseg.preparation import cache as module
from medseg.preparation.cache import CaseCache, class_locations, mapped, prepare_cases
from medseg.preparation.path import after_cache, training_path, up_to_cache
from medseg.spec import Case, Spec

Make = Callable[..., Any]
Array = NDArray[Any]


@pytest.fixture
def spec(make_spec: Make) -> Spec:
    return make_spec(labels={"b": 7, "a": 3})


@pytest.fixture
def plan(spec: Spec, make_plan: Make) -> Plan:
    return make_plan(spec, patch_size=(8, 8, 8))


def write_case(folder: Path, name: str, *, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    mask = np.zeros((12, 11, 10), np.uint8)
    mask[3:6, 3:6, 3:6], mask[7:9, 2:9, 5:9] = 3, 7
    image = (rng.normal(size=mask.shape) + 5 + mask).astype(np.float32)
    folder.mkdir(exist_ok=True)
    files = [folder / f"{name}_{part}.nii.gz" for part in ("image", "mask")]
    for file, array in zip(files, (image, mask), strict=True):
        nibabel.Nifti1Image(array, np.diag([-1.0, -1, 1, 1])).to_filename(file)
    return Case(id=name, images=(files[0],), mask=files[1], patient=name)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return write_case(tmp_path / "data", "one")


def prepared(folder: Path, spec: Spec, plan: Plan, *cases: Case) -> CaseCache:
    cache = CaseCache(folder, spec, plan)
    prepare_cases(up_to_cache(training_path(spec, plan, cache)), cache, cases)
    return cache


def stored_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_arrays_are_memory_maps_of_what_was_prepared(tmp_path: Path, spec: Spec, plan: Plan, case: Case) -> None:
    cache = prepared(tmp_path / "cache", spec, plan, case)
    opened = cache(case)
    image, mask, locations = opened["image"], opened["mask"], opened["locations"]
    for array in (image, mask, locations):
        assert not array.flags.writeable
    maps = Path("/proc/self/maps").read_text()
    assert all(f"{cache.place(case)}/{name}.npy" in maps for name in ("image", "mask", "locations"))
    assert image.shape == mask.shape == (1, 12, 11, 10)
    assert image.dtype == np.float32
    assert mask.dtype == np.uint8
    assert abs(float(image.mean())) < 1e-5
    assert abs(float(image.std()) - 1) < 1e-5
    source = np.asarray(nibabel.load(case.mask).dataobj)
    assert np.array_equal(mask[0], source[::-1, ::-1])
    assert {(int(label), int(mask[0, i, j, k])) for label, i, j, k in locations} == {(0, 7), (1, 3)}
    assert opened["case"] == case


def test_opened_cases_hold_no_files_open(tmp_path: Path, spec: Spec, plan: Plan) -> None:
    """A process may have 1024 on most systems, three a case were all of them with 341 cases."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    cases = [write_case(tmp_path / "data", f"case{number}", seed=number) for number in range(5)]
    cache = prepared(tmp_path / "cache", spec, plan, *cases)
    opened = [cache(case) for case in cases]
    assert len(opened) == 5
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("array", [np.arange(24, dtype=">i2").reshape(2, 3, 4), np.zeros((0, 4), np.int32),
                                   np.asfortranarray(np.arange(6.0).reshape(2, 3))])  # fmt: skip
@pytest.mark.parametrize("writable", [True, False])
def test_a_mapped_file_is_what_numpy_reads(
    tmp_path: Path, array: np.ndarray, writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "array.npy", array)
    monkeypatch.setattr(module.os, "access", lambda *_: writable)
    found = mapped(tmp_path / "array.npy")
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert np.array_equal(found, array)


def test_a_stored_case_is_not_prepared_again(tmp_path: Path, spec: Spec, plan: Plan, case: Case) -> None:
    prepared(tmp_path / "cache", spec, plan, case)
    cache = CaseCache(tmp_path / "cache", spec, plan)
    assert cache.holds(case)
    prepare_cases(lambda _: pytest.fail("prepared again"), cache, (case,))
    assert cache(case)["image"].shape == (1, 12, 11, 10)


def test_a_stored_case_is_opened_on_demand(tmp_path: Path, spec: Spec, plan: Plan, case: Case) -> None:
    """A second process asks for a case that the first has prepared."""
    first = prepared(tmp_path / "cache", spec, plan, case)(case)
    second = CaseCache(tmp_path / "cache", spec, plan)(case)
    assert np.array_equal(first["image"], second["image"])


@pytest.mark.parametrize("name", ["image.npy", "mask.npy", "locations.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_repaired(
    tmp_path: Path, spec: Spec, plan: Plan, case: Case, name: str, damage: str
) -> None:
    folder = prepared(tmp_path / "cache", spec, plan, case).place(case)
    good = stored_bytes(folder)
    file = folder / name
    content = bytearray(good[name])
    content[len(content) // 2] ^= 1
    if damage == "flip":
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(good[name][:-1])
    else:
        file.unlink()
    if (name, damage) != ("meta.json", "cut"):  # the last byte is a line end
        assert not CaseCache(tmp_path / "cache", spec, plan).holds(case)
    prepared(tmp_path / "cache", spec, plan, case)
    assert CaseCache(tmp_path / "cache", spec, plan).holds(case)
    repaired = stored_bytes(folder)
    assert {key: repaired[key] for key in good if key != "meta.json"} == {
        key: good[key] for key in good if key != "meta.json"
    }


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": {}}', '{"files": null}', "1", ""])
def test_foreign_meta_counts_as_absent(tmp_path: Path, spec: Spec, plan: Plan, case: Case, content: str) -> None:
    cache = prepared(tmp_path / "cache", spec, plan, case)
    (cache.place(case) / "meta.json").write_text(content)
    assert not cache.holds(case)


def test_an_interrupted_write_counts_as_absent(
    tmp_path: Path, spec: Spec, plan: Plan, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = module.write_atomically, []

    def stop_at_second(path: Path, write: Callable[[Path], None], *, synced: bool) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        real(path, write, synced=synced)

    monkeypatch.setattr(module, "write_atomically", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "cache", spec, plan, case)
    monkeypatch.undo()
    cache = CaseCache(tmp_path / "cache", spec, plan)
    assert written[0].exists()
    assert not cache.holds(case)
    assert prepared(tmp_path / "cache", spec, plan, case)(case)["mask"].max() == 7


def test_the_key_is_the_content(
    tmp_path: Path, spec: Spec, plan: Plan, case: Case, make_spec: Make, make_plan: Make
) -> None:
    def key(spec: Spec = spec, plan: Plan = plan, case: Case = case) -> str:
        return CaseCache(tmp_path, spec, plan).place(case).name

    assert key() == key()
    # Where files lie and what does not touch the preparation does not matter.
    moved = tmp_path / "elsewhere"
    shutil.copytree(case.images[0].parent, moved)
    same = Case(case.id, (moved / case.images[0].name,), moved / "one_mask.nii.gz", "p")
    assert key(case=same) == key()
    assert key(plan=make_plan(spec, patch_size=(4, 4, 4), learning_rate=1.0)) == key()
    others = {
        key(plan=make_plan(spec, spacing=(1, 1, 2))),
        key(plan=make_plan(spec, orientation="ASR")),
        key(plan=make_plan(spec, normalisation={"t1": {"scheme": "none"}})),
        key(spec=make_spec(labels={"b": 7, "a": 4})),
        key(case=write_case(tmp_path / "new", "one", seed=9)),
        key(case=write_case(tmp_path / "data", "two")),
    }
    assert len(others | {key()}) == 7


def test_the_order_of_the_channels_is_part_of_the_key(
    tmp_path: Path, case: Case, make_spec: Make, make_plan: Make
) -> None:
    spec = make_spec(channels=("a", "b"))
    rows = {"a": {"scheme": "zscore"}, "b": {"scheme": "none"}}
    first, second = (make_plan(spec, normalisation={name: rows[name] for name in order}) for order in ("ab", "ba"))
    assert CaseCache(tmp_path, spec, first).place(case) != CaseCache(tmp_path, spec, second).place(case)


def test_source_digest_of_a_folder_sees_every_file(tmp_path: Path) -> None:
    series = tmp_path / "series"
    (series / "deep").mkdir(parents=True)
    (series / "a").write_bytes(b"1")
    (series / "deep" / "b").write_bytes(b"2")
    case = Case("c", (series,), None, "p")
    before = source_digest(case)
    (series / "a").rename(series / "renamed")
    assert source_digest(case) == before
    (series / "deep" / "b").write_bytes(b"3")
    assert source_digest(case) != before


def test_a_case_that_cannot_be_read_is_named(tmp_path: Path, spec: Spec, plan: Plan, case: Case) -> None:
    case.images[0].write_bytes(case.images[0].read_bytes()[:50])
    with pytest.raises(ReadError, match="case one: ") as caught:
        prepared(tmp_path / "cache", spec, plan, case)
    assert caught.value.code == "TRUNCATED"
    assert isinstance(caught.value, MedsegError)


def test_progress_counts_every_case(tmp_path: Path, spec: Spec, plan: Plan, case: Case) -> None:
    cache = CaseCache(tmp_path / "cache", spec, plan)
    told: list[tuple[int, int]] = []
    cases = (case, write_case(tmp_path / "data", "two"))
    path = up_to_cache(training_path(spec, plan, cache))
    prepare_cases(path, cache, cases, progress=lambda *row: told.append(row))
    prepare_cases(path, cache, cases, progress=lambda *row: told.append(row))
    assert told == [(1, 2), (2, 2)] * 2


@pytest.mark.parametrize("voxels", [0, 1, 1999, 2000, 2001, 3999, 4001, 9000])
def test_locations_are_spread_over_the_whole_label(make_spec: Make, voxels: int) -> None:
    mask = np.zeros((30, 20, 20), np.uint8)
    mask.reshape(-1)[:voxels] = 1
    rows = class_locations(make_spec(), mask)
    assert rows.shape == (min(voxels, 2000), 4)
    assert rows.dtype == np.int32
    assert (rows[:, 0] == 0).all()
    if voxels:
        flat = np.ravel_multi_index(tuple(rows[:, 1:].T), mask.shape)
        assert mask.reshape(-1)[flat].all()
        assert len(set(flat.tolist())) == len(flat)
        assert flat[0] == 0
        assert flat[-1] == voxels - 1
        assert np.diff(flat).max(initial=1) <= widest(voxels)


def widest(voxels: int) -> int:
    """The largest step between neighbours that are spread evenly."""
    return -(-voxels // 2000) + 1


def test_path_ends_in_regions(tmp_path: Path, spec: Spec, plan: Plan, case: Case) -> None:
    cache = CaseCache(tmp_path / "cache", spec, plan)
    path = training_path(spec, plan, cache)
    prepare_cases(up_to_cache(path), cache, (case,))
    path.set_random_state(seed=1)
    region = after_cache(path)({**cache(case), "foreground": True})
    assert region["image"].shape == region["mask"].shape == (1, *plan.patch_size)
    assert region["case"] == case
