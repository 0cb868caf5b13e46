"""Small datasets on disk with predictions whose scores are known by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

AFFINE = np.array([[-2.0, 0, 0, 30], [0, 2.0, 0, -20], [0, 0, 2.5, 5], [0, 0, 0, 1]])
"""10 mm³ voxels."""


def save(path: Path, array: np.ndarray[Any, Any], affine: np.ndarray[Any, Any] = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array, affine).to_filename(path)
    return path


def bar(*lengths: int) -> np.ndarray[Any, Any]:
    """A mask (12, 10, 8) with label n as a bar of `lengths[n - 1]` voxels along I."""
    mask = np.zeros((12, 10, 8), np.uint8)
    for number, length in enumerate(lengths, start=1):
        mask[:length, number, 0] = number
    return mask


class World:
    """A dataset with images and masks, and a folder of predictions."""

    def __init__(self, root: Path) -> None:
        self.root, self.predictions, self.out = root / "data", root / "predictions", root / "out"
        self.root.mkdir(parents=True)
        self.predictions.mkdir()
        self.write_spec()

    def write_spec(self, **changes: Any) -> None:
        spec = {
            "name": "bars",
            "images": "images/{case}.nii.gz",
            "masks": "masks/{case}.nii.gz",
            "channels": {"mr": {"modality": "MR"}},
            "labels": {"one": {"value": 1, "color": "#ff0000"}, "two": 2},
            **changes,
        }
        (self.root / "dataset.yaml").write_text(yaml.safe_dump(spec))

    def add(self, case: str, reference: np.ndarray[Any, Any], prediction: np.ndarray[Any, Any] | None) -> None:
        noise = np.random.default_rng(len(case)).normal(100, 10, reference.shape).astype(np.float32)
        save(self.root / "images" / f"{case}.nii.gz", noise)
        save(self.root / "masks" / f"{case}.nii.gz", reference)
        if prediction is not None:
            self.predict(case, prediction)

    def predict(self, case: str, prediction: np.ndarray[Any, Any], affine: np.ndarray[Any, Any] = AFFINE) -> Path:
        return save(self.predictions / f"{case}.nii.gz", prediction, affine)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")
