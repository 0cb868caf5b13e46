"""Real objects: a golden table of what happens to each, and independent readings of the same labels."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import highdicom
import numpy as np
import pytest
import SimpleITK
from numpy.testing import assert_array_equal

from medseg.errors import MedsegError
from medseg.readers import read_image
from medseg.readers.dicom_labels import read_dicom_labels
from medseg.readers.dicom_series import read_series
from medseg.readers.label_request import LabelRequest, Wanted
from medseg.spec import load_dataset
from medseg.studies import read_study
from medseg.volume import Volume, align_to

DCMQI = "dcmqi/data/segmentations/"
HIGHDICOM = "highdicom-test/data/test_files/"
RT = "rt-utils/tests/"
IMAGES: dict[str, list[str]] = {
    "liver": [DCMQI + "ct-3slice"],
    "wide": [DCMQI + "24x38x3/image"],
    "narrow": [DCMQI + "23x38x3/image"],
    "rt": [RT + "mock_data/ct_1.dcm", RT + "mock_data/ct_2.dcm"],
}


@pytest.fixture(scope="module")
def objects(data: Path) -> Path:
    return data / "dicom_objects"


@pytest.fixture(scope="module")
def image(objects: Path) -> Callable[[str], tuple[Volume, tuple[Path, ...]]]:
    def get(name: str) -> tuple[Volume, tuple[Path, ...]]:
        paths = tuple(objects / path for path in IMAGES[name])
        return read_series(paths if len(paths) > 1 else paths[0]), paths

    return get


def all_of(names: list[str]) -> tuple[Wanted, ...]:
    return tuple(Wanted(name, n, expression=re.escape(name)) for n, name in enumerate(names, start=1))


# --- on the series they were drawn on, against what the makers of the files say they hold ---------------------------

DRAWN: dict[str, tuple[str, list[str], tuple[str, ...], dict[str, dict[int, int]]]] = {
    "24x38x3/seg/label.seg": ("wide", ["Liver"], (), {"24x38x3/nrrd/label.nrrd": {1: 1}}),
    "23x38x3/seg/label.seg": ("narrow", ["Liver"], (), {"23x38x3/nrrd/label.nrrd": {1: 1}}),
    "liver.dcm": ("liver", ["Liver"], (), {"liver_seg.nrrd": {1: 1}}),
    "sparse-labelmap-noppv.dcm": ("wide", ["Liver"], (), {"sparse_labelmap_noppv_seg.nrrd": {1: 1}}),
    "sparse-labelmap-ppv5.dcm": ("wide", ["Liver"], (), {"sparse_labelmap_ppv5_seg.nrrd": {1: 1, 5: 0}}),
}
"""File -> image, names, notes, and the label map it was made from (its values -> ours)."""


def from_nrrd(path: Path, image: Volume) -> np.ndarray:
    """Put a label map on the grid of an image by the positions of its voxels."""
    found = SimpleITK.ReadImage(str(path))
    values = np.zeros(image.shape, np.int64)
    array = SimpleITK.GetArrayFromImage(found)
    inverse = np.linalg.inv(image.affine)
    for k, j, i in np.argwhere(array):
        point = np.array(found.TransformIndexToPhysicalPoint((int(i), int(j), int(k)))) * [-1, -1, 1]
        voxel = np.rint(inverse[:3, :3] @ point + inverse[:3, 3]).astype(int)
        values[tuple(voxel)] = array[k, j, i]
    return values


@pytest.mark.parametrize("name", DRAWN)
def test_segments_are_the_label_maps_they_were_made_from(
    objects: Path, image: Callable[[str], tuple[Volume, tuple[Path, ...]]], name: str
) -> None:
    where, names, notes, sources = DRAWN[name]
    volume, paths = image(where)
    mask = read_dicom_labels(objects / DCMQI / name, LabelRequest(volume, all_of(names), paths))
    assert mask.notes == notes
    expected = np.zeros(volume.shape, np.int64)
    for source, values in sources.items():
        found = from_nrrd(objects / DCMQI / source, volume)
        assert set(np.unique(found)) - {0} == set(values)
        for theirs, ours in values.items():
            expected[found == theirs] = ours
    assert expected.any()
    assert_array_equal(mask.array[0], expected)


def test_partial_overlaps(objects: Path, image: Callable[[str], tuple[Volume, tuple[Path, ...]]]) -> None:
    """Five segments, some of which overlap: refused as exclusive labels, exact one by one."""
    volume, paths = image("liver")
    file = objects / DCMQI / "partial_overlaps.dcm"
    names = ["GREEN", "ORANGE", "PURPLE", "LIGHT_BLUE", "DARK_BLUE"]
    with pytest.raises(MedsegError) as caught:
        read_dicom_labels(file, LabelRequest(volume, all_of(names), paths))
    assert caught.value.code == "SEGMENT_OVERLAP"
    later = read_dicom_labels(file, LabelRequest(volume, all_of(names), paths, "later")).array[0]
    expected = np.zeros(volume.shape, np.uint8)
    sources = [from_nrrd(objects / DCMQI / f"partial_overlaps-{n}.nrrd", volume) for n in (1, 2, 3)]
    known = [part == value for part in sources for value in np.unique(part)[1:]]
    for value, name in enumerate(names, start=1):
        alone = read_dicom_labels(file, LabelRequest(volume, (Wanted("x", 1, expression=name),), paths)).array[0] > 0
        assert sum(np.array_equal(alone, part) for part in known) == 1, name
        expected[alone] = value
    assert_array_equal(later, expected)


# --- without their series: on their own grid, which highdicom derives -----------------------------------------------

ALONE: dict[str, tuple[int, tuple[str, ...]]] = {
    "dcmqi/data/sr-example/seg.dcm": (795, ()),
    HIGHDICOM + "seg_image_ct_binary.dcm": (638, ()),
    HIGHDICOM + "seg_image_ct_binary_fractional.dcm": (638, ("FRACTIONAL_THRESHOLDED",)),
    HIGHDICOM + "seg_image_ct_binary_overlap.dcm": (64, ("OVERLAP_RESOLVED",)),
    HIGHDICOM + "seg_image_ct_binary_single_frame.dcm": (1832, ()),
    HIGHDICOM + "seg_image_ct_true_fractional.dcm": (638, ("FRACTIONAL_THRESHOLDED",)),
}
"""File -> how many voxels are labelled, and the notes."""


@pytest.mark.parametrize("name", ALONE)
def test_segments_are_where_highdicom_finds_them(objects: Path, name: str) -> None:
    count, notes = ALONE[name]
    segmentation = highdicom.seg.segread(objects / name)
    volume = segmentation.get_volume(combine_segments=False, allow_missing_positions=True, rescale_fractional=False)
    # highdicom's axes are slices, rows, columns in LPS.
    affine = np.diag([-1.0, -1, 1, 1]) @ np.asarray(volume.affine)[:, [2, 1, 0, 3]]
    segments = np.asarray(volume.array).transpose(2, 1, 0, 3)
    names = [segmentation.get_segment_description(n).segment_label for n in segmentation.segment_numbers]
    grid = Volume(np.zeros((1, *segments.shape[:3]), np.float32), affine)
    mask = read_dicom_labels(objects / name, LabelRequest(grid, all_of(names), (), "later"))
    half = 0.5 * int(segmentation.get("MaximumFractionalValue") or 1)
    expected = np.zeros(grid.shape, np.uint8)
    for number in range(segments.shape[3]):
        expected[segments[..., number] >= half] = number + 1
    assert_array_equal(mask.array[0], expected)
    assert np.count_nonzero(expected) == count
    assert mask.notes == tuple(sorted((*notes, "MATCHED_BY_POSITION")))


# --- refused, each for its reason -----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, str]] = {
    HIGHDICOM + "seg_image_cr_binary.dcm": ("liver", "NO_POSITION"),
    HIGHDICOM + "seg_image_sm_control.dcm": ("liver", "NO_POSITION"),
    HIGHDICOM + "seg_image_sm_control_labelmap.dcm": ("liver", "NO_POSITION"),
    HIGHDICOM + "seg_image_sm_control_labelmap_palette_color.dcm": ("liver", "NO_POSITION"),
    HIGHDICOM + "seg_image_sm_dots.dcm": ("liver", "NO_POSITION"),
    HIGHDICOM + "seg_image_sm_dots_tiled_full.dcm": ("liver", "NO_POSITION"),
    HIGHDICOM + "seg_image_sm_numbers.dcm": ("liver", "NO_POSITION"),
    HIGHDICOM + "seg_image_ct_binary.dcm": ("liver", "FRAME_OF_REFERENCE"),
    HIGHDICOM + "sr_document.dcm": ("liver", "UNSUPPORTED_CLASS"),
    HIGHDICOM + "ct_image.dcm": ("liver", "UNSUPPORTED_CLASS"),
    HIGHDICOM + "sm_annotations.dcm": ("liver", "UNSUPPORTED_CLASS"),
    DCMQI + "liver.dcm": ("wide", "FRAME_OF_REFERENCE"),
    DCMQI + "24x38x3/seg/label.seg": ("narrow", "FRAME_OF_REFERENCE"),
    DCMQI + "24x38x3/nrrd": ("wide", "NO_LABELS"),
    # drawn on more slices than the two that are there
    RT + "mock_data/invalid_reference_rt.dcm": ("rt", "CONTOUR_OUTSIDE"),
    RT + "mock_data/non_existent_reference_rt.dcm": ("rt", "CONTOUR_OUTSIDE"),
    RT + "empty/dummy_rt.dcm": ("rt", "CONTOUR_OUTSIDE"),
    RT + "mock_data": ("rt", "SEGMENT_AMBIGUOUS"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(objects: Path, image: Callable[[str], tuple[Volume, tuple[Path, ...]]], name: str) -> None:
    where, code = REFUSED[name]
    volume, paths = image(where)
    with pytest.raises(MedsegError) as caught:
        read_dicom_labels(objects / name, LabelRequest(volume, (Wanted("any", 1, expression=".*"),), paths))
    assert caught.value.code == code


def test_contours_of_rt_utils(objects: Path, image: Callable[[str], tuple[Volume, tuple[Path, ...]]]) -> None:
    """A square with a hole of eight corners; it names the images, but another frame of reference than theirs."""
    volume, paths = image("rt")
    mask = read_dicom_labels(objects / RT / "mock_data/rt.dcm", LabelRequest(volume, (Wanted("x", 1),), paths))
    assert mask.notes == ("FRAME_OF_REFERENCE_DIFFERS",)
    found = np.argwhere(mask.array[0])
    assert (found.min(axis=0).tolist(), found.max(axis=0).tolist()) == ([152, 152, 0], [200, 200, 0])
    assert not mask.array[0, 162:190, 162:190].any()
    assert len(found) == 49 * 49 - 958


# --- sarcoma --------------------------------------------------------------------------------------------------------

DIFFERENT = {"STS_013": 4}
"""Voxels in which the publisher's mask differs: centres less than a thousandth of a voxel from the line."""


