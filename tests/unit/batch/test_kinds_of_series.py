"""A batch on real series that are no classic grey stack: enhanced files, mosaics, single slices, colour, tilted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medseg.batch.run import predict
from medseg.inference.predict import Model, load_model
from medseg.readers.dicom_scan import find_series
from medseg.readers.dicom_series import read_series
from medseg.readers.nifti import read_nifti
from medseg.volume import grid_distance

pytestmark = pytest.mark.data
FORMATS = ["nifti,seg,rtstruct,sr"]


@pytest.fixture(scope="module")
def loaded(model: Path) -> Model:
    return load_model(model)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("dcm_qa_enh/In/Siemens/XA10", 4),
        ("dcm_qa_ts/In/1.dcm", 1),
        ("dicom2nifti/ge/anatomical/001_single_slice", 1),
    ],
)
def test_every_part_gets_its_mask_in_every_format(
    loaded: Model, data: Path, tmp_path: Path, name: str, parts: int
) -> None:
    result = predict([data / "dicom_hard" / name], model=loaded, out=tmp_path, formats=FORMATS)
    assert [(e.state, e.code, e.message) for e in result.entries] == [("done", "", "")] * parts
    images = [read_series(entry) for entry in find_series(data / "dicom_hard" / name)]
    for entry in result.entries:
        assert len(entry.outputs) == 4
        mask = read_nifti(tmp_path / f"{entry.id}.nii.gz")
        assert mask.shape == images[0].shape
        assert grid_distance(mask.shape, mask.affine, images[0].affine) < 1e-3


def test_colour_is_refused_by_a_model_of_one_channel(loaded: Model, data: Path, tmp_path: Path) -> None:
    result = predict([data / "dicom_hard/dicom2nifti/generic/rgb/001"], model=loaded, out=tmp_path)
    assert [(entry.state, entry.code) for entry in result.entries] == [("refused", "CHANNEL_COUNT")]


def test_a_volume_of_three_channels_is_what_a_colour_model_takes(data: Path) -> None:
    volume = read_series(data / "dicom_hard/dicom2nifti/generic/rgb/001")
    assert volume.array.shape[0] == 3
    assert np.ptp(volume.array) > 100
