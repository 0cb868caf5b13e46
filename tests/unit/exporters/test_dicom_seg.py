"""Masks as DICOM Segmentation: seen by pydicom alone, by highdicom, and by the check that stands before "done"."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.pixels import pixel_array

from medseg.errors import ExportError
from medseg.exporters import dicom_seg
from medseg.exporters.dicom_seg import write_fractional, write_labelmap, write_seg
from medseg.exporters.dicom_sr import write_sr
from medseg.volume import Volume

Build = Callable[..., Any]


KINDS: dict[str, Callable[..., Any]] = {"seg": write_seg, "labelmap": write_labelmap, "fractional": write_fractional}


def written(folder: Path, result: Any) -> pydicom.Dataset:
    write_seg(folder / "x.seg.dcm", result)
    return pydicom.dcmread(folder / "x.seg.dcm")


def points(dataset: pydicom.Dataset) -> dict[int, set[tuple[float, ...]]]:
    """Segment -> the places (LPS, 0.01 mm) of its voxels, from the attributes of DICOM and nothing else."""
    found: dict[int, set[tuple[float, ...]]] = {s.SegmentNumber: set() for s in dataset.SegmentSequence}
    shared = dataset.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    for frame, item in zip(pixel_array(dataset), dataset.PerFrameFunctionalGroupsSequence, strict=True):
        start = np.array(item.PlanePositionSequence[0].ImagePositionPatient, float)
        number = item.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        for row, column in np.argwhere(frame):
            place = start + cosines[:3] * between_columns * column + cosines[3:] * between_rows * row
            found[number].add(rounded(place))
    return found


def rounded(place: Any) -> tuple[float, ...]:
    return tuple(float(x) + 0.0 for x in np.round(place, 2))


def expected(mask: Volume, value: int) -> set[tuple[float, ...]]:
    index = np.argwhere(mask.array[0] == value)
    places = (index @ mask.affine[:3, :3].T + mask.affine[:3, 3]) * [-1, -1, 1]
    return {rounded(place) for place in places}


def test_every_voxel_lies_where_it_was(dicom_result: Build, dicom_grid: str, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", dicom_grid)
    found = points(written(tmp_path, result))
    for number, value in enumerate(result.spec.foreground.values(), start=1):
        assert found[number] == expected(result.mask, value)
    assert [len(found[n]) for n in (1, 2, 3, 4)] == [int((result.mask.array == v).sum()) for v in (1, 7, 3, 4)]
    # And through highdicom:
    volume = highdicom.seg.segread(tmp_path / "x.seg.dcm").get_volume(combine_segments=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    ours = np.argwhere(volume.array == 1) @ lps[:3, :3].T + lps[:3, 3]
    theirs = np.argwhere(result.mask.array[0] == 1) @ result.mask.affine[:3, :3].T + result.mask.affine[:3, 3]
    assert {rounded(p) for p in ours} == {rounded(p) for p in theirs}
    assert volume.array.shape[0] == result.mask.shape[2], "no frame is left out"


def test_a_labelmap_has_one_number_a_voxel(dicom_result: Build, dicom_grid: str, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", dicom_grid)
    assert write_labelmap(tmp_path / "x.dcm", result) == ("PRIVATE_CODE",)
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    assert (dataset.SegmentationType, dataset.NumberOfFrames, dataset.BitsAllocated) == ("LABELMAP", 9, 8)
    assert not dataset.file_meta.TransferSyntaxUID.is_compressed, "DCMTK cannot read another"
    places = positions(dataset)
    for number, value in enumerate(result.spec.foreground.values(), start=1):
        marked = {rounded(p) for p in places[pixel_array(dataset) == number]}
        assert marked == expected(result.mask, value)
    volume = highdicom.seg.segread(tmp_path / "x.dcm").get_volume(combine_segments=True)
    assert [int((volume.array == n).sum()) for n in (1, 2, 3, 4)] == [
        int((result.mask.array == v).sum()) for v in (1, 7, 3, 4)
    ]


def test_probabilities_lie_where_they_were(dicom_result: Build, dicom_grid: str, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in", dicom_grid)
    write_fractional(tmp_path / "x.dcm", result)
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    assert (dataset.SegmentationType, dataset.SegmentationFractionalType) == ("FRACTIONAL", "PROBABILITY")
    assert dataset.NumberOfFrames == 4 * 9
    grid = result.mask
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1).reshape(-1, 3)
    place = ((index @ grid.affine[:3, :3].T + grid.affine[:3, 3]) * [-1, -1, 1]).reshape(*grid.shape, 3)
    numbers = [g.SegmentIdentificationSequence[0].ReferencedSegmentNumber for g in groups(dataset)]
    for number, where, frame in zip(numbers, positions(dataset), pixel_array(dataset), strict=True):
        k = int(np.argmin(np.linalg.norm(place[0, 0] - where[0, 0], axis=-1)))
        assert np.abs(place[:, :, k].transpose(1, 0, 2) - where).max() < 1e-3
        given = result.probabilities.array[number - 1, :, :, k].T
        assert np.abs(frame / 255 - given).max() <= 0.5 / 255 + 1e-6
    theirs = highdicom.seg.segread(tmp_path / "x.dcm").get_volume(rescale_fractional=True)
    order = np.argsort([np.linalg.norm(place[0, 0] - p, axis=-1).argmin() for p in slices_of(theirs)])
    soft = theirs.array[order].transpose(3, 2, 1, 0)
    assert np.abs(soft - result.probabilities.array).max() <= 0.5 / 255 + 1e-6


def test_probabilities_in_steps_make_the_very_file(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    soft = result.probabilities
    steps = soft.with_array(np.rint(soft.array * np.float32(255)).astype(np.uint8))
    write_fractional(tmp_path / "x.dcm", result)
    write_fractional(tmp_path / "y.dcm", replace(result, probabilities=steps))
    assert (tmp_path / "x.dcm").read_bytes() == (tmp_path / "y.dcm").read_bytes()


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 3, 3, 3)])
def test_pixels_are_read_in_any_pieces(shape: tuple[int, ...]) -> None:
    soft = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    order = [(segment, k) for segment in range(shape[0]) for k in reversed(range(shape[3]))]
    wanted = b"".join(soft[segment, :, :, k].T.tobytes() for segment, k in order)
    wanted += b"\0" * (len(wanted) % 2)
    frames = dicom_seg.Frames(soft, order)
    assert frames.seek(0, io.SEEK_END) == len(wanted)
    assert (frames.read(), frames.seek(0)) == (b"", 0)
    assert b"".join(iter(lambda: frames.read(7), b"")) == wanted
    assert (frames.seek(5), frames.read()) == (5, wanted[5:])


def slices_of(volume: Any) -> Any:
    """Where the first pixel of each slice of highdicom's volume lies: it may number them the other way round."""
    return np.arange(volume.array.shape[0])[:, None] * volume.affine[:3, 0] + volume.affine[:3, 3]


