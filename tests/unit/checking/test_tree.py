"""``medseg check FOLDER``: what lies in a tree of studies, what is usable, and nothing that tells who or where."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from typer.testing import CliRunner

from medseg.batch.inputs import find_inputs
from medseg.checking.tree import check_tree, is_tree, summary
from medseg.cli import app
from medseg.errors import ConfigError
from medseg.phantom.dicom import write_series
from medseg.spec import Channel, Label, Spec
from medseg.volume import Volume


def series(folder: Path, seed: int = 0) -> list[Path]:
    values = np.random.default_rng(seed).integers(0, 500, (1, 12, 10, 6)).astype(np.float32)
    affine = np.diag([-0.7, -0.9, 2.5, 1.0])
    return write_series(
        Volume(values, affine), folder, modality="CT", seed=seed, patient_id="CANARY", description="CANARY"
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A good series, one with a gap, a localizer, a cut one, a lost one, archives, noise."""
    root = tmp_path / "Doe_John"
    series(root / "good")
    series(root / "gap", seed=1)[2].unlink()
    for path in series(root / "scout", seed=2):
        dataset = pydicom.dcmread(path)
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        dataset.save_as(path)
    cut = series(root / "cut", seed=3)[1]
    cut.write_bytes(cut.read_bytes()[:-50])
    (root / "lost").mkdir()
    (root / "lost" / "IM0001.dcm").write_bytes(b"x")
    with zipfile.ZipFile(root / "more.zip", "w") as opened:
        for path in series(tmp_path / "more", seed=4):
            opened.write(path, path.name)
    (root / "bad.zip").write_bytes(b"PK\3\4x")
    (root / "mask.nii.gz").write_bytes(b"x")
    (root / "notes.txt").write_text("hello")
    os.mkfifo(root / "pipe")
    return root


def test_every_series_is_listed_with_its_verdict(tree: Path) -> None:
    result = check_tree(tree)
    found = {row.origin.name: (row.verdict, row.code, row.size, row.spacing) for row in result.series}
    whole = ((12, 10, 6), (0.7, 0.9, 2.5))
    assert found == {
        "good": ("usable", "", *whole),
        "gap": ("refused", "MISSING_SLICES", (12, 10, 5), (0.7, 0.9)),
        "scout": ("set aside", "LOCALIZER", (12, 10, 6), (0.7, 0.9)),
        "cut": ("usable", "", *whole),
        "lost": ("refused", "UNREADABLE", (), ()),
        "more.zip": ("usable", "", *whole),
        "bad.zip": ("refused", "ARCHIVE_DAMAGED", (), ()),
    }
    assert result.others == {
        "archives": 2, "damaged DICOM files": 1, "NIfTI files": 1, "other files": 1, "pipes and devices": 1,
    }  # fmt: skip
    assert all(row.advice and row.message for row in result.series if row.code)
    assert result.exit_code == 3
    assert summary(result) == "5 studies, 7 series: 3 usable, 3 refused, 1 set aside (headers only)"


def test_pixels_are_read_only_if_asked(tree: Path) -> None:
    rows = {row.origin.name: row for row in check_tree(tree, read=True).series}
    assert (rows["cut"].code, rows["cut"].verdict) == ("TRUNCATED", "refused")
    assert rows["good"].code == ""


def test_ids_are_those_of_predict(tmp_path: Path) -> None:
    series(tmp_path / "a")
    spec = Spec(name="one", channels={"ct": Channel()}, labels={"ball": Label(value=1)})
    assert [row.id for row in check_tree(tmp_path).series] == [study.id for study in find_inputs([tmp_path], spec)]


def test_no_path_and_no_name_stands_in_what_is_written(tree: Path, tmp_path: Path) -> None:
    result = check_tree(tree, read=True, out=tmp_path / "out")
    assert result.page == tmp_path / "out" / "check.html"
    text = result.page.read_text() + (tmp_path / "out" / "check.json").read_text() + result.to_json()
    for word in ("CANARY", "Doe", "scout", "more.zip", "IM0001", ".dcm", str(tmp_path)):
        assert word not in text, word
    rows = json.loads(result.to_json())["series"]
    assert {row["verdict"] for row in rows} == {"usable", "refused", "set aside"}
    assert all(row["id"] in text for row in rows)


@pytest.mark.parametrize(("kept", "code"), [("good", 0), ("gap", 1), ("scout", 1), ("good gap", 3), ("good scout", 0)])
def test_exit_codes(tree: Path, tmp_path: Path, kept: str, code: int) -> None:
    for name in kept.split():
        (tree / name).rename(tmp_path / "more" / name)
    for path in (tmp_path / "more").glob("*.dcm"):
        path.unlink()
    assert CliRunner().invoke(app, ["check", str(tmp_path / "more")]).exit_code == code


def test_the_command_prints_json_or_a_table_and_writes_a_page(tree: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["check", str(tree), "--json"])
    assert (run.exit_code, json.loads(run.stdout)["counts"]) == (3, {"usable": 3, "refused": 3, "set aside": 1})
    run = CliRunner().invoke(app, ["check", str(tree), "--read", "--out", str(tmp_path / "out")])
    assert "TRUNCATED (1)" in run.stdout
    assert "4 refused, 1 set aside (pixels read)" in run.stdout
    assert (tmp_path / "out" / "check.html").exists()


def test_an_empty_folder_says_what_a_dataset_would_be(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert run.exit_code == 1
    assert "dataset.yaml" in run.stdout


def test_names_that_are_no_text_are_printed_with_escapes(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff\nb"))
    series(folder)[2].unlink()
    run = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert (run.exit_code, "a\\xff\\nb" in run.stdout.replace("\n", "")) == (1, True)


def test_options_of_the_other_kind_are_refused(tmp_path: Path, tree: Path) -> None:
    assert isinstance(CliRunner().invoke(app, ["check", str(tree), "--splits", "x.yaml"]).exception, ConfigError)
    assert isinstance(CliRunner().invoke(app, ["check", str(tmp_path / "x.yaml"), "--read"]).exception, ConfigError)
    (tree / "dataset.json").write_text("{}")
    assert not is_tree(tree)


@pytest.mark.data
def test_real_trees(data: Path) -> None:
    sarcoma = check_tree(data / "sarcoma" / "dicom")
    assert (sarcoma.counts["usable"], sarcoma.exit_code, sarcoma.studies) == (19, 0, 17)
    assert sarcoma.ignored == {"RT Structure Set Storage": 19}
    hard = check_tree(data / "dicom_hard", read=True)
    refused = [row.origin for row in hard.series if row.code]
    assert all("failing" in place.parts or place.name == "dcm_qa_ct_ge_tilt" for place in refused)
    assert check_tree(data / "hippocampus_dicom").counts == {"usable": 2, "refused": 0, "set aside": 0}


def test_the_same_from_python(tmp_path: Path) -> None:
    import medseg
    from medseg.errors import ConfigError

    write_series(Volume(np.zeros((1, 4, 5, 3), np.float32), np.eye(4)), tmp_path / "in" / "series")
    result = medseg.check(tmp_path / "in", read=True)
    assert result.ok
    assert [row.size for row in result.series] == [(4, 5, 3)]
    with pytest.raises(ConfigError, match="splits are for datasets"):
        medseg.check(tmp_path / "in", splits=tmp_path / "splits.yaml")
