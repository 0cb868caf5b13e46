from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg.errors import SpecError
from medseg.phantom.baseline import _best_interval, threshold_baseline
from medseg.spec import load_dataset

SPEC = """\
name: toy
images: images/{case}.nii.gz
masks: masks/{case}.nii.gz
channels: {T1: {modality: MR}}
labels: {thing: 1, absent: 2}
splits: {test: [c3]}
"""


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


@pytest.fixture
def toy(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Four cases in which the label is exactly what lies between two grey values, at another scale in each."""
    for number in range(4):
        pattern = np.repeat([0, 10, 20, 30], 128).astype(np.float32)
        rng.shuffle(pattern)
        pattern = pattern.reshape(8, 8, 8)
        write(tmp_path / "images" / f"c{number}.nii.gz", pattern * (1 + 7 * number) + 100 * number)
        write(tmp_path / "masks" / f"c{number}.nii.gz", (pattern == 20).astype(np.uint8))
    (tmp_path / "dataset.yaml").write_text(SPEC, encoding="utf-8")
    return tmp_path


def test_it_is_perfect_where_intensity_tells_all_whatever_the_scale(toy: Path) -> None:
    assert threshold_baseline(load_dataset(toy)) == {"thing": 1.0}  # `absent` is in no test case


def test_it_knows_no_place(toy: Path) -> None:
    """Half of the voxels of the grey value are the label: no interval is better than Dice 2/3."""
    for number in range(4):
        path = toy / "masks" / f"c{number}.nii.gz"
        mask = np.asarray(nibabel.load(path).dataobj).copy()
        place = np.flatnonzero(mask)[:64]
        mask.ravel()[place] = 0
        write(path, mask)
    assert threshold_baseline(load_dataset(toy))["thing"] == pytest.approx(2 / 3)


def test_the_interval_is_the_best_of_all(rng: np.random.Generator) -> None:
    label = rng.integers(0, 40, 12)
    everything = label + rng.integers(0, 60, 12)
    first, last = _best_interval(label, everything)

    def score(a: int, b: int) -> float:
        return 2 * label[a:b].sum() / (everything[a:b].sum() + label.sum())

    assert score(first, last) == max(score(a, b) for a in range(12) for b in range(a, 13))


def test_a_missing_split_is_named(toy: Path) -> None:
    (toy / "dataset.yaml").write_text(SPEC.replace("[c3]", "[]"), encoding="utf-8")
    with pytest.raises(SpecError, match=r"toy: 4 training and 0 test cases"):
        threshold_baseline(load_dataset(toy))


def test_phantoms_cannot_be_told_by_intensity(written: Path) -> None:
    scores = threshold_baseline(load_dataset(written))
    assert set(scores) == {"liver", "spleen", "kidney_right", "kidney_left", "lesion"}
    assert max(scores.values()) < 0.6
    assert np.mean(list(scores.values())) < 0.3
