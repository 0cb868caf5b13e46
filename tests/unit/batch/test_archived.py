"""Studies in archives: the same ids and masks as outside, in every run; a bad archive is a refused study."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from medseg.batch.inputs import opened_inputs
from medseg.batch.run import predict
from medseg.phantom.dicom import write_series
from medseg.spec import Channel, Label, Spec
from medseg.volume import Volume

ONE = Spec(name="one", channels={"mr": Channel()}, labels={"ball": Label(value=1)})
TWO = Spec(name="two", channels={"t1": Channel(), "t2": Channel()}, labels={"ball": Label(value=1)})
Rows = dict[str, tuple[str, str]]


def series(folder: Path, seed: int = 0) -> list[Path]:
    values = np.random.default_rng(seed).integers(0, 500, (1, 8, 9, 6)).astype(np.float32)
    return write_series(Volume(values, np.diag([1.0, 1, 2, 1])), folder, modality="MR", seed=seed)


def zipped(path: Path, *folders: Path, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as opened:
        for folder in folders:
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                opened.write(file, str(file.relative_to(folder.parent)))
        for name, content in more.items():
            opened.writestr(name, content)
    return path


def studies(paths: list[Path], out: Path, spec: Spec = ONE) -> Rows:
    """Return id -> (where from, why not)."""
    with opened_inputs(paths, spec, choice=None, splits=None, out=out) as found:
        return {study.id: (str(study.origin), study.refusal.code if study.refusal else "") for study in found}


def test_ids_are_those_of_the_series_and_origins_name_archive_and_member(tmp_path: Path) -> None:
    series(tmp_path / "Doe" / "one")
    series(tmp_path / "Doe" / "two", seed=1)
    plain = studies([tmp_path / "Doe"], tmp_path / "out")
    archive = zipped(tmp_path / "x.zip", tmp_path / "Doe")
    rows = studies([archive], tmp_path / "out")
    assert list(rows) == list(plain)
    assert sorted(origin for origin, _ in rows.values()) == [f"{archive}/Doe/one", f"{archive}/Doe/two"]
    assert studies([archive], tmp_path / "out") == rows
    assert list((tmp_path / "out" / "private").iterdir()) == []
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    shutil.move(archive, tree / "deep" / "x.zip")
    assert list(studies([tree], tree / "deep" / "out")) == list(plain), "also with the results below the input"


def test_nifti_files_keep_their_stems_and_their_channels(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "x.zip", **{"p/a_t1.nii.gz": b"1", "p/a_t2.nii.gz": b"2", "b/t1.nii": b"3"})
    first = studies([archive], tmp_path / "out", TWO)
    assert first == {"a": (f"{archive}/p/a_t1.nii.gz", ""), "b": (f"{archive}/b/t1.nii", "")}
    names = {"c.nii": b"1", "x\ny.nii": b"2", "n" * 150 + ".nii.gz": b"3", ".hidden.nii": b"4"}
    rows = studies([zipped(tmp_path / "y.zip", **names)], tmp_path / "out")
    assert "c" in rows
    assert sorted(name.startswith("case-") for name in rows) == [False, True, True]


def test_files_of_one_name_in_two_archives_are_told_apart_in_every_run_alike(tmp_path: Path) -> None:
    for name in "xy":
        zipped(tmp_path / f"{name}.zip", **{"a.nii": name.encode()})
    rows = studies([tmp_path], tmp_path / "out")
    assert len(rows) == 2
    assert studies([tmp_path], tmp_path / "out") == rows


def test_a_bad_archive_is_a_refused_study(tmp_path: Path) -> None:
    series(tmp_path / "good")
    (tmp_path / "bad.zip").write_bytes(b"PK\3\4nonsense")
    inner = zipped(tmp_path / "inner.zip", **{"a.nii": b"1"}).read_bytes()
    zipped(tmp_path / "outer.zip", **{"inner.zip": inner})
    (tmp_path / "inner.zip").unlink()
    rows = studies([tmp_path], tmp_path / "out")
    assert sorted(code for _, code in rows.values()) == ["", "ARCHIVE_DAMAGED", "ARCHIVE_NESTED"]
    assert studies([tmp_path], tmp_path / "out") == rows


def test_an_archive_without_images_counts_only_if_it_was_named(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "x.zip", **{"notes.txt": b"hello"})
    assert [code for _, code in studies([archive], tmp_path / "out").values()] == ["ARCHIVE_EMPTY"]
    series(tmp_path / "good")
    assert [code for _, code in studies([tmp_path], tmp_path / "out").values()] == [""]


def test_damaged_slices_in_an_archive_are_a_study_of_their_archive(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "x.zip", **{"deep/IM0001.dcm": b"x"})
    rows = studies([archive], tmp_path / "out")
    assert list(rows.values()) == [(f"{archive}/deep", "UNREADABLE")]
    assert studies([archive], tmp_path / "out") == rows


def test_a_run_over_archives_resumes_and_says_where_everything_came_from(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(tmp_path / "Doe" / "one")
    with tarfile.open(tmp_path / "Doe.tar.gz", "w:gz") as opened:
        opened.add(tmp_path / "Doe", "Doe")
    (tmp_path / "bad.zip").write_bytes(b"PK\3\4nonsense")
    inputs = [tmp_path / "Doe.tar.gz", tmp_path / "bad.zip"]
    result = predict(inputs, model=model, out=tmp_path / "out")
    assert sorted((entry.state, entry.code) for entry in result.entries) == [
        ("done", ""),
        ("refused", "ARCHIVE_DAMAGED"),
    ]
    with open(tmp_path / "out" / "private" / "linkage.csv", encoding="utf-8") as table:
        places = {row["path"] for row in csv.DictReader(table)}
    assert places == {str(tmp_path / "Doe.tar.gz" / "Doe" / "one"), str(tmp_path / "bad.zip")}
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and "private" not in path.parts]
    assert not any(word in path.read_bytes() for path in written for word in (b"Doe", b"bad.zip", b".medseg-unpacked"))
    monkeypatch.setattr("medseg.batch.study.predict_case", lambda *_, **__: pytest.fail("it was done already"))
    assert predict(inputs, model=model, out=tmp_path / "out").entries == result.entries
    direct = predict([tmp_path / "Doe" / "one"], model=model, out=tmp_path / "out")
    assert direct.entries == result.select("done"), "the same series outside its archive is the same study"


def test_the_folder_of_unpacked_files_is_gone_even_if_the_run_fails(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(tmp_path / "Doe")
    monkeypatch.setattr("medseg.batch.summary.summary_csv", lambda *_: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        predict([zipped(tmp_path / "x.zip", tmp_path / "Doe")], model=model, out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "private").iterdir()] == ["linkage.csv"]


def test_names_that_are_no_text_are_written_with_escapes(tmp_path: Path, model: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff\nb"))
    series(folder)
    result = predict([folder], model=model, out=tmp_path / "out")
    assert result.complete
    with open(tmp_path / "out" / "private" / "linkage.csv", encoding="utf-8") as table:
        assert [row["path"] for row in csv.DictReader(table)] == [f"{tmp_path}/a\\xff\\nb"]
    assert json.loads(next((tmp_path / "out" / "ledger").iterdir()).read_text())["state"] == "done"
