"""DICOM SEG, written by highdicom: every kind, in every orientation, becomes the very voxels that were written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from numpy.testing import assert_array_equal
from pydicom.sr.codedict import codes
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLSLossless, RLELossless, generate_uid

from medseg.errors import MedsegError
from medseg.readers.dicom_label_parts import LABEL_REFUSALS
from medseg.readers.dicom_labels import read_dicom_labels
from medseg.readers.dicom_scan import scan
from medseg.readers.dicom_series import read_series
from medseg.readers.label_request import LabelRequest, Wanted
from medseg.volume import Volume, reorient

Series = Callable[..., tuple[Volume, list[Path]]]
Structure = Callable[..., np.ndarray]


def description(number: int, name: str) -> Any:
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=codes.SCT.Organ,
        segmented_property_type=codes.SCT.Liver,
        algorithm_type="MANUAL",
    )


def write_seg(path: Path, sources: Sequence[Path], array: np.ndarray, kind: str = "BINARY", **how: Any) -> Path:
    """Write segments (I, J, K, segments) that were drawn on the slices `sources`."""
    frames = array.transpose(2, 1, 0, 3)
    names = how.pop("names", [f"part {n + 1}" for n in range(array.shape[3])])
    seg = highdicom.seg.Segmentation(
        source_images=[pydicom.dcmread(file) for file in sources],
        pixel_array=frames,
        segmentation_type=kind,
        segment_descriptions=[description(n, name) for n, name in enumerate(names, start=1)],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="test",
        manufacturer_model_name="test",
        software_versions="1",
        device_serial_number="1",
        **how,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)
    return path


def both(structure: Structure) -> np.ndarray:
    return np.stack([structure(0), structure(1)], axis=-1).astype(np.uint8)


def edit(path: Path, change: Callable[[Any], object]) -> Path:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)
    return path


WANTED = (Wanted("part 1", 1), Wanted("part 2", 2))


def read(path: Path, image: Volume, *wanted: Wanted, **more: Any) -> Volume:
    return read_dicom_labels(path, LabelRequest(image, wanted or WANTED, **more))


def refused(code: str, path: Path, image: Volume, *wanted: Wanted, **more: Any) -> str:
    with pytest.raises(MedsegError) as caught:
        read(path, image, *wanted, **more)
    assert caught.value.code == code
    return str(caught.value)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_every_kind_in_every_orientation(
    make_series: Series, structure: Structure, tmp_path: Path, direction: str, kind: str
) -> None:
    """Empty frames are omitted."""
    image, files = make_series(direction)
    path = write_seg(tmp_path / "seg.dcm", files, both(structure), kind)
    expected = structure(0) + 2 * structure(1)
    mask = read(path, image, image_paths=(files[0].parent,))
    assert_array_equal(mask.array[0], expected)
    assert_array_equal(mask.affine, image.affine)
    assert mask.notes == (("FRACTIONAL_THRESHOLDED",) if kind == "FRACTIONAL" else ())
    assert mask.array.dtype == np.uint8


def test_the_order_of_sources_and_files_does_not_matter(
    make_series: Series, structure: Structure, tmp_path: Path
) -> None:
    image, files = make_series("oblique")
    backwards = both(structure)[:, :, ::-1]
    path = write_seg(tmp_path / "seg.dcm", files[::-1], backwards, omit_empty_frames=False)
    assert_array_equal(read(path, image).array[0], structure(0) + 2 * structure(1))


def test_the_image_may_be_stored_in_any_axis_order(make_series: Series, structure: Structure, tmp_path: Path) -> None:
    """As when the image was converted to NIfTI: frames are sagittal planes of it, mirrored."""
    image, files = make_series("axial")
    path = write_seg(tmp_path / "seg.dcm", files, both(structure))
    upright = reorient(image, "SRA")
    mask = read(path, upright)
    turned = reorient(image.with_array((structure(0) + 2 * structure(1))[None]), "SRA")
    assert_array_equal(mask.array, turned.array)
    assert mask.notes == ("MATCHED_BY_POSITION",)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, DeflatedExplicitVRLittleEndian])
def test_compressed_label_maps(make_series: Series, structure: Structure, tmp_path: Path, syntax: str) -> None:
    image, files = make_series()
    if syntax == DeflatedExplicitVRLittleEndian:
        path = write_seg(tmp_path / "seg.dcm", files, both(structure))
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(path)
    else:
        path = write_seg(tmp_path / "seg.dcm", files, both(structure), "LABELMAP", transfer_syntax_uid=syntax)
    assert_array_equal(read(path, image).array[0], structure(0) + 2 * structure(1))


def test_fractions_are_cut_at_half_which_belongs(make_series: Series, tmp_path: Path) -> None:
    image, files = make_series()
    shares = np.zeros((*image.shape, 1))
    shares[2, 3, 4], shares[5, 6, 4], shares[7, 8, 4] = 0.49, 0.5, 1.0
    path = write_seg(tmp_path / "seg.dcm", files, shares, "FRACTIONAL", max_fractional_value=200)
    mask = read(path, image, WANTED[0])
    assert np.argwhere(mask.array[0]).tolist() == [[5, 6, 4], [7, 8, 4]]
    assert "FRACTIONAL_THRESHOLDED" in mask.notes


def test_a_segmentation_of_a_crop_lies_where_the_crop_was(
    make_series: Series, structure: Structure, tmp_path: Path
) -> None:
    """Fewer rows, columns and slices than the image."""
    image, files = make_series("coronal")
    path = write_seg(tmp_path / "seg.dcm", files[2:8], both(structure)[:, :, 2:8])
    corner = np.array([3, 2, 0])

    def crop(dataset: Any) -> None:
        frames = dataset.pixel_array[:, corner[1] : 16, corner[0] :]
        dataset.Rows, dataset.Columns = frames.shape[1:]
        dataset.PixelData = np.packbits(frames.ravel(), bitorder="little").tobytes()
        step = image.affine[:3, :3] @ corner * [-1, -1, 1]
        for item in dataset.PerFrameFunctionalGroupsSequence:
            place = item.PlanePositionSequence[0]
            position = place.ImagePositionPatient
            place.ImagePositionPatient = [round(float(a + b), 6) for a, b in zip(position, step, strict=True)]

    edit(path, crop)
    assert_array_equal(read(path, image).array[0], structure(0) + 2 * structure(1))


# --- names -------------------------------------------------------------------------------------------------------


def test_labels_find_segments_by_name(make_series: Series, structure: Structure, tmp_path: Path) -> None:
    image, files = make_series()
    path = write_seg(tmp_path / "seg.dcm", files, both(structure), names=["Left Kidney", "GTV-2 (old)"])
    mask = read(path, image, Wanted("left kidney", 4), Wanted("tumour", 700, expression=r"gtv.*"))
    assert_array_equal(mask.array[0], 4 * structure(0) + 700 * structure(1))
    mask = read(path, image, Wanted("anything", 1, expression=".*"))
    assert_array_equal(mask.array[0], structure(0) | structure(1))
    only = read(path, image, Wanted("tumour", 1, expression="GTV.*"), Wanted("cyst", 2, optional=True))
    assert_array_equal(only.array[0], structure(1))
    assert "SEGMENT_ABSENT" in only.notes


def test_one_segment_and_one_label_need_no_name(make_series: Series, structure: Structure, tmp_path: Path) -> None:
    image, files = make_series()
    path = write_seg(tmp_path / "seg.dcm", files, both(structure)[..., :1], names=["Segment_1"])
    assert_array_equal(read(path, image, Wanted("tumour", 1)).array[0], structure(0))
    refused("SEGMENT_MISSING", path, image, Wanted("tumour", 1, expression="tumour"))


def test_names_that_do_not_fit_are_answered_with_those_that_exist(
    make_series: Series, structure: Structure, tmp_path: Path
) -> None:
    image, files = make_series()
    path = write_seg(tmp_path / "seg.dcm", files, both(structure))
    text = refused("SEGMENT_MISSING", path, image, Wanted("liver", 1))
    assert "'liver'" in text
    assert "'part 1', 'part 2'" in text
    text = refused("SEGMENT_AMBIGUOUS", path, image, Wanted("a", 1, expression="part.*"), Wanted("part 2", 2))
    assert "'part 2' fits the labels 'a' and 'part 2'" in text


def test_two_files(make_series: Series, structure: Structure, tmp_path: Path) -> None:
    """One segment per file is common; the same segment in two files is two opinions."""
    image, files = make_series()
    for n in (0, 1):
        write_seg(tmp_path / "segs" / f"{n}", files, both(structure)[..., n : n + 1], names=[f"part {n + 1}"])
    assert_array_equal(read(tmp_path / "segs", image).array[0], structure(0) + 2 * structure(1))
    write_seg(tmp_path / "segs" / "again", files, both(structure)[..., :1], names=["part 1"])
    refused("SEGMENT_AMBIGUOUS", tmp_path / "segs", image)


# --- overlap -----------------------------------------------------------------------------------------------------


def overlapping(structure: Structure) -> np.ndarray:
    """A core within a whole."""
    whole = structure(0)
    core = np.zeros_like(whole)
    core[5:8, 5:8, 3:6] = True
    return np.stack([whole, core], axis=-1).astype(np.uint8)


def test_overlap_of_exclusive_labels_is_refused_with_numbers(
    make_series: Series, structure: Structure, tmp_path: Path
) -> None:
    image, files = make_series()
    array = overlapping(structure)
    path = write_seg(tmp_path / "seg.dcm", files, array)
    text = refused("SEGMENT_OVERLAP", path, image)
    shared = int((array[..., 0] & array[..., 1]).sum())
    assert f"share {shared} voxels" in text
    assert "'part 1'" in text
    assert "'part 2'" in text


@pytest.mark.parametrize("turned", [False, True])
def test_overlap_is_resolved_where_the_spec_says_so(
    make_series: Series, structure: Structure, tmp_path: Path, turned: bool
) -> None:
    image, files = make_series()
    array = overlapping(structure)
    whole, core = array[..., 0] > 0, array[..., 1] > 0
    path = write_seg(tmp_path / "seg.dcm", files, array)
    labels = list(WANTED[::-1] if turned else WANTED)
    later = read(path, image, *labels, overlap="later")
    first, last = ((core, 2), (whole, 1)) if turned else ((whole, 1), (core, 2))
    assert_array_equal(later.array[0], np.where(last[0], last[1], first[0] * first[1]))
    assert "OVERLAP_RESOLVED" in later.notes
    # With regions that nest the order does not matter: the core belongs to both targets.
    nested = [
        Wanted("part 1", 1, regions=frozenset({"whole"})),
        Wanted("part 2", 2, regions=frozenset({"whole", "core"})),
    ]
    mask = read(path, image, *(nested[::-1] if turned else nested))
    assert_array_equal(mask.array[0], np.where(core, 2, whole))


# --- place -------------------------------------------------------------------------------------------------------


def move(*offset: float) -> Callable[[Any], None]:
    def change(dataset: Any) -> None:
        for item in dataset.PerFrameFunctionalGroupsSequence:
            place = item.PlanePositionSequence[0]
            place.ImagePositionPatient = [float(a) + b for a, b in zip(place.ImagePositionPatient, offset, strict=True)]

    return change


def other_frame(dataset: Any) -> None:
    dataset.FrameOfReferenceUID = generate_uid()


def strange(dataset: Any) -> None:
    """As after anonymisation: no reference leads anywhere."""
    other_frame(dataset)
    for item in dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence:
        item.ReferencedSOPInstanceUID = generate_uid()
    for item in dataset.PerFrameFunctionalGroupsSequence:
        for source in item.DerivationImageSequence[0].SourceImageSequence:
            source.ReferencedSOPInstanceUID = generate_uid()


def test_another_grid_is_refused(make_series: Series, structure: Structure, tmp_path: Path) -> None:
    image, files = make_series()
    path = write_seg(tmp_path / "seg.dcm", files, both(structure))
    where = (files[0].parent,)
    refused("LABEL_GRID", edit(path, move(0.4, 0, 0)), image, image_paths=where)
    refused("LABEL_GRID", edit(path, move(-0.4, 0, 1.2)), image, image_paths=where)
    refused("SEGMENT_OUTSIDE", edit(path, move(0, 0, 28.8)), image, image_paths=where)
    # Whole voxels off and inside is a place like any other.
    moved = read(edit(path, move(0, 0, -36)), image, image_paths=where)
    assert_array_equal(moved.array[0][..., :-2], (structure(0) + 2 * structure(1))[..., 2:])


def test_frames_of_reference(make_series: Series, structure: Structure, tmp_path: Path) -> None:
    image, files = make_series()
    path, where = write_seg(tmp_path / "seg.dcm", files, both(structure)), (files[0].parent,)
    mask = read(edit(path, other_frame), image, image_paths=where)
    assert mask.notes == ("FRAME_OF_REFERENCE_DIFFERS",)
    mask = read(edit(path, strange), image, image_paths=where)
    assert mask.notes == ("FRAME_OF_REFERENCE_DIFFERS", "MATCHED_BY_POSITION")
    text = refused("FRAME_OF_REFERENCE", edit(path, move(0, 0.5, 0)), image, image_paths=where)
    assert "LABEL_GRID" in text


def drop_positions(dataset: Any) -> None:
    for item in dataset.PerFrameFunctionalGroupsSequence:
        del item.PlanePositionSequence


def drop_spacing(dataset: Any) -> None:
    del dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing


def repeat_position(dataset: Any) -> None:
    first, second = dataset.PerFrameFunctionalGroupsSequence[:2]
    second.PlanePositionSequence = first.PlanePositionSequence


DAMAGED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "no position": ("NO_POSITION", drop_positions),
    "no spacing": ("NO_PIXEL_SPACING", drop_spacing),
    "fewer groups than frames": ("NO_POSITION", lambda d: d.PerFrameFunctionalGroupsSequence.pop()),
    "cut pixels": ("TRUNCATED", lambda d: setattr(d, "PixelData", d.PixelData[:-20])),
    "no pixels": ("TRUNCATED", lambda d: delattr(d, "PixelData")),
    "a bomb": ("OVERSIZED", lambda d: (setattr(d, "Rows", 60000), setattr(d, "Columns", 60000))),
    "unknown kind": ("UNREADABLE", lambda d: setattr(d, "SegmentationType", "OTHER")),
    "no segments": ("UNREADABLE", lambda d: delattr(d, "SegmentSequence")),
    "one slice twice": ("DUPLICATE_POSITION", repeat_position),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_damage_is_refused(make_series: Series, structure: Structure, tmp_path: Path, fault: str) -> None:
    image, files = make_series()
    code, change = DAMAGED[fault]
    path = edit(write_seg(tmp_path / "seg.dcm", files, both(structure)), change)
    text = refused(code, path, image)
    assert "seg.dcm" not in text
    assert str(tmp_path) not in text


def test_what_holds_no_labels(make_series: Series, tmp_path: Path) -> None:
    image, files = make_series()
    refused("NO_LABELS", files[0].parent, image)
    refused("UNSUPPORTED_CLASS", files[0], image)
    (tmp_path / "empty").mkdir()
    refused("NO_LABELS", tmp_path / "empty", image)
    (tmp_path / "empty" / "a.dcm").write_bytes(b"x" * 400)
    refused("UNREADABLE", tmp_path / "empty", image)
    refused("NOT_FOUND", tmp_path / "nowhere", image)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_a_segmentation_may_lie_among_the_slices(
    make_series: Series, structure: Structure, tmp_path: Path, kind: str
) -> None:
    image, files = make_series()
    write_seg(files[0].parent / "seg.dcm", files, both(structure), kind)
    assert len(scan(files[0].parent).series) == 1
    assert_array_equal(read_series(files[0].parent).array, image.array)
    assert_array_equal(read(files[0].parent, image).array[0], structure(0) + 2 * structure(1))


def test_an_empty_segment_is_noted(make_series: Series, structure: Structure, tmp_path: Path) -> None:
    image, files = make_series()
    array = both(structure)
    array[..., 1] = 0
    mask = read(write_seg(tmp_path / "seg.dcm", files, array), image)
    assert_array_equal(mask.array[0], structure(0))
    assert "SEGMENT_EMPTY" in mask.notes


def test_every_code_and_note_is_documented(repository: Path) -> None:
    page = (repository / "docs/reference/reason-codes.md").read_text(encoding="utf-8")
    section = page.partition("## Labels from DICOM: refusals")[2].partition("## Evaluation")[0]
    rows = {line.split("`")[1]: line for line in section.splitlines() if line.startswith("| `")}
    for code, kind in LABEL_REFUSALS.items():
        assert f"| {kind.error.__name__} |" in rows[code]
    listed = (read_dicom_labels.__doc__ or "").partition("notes: ")[2].partition("Raises")[0]
    assert set(rows) - set(LABEL_REFUSALS) == set(re.findall(r"[A-Z_]{5,}", listed))


def test_what_the_compression_or_the_numbers_say_never_shows(
    make_series: Series, structure: Structure, tmp_path: Path
) -> None:
    """Texts that may identify a patient stay out of messages and notes."""
    image, files = make_series()
    path = write_seg(tmp_path / "seg.dcm", files, both(structure))

    def plant(dataset: Any) -> None:
        for word in ("PatientName", "PatientID", "SeriesDescription", "ContentDescription", "SegmentationType"):
            setattr(dataset, word, "CANARY")

    assert "CANARY" not in refused("UNREADABLE", edit(path, plant), image)
