"""Our readers inside MONAI's LoadImage, beside MONAI's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.data import NibabelReader
from monai.transforms import Compose, LoadImage, LoadImaged, Orientationd

from medseg.errors import GeometryError, ReadError
from medseg.phantom.anatomy import make_patient
from medseg.phantom.dicom import write_series
from medseg.readers import read_image
from medseg.readers.monai_adapter import MedsegReader

OBLIQUE = np.array([[-0.9, 0.1, 0.0, 12.0], [0.1, 0.9, 0.2, -7.0], [0.0, -0.2, 2.5, 33.0], [0, 0, 0, 1]])


def save(path: Path, array: Any, affine: Any = OBLIQUE) -> Path:
    nibabel.Nifti1Image(array, affine).to_filename(path)
    return path


@pytest.mark.parametrize("shape", [(7, 6, 5), (7, 6, 5, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("channel_first", [True, False])
def test_nifti_is_what_monai_reads(
    tmp_path: Path, shape: tuple[int, ...], dtype: type, channel_first: bool, rng: np.random.Generator
) -> None:
    file = save(tmp_path / "a.nii.gz", (rng.random(shape) * 200).astype(dtype))
    ours, theirs = (
        LoadImage(reader=reader, ensure_channel_first=channel_first)(file)
        for reader in (MedsegReader(), NibabelReader())
    )
    assert torch.equal(ours.as_tensor(), theirs.as_tensor())
    assert torch.equal(ours.affine, theirs.affine)
    assert ours.meta["spatial_shape"].tolist() == theirs.meta["spatial_shape"].tolist()
    assert ours.meta["space"] == theirs.meta["space"]
    first, second = (float(x.meta["original_channel_dim"]) for x in (ours, theirs))
    assert first == second or (np.isnan(first) and np.isnan(second))


def test_a_dicom_series_is_a_folder(tmp_path: Path) -> None:
    patient = make_patient(0, index=0)
    write_series(patient.image, tmp_path / "series", modality=patient.modality, patient_id="p")
    found = LoadImage(reader=MedsegReader(), ensure_channel_first=True)(tmp_path / "series")
    volume = read_image(tmp_path / "series")
    assert np.array_equal(found.as_tensor().numpy(), volume.array)
    assert np.abs(found.affine.numpy() - volume.affine).max() == 0
    # The world position of a voxel is that of the patient who was written, whatever the order of axes.
    world = patient.image.affine @ [3, 4, 5, 1]
    index = np.rint(np.linalg.inv(found.affine.numpy()) @ world).astype(int)[:3]
    assert np.abs(found.affine.numpy() @ [*index, 1] - world).max() < 1e-3
    assert float(found[(0, *index)]) == pytest.approx(float(patient.image.array[0, 3, 4, 5]), abs=1)


def test_channels_stored_in_different_orders_are_brought_together(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.random((4, 5, 6)).astype(np.float32)
    first = save(tmp_path / "a.nii.gz", array)
    turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(array * 2, OBLIQUE))
    turned.to_filename(tmp_path / "b.nii.gz")
    found = LoadImage(reader=MedsegReader(), ensure_channel_first=True)([first, tmp_path / "b.nii.gz"])
    assert found.shape == (2, 4, 5, 6)
    assert torch.allclose(found[1], found[0] * 2)


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    first = save(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.float32))
    moved = OBLIQUE.copy()
    moved[0, 3] += 1
    second = save(tmp_path / "b.nii.gz", np.zeros((4, 5, 6), np.float32), moved)
    with pytest.raises(GeometryError) as caught:
        MedsegReader().read([first, second])
    assert caught.value.code == "CHANNEL_GRID"


def test_refusals_reach_the_user(tmp_path: Path) -> None:
    file = save(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.float32))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ReadError) as caught:
        LoadImage()(file, reader=MedsegReader())
    assert caught.value.code == "TRUNCATED"
    with pytest.raises(RuntimeError, match="ends too early"):
        LoadImage(reader=MedsegReader())(file)


def test_what_can_be_read_is_known_by_name(tmp_path: Path) -> None:
    reader = MedsegReader()
    assert reader.verify_suffix(tmp_path / "x.nii.gz")
    assert reader.verify_suffix([tmp_path / "x.nii", tmp_path])
    assert not reader.verify_suffix(tmp_path / "x.docx")


def test_in_a_compose_of_monai(tmp_path: Path, rng: np.random.Generator) -> None:
    file = save(tmp_path / "a.nii.gz", rng.random((7, 6, 5)).astype(np.float32))
    path = Compose(
        [
            LoadImaged("image", reader=MedsegReader(), ensure_channel_first=True),
            Orientationd("image", axcodes="SRA", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
        ]
    )
    canonical = nibabel.as_closest_canonical(nibabel.load(file)).get_fdata()
    assert np.allclose(path({"image": file})["image"][0].numpy(), canonical.transpose(2, 0, 1))
