"""What the numbers in a file mean: bits, signs, tables, padding, floats; each answer worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame

from medseg.errors import ReadError
from medseg.phantom.dicom import write_series
from medseg.readers.dicom_budget import HEADER_BYTES, check_budget
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume

ROWS, COLUMNS, SLICES = 3, 5, 3
Edit = Callable[[Dataset], object]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Write a series of which each slice holds the same numbers, (rows, columns); `edit` may change what they mean."""

    def write(numbers: Any, dtype: str = "<u2", edit: Edit = lambda dataset: None, modality: Any = "MR") -> Path:
        blank = Volume(np.zeros((1, COLUMNS, ROWS, SLICES), np.float32), np.diag([-1.0, -1, 2, 1]))
        for file in write_series(blank, tmp_path, modality=modality):
            dataset = pydicom.dcmread(file)
            data = np.asarray(numbers, dtype=dtype)
            dataset.BitsAllocated = dataset.BitsStored = 8 * data.itemsize
            dataset.HighBit, dataset.PixelRepresentation = 8 * data.itemsize - 1, int(data.dtype.kind == "i")
            dataset.PixelData = data.tobytes() + b"\0" * (data.size * data.itemsize % 2)
            dataset["PixelData"].VR = "OB" if data.itemsize == 1 else "OW"
            edit(dataset)
            dataset.save_as(file)
        return tmp_path

    return write


def plane(folder: Path) -> np.ndarray:
    """(rows, columns) of the middle slice; all slices are the same."""
    array = read_series(folder).array[0]
    np.testing.assert_array_equal(array, array[:, :, :1].repeat(SLICES, axis=2))
    return np.asarray(array[:, :, 1].T)


def refusal(folder: Path) -> str:
    with pytest.raises(ReadError) as caught:
        read_series(folder)
    return caught.value.code


RAMP = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)


def test_pixels_of_one_byte_in_odd_number(make: Callable[..., Path]) -> None:
    """15 bytes and one to pad."""
    np.testing.assert_array_equal(plane(make(RAMP, "u1")), RAMP)
    np.testing.assert_array_equal(plane(make(RAMP - 7, "i1")), RAMP - 7)
    folder = make(RAMP, "u1", lambda dataset: setattr(dataset, "PixelData", dataset.PixelData[:14]))
    assert refusal(folder) == "TRUNCATED"


@pytest.mark.parametrize("dtype", ["<u4", "<i4"])
def test_pixels_of_four_bytes(dtype: str, make: Callable[..., Path]) -> None:
    numbers = RAMP * 1000003 - (7 * 1000003 if dtype == "<i4" else 0)
    np.testing.assert_array_equal(plane(make(numbers, dtype)), numbers.astype(np.float32))


@pytest.mark.parametrize(("stored", "high"), [(12, 11), (12, 15), (12, 13), (10, 11), (1, 0), (15, 14)])
@pytest.mark.parametrize("signed", [False, True])
def test_used_bits_may_lie_anywhere(stored: int, high: int, signed: bool, make: Callable[..., Path]) -> None:
    """The bits around them hold overlays: all are set."""
    low = -(1 << (stored - 1)) if signed else 0
    truth = low + (RAMP * 37) % (1 << stored)
    shift = high + 1 - stored
    mask = ((1 << stored) - 1) << shift
    raw = ((truth << shift) & mask) | (0xFFFF & ~mask)

    def edit(dataset: Dataset) -> None:
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = stored, high, int(signed)

    np.testing.assert_array_equal(plane(make(raw, "<u2", edit)), truth)


def test_bytes_written_as_words_by_the_other_end_first(make: Callable[..., Path]) -> None:
    """PS3.5 annex D: 8-bit pixels in big endian are OW, whose bytes change places; as OB they do not."""
    numbers = np.arange(16, dtype=np.uint8).reshape(4, 4)

    def of_kind(vr: str, data: bytes) -> Path:
        folder = make(RAMP, "u1")
        for file in folder.iterdir():
            dataset = pydicom.dcmread(file)
            dataset.Rows = dataset.Columns = 4
            dataset["PixelData"] = DataElement(0x7FE00010, vr, data)
            dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
            fresh = Dataset()
            fresh.file_meta = dataset.file_meta
            fresh.update({element.tag: element for element in dataset})
            fresh.save_as(file, implicit_vr=False, little_endian=False)
        return folder

    np.testing.assert_array_equal(plane(of_kind("OB", numbers.tobytes())), numbers)
    np.testing.assert_array_equal(plane(of_kind("OW", numbers.view("<u2").byteswap().tobytes())), numbers)


