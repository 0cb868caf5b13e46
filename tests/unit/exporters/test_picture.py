"""Label maps of pictures: other programs read what was predicted, and volumes never lose their place silently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image

from medseg.errors import ExportError
from medseg.exporters import picture as module
from medseg.exporters import usual_format
from medseg.exporters.picture import write_png, write_tiff
from medseg.readers import read_labels
from medseg.volume import Volume


def mask(*shape: int, dtype: type = np.uint8, top: int = 255) -> Volume:
    values = np.random.default_rng(0).integers(0, top, (1, *shape), endpoint=True).astype(dtype)
    return Volume(values, np.eye(4), "pixel")


@pytest.mark.parametrize(("dtype", "top", "stored"), [(np.uint8, 255, np.uint8), (np.int32, 65535, np.uint16)])
def test_png(tmp_path: Path, dtype: type, top: int, stored: type) -> None:
    volume = mask(7, 5, 1, dtype=dtype, top=top)
    write_png(tmp_path / "a.png", volume)
    rows = volume.array[0, :, :, 0].T
    for found in (
        np.asarray(Image.open(tmp_path / "a.png")),
        SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(tmp_path / "a.png")),
    ):
        assert found.dtype == stored
        np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.int32, 2**24 - 1)])
@pytest.mark.parametrize("pages", [1, 4])
def test_tiff(tmp_path: Path, dtype: type, top: int, pages: int) -> None:
    volume = mask(7, 5, pages, dtype=dtype, top=top)
    write_tiff(tmp_path / "a.tif", volume)
    found = tifffile.imread(tmp_path / "a.tif").reshape(pages, 5, 7)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, volume.array[0].T)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif").array, volume.array)


def test_the_same_mask_is_the_same_bytes(tmp_path: Path) -> None:
    for name, write in (("a.png", write_png), ("a.tif", write_tiff)):
        write(tmp_path / name, mask(7, 5, 1))
        first = (tmp_path / name).read_bytes()
        write(tmp_path / name, mask(7, 5, 1))
        assert (tmp_path / name).read_bytes() == first


def test_what_a_picture_cannot_hold(tmp_path: Path) -> None:
    cases = [
        (write_png, mask(7, 5, 2), "NEEDS_PICTURE"),
        (write_png, mask(7, 5, 1, dtype=np.int32, top=2**24 - 1), "LABEL_RANGE"),
        (write_png, Volume(mask(7, 5, 1).array, np.eye(4)), "NEEDS_PICTURE"),
        (write_tiff, Volume(mask(7, 5, 1).array, np.eye(4)), "NEEDS_PICTURE"),
    ]
    for write, volume, code in cases:
        with pytest.raises(ExportError) as caught:
            write(tmp_path / "a", volume)
        assert caught.value.code == code
    assert not list(tmp_path.iterdir())


def test_a_file_that_reads_back_differently_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_picture_labels", lambda path: mask(7, 5, 1, top=3))
    with pytest.raises(ExportError) as caught:
        write_png(tmp_path / "a.png", mask(7, 5, 1))
    assert caught.value.code == "READ_BACK"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.png", "png"), ("a.JPG", "png"), ("a.tif", "tiff"), ("a.TIFF", "tiff"), ("a.nii.gz", "nifti"), ("a", "nifti")],
)
def test_usual_format(name: str, expected: str) -> None:
    assert usual_format(Path(name)) == expected