def test_regions_keep_their_own_probabilities(dicom_result: Build, tmp_path: Path) -> None:
    regions = {
        "whole": {"labels": ["liver", "lesion"], "paint": "liver"},
        "core": {"labels": ["lesion"], "paint": "lesion"},
    }
    result = dicom_result(tmp_path / "in", regions=regions)
    assert result.probabilities.array.shape[0] == 2
    write_fractional(tmp_path / "x.dcm", result)
    whole, core = pydicom.dcmread(tmp_path / "x.dcm").SegmentSequence
    assert (whole.SegmentLabel, code(whole)[::2]) == ("whole", ("99MEDSEG", "99MEDSEG"))
    assert (core.SegmentLabel, code(core)[3]) == ("core", "52988006"), "a region of one label is that label"
    write_seg(tmp_path / "y.dcm", result)
    assert len(pydicom.dcmread(tmp_path / "y.dcm").SegmentSequence) == 4, "what is painted are labels"


def test_kinds_are_objects_of_their_own(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    uids, tracked = [], []
    for name, write in KINDS.items():
        for copy in "ab":
            write(tmp_path / f"{name}-{copy}.dcm", result)
        assert (tmp_path / f"{name}-a.dcm").read_bytes() == (tmp_path / f"{name}-b.dcm").read_bytes()
        dataset = pydicom.dcmread(tmp_path / f"{name}-a.dcm")
        uids += [dataset.SOPInstanceUID, dataset.SeriesInstanceUID]
        tracked.append([s.TrackingUID for s in dataset.SegmentSequence if s.SegmentNumber])
        write(tmp_path / "other.dcm", replace(result, model="beef" * 16))
        other = pydicom.dcmread(tmp_path / "other.dcm")
        assert (other.SOPInstanceUID, other.SeriesInstanceUID) not in (uids, uids[::-1])
        uids += [other.SOPInstanceUID, other.SeriesInstanceUID]
    assert len(set(uids)) == len(uids)
    assert tracked[0] == tracked[1] == tracked[2], "one liver in all of them"


def test_more_than_one_object_can_hold(dicom_result: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = dicom_result(tmp_path / "in")
    monkeypatch.setattr(dicom_seg, "MAX_PIXEL_BYTES", 4 * 21 * 26 * 9 - 1)
    with pytest.raises(ExportError, match="seg-labelmap") as caught:
        write_fractional(tmp_path / "x.seg.dcm", result)
    assert caught.value.code == "OBJECT_TOO_LARGE"
    assert write_seg(tmp_path / "x.seg.dcm", result)


def groups(dataset: pydicom.Dataset) -> Any:
    return dataset.PerFrameFunctionalGroupsSequence


def positions(dataset: pydicom.Dataset) -> Any:
    """(frames, rows, columns, 3): where each pixel lies, mm in LPS, from the attributes of DICOM."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    down, across = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    rows, columns = np.mgrid[: dataset.Rows, : dataset.Columns][..., None]
    plane = columns * across * cosines[:3] + rows * down * cosines[3:]
    starts = [g.PlanePositionSequence[0].ImagePositionPatient for g in groups(dataset)]
    return np.array(starts, float)[:, None, None] + plane


def test_same_series_and_model_give_the_same_bytes(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    for name in "ab":
        write_seg(tmp_path / f"{name}.seg.dcm", result)
    assert (tmp_path / "a.seg.dcm").read_bytes() == (tmp_path / "b.seg.dcm").read_bytes()


def test_another_model_makes_another_object_of_another_series(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    one, other = written(tmp_path, result), written(tmp_path, replace(result, model="beef" * 16))
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert one[keyword].value != other[keyword].value
    assert one.SegmentSequence[0].TrackingUID != other.SegmentSequence[0].TrackingUID
    source = pydicom.dcmread(result.series.files[0])
    assert one.StudyInstanceUID == other.StudyInstanceUID == source.StudyInstanceUID
    assert one.FrameOfReferenceUID == source.FrameOfReferenceUID


def test_it_says_what_it_is(dicom_result: Build, tmp_path: Path) -> None:
    dataset = written(tmp_path, dicom_result(tmp_path / "in", StudyDate="20010203", AccessionNumber="A7"))
    assert "RESEARCH USE" in dataset.SeriesDescription
    assert dataset.ContentLabel == "RESEARCH_USE"
    assert dataset.AccessionNumber == "A7"
    assert (dataset.Manufacturer, dataset.SegmentationType) == ("medseg", "BINARY")
    liver, thing, lesion, absent = dataset.SegmentSequence
    assert [s.SegmentLabel for s in dataset.SegmentSequence] == ["liver", "thing_b", "lesion", "absent"]
    assert code(liver) == ("SCT", "91723000", "SCT", "10200004")
    assert code(lesion) == ("SCT", "49755003", "SCT", "52988006")
    assert code(thing)[::2] == ("99MEDSEG", "99MEDSEG")
    assert thing.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "thing_b"
    assert code(absent)[3] == "78961009"
    for segment in dataset.SegmentSequence:
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert algorithm.AlgorithmName == "medseg"
        assert "5eed" * 16 in algorithm.AlgorithmParameters
    assert len({s.TrackingUID for s in dataset.SegmentSequence}) == 4
    # #b5523b is L* 46.9, a* 39.0, b* 33.6 (D50), scaled to 16 bits as PS3.3 C.10.7.1.1 says
    lightness, a, b = liver.RecommendedDisplayCIELabValue
    assert lightness / 65535 * 100 == pytest.approx(46.9, abs=1.5)
    assert a / 65535 * 255 - 128 == pytest.approx(39, abs=3)
    assert b / 65535 * 255 - 128 == pytest.approx(33.6, abs=3)
    assert "RecommendedDisplayCIELabValue" not in thing


def code(segment: pydicom.Dataset) -> tuple[str, ...]:
    rows = (segment.SegmentedPropertyCategoryCodeSequence[0], segment.SegmentedPropertyTypeCodeSequence[0])
    return tuple(str(text) for row in rows for text in (row.CodingSchemeDesignator, row.CodeValue))


def test_labels_without_code_are_noted(dicom_result: Build, tmp_path: Path) -> None:
    coded = {"liver": {"value": 1, "snomed": {"value": "10200004", "meaning": "Liver"}}}
    result = dicom_result(tmp_path / "in")
    assert write_seg(tmp_path / "x.seg.dcm", result) == ("PRIVATE_CODE",)
    result = dicom_result(tmp_path / "in", labels={**coded, "b": {**coded["liver"], "value": 7}, "c": 3})
    assert write_seg(tmp_path / "x.seg.dcm", result) == ("PRIVATE_CODE",)
    only = replace(result, mask=result.mask.with_array((result.mask.array == 1).astype(np.uint8)))
    only = replace(only, spec=result.spec.model_copy(update={"labels": {"liver": result.spec.labels["liver"]}}))
    assert write_seg(tmp_path / "x.seg.dcm", only) == ()


@pytest.mark.parametrize(
    ("charset", "name"),
    [("ISO_IR 100", "Müller^Änne"), ("ISO_IR 192", "山田^太郎"), (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎")],
)
def test_names_in_any_alphabet(dicom_result: Build, tmp_path: Path, charset: Any, name: str) -> None:
    labels = {"Körper": {"value": 1}, "b": 7, "c": 3}
    result = dicom_result(tmp_path / "in", labels=labels, SpecificCharacterSet=charset, PatientName=name)
    dataset = written(tmp_path, result)
    assert str(dataset.PatientName) == name
    assert dataset.SegmentSequence[0].SegmentLabel == "Körper"


@pytest.mark.filterwarnings("error")
def test_bad_names_are_not_told_to_anybody(
    dicom_result: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    result = dicom_result(tmp_path / "in", PatientName="CANARY NAME", PatientID="CANARY-ID", PatientSex="O")
    dataset = written(tmp_path, result)
    assert dataset.PatientName == "CANARY NAME"
    printed = capfd.readouterr()
    assert "CANARY" not in printed.out + printed.err + caplog.text


def test_an_empty_mask_is_an_object_too(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    result = replace(result, mask=result.mask.with_array(np.zeros_like(result.mask.array)))
    dataset = written(tmp_path, result)
    assert dataset.NumberOfFrames == 4 * 9
    assert not pixel_array(dataset).any()


@pytest.mark.parametrize(
    "missing", ["SliceThickness", "FrameOfReferenceUID", "StudyID", "PatientName", "AccessionNumber", "SeriesDate"]
)
def test_poor_sources(dicom_result: Build, tmp_path: Path, missing: str) -> None:
    result = dicom_result(tmp_path / "in")
    for file in result.series.files:
        dataset = pydicom.dcmread(file)
        del dataset[missing]
        dataset.save_as(file)
    dataset = written(tmp_path, result)
    assert dataset.FrameOfReferenceUID
    assert dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == 2.5
    assert dataset.ContentDate == ("19000101" if missing == "SeriesDate" else "20000101")


def test_slices_that_jitter_within_what_the_reader_allows(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    rng = np.random.default_rng(1)
    for file in result.series.files:
        dataset = pydicom.dcmread(file)
        dataset.ImageOrientationPatient = [
            float(x) + rng.uniform(-1, 1) * 1e-5 for x in dataset.ImageOrientationPatient
        ]
        dataset.ImagePositionPatient = [float(x) + rng.uniform(-1, 1) * 5e-3 for x in dataset.ImagePositionPatient]
        dataset.save_as(file)
    from medseg.readers.dicom_scan import find_series
    from medseg.readers.dicom_series import read_series

    (series,) = find_series(tmp_path / "in")
    image = read_series(series)
    result = replace(result, series=series, mask=replace(result.mask, affine=image.affine))
    found = written(tmp_path, result)
    assert int(pixel_array(found).sum()) == int((result.mask.array > 0).sum())


def test_duplicate_files_count_once(dicom_result: Build, tmp_path: Path) -> None:
    from medseg.readers.dicom_scan import find_series

    result = dicom_result(tmp_path / "in")
    file = result.series.files[2]
    (tmp_path / "in" / "copy.dcm").write_bytes(file.read_bytes())
    (series,) = find_series(tmp_path / "in")
    assert len(series.files) == 10
    assert written(tmp_path, replace(result, series=series)).NumberOfFrames == 4 * 9


def refused(path: Path, result: Any, write: Callable[..., Any] = write_seg) -> str:
    with pytest.raises(ExportError) as caught:
        write(path / "x.seg.dcm", result)
    assert not list(path.glob("*.dcm")), "nothing is left"
    assert not list(path.glob(".partial*"))
    return caught.value.code


def test_refusals(dicom_result: Build, tmp_path: Path) -> None:
    result = dicom_result(tmp_path / "in")
    assert refused(tmp_path, replace(result, series=None)) == "NEEDS_DICOM"
    moved = result.mask.affine.copy()
    moved[0, 3] += 0.4
    assert refused(tmp_path, replace(result, mask=replace(result.mask, affine=moved))) == "NOT_ON_SOURCE_GRID"
    cut = replace(result.mask, array=result.mask.array[:, :, :, :-1])
    assert refused(tmp_path, replace(result, mask=cut)) == "NOT_ON_SOURCE_GRID"
    strange = result.mask.array.copy()
    strange[0, 0, 0, 0] = 99
    assert refused(tmp_path, replace(result, mask=result.mask.with_array(strange))) == "UNKNOWN_LABEL"
    dataset = pydicom.dcmread(result.series.files[0])
    dataset.SOPInstanceUID = "1.2.3"
    dataset.save_as(result.series.files[0])
    assert refused(tmp_path, result) == "SOURCE_CHANGED"


def mirror(dataset: pydicom.Dataset) -> None:
    # by identity: the segments share the items of a slice
    items = [item.PlanePositionSequence[0] for item in dataset.PerFrameFunctionalGroupsSequence]
    for position in {id(item): item for item in items}.values():
        position.ImagePositionPatient = [-float(position.ImagePositionPatient[0]), *position.ImagePositionPatient[1:]]


def turn(dataset: pydicom.Dataset) -> None:
    plane = dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    plane.ImageOrientationPatient = [*plane.ImageOrientationPatient[3:], *plane.ImageOrientationPatient[:3]]


def respace(dataset: pydicom.Dataset) -> None:
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    measures.PixelSpacing = [float(x) * 1.02 for x in measures.PixelSpacing]


def flip_a_bit(dataset: pydicom.Dataset) -> None:
    pixels = bytearray(dataset.PixelData)
    pixels[40] ^= 4
    dataset.PixelData = bytes(pixels)


def swap_segments(dataset: pydicom.Dataset) -> None:
    if dataset.SegmentationType == "LABELMAP":
        dataset.PixelData = dataset.PixelData.translate(bytes([0, 2, 1, *range(3, 256)]))
        return
    for item in dataset.PerFrameFunctionalGroupsSequence:
        row = item.SegmentIdentificationSequence[0]
        row.ReferencedSegmentNumber = {1: 2, 2: 1}.get(row.ReferencedSegmentNumber, row.ReferencedSegmentNumber)


def shift_a_slice(dataset: pydicom.Dataset) -> None:
    positions = [item.PlanePositionSequence[0] for item in dataset.PerFrameFunctionalGroupsSequence]
    positions[0].ImagePositionPatient, positions[1].ImagePositionPatient = (
        positions[1].ImagePositionPatient,
        positions[0].ImagePositionPatient,
    )


def lose_a_frame(dataset: pydicom.Dataset) -> None:
    dataset.NumberOfFrames -= 1
    del dataset.PerFrameFunctionalGroupsSequence[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [mirror, turn, respace, flip_a_bit, swap_segments, shift_a_slice, lose_a_frame])
def test_a_wrong_file_is_never_left(
    dicom_result: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[pydicom.Dataset], None],
    kind: str,
) -> None:
    result = dicom_result(tmp_path / "in")
    name = "build_fractional" if KINDS[kind] is write_fractional else "build_seg"
    build = getattr(dicom_seg, name)

    def damaged(*args: Any, **kind: Any) -> pydicom.Dataset:
        dataset = build(*args, **kind)
        if not isinstance(dataset.PixelData, bytes):
            dataset.PixelData = dataset.PixelData.read()
        damage(dataset)
        return dataset

    monkeypatch.setattr(dicom_seg, name, damaged)
    assert refused(tmp_path, result, KINDS[kind]) == "READ_BACK"


@pytest.mark.parametrize("write", ["absent", "empty", "zero"])
def test_slices_that_do_not_say_how_thick_they_are_touch(dicom_result: Build, tmp_path: Path, write: str) -> None:
    result = dicom_result(tmp_path / "in", SliceThickness={"zero": 0}.get(write))
    for file in result.series.files if write == "absent" else ():
        dataset = pydicom.dcmread(file)
        del dataset.SliceThickness
        dataset.save_as(file)
    dataset = written(tmp_path, result)
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert float(measures.SliceThickness) == pytest.approx(result.mask.spacing[2])


@pytest.mark.parametrize("write", [write_seg, write_sr], ids=["seg", "sr"])
def test_values_of_the_patient_that_fit_no_vr_are_left_empty(
    dicom_result: Build, tmp_path: Path, write: Callable[..., Any]
) -> None:
    """A real series says "0Y" where an age has four characters: the source may, an object of ours may not."""
    result = dicom_result(tmp_path / "in", PatientID="A1", PatientSize="1.80")
    for file in result.series.files:
        # Its bytes, since pydicom does not write what it knows to be wrong.
        data = file.read_bytes()
        at = data.index(b"\x10\x00\x20\x10DS")  # PatientSize follows PatientAge
        file.write_bytes(data[:at] + b"\x10\x00\x10\x10AS\x02\x000Y" + data[at:])
    write(tmp_path / "x.dcm", result)
    found = pydicom.dcmread(tmp_path / "x.dcm")
    assert not found.get("PatientAge")
    assert found.PatientID == "A1"