@pytest.mark.parametrize("slope", [1.0, 0.5, 0.001, 3.0517578125e-05])
@pytest.mark.parametrize("intercept", [0.0, -1024.0, 0.25, 16777216.0])
def test_rescale_is_rounded_once(slope: float, intercept: float, make: Callable[..., Path]) -> None:
    def edit(dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept

    numbers = RAMP * 4099
    exact = (numbers.astype(np.float64) * slope + intercept).astype(np.float32)
    np.testing.assert_array_equal(plane(make(numbers, "<u2", edit)), exact)


# ---- padding --------------------------------------------------------------------------------------------------------


def padded(first: int, limit: int | None, vr: str) -> Edit:
    def edit(dataset: Dataset) -> None:
        dataset.add_new("PixelPaddingValue", vr, first)
        if limit is not None:
            dataset.add_new("PixelPaddingRangeLimit", vr, limit)
        dataset.RescaleSlope, dataset.RescaleIntercept = 2, -10

    return edit


@pytest.mark.parametrize(
    ("first", "limit", "vr", "gone"),
    [
        (-5, None, "SS", {-5}),
        (65531, None, "US", {-5}),
        (-5, -3, "SS", {-5, -4, -3}),
        (-3, -5, "SS", {-5, -4, -3}),
        (65531, 65533, "US", {-5, -4, -3}),
        (-100, None, "SS", set()),
    ],
)
def test_padding_is_set_to_the_lowest_real_value(
    first: int, limit: int | None, vr: str, gone: set[int], make: Callable[..., Path]
) -> None:
    numbers = RAMP - 5
    folder = make(numbers, "<i2", padded(first, limit, vr), modality="CT")
    kept = numbers[~np.isin(numbers, list(gone))]
    expected = np.where(np.isin(numbers, list(gone)), kept.min(), numbers) * 2.0 - 10
    np.testing.assert_array_equal(plane(folder), expected)
    assert ("PADDING_MASKED" in read_series(folder).notes) == bool(gone)


def test_monochrome1_is_not_turned_over(make: Callable[..., Path]) -> None:
    folder = make(RAMP, "<u2", lambda dataset: setattr(dataset, "PhotometricInterpretation", "MONOCHROME1"))
    np.testing.assert_array_equal(plane(folder), RAMP)


@pytest.mark.parametrize("kind", ["PALETTE COLOR", "RGB", "CANARY"])
def test_numbers_that_are_no_intensities_are_refused(kind: str, make: Callable[..., Path]) -> None:
    assert refusal(make(RAMP, "<u2", lambda dataset: setattr(dataset, "PhotometricInterpretation", kind))) == "COLOUR"


# ---- tables and other scales ----------------------------------------------------------------------------------------


def table(count: int, first: int, bits: int, data: Any, vr: str = "US") -> Edit:
    def edit(dataset: Dataset) -> None:
        item = Dataset()
        item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [count, first, bits])
        item.add_new("LUTData", vr, data)
        item.ModalityLUTType = "US"
        dataset.ModalityLUTSequence = [item]

    return edit


def test_a_lookup_table_and_its_ends(make: Callable[..., Path]) -> None:
    """PS3.3 C.11.1.1: entries for 3, 4, 5 and 6; what is below takes the first one, what is above the last."""
    expected = np.array([10, 10, 10, 10, 400, 30, 20] + [20] * 8).reshape(ROWS, COLUMNS)
    np.testing.assert_array_equal(plane(make(RAMP, "<u2", table(4, 3, 16, [10, 400, 30, 20]))), expected)


def test_a_lookup_table_of_signed_numbers(make: Callable[..., Path]) -> None:
    expected = np.array([7] * 5 + [7, 9, 11] + [11] * 7).reshape(ROWS, COLUMNS)
    np.testing.assert_array_equal(plane(make(RAMP - 7, "<i2", table(3, -2, 16, [7, 9, 11]))), expected)


@pytest.mark.parametrize(
    ("bits", "data"),
    [(16, b"\x05\x00\x00\x01\x07\x00"), (8, b"\x05\x00\x06\x00\x07\x00"), (8, b"\x05\x06\x07\x00")],
)
def test_a_lookup_table_in_bytes(bits: int, data: bytes, make: Callable[..., Path]) -> None:
    """Words; bytes in words of their own; bytes side by side, with one to pad."""
    last, middle = 7, 256 if bits == 16 else 6
    expected = np.array([5, middle] + [last] * 13).reshape(ROWS, COLUMNS)
    np.testing.assert_array_equal(plane(make(RAMP, "<u2", table(3, 0, bits, data, "OW"))), expected)


def test_a_full_table_has_no_room_for_its_count(make: Callable[..., Path]) -> None:
    data = (np.arange(65536)[::-1]).astype("<u2").tobytes()
    np.testing.assert_array_equal(plane(make(RAMP, "<u2", table(0, 0, 16, data, "OW"))), 65535 - RAMP)


@pytest.mark.parametrize(
    ("edit", "modality"),
    [
        (table(9, 0, 16, [1, 2, 3]), "MR"),
        (table(3, 0, 8, [1, 2, 300]), "MR"),
        (table(3, 0, 12, [1, 2, 3]), "MR"),
        (table(3, 0, 16, [1, 2, 3]), "CT"),
    ],
    ids=["too short", "above its bits", "of 12 bits", "beside a rescale"],
)
def test_tables_in_doubt_are_refused(edit: Edit, modality: str, make: Callable[..., Path]) -> None:
    assert refusal(make(RAMP, "<u2", edit, modality=modality)) == "MODALITY_LUT"


