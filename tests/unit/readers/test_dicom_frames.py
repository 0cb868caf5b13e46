"""Many frames in one file: read as the slices that they are, or refused; the oracle beside ours is highdicom."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    LegacyConvertedEnhancedMRImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    RLELossless,
    UltrasoundMultiFrameImageStorage,
)

from medseg.errors import MedsegError
from medseg.readers import dicom_frames
from medseg.readers.dicom_scan import find_series, scan
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume, align_to

SHAPE = (34, 33, 6)
AFFINE = np.array([[-0.7, 0, 0, 12.5], [0, -0.9, 0, -31.25], [0, 0, 2.5, 101.0], [0, 0, 0, 1.0]])
SAGITTAL = np.array([[0, 0, -2.5, 12.5], [-0.7, 0, 0, -31.25], [0, -0.9, 0, 101.0], [0, 0, 0, 1.0]])
Write = Callable[..., Path]


def phantom(seed: int = 0, affine: np.ndarray = AFFINE) -> Volume:
    values = np.random.default_rng(seed).permutation(np.prod(SHAPE)).reshape((1, *SHAPE)) - 300
    return Volume(values.astype(np.float32), affine)


def assert_same(volume: Volume, truth: Volume) -> None:
    aligned, back = align_to(volume, truth), align_to(truth, volume)
    assert aligned is not None
    assert back is not None
    np.testing.assert_array_equal(aligned.array, truth.array)
    np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], back.affine @ [0, 0, 0, 1], atol=1e-6)


def parts(folder: Path) -> list[tuple[int, str, str]]:
    found = find_series(folder)
    return [(len(entry.headers), entry.part, entry.refusal.code if entry.refusal else "") for entry in found]


def code_of(path: Path) -> str:
    with pytest.raises(MedsegError) as caught:
        read_series(path)
    assert path.name not in str(caught.value)
    return caught.value.code


ALIKE = ("PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence")
SYNTAXES = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "big endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "RLE": RLELossless,
    "JPEG 2000": JPEG2000Lossless,
}


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("shared", [(), ALIKE], ids=["per frame", "shared"])
def test_frames_in_any_order_are_read_exactly(
    write_enhanced: Write, tmp_path: Path, syntax: str, shared: tuple[str, ...]
) -> None:
    path = write_enhanced(tmp_path / "x.dcm", phantom(), syntax=SYNTAXES[syntax], shared=shared)
    volume = read_series(path)
    assert_same(volume, phantom())
    assert volume.notes == ()
    (entry,) = find_series(tmp_path)
    assert entry.files == (path,)
    assert len(entry.headers) == SHAPE[2]


@pytest.mark.parametrize("affine", [AFFINE, SAGITTAL], ids=["axial", "sagittal"])
def test_highdicom_sees_the_same(write_enhanced: Write, tmp_path: Path, affine: np.ndarray) -> None:
    path = write_enhanced(tmp_path / "x.dcm", phantom(1, affine))
    theirs = highdicom.imread(path).get_volume(apply_real_world_transform=False)
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ theirs.affine
    assert_same(read_series(path), Volume(theirs.array[None].astype(np.float32), to_ras))


def test_each_frame_has_its_own_scale(write_enhanced: Write, tmp_path: Path) -> None:
    truth = phantom()
    truth = truth.with_array(truth.array * 2)

    def rescale(k: int) -> tuple[float, float]:
        return (0.5, 10.0) if k % 2 else (2.0, 0.0)

    path = write_enhanced(tmp_path / "x.dcm", truth, tags=[{"rescale": rescale}])
    assert_same(read_series(path), truth)


SPLITS: dict[str, tuple[dict[str, Any], ...]] = {
    "time points": ({"time": 1}, {"time": 2}, {"time": 3}),
    "echoes": ({"echo": 2.5}, {"echo": 5.0}),
    "b-values": ({"b": 0.0}, {"b": 800.0}),
    "magnitude and phase": ({"type": "M"}, {"type": "P"}),
    "a private dimension": ({"dimension": 1}, {"dimension": 2}),
    "echoes of time points": tuple({"time": t, "echo": e} for t in (1, 2) for e in (3.0, 6.0, 9.0)),
    "times, echoes and kinds": tuple(
        {"time": t, "echo": e, "type": c} for t in (1, 2) for e in (3.0, 6.0) for c in ("M", "P")
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_images_of_one_place_are_split_and_each_is_read(write_enhanced: Write, tmp_path: Path, name: str) -> None:
    truths = [phantom(number) for number in range(len(SPLITS[name]))]
    path = write_enhanced(tmp_path / "x.dcm", *truths, tags=SPLITS[name])
    assert parts(tmp_path) == [(SHAPE[2], "MIXED_SERIES", "")] * len(truths)
    found = [read_series(entry) for entry in find_series(tmp_path)]
    for truth in truths:
        assert sum(np.array_equal(volume.array, truth.array) for volume in found) == 1
    assert all(entry.files == (path,) for entry in find_series(tmp_path))
    assert code_of(path) == "MIXED_SERIES"


def test_stacks_are_parts(write_enhanced: Write, tmp_path: Path) -> None:
    lower = phantom(2, AFFINE + np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, -40.0], [0, 0, 0, 0]]))
    volumes = (phantom(), phantom(1, SAGITTAL), lower)
    write_enhanced(tmp_path / "x.dcm", *volumes, tags=[{"stack": "A"}, {"stack": "B"}, {"stack": "C"}])
    assert [row[0::2] for row in parts(tmp_path)] == [(6, "")] * 3
    found = [read_series(entry) for entry in find_series(tmp_path)]
    for truth in volumes:
        assert sum(volume_equals(volume, truth) for volume in found) == 1


def volume_equals(volume: Volume, truth: Volume) -> bool:
    aligned = align_to(volume, truth)
    return aligned is not None and np.array_equal(aligned.array, truth.array)


def test_a_file_per_time_point_without_any_number(write_enhanced: Write, tmp_path: Path) -> None:
    for number in range(3):
        path = write_enhanced(tmp_path / f"{number}.dcm", phantom(number))
        dataset = pydicom.dcmread(path)
        dataset.SeriesInstanceUID = "1.2.3.4"
        dataset.save_as(path)
    assert parts(tmp_path) == [(6, "MIXED_SERIES", "")] * 3
    assert [len(entry.files) for entry in find_series(tmp_path)] == [1, 1, 1]


def test_the_same_file_twice_counts_once(write_enhanced: Write, tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "x.dcm", phantom())
    shutil.copy(path, tmp_path / "y.dcm")
    volume = read_series(tmp_path)
    assert_same(volume, phantom())
    assert volume.notes == ("DUPLICATES_DROPPED",)
    dataset = pydicom.dcmread(tmp_path / "y.dcm")
    dataset.PixelData = bytes(2) + dataset.PixelData[2:]
    dataset.save_as(tmp_path / "y.dcm")
    assert code_of(tmp_path) == "DUPLICATE_POSITION"


def frame(dataset: Dataset, number: int) -> Dataset:
    return dataset.PerFrameFunctionalGroupsSequence[number]


def remove_middle(dataset: Dataset) -> None:
    del dataset.PerFrameFunctionalGroupsSequence[2]
    dataset.NumberOfFrames -= 1
    size = len(dataset.PixelData) // SHAPE[2]
    dataset.PixelData = dataset.PixelData[: 2 * size] + dataset.PixelData[3 * size :]


def nudge(dataset: Dataset) -> None:
    frame(dataset, 3).PlanePositionSequence[0].ImagePositionPatient[2] += 0.5


def huge(dataset: Dataset) -> None:
    dataset.Rows = dataset.Columns = 60000


REFUSED: dict[str, tuple[str, Callable[[Dataset], object]]] = {
    "a frame without position": ("NO_POSITION", lambda d: delattr(frame(d, 2), "PlanePositionSequence")),
    "only the file has a position": (
        "NO_POSITION",
        lambda d: [
            setattr(d, "ImagePositionPatient", [0, 0, 0]),
            *(delattr(frame(d, n), "PlanePositionSequence") for n in range(SHAPE[2])),
        ],
    ),
    "a frame without orientation": (
        "MIXED_ORIENTATION",
        lambda d: delattr(frame(d, 2), "PlaneOrientationSequence"),
    ),
    "no pixel spacing": (
        "NO_PIXEL_SPACING",
        lambda d: [delattr(frame(d, n), "PixelMeasuresSequence") for n in range(SHAPE[2])],
    ),
    "no functional groups": ("ENHANCED_MULTIFRAME", lambda d: delattr(d, "PerFrameFunctionalGroupsSequence")),
    "another class of frames": (
        "ENHANCED_MULTIFRAME",
        lambda d: (
            setattr(d, "SOPClassUID", UltrasoundMultiFrameImageStorage)
            or setattr(d.file_meta, "MediaStorageSOPClassUID", UltrasoundMultiFrameImageStorage)
        ),
    ),
    "more frames declared than described": ("UNREADABLE", lambda d: setattr(d, "NumberOfFrames", 7)),
    "a billion frames declared": ("UNREADABLE", lambda d: setattr(d, "NumberOfFrames", 10**9)),
    "fewer pixels than frames": ("TRUNCATED", lambda d: setattr(d, "PixelData", d.PixelData[:-40])),
    "more pixels than frames": ("LENGTH_MISMATCH", lambda d: setattr(d, "PixelData", d.PixelData + bytes(40))),
    "no pixels": ("TRUNCATED", lambda d: delattr(d, "PixelData")),
    "a frame is missing": ("MISSING_SLICES", remove_middle),
    "a frame off its place": ("IRREGULAR_SPACING", nudge),
    "60000 x 60000 declared": ("OVERSIZED", huge),
    "one frame without scale": ("BAD_RESCALE", lambda d: delattr(frame(d, 1), "PixelValueTransformationSequence")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_whole_is_refused(write_enhanced: Write, tmp_path: Path, name: str) -> None:
    code, change = REFUSED[name]
    path = write_enhanced(tmp_path / "x.dcm", phantom(), seed=None, change=change)
    assert code_of(path) == code


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless])
def test_a_file_that_is_cut_short_is_refused(write_enhanced: Write, tmp_path: Path, syntax: str) -> None:
    path = write_enhanced(tmp_path / "x.dcm", phantom(), syntax=syntax)
    content = path.read_bytes()
    for keep in (0.1, 0.5, 0.8, 0.95):
        path.write_bytes(content[: int(len(content) * keep)])
        assert code_of(path) in ("TRUNCATED", "UNREADABLE", "ENHANCED_MULTIFRAME", "NO_SERIES")


@pytest.mark.parametrize(
    ("sop_class", "read"),
    [
        (LegacyConvertedEnhancedMRImageStorage, True),
        (EnhancedCTImageStorage, True),
        (MultiFrameGrayscaleWordSecondaryCaptureImageStorage, True),
        ("1.3.46.670589.11.0.0.12.2", True),
        (UltrasoundMultiFrameImageStorage, False),
    ],
)
def test_which_classes_are_read(write_enhanced: Write, tmp_path: Path, sop_class: str, read: bool) -> None:
    path = write_enhanced(tmp_path / "x.dcm", phantom(), sop_class=sop_class)
    assert parts(tmp_path) == [(6 if read else 1, "", "" if read else "ENHANCED_MULTIFRAME")]
    if read:
        assert_same(read_series(path), phantom())


def test_a_file_is_opened_once_for_all_its_frames(
    write_enhanced: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_enhanced(tmp_path / "x.dcm", phantom(), phantom(1), tags=[{"time": 1}, {"time": 2}])
    entries = find_series(tmp_path)
    opened = []
    original = dicom_frames.pydicom.dcmread

    def counted(*given: Any, **how: Any) -> Dataset:
        opened.append(given)
        return original(*given, **how)

    monkeypatch.setattr(dicom_frames.pydicom, "dcmread", counted)
    read_series(entries[0])
    assert len(opened) == 1


def test_nothing_identifying_is_shown(write_enhanced: Write, tmp_path: Path) -> None:
    write_enhanced(tmp_path / "x.dcm", phantom(), PatientID="CANARY", PatientName="CANARY")
    (entry,) = find_series(tmp_path)
    shown = f"{entry} {entry.headers[0]} {scan(tmp_path)} {read_series(entry).meta}"
    assert "CANARY" not in shown
    assert entry.uid not in shown
    assert str(tmp_path) not in shown


@pytest.mark.parametrize("seed", range(8))
def test_damaged_groups_are_never_read_wrong(write_enhanced: Write, tmp_path: Path, seed: int) -> None:
    path = write_enhanced(tmp_path / "x.dcm", phantom())
    rng, whole = np.random.default_rng(seed), path.read_bytes()
    end = len(whole) - 2 * int(np.prod(SHAPE)) - 12
    for _ in range(25):
        at, junk = int(rng.integers(132, end)), rng.bytes(int(rng.integers(1, 8)))
        path.write_bytes(whole[:at] + junk + whole[at + len(junk) :])
        try:
            volume = read_series(path)
        except MedsegError:
            continue
        assert volume.shape == SHAPE or len(volume.notes) > 0