@pytest.mark.parametrize("half", ["first", "second"])
def test_sarcoma_contours_are_the_publisher_masks(data: Path, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image UIDs match nothing; head first, feet first and prone; several contours on a slice."""
    monkeypatch.setenv("MEDSEG_DATA", str(data))
    repository = Path(__file__).parents[3]
    contours = load_dataset(repository / "data_specs" / "sarcoma.yaml")
    published = {case.id: data / "sarcoma/nifti_masks" / case.id / "MR_T1_mask.nii.gz" for case in contours.cases}
    cases = contours.cases[::2] if half == "first" else contours.cases[1::2]
    assert len(contours.cases) == 17
    for case in cases:
        study = read_study(contours.spec, case)
        assert study.mask is not None
        theirs = align_to(read_image(published[case.id]), study.image)
        assert theirs is not None
        different = int(np.count_nonzero(study.mask.array != theirs.array))
        assert different == DIFFERENT.get(case.id, 0), case.id
        assert study.mask.notes == ("MATCHED_BY_POSITION",)


@pytest.mark.parametrize("modality", ["CT", "PET"])
def test_sarcoma_contours_on_ct_and_pet_are_the_publisher_masks(data: Path, modality: str) -> None:
    """The one patient of whom all three modalities are there; equal to the voxel, on grids of 1 and of 4.7 mm."""
    folder = data / "sarcoma/dicom/STS_044" / modality
    image = read_series(folder / "image")
    request = LabelRequest(image, (Wanted("tumour", 1, expression="GTV_Mass.*"),), (folder / "image",))
    mask = read_dicom_labels(folder / "mask", request)
    theirs = align_to(read_image(data / "sarcoma/nifti_masks/STS_044" / f"{modality}_mask.nii.gz"), image)
    assert theirs is not None
    assert_array_equal(mask.array, theirs.array)
    assert mask.array.any()
