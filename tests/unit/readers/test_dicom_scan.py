"""Finding series in any tree: links, pipes, odd names, damage; and by several processes as by one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import EncapsulatedPDFStorage

from medseg.errors import ReadError
from medseg.phantom.dicom import write_series
from medseg.readers import dicom_workers
from medseg.readers.dicom_damage import Damage, examine, judge
from medseg.readers.dicom_files import SCRATCH_PREFIX, files_below, walk
from medseg.readers.dicom_header import quiet
from medseg.readers.dicom_scan import Found, scan
from medseg.readers.dicom_series import read_series
from medseg.readers.dicom_workers import read_all, read_one
from medseg.volume import Volume


def write(folder: Path, seed: int = 0, modality: str = "CT") -> list[Path]:
    values = np.random.default_rng(seed).integers(0, 900, (1, 12, 10, 6)).astype(np.float32)
    return write_series(Volume(values, np.diag([-0.7, -0.9, 2.5, 1.0])), folder, modality=modality, seed=seed)  # type: ignore[arg-type]


def codes(found: Found) -> list[str]:
    return [row.refusal.code if row.refusal else "" for row in found.series]


def cut_header(path: Path, *, after: bytes = b"\x28\x00\x10\x00US") -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(after) + 9])  # within a value: at its end pydicom is content


# ---- what lies in a tree --------------------------------------------------------------------------------------------


def test_files_come_in_the_order_of_their_names_each_once(tmp_path: Path) -> None:
    for name in ("b/2", "b/10", "a.txt", "a/x/1", "a/y", "c", f"{SCRATCH_PREFIX}1/9"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in files_below([tmp_path, tmp_path / "a", tmp_path / "c"])]
    assert found == ["a/x/1", "a/y", "a.txt", "b/10", "b/2", "c"]
    assert files_below(tmp_path / f"{SCRATCH_PREFIX}1") == [tmp_path / f"{SCRATCH_PREFIX}1" / "9"], "if it is asked for"
    assert walk([]).files == []
    with pytest.raises(ReadError, match="does not exist"):
        walk(tmp_path / "absent")


def test_links_are_followed_to_files_and_counted_to_folders(tmp_path: Path) -> None:
    files = write(tmp_path / "real")
    tree = tmp_path / "tree"
    tree.mkdir()
    for path in files:
        (tree / path.name).symlink_to(path)
    (tree / "loop").symlink_to(tree)
    (tree / "up").symlink_to(tmp_path)
    (tree / "notes.txt").symlink_to(tmp_path / "nothing.txt")
    found = scan(tree)
    assert (codes(found), len(found.series[0].files)) == ([""], 6)
    assert found.skipped == {"linked folders": 2}
    linked = tmp_path / "link"
    linked.symlink_to(tree)
    assert codes(scan(linked)) == [""], "a path that was named is followed"


@pytest.mark.parametrize("target", ["gone", "itself"])
def test_a_link_to_a_slice_that_is_gone_is_a_lost_slice(tmp_path: Path, target: str) -> None:
    files = write(tmp_path)
    files[-1].rename(tmp_path / "moved.txt")
    files[-1].symlink_to(files[-1] if target == "itself" else tmp_path / "unmounted" / "x")
    (tmp_path / "moved.txt").unlink()
    assert codes(scan(tmp_path)) == ["UNREADABLE"]


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    write(tmp_path)
    os.mkfifo(tmp_path / "IM0009")
    (tmp_path / "null").symlink_to("/dev/null")
    found = scan(tmp_path)
    assert (codes(found), found.skipped) == ([""], {"pipes and devices": 2})
    assert scan(tmp_path / "IM0009").series == ()


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    for number, path in enumerate(write(tmp_path)):
        path.rename(os.fsdecode(os.fsencode(tmp_path) + (b"/a\xff\n%d" % number)))
    (tmp_path / "a\nb").touch()
    found = scan(tmp_path)
    assert (codes(found), found.not_dicom) == ([""], 1)
    assert read_series(found.series[0]).shape == (12, 10, 6)
    assert read_all(files_below(tmp_path), workers=1) == read_all(files_below(tmp_path), workers=0)


@pytest.mark.parametrize(("name", "code"), [("IM0007", "UNREADABLE"), ("IM7.dcm", "UNREADABLE"), ("notes.txt", "")])
def test_what_may_not_be_opened_may_be_a_slice(
    tmp_path: Path, name: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    real = dicom_workers.read_header

    def locked(path: Path) -> object:
        if path.name == name:
            raise PermissionError
        return real(path)

    monkeypatch.setattr(dicom_workers, "read_header", locked)
    assert codes(scan(tmp_path)) == [code]


def test_a_folder_that_may_not_be_listed_is_lost_and_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", seed=1)
    real = os.scandir

    def locked(path: str) -> object:
        if str(path).endswith("b"):
            raise PermissionError
        return real(path)

    monkeypatch.setattr(os, "scandir", locked)
    found = scan(tmp_path)
    assert (codes(found), [(part.place.name, part.files) for part in found.lost]) == ([""], [("b", ())])
    assert "1 folders that may not be listed" in found.describe()
    with pytest.raises(ReadError, match="slices may be missing; give the user who runs this the right to read"):
        read_series(tmp_path)


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[list[Path], list[Path], Path]:
    """Two series in one folder, file names of the second beginning with an s."""
    folder = tmp_path / "study"
    first = write(folder)
    second = [path.rename(folder / f"s{path.name}") for path in write(tmp_path / "other", seed=1)]
    return first, second, folder


def test_a_damaged_file_that_names_its_series_costs_only_that_one(two: tuple[list[Path], list[Path], Path]) -> None:
    first, _, folder = two
    assert codes(scan(folder)) == ["", ""]
    cut_header(first[-1])
    assert codes(scan(folder)) == ["UNREADABLE", ""]
    away = folder.with_name("away")
    away.mkdir()
    first[-1].rename(away / first[-1].name)
    assert codes(scan(folder.parent)) == ["", "UNREADABLE"][::-1], "wherever the damaged file lies"


def test_a_damaged_slice_within_is_the_reason_and_not_its_gap(two: tuple[list[Path], list[Path], Path]) -> None:
    first, _, folder = two
    cut_header(first[2])
    assert codes(scan(folder)) == ["UNREADABLE", ""]


def test_a_damaged_file_that_names_nothing_costs_all_in_its_folder(two: tuple[list[Path], list[Path], Path]) -> None:
    first, _, folder = two
    write(folder.parent / "elsewhere", seed=2)
    for content in (bytes(4000), b"", bytes(128) + b"DICM" + b"\xff" * 40):
        first[-1].write_bytes(content)
        if content == bytes(4000):
            first[-1] = first[-1].rename(first[-1].with_suffix(".dcm"))
        assert codes(scan(folder.parent)) == ["", "UNREADABLE", "UNREADABLE"]


def test_a_series_of_cut_files_alone_is_lost_by_itself(two: tuple[list[Path], list[Path], Path]) -> None:
    first, _, folder = two
    for path in first:
        cut_header(path)
    found = scan(folder)
    assert codes(found) == [""]
    assert [(part.place, len(part.files), part.uid != "") for part in found.lost] == [(folder, 6, True)]


def test_a_name_that_no_other_file_has_is_not_believed_of_a_garbled_one(
    two: tuple[list[Path], list[Path], Path],
) -> None:
    first, _, folder = two
    uid = str(pydicom.dcmread(first[-1]).SeriesInstanceUID).encode()
    whole = first[-1].read_bytes().replace(uid, uid[:-3] + b"777")
    at = whole.index(b"\x28\x00\x10\x00US")
    first[-1].write_bytes(whole[:at] + b"\xff" * 40 + whole[at:])
    assert codes(scan(folder)) == ["UNREADABLE", "UNREADABLE"]
    shutil.copy(first[-1], folder / "IM0099")
    assert codes(scan(folder)) == ["", ""], "two that agree are a series of their own"
    assert len(scan(folder).lost) == 1


def test_a_damaged_object_that_is_no_image_costs_nothing(two: tuple[list[Path], list[Path], Path]) -> None:
    _, _, folder = two
    dataset = pydicom.dcmread(write(folder.parent / "pdf", seed=5)[0])
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = EncapsulatedPDFStorage
    dataset.save_as(folder / "pdf.dcm")
    whole = (folder / "pdf.dcm").read_bytes()
    at = whole.index(b"\x10\x00\x10\x00PN")
    (folder / "pdf.dcm").write_bytes(whole[:at] + b"\xff" * 40 + whole[at:])
    series = scan(folder).series
    damage = examine(folder / "pdf.dcm")
    assert damage.object_only
    assert judge(series, [damage], []) == (series, ())
    unknown = Damage(damage.path)
    assert [row.refusal is None for row in judge(series, [unknown], [])[0]] == [False, False]


def test_nothing_is_logged_of_a_damaged_file(
    two: tuple[list[Path], list[Path], Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    first, _, folder = two
    whole = first[0].read_bytes()
    at = whole.index(b"\x10\x00\x10\x00PN")
    first[0].write_bytes(whole[:at] + b"\xff" * 40 + whole[at:])
    scan(folder)
    assert (caplog.records, *capfd.readouterr()) == ([], "", "")


def test_a_slice_without_its_place_is_missing_from_the_others(two: tuple[list[Path], list[Path], Path]) -> None:
    first, _, folder = two
    dataset = pydicom.dcmread(first[-1])
    del dataset.ImagePositionPatient, dataset.ImageOrientationPatient
    dataset.save_as(first[-1])
    assert codes(scan(folder)) == ["UNREADABLE", "NO_POSITION", ""]


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_no_damage_to_a_header_ever_shortens_a_series_unseen(
    two: tuple[list[Path], list[Path], Path], place: str, rng: np.random.Generator
) -> None:
    """Whatever is overwritten, cut or zeroed in one slice: its series is refused, or has all six slices."""
    first, _, folder = two
    path = first[{"first": 0, "middle": 3, "last": -1}[place]]
    whole = path.read_bytes()
    for _ in range(40):
        at, size = int(rng.integers(0, len(whole) - 300)), int(rng.integers(1, 600))
        junk = (b"", bytes(size), rng.bytes(size))[rng.integers(3)]
        path.write_bytes(whole[:at] if not junk else whole[:at] + junk + whole[at + size :])
        for row in scan(folder).series:
            assert row.refusal is not None or len(row.files) == 6
    path.write_bytes(whole)


# ---- several processes ----------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    write(tmp_path / "a")
    cut_header(write(tmp_path / "b", seed=1)[2])
    (tmp_path / "notes").write_text("x")
    return files_below(tmp_path)


def test_several_processes_say_the_same_as_one(many: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_workers, "BATCH", 3)
    with quiet():
        here = [read_one(path) for path in many]
    assert [type(outcome).__name__ for outcome in here].count("Damage") == 1
    assert read_all(many, workers=2) == here
    monkeypatch.setattr(dicom_workers, "PATIENCE", 0.0)
    monkeypatch.setattr(dicom_workers, "WORTH", 0.0)
    monkeypatch.setattr(dicom_workers, "_cores", lambda: 2)
    assert read_all(many) == here


@pytest.mark.parametrize("fault", ["os.abort()", "time.sleep(60)"])
def test_a_file_that_kills_or_hangs_its_worker_costs_only_itself(
    many: list[Path], fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with quiet():
        here = [read_one(path) for path in many]
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'medseg.readers.dicom_workers' in ' '.join(sys.orig_argv):\n"
        "    import medseg.readers.dicom_header as h\n"
        "    real = h.read_header\n"
        f"    h.read_header = lambda path: {fault} if path == type(path)({str(many[4])!r}) else real(path)\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path / "path"), *sys.path])
    monkeypatch.setattr(dicom_workers, "BATCH_SECONDS", 1.0)
    monkeypatch.setattr(dicom_workers, "FILE_SECONDS", 1.0)
    assert read_all(many, workers=1) == [*here[:4], Damage(many[4]), *here[5:]]


@pytest.mark.parametrize("program", ["/nonexistent", "/bin/false"])
def test_where_no_process_can_be_started_the_files_are_read_here(
    many: list[Path], program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    expected = read_all(many, workers=0)
    assert read_all(many, workers=2) == expected


def test_the_result_does_not_depend_on_how_the_folders_are_stored(tmp_path: Path) -> None:
    write(tmp_path / "a" / "one")
    write(tmp_path / "a" / "two", seed=1)
    shutil.copytree(tmp_path / "a" / "two", tmp_path / "b" / "two")
    shutil.copytree(tmp_path / "a" / "one", tmp_path / "b" / "one")
    order: Callable[[str], list[str]] = lambda name: [row.uid for row in scan(tmp_path / name).series]  # noqa: E731
    assert order("a") == order("b")