@pytest.mark.parametrize(("slope", "noted"), [(1, False), (2.5, True)])
def test_a_real_world_map_is_noted_where_it_differs(slope: float, noted: bool, make: Callable[..., Path]) -> None:
    def edit(dataset: Dataset) -> None:
        item = Dataset()
        item.RealWorldValueSlope, item.RealWorldValueIntercept = float(slope), 0.0
        dataset.RealWorldValueMappingSequence = [item]

    folder = make(RAMP, "<u2", edit)
    np.testing.assert_array_equal(plane(folder), RAMP)
    assert read_series(folder).notes == (("REAL_WORLD_MAP",) if noted else ())


@pytest.mark.parametrize(("kind", "noted"), [("HU", False), ("US", False), ("Z_EFF", True)])
def test_a_ct_of_another_unit_is_noted(kind: str, noted: bool, make: Callable[..., Path]) -> None:
    folder = make(RAMP, "<i2", lambda dataset: setattr(dataset, "RescaleType", kind), modality="CT")
    assert read_series(folder).notes == (("NOT_HU",) if noted else ())


# ---- floats ---------------------------------------------------------------------------------------------------------


def floats(keyword: str, dtype: str, padding: str) -> Edit:
    def edit(dataset: Dataset) -> None:
        del dataset.PixelData
        setattr(dataset, keyword, (RAMP * 0.1 - 0.3).astype(dtype).tobytes())
        dataset.BitsAllocated = 8 * np.dtype(dtype).itemsize
        for word in ("BitsStored", "HighBit", "PixelRepresentation"):
            del dataset[word]
        setattr(dataset, padding, float((RAMP * 0.1 - 0.3).astype(dtype)[0, 1]))

    return edit


@pytest.mark.parametrize(
    ("keyword", "dtype", "padding"),
    [
        ("FloatPixelData", "<f4", "FloatPixelPaddingValue"),
        ("DoubleFloatPixelData", "<f8", "DoubleFloatPixelPaddingValue"),
    ],
)
def test_pixels_that_are_floats(keyword: str, dtype: str, padding: str, make: Callable[..., Path]) -> None:
    folder = make(RAMP, "<u2", floats(keyword, dtype, padding))
    expected = (RAMP * 0.1 - 0.3).astype(dtype).astype(np.float32)
    expected[0, 1] = expected.min()  # the padding
    np.testing.assert_array_equal(plane(folder), expected)
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        setattr(dataset, keyword, dataset[keyword].value[:-8])
        dataset.save_as(file)
    assert refusal(folder) == "TRUNCATED"


def test_what_pydicom_logs_of_a_damaged_picture_is_not_shown(
    make: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Colour pictures go through its decoders, which log the traceback of an error."""

    def edit(dataset: Dataset) -> None:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.PixelData = bytes(range(ROWS * COLUMNS * 3)) + b"\0"
        # not by GDCM, which ends the process when it writes an odd number of bytes
        dataset.compress(uid.RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
        dataset.PixelData = encapsulate([frame[:-30]])

    assert refusal(make(RAMP, "u1", edit)) in ("TRUNCATED", "UNREADABLE", "LENGTH_MISMATCH")
    assert caplog.records == []


# ---- bombs ----------------------------------------------------------------------------------------------------------


def deflated(file: Path, extra: int) -> None:
    """Write a slice anew, deflated, with so many bytes of zeros in a private element before its pixels."""
    dataset = pydicom.dcmread(file)
    if extra:
        dataset.private_block(0x0011, "MEDSEG TEST", create=True).add_new(0x01, "OB", bytes(extra))
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(file)


def test_a_deflated_bomb_is_refused_before_it_is_unpacked(make: Callable[..., Path]) -> None:
    folder = make(RAMP)
    for file in folder.iterdir():
        deflated(file, 0)
    np.testing.assert_array_equal(plane(folder), RAMP)
    bomb = sorted(folder.iterdir())[1]
    deflated(bomb, HEADER_BYTES + 2**20)
    assert bomb.stat().st_size < 200_000
    with pytest.raises(ReadError) as caught:
        check_budget(bomb, 30)
    assert caught.value.code == "OVERSIZED"
    assert refusal(folder) in ("OVERSIZED", "UNREADABLE")


def test_only_deflated_files_are_measured(make: Callable[..., Path]) -> None:
    """Also not one that names the syntax in another place."""
    folder = make(RAMP, "<u2", lambda dataset: setattr(dataset, "DerivationDescription", "1.2.840.10008.1.2.1.99"))
    np.testing.assert_array_equal(plane(folder), RAMP)
    for file in folder.iterdir():
        check_budget(file, 0)


def test_a_deflated_file_cut_short(make: Callable[..., Path]) -> None:
    folder = make(RAMP)
    for file in folder.iterdir():
        deflated(file, 0)
    file.write_bytes(file.read_bytes()[:-20])
    assert refusal(folder) in ("TRUNCATED", "UNREADABLE")
