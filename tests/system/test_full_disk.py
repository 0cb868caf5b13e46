"""A real file system of 10 MB becomes full while workers write into it: that costs the study that does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg.batch.engines import Workers
from medseg.batch.run import BatchResult, predict
from medseg.errors import ExportError


@pytest.fixture
def small_disk(small_file_system: Callable[[str], Path]) -> Path:
    return small_file_system("10m")


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes free."""
    filler = disk / "filler"
    with open(filler, "wb") as file:
        file.write(b"x" * (shutil.disk_usage(disk).free - left))
    return filler


def states(result: BatchResult) -> dict[str, str]:
    return {entry.id: entry.code or entry.state for entry in result.entries}


@pytest.fixture
def images(model: Path, tmp_path: Path) -> Path:
    """Three small images, and between them one of noise, whose mask is large."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abz":
        shutil.copyfile(model.parent / "data" / "images" / "c0.nii.gz", folder / f"{name}.nii.gz")
    affine = nibabel.load(folder / "a.nii.gz").affine
    noise = np.random.default_rng(0).normal(100, 60, (128, 128, 64)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(noise, affine), folder / "large.nii.gz")
    return folder


def test_a_study_that_does_not_fit_costs_itself(model: Path, images: Path, small_disk: Path, tmp_path: Path) -> None:
    calm = predict([images], model=model, out=tmp_path / "calm", workers=Workers())
    large = (tmp_path / "calm" / "large.nii.gz").stat().st_size
    pages = sum(4096 * -(-p.stat().st_size // 4096) for p in (tmp_path / "calm").rglob("*") if p.is_file()) - large
    others = pages * 5 // 4 + 16_384
    assert large > others, "the test needs an image whose mask alone is too large"
    filler, out = fill(small_disk, (large + others) // 2), small_disk / "out"
    found = states(predict([images], model=model, out=out, workers=Workers()))
    assert found == {**states(calm), "large": "DISK_FULL"}
    assert not list(out.rglob(".partial-*"))
    assert not (out / "large.nii.gz").exists()
    filler.unlink()
    assert predict([images], model=model, out=out, workers=Workers()).complete
    for entry in calm.entries:
        assert (out / f"{entry.id}.nii.gz").read_bytes() == (tmp_path / "calm" / f"{entry.id}.nii.gz").read_bytes()


def test_a_disk_that_holds_nothing_ends_the_run(model: Path, images: Path, small_disk: Path) -> None:
    fill(small_disk, 20_000)
    with pytest.raises(ExportError) as caught:
        predict([images], model=model, out=small_disk / "out", workers=Workers())
    assert caught.value.code == "DISK_FULL"
