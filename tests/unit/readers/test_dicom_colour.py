"""Colour pictures of a patient: red, green and blue in this order, however they are stored."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
)

from medseg.errors import MedsegError
from medseg.phantom.dicom import write_series
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume

SHAPE = (34, 35, 3)
AFFINE = np.array([[-0.7, 0, 0, 12.5], [0, -0.9, 0, -31.25], [0, 0, 2.5, 101.0], [0, 0, 0, 1.0]])
TRUTH = np.random.default_rng(5).integers(0, 256, (3, *SHAPE)).astype(np.uint8)


def save(
    folder: Path,
    *,
    truth: np.ndarray = TRUTH,
    planar: int = 0,
    syntax: str = "",
    kind: str = "RGB",
    change: Callable[[Dataset], object] = lambda dataset: None,
) -> Path:
    """A series of pictures; truth (3, I, J, K)."""
    files = write_series(Volume(np.zeros((1, *SHAPE), np.float32), AFFINE), folder, modality="MR")
    for k, file in enumerate(files):
        dataset, picture = pydicom.dcmread(file), truth[..., k].transpose(2, 1, 0)
        if kind == "YBR_FULL":
            picture = convert_color_space(picture, "RGB", "YBR_FULL")
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, kind, planar
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        # (pydicom takes planes for pixels when it encodes RLE: that one gets its planar configuration afterwards)
        data = (picture.transpose(2, 0, 1) if planar and syntax != RLELossless else picture).tobytes()
        dataset.PixelData = data + b"\0" * (len(data) % 2)
        if syntax == JPEGBaseline8Bit:
            stream = io.BytesIO()
            PIL.Image.fromarray(picture).save(stream, "JPEG", quality=95, subsampling=0)
            dataset.PixelData = encapsulate([stream.getvalue()])
            dataset["PixelData"].is_undefined_length = True
            dataset.PhotometricInterpretation = "YBR_FULL"
            dataset.LossyImageCompression = "01"
            dataset.file_meta.TransferSyntaxUID = syntax
        elif syntax:
            dataset.PlanarConfiguration = 0 if syntax == RLELossless else planar
            dataset.compress(syntax, generate_instance_uid=False)
            dataset.PlanarConfiguration = planar
        change(dataset)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset.save_as(file)
    return folder


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("syntax", ["", RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_each_voxel_has_its_colour(tmp_path: Path, planar: int, syntax: str) -> None:
    volume = read_series(save(tmp_path, planar=planar, syntax=syntax))
    assert volume.array.dtype == np.uint8
    np.testing.assert_array_equal(volume.array, TRUTH)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    assert volume.notes == ("COLOUR_PICTURE",)


def test_luminance_and_chrominance_become_rgb(tmp_path: Path) -> None:
    volume = read_series(save(tmp_path, kind="YBR_FULL"))
    assert np.abs(volume.array.astype(int) - TRUTH).max() <= 2  # both ways are rounded to whole numbers


def test_jpeg_becomes_rgb(tmp_path: Path) -> None:
    smooth = np.stack([np.add.outer(np.arange(34) * a, np.arange(35) * b) for a, b in ((3, 2), (1, 5), (4, 0))])
    truth = np.repeat(smooth[..., None], 3, axis=-1).astype(np.uint8)
    volume = read_series(save(tmp_path, truth=truth, syntax=JPEGBaseline8Bit))
    assert np.abs(volume.array.astype(int) - truth).max() <= 8
    assert volume.notes == ("COLOUR_PICTURE", "LOSSY")


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "16 bits": ("COLOUR", {"change": lambda d: setattr(d, "BitsAllocated", 16)}),
    "another kind of colour": ("COLOUR", {"change": lambda d: setattr(d, "PhotometricInterpretation", "HSV")}),
    "too few pixels": ("TRUNCATED", {"change": lambda d: setattr(d, "PixelData", d.PixelData[:-40])}),
    "too many pixels": ("LENGTH_MISMATCH", {"change": lambda d: setattr(d, "PixelData", d.PixelData + bytes(40))}),
    "no position": ("NO_POSITION", {"change": lambda d: delattr(d, "ImagePositionPatient")}),
    "ultrasound": ("UNSUPPORTED_CLASS", {"change": lambda d: setattr(d, "SOPClassUID", UltrasoundImageStorage)}),
    "of no scanner": ("UNSUPPORTED_CLASS", {"change": lambda d: setattr(d, "Modality", "OT")}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    code, how = REFUSED[name]
    with pytest.raises(MedsegError) as caught:
        read_series(_with_class(save(tmp_path, **how)))
    assert caught.value.code == code


def _with_class(folder: Path) -> Path:
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.save_as(file)
    return folder
