from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medseg.errors import ConfigError
from medseg.phantom.anatomy import make_patient
from medseg.phantom.dataset import case_names, spec_text, write_dataset
from medseg.phantom.template import LABELS
from medseg.readers.dicom_series import read_series
from medseg.spec import load_dataset, spec_digest
from medseg.studies import read_study
from medseg.volume import align_to


def fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_spec_loads_with_names_as_case_ids(written: Path) -> None:
    dataset = load_dataset(written)
    assert [case.id for case in dataset.cases] == case_names(6)
    assert [case.id for case in dataset.select("test")] == case_names(6)[4:]
    assert dataset.spec.foreground == LABELS
    assert load_dataset(written.parent) == dataset


def test_studies_read_back_as_they_were_made(written: Path) -> None:
    """Values to the last bit, places to a micrometre, whatever axis order the reader prefers."""
    dataset = load_dataset(written)
    for index, case in enumerate(dataset.cases):
        made = make_patient(0, index=index)
        found = read_study(dataset.spec, case)
        image = align_to(found.image, made.image)
        assert image is not None
        np.testing.assert_array_equal(image.array, made.image.array)
        np.testing.assert_allclose(read_series(case.images[0]).spacing, found.image.spacing)
        assert found.mask is not None
        mask = align_to(found.mask, made.mask)
        assert mask is not None
        np.testing.assert_array_equal(mask.array, made.mask.array)


def test_headers_name_the_scanner_and_the_pseudonym_only(written: Path) -> None:
    for index, folder in enumerate(sorted((written.parent / "dicom").iterdir())):
        header = pydicom.dcmread(folder / "IM0001.dcm")
        assert header.Modality == "MR"
        assert header.Manufacturer == make_patient(0, index=index).manufacturer
        assert header.PatientID == folder.name
        assert not header.PatientName


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_dataset(tmp_path / name, patients=2, test=1, seed=3)
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    write_dataset(tmp_path / "three", patients=2, test=1, seed=4)
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "three")


def test_a_longer_cohort_begins_like_a_shorter_one(written: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, patients=2, test=1)
    shorter, longer = fingerprint(tmp_path), fingerprint(written.parent)
    assert shorter.pop("dataset.yaml") != longer["dataset.yaml"]
    assert shorter.items() <= longer.items()


@pytest.mark.parametrize(("patients", "test"), [(0, 0), (5, 5), (5, -1)])
def test_impossible_numbers_are_refused_before_anything_is_written(patients: int, test: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="held out"):
        write_dataset(tmp_path / "no", patients=patients, test=test)
    assert not (tmp_path / "no").exists()


def test_the_shipped_spec_says_the_same(
    repository: Path, tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = repository / "data_specs" / "phantom.yaml"
    assert shipped.read_text(encoding="utf-8") == spec_text(root="${MEDSEG_PHANTOM}")
    for name in case_names(20):
        (tmp_path / "dicom" / name).mkdir(parents=True)
    monkeypatch.setenv("MEDSEG_PHANTOM", str(tmp_path))
    dataset = load_dataset(shipped)
    (tmp_path / "dataset.yaml").write_text(spec_text(), encoding="utf-8")
    assert spec_digest(dataset.spec) == spec_digest(load_dataset(tmp_path).spec)
    assert [case.id for case in dataset.select("test")] == case_names(20)[15:]


def test_the_shipped_hippocampus_spec_finds_what_the_msd_layout_finds(
    repository: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSEG_DATA", str(data))
    by_spec = load_dataset(repository / "data_specs" / "hippocampus.yaml")
    by_layout = load_dataset(data / "hippocampus")
    assert [(c.id, c.images, c.mask) for c in by_spec.cases] == [
        (c.id, tuple(path.resolve() for path in c.images), c.mask and c.mask.resolve()) for c in by_layout.cases
    ]
    study = read_study(by_spec.spec, by_spec.cases[0])
    assert study.mask is not None
    assert set(np.unique(study.mask.array)) == {0, *by_spec.spec.foreground.values()}
