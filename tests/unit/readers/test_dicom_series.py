"""What the matrix of hazards (test_hazards) leaves out: kinds of object, finding and splitting, real series."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    EncapsulatedPDFStorage,
    EnhancedCTImageStorage,
    JPEGLSLossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from medseg.errors import GeometryError, MedsegError, ReadError
from medseg.phantom.damage import (
    Damage,
    compressed,
    drop,
    each,
    edit,
    of_class,
    one,
    put,
    removed,
    second_time,
    shift,
    then,
)
from medseg.phantom.dicom import write_series
from medseg.phantom.hazards import AXIAL, READ, REFUSE, SHAPE, phantom
from medseg.readers.allowances import BEYOND
from medseg.readers.dicom_refusals import REFUSALS
from medseg.readers.dicom_scan import find_series, scan
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume, align_to, grid_distance


def renew(dataset: Dataset) -> None:
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()


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


@pytest.mark.parametrize("name", [name for name, hazard in READ.items() if hazard.shuffle])
def test_geometry_agrees_with_simpleitk(name: str, tmp_path: Path) -> None:
    READ[name].write(tmp_path)
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    image = SimpleITK.ReadImage(names)
    direction = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction, image.GetOrigin()
    other = Volume(SimpleITK.GetArrayFromImage(image).T[None].astype(np.float32), np.diag([-1, -1, 1, 1]) @ affine)
    # rows of SimpleITK's own normal may run the other way, its voxels must not lie elsewhere
    assert_same(read_series(tmp_path), other, mm=1e-4)


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
        edit(series[0], put(**{keyword: value}))
    volume = read_series(series[0].parent)
    truth = phantom().array[:, :, :, :1]
    np.testing.assert_array_equal(volume.array, truth)
    expected = AXIAL.copy()
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


# ---- refuse with a code ---------------------------------------------------------------------------------------------


def colour(dataset: Dataset) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0


def lookup(dataset: Dataset) -> None:
    dataset.ModalityLUTSequence = Sequence([Dataset()])


REFUSED: dict[str, tuple[str, Damage]] = {
    "pixel spacing zero": ("NO_PIXEL_SPACING", each(put(PixelSpacing=[0, 1]))),
    "position of two numbers": ("UNREADABLE", one(put(ImagePositionPatient=[0, 1]))),
    "localizers only": ("LOCALIZER", each(put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))),
    "palette colour": ("COLOUR", each(put(PhotometricInterpretation="PALETTE COLOR"))),
    "colour": ("COLOUR", each(colour)),
    "multi-frame class": ("ENHANCED_MULTIFRAME", of_class(EnhancedCTImageStorage)),
    "several frames": ("ENHANCED_MULTIFRAME", each(put(NumberOfFrames=2))),
    "mosaic": ("MOSAIC", each(put(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]))),
    "secondary capture": ("UNSUPPORTED_CLASS", of_class(SecondaryCaptureImageStorage)),
    "no images": ("NOT_AN_IMAGE", of_class(EncapsulatedPDFStorage)),
    "no DICOM": (
        "NO_SERIES",
        lambda paths: [path.rename(path.with_suffix(".txt")).write_text("text") for path in paths],
    ),
    "text called .dcm beside": ("UNREADABLE", lambda paths: paths[0].with_name("x.dcm").write_text("text")),
    "another class in the same series": ("UNREADABLE", lambda paths: of_class(EncapsulatedPDFStorage)(paths[:1])),
    "empty folder": ("NO_SERIES", removed(*range(8))),
    "two series": (
        "MULTIPLE_SERIES",
        lambda paths: each(put(SeriesInstanceUID="1.2.3"))(paths[4:]),
    ),
    "lookup table": ("MODALITY_LUT", each(lookup)),
    "compressed with more bits than declared": (
        "CODESTREAM_MISMATCH",
        then(compressed(JPEGLSLossless), one(put(BitsStored=8, HighBit=7))),
    ),
    "no bits declared": ("UNREADABLE", one(drop("BitsStored"))),
    "bits that do not fit": ("UNREADABLE", one(put(HighBit=25))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_code(name: str, series: list[Path]) -> None:
    code, change = REFUSED[name]
    change(series)
    with pytest.raises(MedsegError) as caught:
        read_series(series[0].parent)
    assert caught.value.code == code, caught.value
    assert type(caught.value) in (ReadError, GeometryError)
    assert REFUSALS[code].advice in str(caught.value)
    assert not any(path.name in str(caught.value) for path in series)


def test_a_slice_that_does_not_fit_the_others_is_refused(series: list[Path]) -> None:
    edit(series[-1], put(ImageOrientationPatient=[1, 0, 0, 0, 0.8, 0.6]))
    assert parts(series[0].parent) == [(1, "MIXED_ORIENTATION", "SINGLE_SLICE"), (7, "MIXED_ORIENTATION", "")]


def test_every_code_has_a_case() -> None:
    # here, in the matrix (test_hazards; two matrix sizes are split there), or elsewhere:
    # what is allowed and goes too far: test_dicom_regular; what PET values need: test_dicom_suv; a stray slice: above
    there = {code for code, _ in REFUSED.values()} | {hazard.outcome for hazard in REFUSE.values()}
    assert there | {"MIXED_MATRIX"} == set(REFUSALS) - set(BEYOND) - {"SUV_INCOMPLETE", "SINGLE_SLICE"}


def test_every_code_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs/reference/reason-codes.md").read_text()
    assert [code for code in REFUSALS if f"`{code}`" not in text] == []


# ---- find and split -------------------------------------------------------------------------------------------------


def parts(folder: Path) -> list[tuple[int, str, str]]:
    found = find_series(folder)
    return sorted((len(entry.files), entry.part, entry.refusal.code if entry.refusal else "") for entry in found)


def third_series(paths: list[Path], count: int, **tags: object) -> None:
    """Images of the first `count` places more, told apart by `tags`."""
    for number, path in enumerate(paths[:count]):
        target = path.with_name(f"third{number}")
        shutil.copy(path, target)
        edit(target, renew)
        for keyword, value in tags.items():
            edit(target, put(**{keyword: value}))


@pytest.mark.parametrize("word", ["TemporalPositionIdentifier", "EchoTime", "AcquisitionNumber"])
@pytest.mark.parametrize("count", [7, 5, 1])
def test_an_incomplete_time_point_is_refused_and_the_others_are_read(series: list[Path], word: str, count: int) -> None:
    second_time(**{word: 2})(series)
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
        edit(target, shift(0, 0, 10))
        edit(target, put(AcquisitionNumber=2))
    assert parts(series[0].parent) == [(8, "MIXED_SERIES", ""), (8, "MIXED_SERIES", "")]


def test_echoes_of_time_points_are_split(series: list[Path]) -> None:
    for number, path in enumerate(list(series)):
        for time, echo in ((1, 2), (2, 1), (2, 2)):
            target = path.with_name(f"more{number}{time}{echo}")
            shutil.copy(path, target)
            edit(target, renew)
            edit(target, put(TemporalPositionIdentifier=time))
            edit(target, put(EchoNumbers=echo))
            edit(target, put(ContentTime=f"12000{time}.{number}{echo}"))
        edit(path, put(TemporalPositionIdentifier=1))
        edit(path, put(EchoNumbers=1))
    assert parts(series[0].parent) == [(8, "MIXED_SERIES", "")] * 4
    assert len({entry.identity for entry in find_series(series[0].parent)}) == 4


def test_all_different_orientations_stay_one_refused_series(series: list[Path]) -> None:
    for number, path in enumerate(series):
        angle = 0.3 * number
        edit(path, put(ImageOrientationPatient=[1, 0, 0, 0, round(np.cos(angle), 9), round(np.sin(angle), 9)]))
    assert parts(series[0].parent) == [(8, "", "MIXED_ORIENTATION")]


def test_scan_walks_a_study_and_counts_the_rest(series: list[Path], tmp_path: Path) -> None:
    write_series(phantom(seed=1), tmp_path / "deep" / "er", modality="CT", seed=1)
    pdf = Path(shutil.copy(series[0], tmp_path / "pdf"))
    of_class(EncapsulatedPDFStorage)([pdf])
    edit(pdf, put(SeriesInstanceUID="1.2.3"))
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


def test_a_number_with_an_underscore_is_none(series: list[Path]) -> None:
    """Python's float reads "0_9" as nine; DICOM's decimal strings know no underscores (PS3.5 table 6.2-1)."""
    for path in series:
        data = path.read_bytes()
        at = data.index(b"\x28\x00\x30\x00DS") + 8
        length = int.from_bytes(data[at - 2 : at], "little")
        value = data[at : at + length]
        path.write_bytes(data[:at] + value.replace(b".", b"_") + data[at + length :])
    with pytest.raises(ReadError, match="PixelSpacing"):
        read_series(series[0].parent)
