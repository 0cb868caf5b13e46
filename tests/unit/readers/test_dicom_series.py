"""The matrix of hazards: every series is read exactly or refused with its code (field notes 2.1, 2.2)."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EncapsulatedPDFStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from medseg.errors import GeometryError, MedsegError, ReadError
from medseg.phantom.dicom import write_series
from medseg.readers.allowances import BEYOND
from medseg.readers.dicom_refusals import REFUSALS
from medseg.readers.dicom_scan import find_series, scan
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume, align_to, grid_distance

SHAPE = (33, 35, 8)
AFFINE = np.array([[-0.7, 0, 0, 12.5], [0, -0.9, 0, -31.25], [0, 0, 2.5, 101.0], [0, 0, 0, 1.0]])


def phantom(affine: np.ndarray = AFFINE, seed: int = 0) -> Volume:
    """Every voxel has its own value, so that any flip, swap or shift shows."""
    values = np.random.default_rng(seed).permutation(np.prod(SHAPE)) - 300.0
    return Volume(values.reshape((1, *SHAPE)).astype(np.float32), affine)


def edit(path: Path, change: Callable[[Dataset], object], **how: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path)
        change(dataset)
        dataset.save_as(path, **how)


def put(keyword: str, value: object) -> Callable[[Dataset], object]:
    return lambda dataset: setattr(dataset, keyword, value)


def drop(*keywords: str) -> Callable[[Dataset], object]:
    return lambda dataset: [delattr(dataset, word) for word in keywords]


def renew(dataset: Dataset) -> None:
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()


def shift(offset: tuple[float, float, float]) -> Callable[[Dataset], object]:
    def change(dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [a + b for a, b in zip(dataset.ImagePositionPatient, offset, strict=True)]

    return change


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    return write_series(phantom(), tmp_path / "series", modality="CT")


def assert_same(volume: Volume, truth: Volume, mm: float = 1e-6) -> None:
    aligned = align_to(volume, truth)
    assert aligned is not None
    np.testing.assert_array_equal(aligned.array, truth.array)
    # align_to takes the reference's affine: compare the one that was read, in the reader's own axis order
    back = align_to(truth, volume)
    assert back is not None
    np.testing.assert_array_equal(back.array, volume.array)
    assert grid_distance(volume.shape, volume.affine, _own_affine(volume, truth)) < mm


def _own_affine(volume: Volume, truth: Volume) -> np.ndarray:
    from medseg.volume import reorient

    return reorient(truth, volume.axis_codes).affine


def rotated(degrees: tuple[float, float, float], spacing: tuple[float, float, float]) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * np.array(spacing)
    affine[:3, 3] = (-20.5, 33.25, -77.125)
    return affine


def signed_axes(codes: str) -> np.ndarray:
    from nibabel.orientations import axcodes2ornt

    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (row, direction) in enumerate(axcodes2ornt(tuple(codes))):
        affine[int(row), axis] = direction * (0.7, 0.9, 2.5)[axis]
    affine[:3, 3] = (12.5, -31.25, 101)
    return affine


CODES = ["LPS", "PIR", "LIP", "LPI", "RAS", "RPS", "LAS", "PSL", "AIL", "RIA", "LSA", "SRP", "IPL"]
AFFINES = {code: signed_axes(code) for code in CODES} | {
    "oblique": rotated((20, -15, 40), (0.8, 1.1, 3.0)),
    "double oblique, left-handed": rotated((-35, 50, 160), (0.8, 1.1, -3.0)),
}


# ---- read exactly ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AFFINES)
def test_every_orientation_is_read_exactly(name: str, tmp_path: Path) -> None:
    truth = phantom(AFFINES[name])
    write_series(truth, tmp_path, modality="CT", shuffle=True)
    volume = read_series(tmp_path)
    assert_same(volume, truth)
    assert volume.array.dtype == np.float32
    assert volume.orthogonal
    assert volume.meta == {"Modality": "CT"}
    assert volume.notes == ()


@pytest.mark.parametrize("name", AFFINES)
def test_geometry_agrees_with_simpleitk(name: str, tmp_path: Path) -> None:
    write_series(phantom(AFFINES[name]), tmp_path, modality="CT", shuffle=True)
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    image = SimpleITK.ReadImage(names)
    direction = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction, image.GetOrigin()
    other = Volume(SimpleITK.GetArrayFromImage(image).T[None].astype(np.float32), np.diag([-1, -1, 1, 1]) @ affine)
    # rows of SimpleITK's own normal may run the other way, its voxels must not lie elsewhere
    assert_same(read_series(tmp_path), other, mm=1e-4)


def reverse_instance_numbers(paths: list[Path]) -> None:
    for number, path in enumerate(paths):
        edit(path, put("InstanceNumber", len(paths) - number))


def jitter(paths: list[Path]) -> None:
    for number, path in enumerate(paths):
        edit(path, put("ImageOrientationPatient", [1, 0, 1e-5 * (number % 2), 0, 1, 1e-5 * (number % 3)]))


def rewrite(paths: list[Path], syntax: str, *, implicit: bool = False, little: bool = True) -> None:
    for path in paths:
        dataset = pydicom.dcmread(path)
        if not little:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
        fresh = Dataset()
        fresh.file_meta = dataset.file_meta
        fresh.file_meta.TransferSyntaxUID = syntax
        for element in dataset:
            fresh.add(element)
        fresh.save_as(path, implicit_vr=implicit, little_endian=little, enforce_file_format=True)


def compress(paths: list[Path], syntax: str) -> None:
    for path in paths:
        edit(path, lambda dataset: dataset.compress(syntax, generate_instance_uid=False))


def monochrome1(paths: list[Path]) -> None:
    for path in paths:
        edit(path, put("PhotometricInterpretation", "MONOCHROME1"))


def fourteen_bits_with_overlay(paths: list[Path]) -> None:
    """Signed 14-bit values without sign extension; the two bits above hold something else."""

    def change(dataset: Dataset) -> None:
        stored = np.frombuffer(dataset.PixelData, np.int16) - 4096
        dataset.RescaleIntercept = 3072
        dataset.BitsStored, dataset.HighBit = 14, 13
        dataset.PixelData = ((stored.astype(np.uint16) & 0x3FFF) | 0x4000).tobytes()

    for path in paths:
        edit(path, change)


def unsigned(paths: list[Path]) -> None:
    def change(dataset: Dataset) -> None:
        stored = np.frombuffer(dataset.PixelData, np.int16).astype(np.int32) + 40000
        dataset.RescaleIntercept, dataset.PixelRepresentation = -41024, 0
        dataset.PixelData = stored.astype(np.uint16).tobytes()

    for path in paths:
        edit(path, change)


def no_rescale(paths: list[Path]) -> None:
    def change(dataset: Dataset) -> None:
        dataset.PixelData = (np.frombuffer(dataset.PixelData, np.int16) - 1024).tobytes()
        del dataset.RescaleSlope, dataset.RescaleIntercept

    for path in paths:
        edit(path, change)


def another_rescale(paths: list[Path]) -> None:
    def change(dataset: Dataset) -> None:
        dataset.PixelData = (2 * np.frombuffer(dataset.PixelData, np.int16) - 2000).astype(np.int16).tobytes()
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, -24

    edit(paths[2], change)


def misleading_tags(paths: list[Path]) -> None:
    for number, path in enumerate(paths):
        edit(path, put("SliceThickness", 7))
        edit(path, put("SliceLocation", -3 * number))
        edit(path, put("SpacingBetweenSlices", 11))


def no_preamble(paths: list[Path]) -> None:
    for path in paths:
        rewrite([path], ImplicitVRLittleEndian, implicit=True)
        dataset = pydicom.dcmread(path)
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(path, implicit_vr=True, little_endian=True)
        assert path.read_bytes()[:2] == b"\x08\x00"


READS: dict[str, tuple[Callable[[list[Path]], object], tuple[str, ...]]] = {
    "reversed instance numbers": (reverse_instance_numbers, ()),
    "thickness, location and gap tags that lie": (misleading_tags, ()),
    "orientation jitter 1e-5": (jitter, ()),
    "deflated": (partial(rewrite, syntax=DeflatedExplicitVRLittleEndian), ()),
    "implicit": (partial(rewrite, syntax=ImplicitVRLittleEndian, implicit=True), ()),
    "big endian": (partial(rewrite, syntax=ExplicitVRBigEndian, little=False), ()),
    "RLE": (partial(compress, syntax=RLELossless), ()),
    "JPEG-LS": (partial(compress, syntax=JPEGLSLossless), ()),
    "JPEG 2000": (partial(compress, syntax=JPEG2000Lossless), ()),
    "MONOCHROME1": (monochrome1, ()),
    "signed 14 bits, dirty high bits": (fourteen_bits_with_overlay, ()),
    "big endian, signed 14 bits, dirty high bits": (
        lambda paths: (fourteen_bits_with_overlay(paths), rewrite(paths, ExplicitVRBigEndian, little=False)),
        (),
    ),
    "unsigned 16 bits": (unsigned, ()),
    "no preamble": (no_preamble, ()),
    "no frame of reference": (
        lambda paths: [edit(path, drop("FrameOfReferenceUID")) for path in paths],
        ("NO_FRAME_OF_REFERENCE",),
    ),
    "CT without rescale": (no_rescale, ("NO_RESCALE",)),
    "another rescale on one slice": (another_rescale, ("RESCALE_VARIES",)),
    "derived": (
        lambda paths: [edit(path, put("ImageType", ["DERIVED", "SECONDARY"])) for path in paths],
        ("DERIVED",),
    ),
    "exact duplicate": (
        lambda paths: shutil.copy(paths[3], paths[3].with_name("copy")),
        ("DUPLICATES_DROPPED",),
    ),
    "no extension, junk beside": (
        lambda paths: ((paths[0].rename(paths[0].with_suffix("")), (paths[0].parent / "x.txt").write_text("no"))),
        (),
    ),
}


@pytest.mark.parametrize("name", READS)
def test_harmless_variants_are_read_exactly(name: str, series: list[Path]) -> None:
    change, notes = READS[name]
    change(series)
    volume = read_series(series[0].parent)
    assert_same(volume, phantom(), mm=5e-4 if "jitter" in name else 1e-6)
    assert volume.notes == notes


def test_slope_per_slice_is_exact(tmp_path: Path) -> None:
    truth = phantom()
    truth = truth.with_array(np.abs(truth.array) ** 1.7 * 0.37)
    write_series(truth, tmp_path, modality="PT")
    expected = []
    for path in sorted(tmp_path.iterdir()):
        dataset = pydicom.dcmread(path)
        expected.append(dataset.pixel_array.astype(np.float64).T * float(dataset.RescaleSlope))
    volume = read_series(tmp_path)
    assert volume.meta["Units"] == "BQML"
    np.testing.assert_array_equal(volume.array[0], np.stack(expected, axis=-1).astype(np.float32))
    np.testing.assert_allclose(volume.array, truth.array, atol=float(truth.array.max()) / 32767)


def test_mr_values_are_kept(tmp_path: Path) -> None:
    truth = phantom()
    truth = truth.with_array(truth.array + 300)
    write_series(truth, tmp_path, modality="MR", plane="sagittal")
    assert_same(read_series(tmp_path), truth)


@pytest.mark.parametrize("written", [-2000, 63536])
def test_padding_becomes_the_lowest_real_value(written: int, series: list[Path]) -> None:
    truth = phantom()
    expected = truth.array.copy()
    for k, path in enumerate(series):

        def change(dataset: Dataset) -> None:
            pixels = np.frombuffer(dataset.PixelData, np.int16).reshape(dataset.Rows, dataset.Columns).copy()
            pixels[0, :3] = -2000
            dataset.PixelData = pixels.tobytes()
            dataset.add_new("PixelPaddingValue", "SS" if written < 0 else "US", written)

        edit(path, change)
        expected[0, :3, 0, k] = np.nan
    volume = read_series(series[0].parent)
    expected[np.isnan(expected)] = np.nanmin(expected)
    np.testing.assert_array_equal(volume.array, expected)
    assert volume.notes == ("PADDING_MASKED",)


@pytest.mark.parametrize(
    ("tags", "step", "notes"),
    [
        ({"SliceThickness": 3}, 3, ("SINGLE_SLICE",)),
        ({"SliceThickness": 3, "SpacingBetweenSlices": -4}, 4, ("SINGLE_SLICE",)),
        ({"SliceThickness": 0}, 1, ("NO_THICKNESS", "SINGLE_SLICE")),
        ({"SliceThickness": None}, 1, ("NO_THICKNESS", "SINGLE_SLICE")),
    ],
)
def test_a_single_slice_lies_where_it_says(
    series: list[Path], tags: dict[str, float | None], step: float, notes: tuple[str, ...]
) -> None:
    for path in series[1:]:
        path.unlink()
    for keyword, value in tags.items():
        edit(series[0], put(keyword, value))
    volume = read_series(series[0].parent)
    truth = phantom().array[:, :, :, :1]
    np.testing.assert_array_equal(volume.array, truth)
    expected = AFFINE.copy()
    expected[2, 2] = step
    np.testing.assert_allclose(volume.affine, expected, atol=1e-6)
    assert volume.notes == notes
    edit(series[0], drop("ImagePositionPatient"))
    with pytest.raises(GeometryError) as caught:
        read_series(series[0].parent)
    assert caught.value.code == "NO_POSITION"


def test_zero_padding_of_mr_stays_zero(tmp_path: Path) -> None:
    truth = phantom()
    truth = truth.with_array(truth.array + 300)
    for path in write_series(truth, tmp_path, modality="MR"):
        edit(path, lambda dataset: dataset.add_new("PixelPaddingValue", "US", 0))
    volume = read_series(tmp_path)
    assert_same(volume, truth)
    assert volume.notes == ()


def test_a_localizer_in_the_series_is_set_aside(series: list[Path]) -> None:
    def change(dataset: Dataset) -> None:
        renew(dataset)
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]

    scout = series[0].with_name("scout")
    shutil.copy(series[0], scout)
    edit(scout, change)
    volume = read_series(series[0].parent)
    assert_same(volume, phantom())
    assert volume.notes == ("LOCALIZER_SET_ASIDE",)
    assert sorted(str(entry.refusal and entry.refusal.code) for entry in find_series(scout.parent)) == [
        "LOCALIZER",
        "None",
    ]


# ---- refuse with a code ---------------------------------------------------------------------------------------------


def each(change: Callable[[Dataset], object]) -> Callable[[list[Path]], object]:
    return lambda paths: [edit(path, change) for path in paths]


def one(change: Callable[[Dataset], object], index: int = 3) -> Callable[[list[Path]], object]:
    return lambda paths: edit(paths[index], change)


def copy_of(paths: list[Path], change: Callable[[Dataset], object], index: int = 3) -> None:
    target = paths[index].with_name("another")
    shutil.copy(paths[index], target)
    edit(target, change)


def brighter(dataset: Dataset) -> None:
    dataset.PixelData = (np.frombuffer(dataset.PixelData, np.int16) + 1).tobytes()


def second_half_wider(paths: list[Path]) -> None:
    for number, path in enumerate(paths[5:], start=1):
        edit(path, shift((0, 0, 2.5 * number)))


def tilt(paths: list[Path], degrees: float) -> None:
    for number, path in enumerate(paths):
        edit(path, shift((0, 2.5 * number * float(np.tan(np.radians(degrees))), 0)))


def cut_file(paths: list[Path], keep: float) -> None:
    data = paths[3].read_bytes()
    paths[3].write_bytes(data[: int(len(data) * keep)])


def cut_compressed(paths: list[Path]) -> None:
    compress(paths, RLELossless)
    cut_file(paths, 0.95)


def second_series(paths: list[Path], **tags: object) -> None:
    """A second image of every place, in the same series, told apart by `tags`."""
    for number, path in enumerate(paths):
        target = path.with_name(f"second{number}")
        shutil.copy(path, target)
        edit(target, renew)
        edit(target, brighter)
        for keyword, value in tags.items():
            edit(target, put(keyword, value))
            edit(path, put(keyword, 1))


def nested(paths: list[Path]) -> None:
    """A sequence in a sequence, 400 deep, of undefined length."""
    dataset = pydicom.dcmread(paths[3])
    inner = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 2000
    outer = b"\xfe\xff\x0d\xe0\x00\x00\x00\x00\xfe\xff\xdd\xe0\x00\x00\x00\x00" * 2000
    paths[3].write_bytes(_until(paths[3], dataset) + inner + outer)


def _until(path: Path, dataset: Dataset) -> bytes:
    """The bytes of a file before element (0008,1140) would stand."""
    head = Dataset()
    head.file_meta = dataset.file_meta
    head.SOPClassUID, head.SOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    head.save_as(path, enforce_file_format=True)
    return path.read_bytes()


def mixed_matrix(paths: list[Path]) -> None:
    def change(dataset: Dataset) -> None:
        dataset.Rows += 1
        dataset.PixelData += b"\0\0" * dataset.Columns

    for path in paths[4:]:
        edit(path, change)


def object_of(paths: list[Path], sop_class: str) -> None:
    def change(dataset: Dataset) -> None:
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class

    for path in paths:
        edit(path, change)


def colour(dataset: Dataset) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0


def lookup(dataset: Dataset) -> None:
    dataset.ModalityLUTSequence = Sequence([Dataset()])


def fewer_bits(paths: list[Path]) -> None:
    compress(paths, JPEGLSLossless)
    edit(paths[3], lambda dataset: (put("BitsStored", 8)(dataset), put("HighBit", 7)(dataset)))


def unknown_syntax(paths: list[Path]) -> None:
    compress(paths, RLELossless)
    edit(paths[3], lambda dataset: setattr(dataset.file_meta, "TransferSyntaxUID", "1.2.840.10008.1.2.4.100"))


REFUSED: dict[str, tuple[str, Callable[[list[Path]], object]]] = {
    "missing middle slice": ("MISSING_SLICES", lambda paths: paths[3].unlink()),
    "two missing slices": ("MISSING_SLICES", lambda paths: [paths[3].unlink(), paths[4].unlink()]),
    "spacing 2.5 then 5": ("IRREGULAR_SPACING", second_half_wider),
    "one slice 0.4 mm off": ("IRREGULAR_SPACING", one(shift((0, 0, 0.4)))),
    "one slice 1 mm aside": ("IRREGULAR_SPACING", one(shift((1, 0, 0)))),
    "same place, other pixels, new UID": (
        "DUPLICATE_POSITION",
        partial(copy_of, change=lambda d: (renew(d), brighter(d))),
    ),
    "same UID, other pixels": ("DUPLICATE_POSITION", partial(copy_of, change=brighter)),
    "same UID, other place": ("DUPLICATE_POSITION", partial(copy_of, change=shift((0, 0, 0.5)))),
    "one slice without position": ("NO_POSITION", one(drop("ImagePositionPatient"))),
    "one slice without orientation": ("MIXED_ORIENTATION", one(drop("ImageOrientationPatient"))),
    "no orientation at all": ("NO_POSITION", each(drop("ImageOrientationPatient"))),
    "one oblique slice": ("MIXED_ORIENTATION", one(put("ImageOrientationPatient", [1, 0, 0, 0, 0.8, 0.6]))),
    "orientation not of unit length": ("BAD_ORIENTATION", each(put("ImageOrientationPatient", [1, 0, 0, 0, 2, 0]))),
    "orientation not at right angles": (
        "BAD_ORIENTATION",
        each(put("ImageOrientationPatient", [1, 0, 0, 0.6, 0.8, 0])),
    ),
    "two matrix sizes": ("MIXED_MATRIX", mixed_matrix),
    "two pixel spacings": ("MIXED_SPACING", one(put("PixelSpacing", [0.9, 0.71]))),
    "gantry tilt 15 degrees": ("GANTRY_TILT", partial(tilt, degrees=15)),
    "gantry tilt 0.5 degrees": ("GANTRY_TILT", partial(tilt, degrees=0.5)),
    "only ImagerPixelSpacing": (
        "NO_PIXEL_SPACING",
        each(lambda d: (drop("PixelSpacing")(d), put("ImagerPixelSpacing", [1, 1])(d))),
    ),
    "pixel spacing zero": ("NO_PIXEL_SPACING", each(put("PixelSpacing", [0, 1]))),
    "position of two numbers": ("UNREADABLE", one(put("ImagePositionPatient", [0, 1]))),
    "pixels cut short": ("TRUNCATED", one(lambda d: put("PixelData", d.PixelData[:-20])(d))),
    "file cut in its pixels": ("TRUNCATED", partial(cut_file, keep=0.95)),
    "compressed file cut": ("TRUNCATED", cut_compressed),
    "file cut in its header": ("UNREADABLE", partial(cut_file, keep=0.2)),
    "more pixels than declared": ("LENGTH_MISMATCH", each(lambda d: put("Rows", d.Rows - 1)(d))),
    "60000 x 60000 declared": ("OVERSIZED", each(lambda d: (put("Rows", 60000)(d), put("Columns", 60000)(d)))),
    "localizers only": ("LOCALIZER", each(put("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))),
    "palette colour": ("COLOUR", each(put("PhotometricInterpretation", "PALETTE COLOR"))),
    "two frames of reference": ("MIXED_FRAME_OF_REFERENCE", one(put("FrameOfReferenceUID", "1.2.3"))),
    "two time points": ("MIXED_SERIES", partial(second_series, TemporalPositionIdentifier=2)),
    "two echoes": ("MIXED_SERIES", partial(second_series, EchoNumbers=2)),
    "two of each, nothing tells": ("MIXED_SERIES", second_series),
    "colour": ("COLOUR", each(colour)),
    "multi-frame class": ("ENHANCED_MULTIFRAME", partial(object_of, sop_class=EnhancedCTImageStorage)),
    "several frames": ("ENHANCED_MULTIFRAME", each(put("NumberOfFrames", 2))),
    "mosaic": ("MOSAIC", each(put("ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]))),
    "secondary capture": ("UNSUPPORTED_CLASS", partial(object_of, sop_class=SecondaryCaptureImageStorage)),
    "no images": ("NOT_AN_IMAGE", partial(object_of, sop_class=EncapsulatedPDFStorage)),
    "no DICOM": (
        "NO_SERIES",
        lambda paths: [path.rename(path.with_suffix(".txt")).write_text("text") for path in paths],
    ),
    "text called .dcm beside": ("UNREADABLE", lambda paths: paths[0].with_name("x.dcm").write_text("text")),
    "last slice empty": ("UNREADABLE", lambda paths: paths[-1].write_bytes(b"")),
    "another class in the same series": ("UNREADABLE", lambda paths: object_of(paths[:1], EncapsulatedPDFStorage)),
    "empty folder": ("NO_SERIES", lambda paths: [path.unlink() for path in paths]),
    "two series": (
        "MULTIPLE_SERIES",
        lambda paths: [edit(path, put("SeriesInstanceUID", "1.2.3")) for path in paths[4:]],
    ),
    "lookup table": ("MODALITY_LUT", each(lookup)),
    "one slice without rescale": ("BAD_RESCALE", one(drop("RescaleSlope", "RescaleIntercept"))),
    "slope zero": ("BAD_RESCALE", one(put("RescaleSlope", 0))),
    "compressed with more bits than declared": ("CODESTREAM_MISMATCH", fewer_bits),
    "no decoder": ("NO_DECODER", unknown_syntax),
    "nested sequences": ("UNREADABLE", nested),
    "no bits declared": ("UNREADABLE", one(drop("BitsStored"))),
    "bits that do not fit": ("UNREADABLE", one(put("HighBit", 25))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hazards_are_refused_with_their_code(name: str, series: list[Path]) -> None:
    code, change = REFUSED[name]
    change(series)
    with pytest.raises(MedsegError) as caught:
        read_series(series[0].parent)
    assert caught.value.code == code, caught.value
    assert type(caught.value) in (ReadError, GeometryError)
    assert REFUSALS[code].advice in str(caught.value)
    assert not any(path.name in str(caught.value) for path in series)


def test_a_slice_that_does_not_fit_the_others_is_refused(series: list[Path]) -> None:
    edit(series[-1], put("ImageOrientationPatient", [1, 0, 0, 0, 0.8, 0.6]))
    assert parts(series[0].parent) == [(1, "MIXED_ORIENTATION", "SINGLE_SLICE"), (7, "MIXED_ORIENTATION", "")]


def test_every_code_has_a_case() -> None:
    # what is allowed and goes too far: test_dicom_regular; what PET values need: test_dicom_suv; a stray slice: above
    assert {code for code, _ in REFUSED.values()} == set(REFUSALS) - set(BEYOND) - {"SUV_INCOMPLETE", "SINGLE_SLICE"}


def test_every_code_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs/reference/reason-codes.md").read_text()
    assert [code for code in REFUSALS if f"`{code}`" not in text] == []


# ---- find and split -------------------------------------------------------------------------------------------------


def parts(folder: Path) -> list[tuple[int, str, str]]:
    found = find_series(folder)
    return sorted((len(entry.files), entry.part, entry.refusal.code if entry.refusal else "") for entry in found)


def test_time_points_are_split_and_each_is_read(series: list[Path]) -> None:
    second_series(series, TemporalPositionIdentifier=2)
    assert parts(series[0].parent) == [(8, "MIXED_SERIES", ""), (8, "MIXED_SERIES", "")]
    first, second = (read_series(entry) for entry in find_series(series[0].parent))
    np.testing.assert_array_equal(first.array + 1, second.array)
    with pytest.raises(GeometryError, match=r"2 parts.*what differs: TemporalPositionIdentifier"):
        read_series(series[0].parent)


def third_series(paths: list[Path], count: int, **tags: object) -> None:
    """Images of the first `count` places more, told apart by `tags`."""
    for number, path in enumerate(paths[:count]):
        target = path.with_name(f"third{number}")
        shutil.copy(path, target)
        edit(target, renew)
        for keyword, value in tags.items():
            edit(target, put(keyword, value))


@pytest.mark.parametrize("word", ["TemporalPositionIdentifier", "EchoTime", "AcquisitionNumber"])
@pytest.mark.parametrize("count", [7, 5, 1])
def test_an_incomplete_time_point_is_refused_and_the_others_are_read(series: list[Path], word: str, count: int) -> None:
    second_series(series, **{word: 2})
    third_series(series, count, **{word: 3})
    assert parts(series[0].parent) == [
        (count, "MIXED_SERIES", "SINGLE_SLICE" if count == 1 else "MISSING_SLICES"),
        (8, "MIXED_SERIES", ""),
        (8, "MIXED_SERIES", ""),
    ]


def test_acquisitions_that_overlap_are_split_and_each_is_read(series: list[Path]) -> None:
    for number, path in enumerate(series):
        target = path.with_name(f"second{number}")
        shutil.copy(path, target)
        edit(target, renew)
        edit(target, shift((0, 0, 10)))
        edit(target, put("AcquisitionNumber", 2))
    assert parts(series[0].parent) == [(8, "MIXED_SERIES", ""), (8, "MIXED_SERIES", "")]


def test_echoes_of_time_points_are_split(series: list[Path]) -> None:
    for number, path in enumerate(list(series)):
        for time, echo in ((1, 2), (2, 1), (2, 2)):
            target = path.with_name(f"more{number}{time}{echo}")
            shutil.copy(path, target)
            edit(target, renew)
            edit(target, put("TemporalPositionIdentifier", time))
            edit(target, put("EchoNumbers", echo))
            edit(target, put("ContentTime", f"12000{time}.{number}{echo}"))
        edit(path, put("TemporalPositionIdentifier", 1))
        edit(path, put("EchoNumbers", 1))
    assert parts(series[0].parent) == [(8, "MIXED_SERIES", "")] * 4
    assert len({entry.identity for entry in find_series(series[0].parent)}) == 4


def test_matrix_sizes_are_split(series: list[Path]) -> None:
    mixed_matrix(series)
    assert parts(series[0].parent) == [(4, "MIXED_MATRIX", ""), (4, "MIXED_MATRIX", "")]


def test_all_different_orientations_stay_one_refused_series(series: list[Path]) -> None:
    for number, path in enumerate(series):
        angle = 0.3 * number
        edit(path, put("ImageOrientationPatient", [1, 0, 0, 0, round(np.cos(angle), 9), round(np.sin(angle), 9)]))
    assert parts(series[0].parent) == [(8, "", "MIXED_ORIENTATION")]


def test_scan_walks_a_study_and_counts_the_rest(series: list[Path], tmp_path: Path) -> None:
    write_series(phantom(seed=1), tmp_path / "deep" / "er", modality="CT", seed=1)
    pdf = Path(shutil.copy(series[0], tmp_path / "pdf"))
    object_of([pdf], EncapsulatedPDFStorage)
    edit(pdf, put("SeriesInstanceUID", "1.2.3"))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").touch()
    (tmp_path / "damaged").write_bytes(bytes(128) + b"DICM" + b"\xff" * 40)
    found = scan(tmp_path)
    assert [len(entry.files) for entry in found.series] == [8, 8]
    assert (found.ignored, found.not_dicom, len(found.damaged)) == ({"Encapsulated PDF Storage": 1}, 2, 1)
    assert [entry.refusal for entry in found.series] == [None, None]
    shutil.copy(tmp_path / "damaged", series[0].parent)
    assert parts(tmp_path) == [(8, "", ""), (8, "", "UNREADABLE")]
    assert len(scan([tmp_path / "deep", tmp_path / "series", *series]).series) == 2


def test_what_a_mac_leaves_beside_the_slices_is_no_slice(tmp_path: Path) -> None:
    (first, *_) = write_series(phantom(), tmp_path, modality="CT")
    first.with_name(f"._{first.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + bytes(4000))
    assert parts(tmp_path) == [(8, "", "")]
    assert scan(tmp_path).not_dicom == 1


@pytest.mark.parametrize("name", ["IM0009", "1.2.840.9", "9"])
def test_an_empty_file_with_the_name_of_a_slice_is_a_lost_slice(tmp_path: Path, name: str) -> None:
    write_series(phantom(), tmp_path, modality="CT")
    (tmp_path / name).touch()
    assert parts(tmp_path) == [(8, "", "UNREADABLE")]


def test_nothing_identifying_is_shown(tmp_path: Path) -> None:
    write_series(phantom(), tmp_path, modality="CT", patient_id="CANARY", description="CANARY")
    (entry,) = find_series(tmp_path)
    volume = read_series(entry)
    assert entry.patient_id == "CANARY"
    shown = f"{entry} {entry.headers[0]} {volume.meta} {volume.notes} {scan(tmp_path)}"
    assert "CANARY" not in shown
    assert entry.uid not in shown
    assert str(tmp_path) not in shown


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ReadError) as caught:
        find_series(tmp_path / "absent")
    assert caught.value.code == "NOT_FOUND"


def test_the_budget_is_checked_before_anything_is_read(series: list[Path]) -> None:
    needed = 4 * int(np.prod(SHAPE))
    assert read_series(series, max_bytes=needed).shape == SHAPE
    with pytest.raises(ReadError) as caught:
        read_series(series, max_bytes=needed - 1)
    assert caught.value.code == "OVERSIZED"


def test_mutated_files_are_never_read_wrong(series: list[Path], rng: np.random.Generator) -> None:
    """Cut, changed and inserted bytes in the header of one slice (not in its pixels): truth, refusal or a note."""
    codes = set()
    for _ in range(120):
        path = series[rng.integers(len(series))]
        whole = path.read_bytes()
        at = int(rng.integers(132, len(whole) - 2 * SHAPE[0] * SHAPE[1] - 24))
        junk = rng.bytes(int(rng.integers(1, 12)))
        cut, changed, inserted = whole[:at], whole[:at] + junk + whole[at + len(junk) :], whole[:at] + junk + whole[at:]
        path.write_bytes((cut, changed, inserted)[rng.integers(3)])
        try:
            volume = read_series(series[0].parent)
        except MedsegError as error:
            codes.add(error.code)
        else:
            if "RESCALE_VARIES" not in volume.notes:
                assert_same(volume, phantom(), mm=0.06)
        path.write_bytes(whole)
    assert len(codes) > 3


# ---- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_hippocampus_series_are_read(data: Path) -> None:
    volumes = [read_series(entry) for entry in find_series(data / "hippocampus_dicom")]
    assert sorted(volume.shape for volume in volumes) == [(35, 51, 32), (36, 48, 35)]
    assert all(volume.notes == ("DERIVED",) and volume.axis_codes == "LPS" for volume in volumes)


@pytest.mark.data
@pytest.mark.parametrize(
    "name", ["generic/compressed_rle/001", "siemens/anatomical/001", "hitachi/anatomical/001", "philips/anatomical/001"]
)
def test_real_series_equal_their_reference(data: Path, name: str) -> None:
    import nibabel

    folder = data / "dicom_hard" / "dicom2nifti" / name
    image = nibabel.load(folder.with_name(folder.name + "_ground_truth.nii.gz"))
    truth = Volume(np.asarray(image.dataobj, dtype=np.float32)[None], image.affine)
    assert_same(read_series(folder), truth, mm=1e-3)
