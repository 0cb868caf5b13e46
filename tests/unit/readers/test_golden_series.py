"""What happens to each series of the development data; only `failing/` and the tilted head are refused among images of
a patient, and what has a reference NIfTI equals it. Where they differ and why: docs/reference/real-series.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from medseg.errors import MedsegError
from medseg.readers.dicom_geometry import LPS_TO_RAS, series_stack
from medseg.readers.dicom_scan import find_series, scan
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume, grid_distance, reorient

pytestmark = pytest.mark.data
MM = 1e-3


@dataclass(frozen=True)
class Row:
    """One folder, or one file of it: how many parts of which shape, or the code of the refusal; the notes."""

    shape: tuple[int, ...] = ()
    notes: tuple[str, ...] = ("NO_FRAME_OF_REFERENCE",)
    parts: int = 1
    code: str = ""


def row(*shape: int, notes: tuple[str, ...] = ("NO_FRAME_OF_REFERENCE",), parts: int = 1) -> Row:
    return Row(shape if len(shape) == 4 else (1, *shape), notes, parts)


def refused(code: str, parts: int = 1) -> Row:
    return Row(code=code, parts=parts)


HARD, OBJECTS = "dicom_hard/", "dicom_objects/"
NIFTI = HARD + "dicom2nifti/"
DCMQI, HIGHDICOM, RT = OBJECTS + "dcmqi/data/", OBJECTS + "highdicom-test/data/test_files/", OBJECTS + "rt-utils/tests/"

GOLDEN: dict[str, Row] = {
    HARD + "dcm_qa_ct_ge_tilt": refused("IRREGULAR_SPACING"),
    HARD + "dcm_qa_enh/In/Philips": row(64, 64, 32, notes=(), parts=2),  # magnitude and field map
    HARD + "dcm_qa_enh/In/Siemens/XA10": row(64, 64, 6, notes=(), parts=4),  # a file for each time point
    HARD + "dcm_qa_ts/In": row(64, 64, 35, notes=(), parts=9),  # one mosaic in nine syntaxes, under one series UID
    NIFTI + "anatomical/001": row(256, 256, 4),
    NIFTI + "anatomical/001_implicit": row(256, 256, 4),
    NIFTI + "failing/gantrytilting/001": refused("GANTRY_TILT"),
    NIFTI + "failing/notavolume/001": refused("MIXED_SERIES"),
    NIFTI + "failing/slicecount/001": row(256, 256, 2),  # two slices fail elsewhere
    NIFTI + "failing/sliceincrement/001": refused("MISSING_SLICES"),
    NIFTI + "failing/sliceincrement/002": refused("MISSING_SLICES"),
    NIFTI + "failing/sliceorientation/001": row(288, 288, 2, parts=2),  # each direction is a volume
    NIFTI + "ge/anatomical/001": row(256, 256, 4),
    NIFTI + "ge/anatomical/001_implicit": row(256, 256, 4),
    NIFTI + "ge/anatomical/001_single_slice": row(
        256, 256, 1, notes=("NO_FRAME_OF_REFERENCE", "NO_THICKNESS", "SINGLE_SLICE")
    ),
    NIFTI + "generic/anatomical/001": row(256, 256, 4),
    NIFTI + "generic/anatomical/001_implicit": row(256, 256, 4),
    NIFTI + "generic/anatomical/002_non_isotropic": row(64, 28, 4),
    NIFTI + "generic/compressed/001": row(256, 256, 4),
    NIFTI + "generic/compressed_j2k/001": row(256, 256, 4),
    NIFTI + "generic/compressed_jpeg/001": row(256, 256, 4),
    NIFTI + "generic/compressed_jpegls/001": row(256, 256, 4),
    NIFTI + "generic/compressed_rle/001": row(256, 256, 4),
    NIFTI + "generic/rgb/001": row(3, 52, 77, 4, notes=("COLOUR_PICTURE", "DERIVED", "NO_FRAME_OF_REFERENCE")),
    NIFTI + "hitachi/anatomical/001": row(64, 64, 4),
    NIFTI + "hitachi/anatomical/001_implicit": row(64, 64, 4),
    NIFTI + "hyperfine/anatomical/001": row(112, 138, 8),
    NIFTI + "philips/anatomical/001": row(240, 240, 4),
    NIFTI + "philips/anatomical/001_implicit": row(240, 240, 4),
    NIFTI + "philips/anatomical/002": row(768, 768, 4, parts=2),
    NIFTI + "philips_enhanced/anatomical/001": row(256, 256, 8),
    NIFTI + "philips_enhanced/anatomical/001_implicit": row(256, 256, 8),
    NIFTI + "siemens/anatomical/001": row(256, 256, 4),
    NIFTI + "siemens/anatomical/001_implicit": row(256, 256, 4),
    NIFTI + "siemens_multiframe/anatomical/001": row(256, 256, 8),
    DCMQI + "paramaps": row(256, 256, 1, notes=("DERIVED", "SINGLE_SLICE")),
    DCMQI + "segmentations/23x38x3/image": row(23, 38, 3, notes=()),
    DCMQI + "segmentations/23x38x3/multiframe": row(23, 38, 3, notes=()),
    DCMQI + "segmentations/24x38x3/image": row(24, 38, 3, notes=()),
    DCMQI + "segmentations/24x38x3/multiframe": row(24, 38, 3, notes=()),
    DCMQI + "segmentations/ct-3slice": row(512, 512, 3, notes=("PADDING_MASKED",)),
    HIGHDICOM + "ct_image.dcm": row(128, 128, 1, notes=("SINGLE_SLICE",)),
    HIGHDICOM + "dx_image.dcm": refused("UNSUPPORTED_CLASS"),
    HIGHDICOM + "sm_image.dcm": refused("ENHANCED_MULTIFRAME"),
    HIGHDICOM + "sm_image_control.dcm": refused("ENHANCED_MULTIFRAME"),
    HIGHDICOM + "sm_image_dots.dcm": refused("ENHANCED_MULTIFRAME"),
    HIGHDICOM + "sm_image_grayscale.dcm": refused("ENHANCED_MULTIFRAME"),
    HIGHDICOM + "sm_image_grayscale_reversed.dcm": refused("ENHANCED_MULTIFRAME"),
    HIGHDICOM + "sm_image_jpegls.dcm": refused("ENHANCED_MULTIFRAME"),
    HIGHDICOM + "sm_image_jpegls_nobot.dcm": refused("ENHANCED_MULTIFRAME"),
    HIGHDICOM + "sm_image_numbers.dcm": refused("ENHANCED_MULTIFRAME"),
    RT + "mock_data": row(512, 512, 2, notes=("PADDING_MASKED",)),
    RT + "one_slice_data": row(100, 50, 1, notes=("DERIVED", "NO_FRAME_OF_REFERENCE", "NO_THICKNESS", "SINGLE_SLICE")),
    RT + "oriented_data": row(100, 50, 3, notes=("DERIVED", "NO_FRAME_OF_REFERENCE")),
}


def files_of(data: Path, name: str) -> list[Path]:
    place = data / name
    return sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else [place]


@pytest.mark.parametrize("name", GOLDEN)
def test_what_happens_to_it(data: Path, name: str) -> None:
    expected = GOLDEN[name]
    entries = scan(files_of(data, name)).series
    assert len(entries) == expected.parts
    for entry in entries:
        if expected.code:
            with pytest.raises(MedsegError) as caught:
                read_series(entry)
            assert caught.value.code == expected.code
        else:
            volume = read_series(entry)
            assert (volume.array.shape, volume.notes) == (expected.shape, expected.notes)


def test_every_series_has_a_row(data: Path) -> None:
    """Nothing is left out: every file of an image belongs to a row."""
    known = {path for name in GOLDEN for path in files_of(data, name)}
    for root in (HARD, OBJECTS):
        found = scan(data / root)
        assert sorted(str(path) for entry in found.series for path in entry.files if path not in known) == []


def test_only_these_are_refused() -> None:
    """Tilt, gaps and no volume at all (corrected on request where that goes), X-ray and microscopy."""
    codes = {name.removeprefix(HARD).split("/")[0]: row.code for name, row in GOLDEN.items() if row.code}
    assert codes.keys() == {"dcm_qa_ct_ge_tilt", "dicom2nifti", "dicom_objects"}
    inside = {name for name, row in GOLDEN.items() if row.code and name.startswith(NIFTI)}
    assert all(name.startswith(NIFTI + "failing/") for name in inside)
    others = {name.removeprefix(HIGHDICOM) for name, row in GOLDEN.items() if row.code and name.startswith(OBJECTS)}
    assert all(name.startswith(("dx_", "sm_")) for name in others)


# ---- where a reference exists ---------------------------------------------------------------------------------------


def reference(path: Path, time: int | None = None) -> Volume:
    image = nibabel.load(path)
    array = np.asarray(image.dataobj)
    if array.dtype.names:  # a colour NIfTI
        array = np.stack([array[word] for word in "RGB"])
    else:
        array = (array if time is None else array[..., time]).astype(np.float64).reshape(image.shape[:3])[None]
    return Volume(array, image.affine)


def in_order_of(other: Volume, volume: Volume) -> Volume:
    """The reference with the axes of ours: NIfTI writers turn and flip them."""
    turned = reorient(other, volume.axis_codes)
    assert turned.shape == volume.shape
    assert grid_distance(volume.shape, volume.affine, turned.affine) < MM
    return turned


REFERENCES = [name for name in GOLDEN if name.startswith(NIFTI) and not GOLDEN[name].code]


@pytest.mark.parametrize("name", REFERENCES)
def test_it_equals_its_reference(data: Path, name: str) -> None:
    path = data / (name + "_ground_truth.nii.gz")
    if not path.exists():
        assert name in (NIFTI + "failing/sliceorientation/001", NIFTI + "philips/anatomical/002")
        return
    volume = read_series(data / name)
    other = in_order_of(reference(path), volume).array.astype(volume.array.dtype)
    # Where the slope is a fraction the reference was scaled in float32, we round once: the last digit may differ.
    rtol = 2e-7 if "philips_enhanced" in name else 0
    np.testing.assert_allclose(volume.array, other, rtol=rtol, atol=0)


@pytest.mark.parametrize("number", range(1, 10))
def test_each_transfer_syntax_of_a_mosaic_equals_its_reference(data: Path, number: int) -> None:
    volume = read_series(data / HARD / f"dcm_qa_ts/In/{number}.dcm")
    other = in_order_of(reference(data / HARD / f"dcm_qa_ts/Ref/{number}.nii"), volume)
    np.testing.assert_array_equal(volume.array, other.array)


def test_each_time_point_of_an_enhanced_series_equals_its_reference(data: Path) -> None:
    """One 4D NIfTI stands for four of ours."""
    for time, entry in enumerate(find_series(data / HARD / "dcm_qa_enh/In/Siemens/XA10")):
        volume = read_series(entry)
        other = reference(data / HARD / "dcm_qa_enh/Ref/Siemens_REST1_w_SMS_PF7-8_6.nii", time)
        np.testing.assert_array_equal(volume.array, in_order_of(other, volume).array)


def test_kinds_of_image_in_one_enhanced_file_equal_their_references(data: Path) -> None:
    """Field map in Hz; the magnitude in another unit: dcm2niix takes Philips' private scale, we the standard's.

    Theirs is stored / (2005,100E), ours stored * RescaleSlope; the quotient is one number for all voxels.
    """
    folder = data / HARD / "dcm_qa_enh"
    field, magnitude = (read_series(entry) for entry in find_series(folder / "In/Philips"))
    other = in_order_of(reference(folder / "Ref/Philips_WIP_B0_NS_801_e2_fieldmaphz.nii"), field)
    np.testing.assert_allclose(field.array, other.array, atol=0.01)  # their step is 0.244 Hz
    other = in_order_of(reference(folder / "Ref/Philips_WIP_B0_NS_801_e1.nii"), magnitude)
    there = magnitude.array > 0
    assert (other.array[~there] == 0).all()
    frame = pydicom.dcmread(folder / "In/Philips/IM_0027_fMAP.dcm").PerFrameFunctionalGroupsSequence[0]
    private = float(frame[0x2005, 0x140F].value[0][0x2005, 0x100E].value)
    slope = float(frame.PixelValueTransformationSequence[0].RescaleSlope)
    np.testing.assert_allclose(other.array[there] / magnitude.array[there], 1 / (private * slope), rtol=1e-6)


def test_enhanced_and_classic_of_the_same_images_agree(data: Path) -> None:
    for name in ("23x38x3", "24x38x3"):
        classic, enhanced = (
            read_series(data / DCMQI / "segmentations" / name / kind) for kind in ("image", "multiframe")
        )
        np.testing.assert_array_equal(classic.array, enhanced.array)
        np.testing.assert_allclose(classic.affine, enhanced.affine, atol=1e-9)


def test_our_slices_lie_where_sarcoma_says(data: Path) -> None:
    """To 1 nm; dcm2niix is up to 0.0043 mm off, for it counts the first gap on in float32 (docs)."""
    for folder in sorted((data / "sarcoma/dicom").glob("*/*/image")):
        for entry in find_series(folder):
            if entry.refusal is not None:
                continue
            stack = series_stack(entry.headers)
            index = np.c_[np.zeros((len(stack.positions), 2)), np.arange(len(stack.positions)), stack.order]
            index[:, 3] = 1
            places = (index @ stack.affine.T)[:, :3] @ LPS_TO_RAS
            assert np.abs(places - stack.positions).max() < 1e-5
