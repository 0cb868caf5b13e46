"""Cases become checked voxels: mismatches between image, channels and mask are found and named."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.testing import assert_array_equal

from medseg.errors import GeometryError, MedsegError, ReadError, SpecError
from medseg.spec import Case, Spec
from medseg.studies import read_channels, read_study

SHAPE = (6, 5, 4)
AFFINE = nibabel.affines.from_matvec(
    nibabel.eulerangles.euler2mat(0.2, 0.1, -0.15) @ np.diag([0.9, 1.1, 3.0]), [10, 20, -30]
)


def spec(*channels: str, **changes: object) -> Spec:
    names = channels or ("T1",)
    return Spec.model_validate(
        {"name": "toy", "channels": {name: {} for name in names}, "labels": {"liver": 1, "tumour": 2}, **changes}
    )


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def turned(path: Path, codes: str) -> Path:
    """Store the same voxels in another axis order."""
    image = nibabel.load(path)
    ornt = ornt_transform(io_orientation(image.affine), axcodes2ornt(tuple(codes)))
    nibabel.save(image.as_reoriented(ornt), path)
    return path


@pytest.fixture
def image(tmp_path: Path, rng: np.random.Generator) -> Path:
    return save(tmp_path / "image.nii.gz", rng.normal(size=SHAPE).astype(np.float32))


@pytest.fixture
def mask(tmp_path: Path, rng: np.random.Generator) -> Path:
    return save(tmp_path / "mask.nii.gz", rng.integers(0, 3, SHAPE).astype(np.uint8))


def case(image: Path, mask: Path | None = None) -> Case:
    return Case("case_7", (image,), mask, "p")


def refused(given: Spec, study: Case, code: str, *words: str) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        read_study(given, study)
    assert caught.value.code == code
    text = str(caught.value)
    assert text.startswith("case case_7: ")
    for word in words:
        assert word in text
    for path in study.images:
        assert str(path.parent) not in text
    return caught.value


def test_image_and_mask_come_on_one_grid(image: Path, mask: Path) -> None:
    study = read_study(spec(), case(image, mask))
    assert study.case.id == "case_7"
    assert_array_equal(study.image.array[0], nibabel.load(image).get_fdata().astype(np.float32))
    assert study.mask is not None
    assert_array_equal(study.mask.array[0], np.asarray(nibabel.load(mask).dataobj))
    assert study.mask.array.dtype == np.uint8
    assert_array_equal(study.mask.affine, study.image.affine)


def test_a_case_without_mask(image: Path) -> None:
    assert read_study(spec(), case(image)).mask is None


@pytest.mark.parametrize("codes", ["LPS", "SAR", "ILA", "PRS"])
def test_a_mask_in_another_axis_order_is_turned_and_keeps_every_voxel(image: Path, mask: Path, codes: str) -> None:
    expected = np.asarray(nibabel.load(mask).dataobj)
    study = read_study(spec(), case(image, turned(mask, codes)))
    assert study.mask is not None
    assert_array_equal(study.mask.array[0], expected)
    assert_array_equal(study.mask.affine, study.image.affine)


def test_masks_of_any_number_type_hold_the_same_labels(image: Path, mask: Path) -> None:
    values = np.asarray(nibabel.load(mask).dataobj)
    for dtype in (np.int16, np.float32, np.float64, np.int32):
        study = read_study(spec(), case(image, save(mask, values.astype(dtype))))
        assert study.mask is not None
        assert_array_equal(study.mask.array[0], values)
        assert study.mask.array.dtype == np.uint8


def test_values_above_255_need_a_wider_type(image: Path, mask: Path) -> None:
    values = np.asarray(nibabel.load(mask).dataobj).astype(np.int32)
    wide = spec(labels={"liver": 1, "tumour": 70000})
    study = read_study(wide, case(image, save(mask, np.where(values == 2, 70000, values))))
    assert study.mask is not None
    assert study.mask.array.dtype == np.int32
    assert set(np.unique(study.mask.array)) == {0, 1, 70000}


def test_a_mask_elsewhere_or_of_another_size_is_refused(image: Path, mask: Path) -> None:
    values = np.asarray(nibabel.load(mask).dataobj)
    shifted = AFFINE.copy()
    shifted[0, 3] += 1
    error = refused(spec(), case(image, save(mask, values, shifted)), "LABEL_GRID")
    assert isinstance(error, GeometryError)
    refused(spec(), case(image, save(mask, values[:-1])), "LABEL_GRID", "5×5×4", "6×5×4")
    refused(spec(), case(image, save(mask, values, AFFINE @ np.diag([1, 1, 1.1, 1]))), "LABEL_GRID", "3.3", "3 mm")


def test_a_mask_that_is_only_moved_says_how_far(image: Path, mask: Path) -> None:
    """Size, spacing and axes are the same: a message of these alone would not say what is wrong."""
    shifted = AFFINE.copy()
    shifted[0, 3] += 7.5
    refused(spec(), case(image, save(mask, np.zeros(SHAPE, np.uint8), shifted)), "LABEL_GRID", "7.5 mm")


def test_foreign_values_are_named_with_what_is_allowed(image: Path, mask: Path) -> None:
    values = np.asarray(nibabel.load(mask).dataobj)
    error = refused(
        spec(), case(image, save(mask, np.where(values == 2, 9, values))), "LABEL_VALUES", "value(s) 9", "0, 1, 2"
    )
    assert isinstance(error, SpecError)
    refused(spec(), case(image, save(mask, np.where(values == 2, -1, values.astype(np.int16)))), "LABEL_VALUES", "-1")
    study = read_study(spec(ignore=9), case(image, save(mask, np.where(values == 2, 9, values))))
    assert study.mask is not None


def test_fractions_and_numbers_too_large_for_a_label_are_refused(image: Path, mask: Path) -> None:
    values = np.asarray(nibabel.load(mask).dataobj).astype(np.float32)
    refused(spec(), case(image, save(mask, values / 2)), "LABEL_NOT_INTEGER", "0.5")
    # 2**32 + 1 is 1 when cut to 32 bits: a label out of nothing.
    refused(spec(), case(image, save(mask, np.where(values == 2, 2.0**32, values))), "LABEL_VALUES")


def test_a_mask_with_channels_is_refused(image: Path, mask: Path) -> None:
    refused(spec(), case(image, save(mask, np.zeros((*SHAPE, 2), np.uint8))), "NOT_3D", "2 channels")


def test_what_is_missing_or_broken_is_named(image: Path, mask: Path, tmp_path: Path) -> None:
    assert isinstance(refused(spec(), case(tmp_path / "no.nii.gz"), "CHANNEL_MISSING", "'T1'", "no.nii.gz"), ReadError)
    refused(spec(), case(image, tmp_path / "no.nii.gz"), "LABEL_MISSING", "no.nii.gz")
    mask.write_bytes(mask.read_bytes()[:-20])
    refused(spec(), case(image, mask), "TRUNCATED", "mask.nii.gz")
    image.write_bytes(b"")
    refused(spec(), case(image, mask), "TRUNCATED", "image.nii.gz")


# --- channels ----------------------------------------------------------------------------------------------------


def test_channels_are_stacked_in_the_order_of_the_spec(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = [rng.normal(size=SHAPE).astype(np.float32) for _ in range(3)]
    paths = tuple(save(tmp_path / f"{n}.nii.gz", array) for n, array in enumerate(arrays))
    turned(paths[1], "SLP")
    volume = read_channels(spec("T1", "T2", "PD"), paths)
    assert volume.array.shape == (3, *SHAPE)
    for channel, array in zip(volume.array, arrays, strict=True):
        assert_array_equal(channel, array)


def test_one_file_may_hold_all_channels(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.normal(size=(*SHAPE, 2)).astype(np.float32)
    path = save(tmp_path / "a.nii.gz", array)
    assert_array_equal(read_channels(spec("T1", "T2"), (path,)).array, np.moveaxis(array, 3, 0))
    refused(spec("T1", "T2", "PD"), case(path), "CHANNEL_COUNT", "2 channel(s)", "3: T1, T2, PD")
    refused(spec("T1"), case(path), "CHANNEL_COUNT")


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    first = save(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.float32))
    second = save(tmp_path / "b.nii.gz", np.zeros(SHAPE, np.float32), AFFINE @ np.diag([1, 1, 2, 1]))
    refused(spec("T1", "T2"), Case("case_7", (first, second), None, "p"), "CHANNEL_GRID", "'T2'", "'T1'")


def test_a_missing_second_channel_is_named(tmp_path: Path) -> None:
    first = save(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.float32))
    study = Case("case_7", (first, tmp_path / "b.nii.gz"), None, "p")
    refused(spec("T1", "T2"), study, "CHANNEL_MISSING", "'T2'", "b.nii.gz")


def test_large_whole_numbers_of_a_second_channel_keep_their_values(tmp_path: Path) -> None:
    """Up to 2**24 a float32 holds every whole number."""
    first = save(tmp_path / "a.nii.gz", np.full(SHAPE, 2**24 - 1, np.int32))
    second = save(tmp_path / "b.nii.gz", np.full(SHAPE, -(2**24) + 1, np.int32))
    volume = read_channels(spec("T1", "T2"), (first, second))
    assert volume.array[0].flat[0] == 2**24 - 1
    assert volume.array[1].flat[0] == -(2**24) + 1
