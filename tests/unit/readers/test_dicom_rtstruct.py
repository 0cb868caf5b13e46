"""RTSTRUCT: known polygons become the voxels whose centres they hold, in every orientation, or are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from medseg.errors import MedsegError
from medseg.readers.dicom_labels import read_dicom_labels
from medseg.readers.dicom_rtstruct import fill
from medseg.readers.label_request import LabelRequest, Wanted
from medseg.volume import Volume

Series = Callable[..., tuple[Volume, list[Path]]]
Writer = Callable[..., Path]

# Lopsided, with a notch; no vertex and no edge runs through a voxel centre.
OUTER = [(2.3, 3.2), (14.6, 2.4), (17.3, 9.7), (9.4, 8.1), (6.2, 15.6)]
HOLE = [(5.3, 5.2), (8.4, 5.4), (7.2, 8.6)]
ISLAND = [(6.3, 5.9), (7.4, 6.1), (6.6, 7.3)]
FAR = [(14.2, 13.3), (19.4, 13.6), (16.7, 16.6)]


def inside(point: tuple[float, float], polygon: Sequence[tuple[float, float]]) -> bool:
    """Tell by the angle that the polygon turns around the point: nothing in common with counting crossings."""
    towards = np.array(polygon) - point
    angles = np.arctan2(towards[:, 1], towards[:, 0])
    turns = np.angle(np.exp(1j * (np.roll(angles, -1) - angles))).sum() / (2 * np.pi)
    return round(turns) % 2 == 1


def oracle(polygons: Sequence[Sequence[tuple[float, float]]], shape: tuple[int, int]) -> np.ndarray:
    found = np.zeros(shape, bool)
    for u, v in np.ndindex(*shape):
        found[u, v] = sum(inside((u, v), polygon) for polygon in polygons) % 2 == 1
    return found


def on(k: float, polygon: Sequence[tuple[float, float]]) -> np.ndarray:
    return np.column_stack([np.array(polygon), np.full(len(polygon), k)])


def read(path: Path, image: Volume, *wanted: Wanted, where: Sequence[Path] = ()) -> Volume:
    chosen = wanted or (Wanted("tumour", 1),)
    return read_dicom_labels(path, LabelRequest(image, chosen, tuple(where)))


def refused(code: str, path: Path, image: Volume, *wanted: Wanted, where: Sequence[Path] = ()) -> str:
    with pytest.raises(MedsegError) as caught:
        read(path, image, *wanted, where=where)
    assert caught.value.code == code
    return str(caught.value)


def stack(image: Volume, slices: dict[int, Sequence[Sequence[tuple[float, float]]]]) -> np.ndarray:
    expected = np.zeros(image.shape, bool)
    for k, polygons in slices.items():
        expected[:, :, k] = oracle(polygons, image.shape[:2])
    return expected


def test_holes_and_islands_in_every_orientation(
    make_series: Series, structures: Writer, tmp_path: Path, direction: str
) -> None:
    image, _ = make_series(direction)
    slices = {2: [OUTER], 3: [OUTER, HOLE], 4: [HOLE, FAR, OUTER, ISLAND], 5: [FAR]}
    contours = [on(k, polygon) for k, polygons in slices.items() for polygon in polygons]
    mask = read(structures(tmp_path / "rt.dcm", image, {"GTV": contours}), image)
    assert_array_equal(mask.array[0], stack(image, slices))
    assert_array_equal(mask.affine, image.affine)
    assert mask.notes == ("MATCHED_BY_POSITION",)


def test_a_keyhole_is_a_hole(make_series: Series, structures: Writer, tmp_path: Path) -> None:
    """One contour that runs in along a channel, around the hole the other way, and out along the same channel."""
    image, _ = make_series("oblique")
    keyhole = [*OUTER[:1], *HOLE, HOLE[0], OUTER[0], *OUTER[1:]]
    mask = read(structures(tmp_path / "rt.dcm", image, {"GTV": [on(4, keyhole)]}), image)
    assert_array_equal(mask.array[0], stack(image, {4: [OUTER, HOLE]}))


def test_contours_may_lie_along_any_axis_of_the_image(make_series: Series, structures: Writer, tmp_path: Path) -> None:
    """Drawn on sagittal planes of an axial image; contours of half a gap would be off for the axial planes."""
    image, _ = make_series()
    flat = [(2.3, 1.2), (12.4, 1.4), (6.3, 7.2)]
    contours = [np.column_stack([np.full(3, i), flat]) for i in (7, 8)]
    mask = read(structures(tmp_path / "rt.dcm", image, {"GTV": contours}), image)
    expected = np.zeros(image.shape, bool)
    expected[7] = expected[8] = oracle([flat], image.shape[1:])
    assert_array_equal(mask.array[0], expected)


def test_several_rois(make_series: Series, structures: Writer, tmp_path: Path) -> None:
    image, _ = make_series()
    rois = {"GTV 1": [on(3, HOLE)], "GTV 2": [on(3, FAR)], "Body": [on(3, OUTER)]}
    path = structures(tmp_path / "rt.dcm", image, rois)
    mask = read(path, image, Wanted("tumour", 3, expression="gtv.*"))
    assert_array_equal(mask.array[0], 3 * (stack(image, {3: [HOLE]}) | stack(image, {3: [FAR]})))
    assert "'GTV 1', 'GTV 2', 'Body'" in refused("SEGMENT_MISSING", path, image, Wanted("liver", 1))
    text = refused("SEGMENT_OVERLAP", path, image, Wanted("GTV 1", 1), Wanted("body", 2))
    assert str(int(stack(image, {3: [HOLE]}).sum())) in text


def test_neighbours_share_no_voxel(make_series: Series, structures: Writer, tmp_path: Path) -> None:
    """Two ROIs with a common edge right through voxel centres, written with three decimals."""
    image, _ = make_series("oblique")
    left = [(2, 2), (8, 2), (8, 10), (2, 10)]
    right = [(8, 2), (15, 2), (15, 10), (8, 10)]
    path = structures(tmp_path / "rt.dcm", image, {"a": [on(3, left)], "b": [on(3, right)]}, digits=3)
    mask = read(path, image, Wanted("a", 1), Wanted("b", 2)).array[0]
    expected = np.zeros(image.shape)
    expected[2:8, 2:10, 3], expected[8:15, 2:10, 3] = 1, 2
    assert_array_equal(mask, expected)


# --- place -------------------------------------------------------------------------------------------------------


def test_identifiers_that_match_nothing(
    make_series: Series, structures: Writer, tmp_path: Path, frame_of: Callable[[Path], str]
) -> None:
    image, files = make_series()
    where, frame = [files[0].parent], frame_of(files[0])
    own = str(pydicom.dcmread(files[3]).SOPInstanceUID)
    said = {
        (frame, own): (),
        (frame, "1.2.3"): ("MATCHED_BY_POSITION",),
        ("", "1.2.3"): ("MATCHED_BY_POSITION",),
        ("1.2.9", own): ("FRAME_OF_REFERENCE_DIFFERS",),
        ("1.2.9", "1.2.3"): ("FRAME_OF_REFERENCE_DIFFERS", "MATCHED_BY_POSITION"),
    }
    off = on(3.6, OUTER)
    for (uid, reference), notes in said.items():
        how: dict[str, Any] = {"frame": uid, "references": [reference]}
        mask = read(structures(tmp_path / "rt.dcm", image, {"GTV": [on(3, OUTER)]}, **how), image, where=where)
        assert mask.notes == notes
        assert_array_equal(mask.array[0], stack(image, {3: [OUTER]}))
        code = "FRAME_OF_REFERENCE" if len(notes) == 2 else "CONTOUR_OFF_PLANE"
        refused(code, structures(tmp_path / "rt.dcm", image, {"GTV": [off]}, **how), image, where=where)


def test_contours_off_their_slice(make_series: Series, structures: Writer, tmp_path: Path) -> None:
    image, _ = make_series("oblique")
    mask = read(structures(tmp_path / "rt.dcm", image, {"GTV": [on(3.005, OUTER)]}), image)
    assert "CONTOUR_NEAREST_SLICE" not in mask.notes
    mask = read(structures(tmp_path / "rt.dcm", image, {"GTV": [on(3.2, OUTER), on(4.2, FAR)]}), image)
    assert "CONTOUR_NEAREST_SLICE" in mask.notes
    assert_array_equal(mask.array[0], stack(image, {3: [OUTER], 4: [FAR]}))
    refused("CONTOUR_OFF_PLANE", structures(tmp_path / "rt.dcm", image, {"GTV": [on(3.3, OUTER)]}), image)
    two = {"GTV": [on(2.8, OUTER), on(3.2, FAR)]}
    assert "different depths" in refused("CONTOUR_OFF_PLANE", structures(tmp_path / "rt.dcm", image, two), image)
    bent = on(3, OUTER)
    bent[2, 2] += 0.4
    assert "not parallel" in refused(
        "CONTOUR_OFF_PLANE", structures(tmp_path / "rt.dcm", image, {"GTV": [bent]}), image
    )


def test_contours_outside_the_image(make_series: Series, structures: Writer, tmp_path: Path) -> None:
    image, _ = make_series()
    for k in (-1, image.shape[2]):
        refused("CONTOUR_OUTSIDE", structures(tmp_path / "rt.dcm", image, {"GTV": [on(k, OUTER)]}), image)
    beside = on(3, OUTER) + np.array([30, 0, 0])
    assert "beside" in refused("CONTOUR_OUTSIDE", structures(tmp_path / "rt.dcm", image, {"GTV": [beside]}), image)
    across = [(u - 8.1, v + 6.2) for u, v in OUTER]
    mask = read(structures(tmp_path / "rt.dcm", image, {"GTV": [on(3, across)]}), image)
    assert "CONTOUR_CLIPPED" in mask.notes
    assert_array_equal(mask.array[0], stack(image, {3: [across]}))


# --- contours ----------------------------------------------------------------------------------------------------


def test_slices_without_contour(make_series: Series, structures: Writer, tmp_path: Path) -> None:
    image, _ = make_series()
    mask = read(structures(tmp_path / "rt.dcm", image, {"GTV": [on(k, OUTER) for k in (1, 2, 5)]}), image)
    assert "CONTOUR_GAPS" in mask.notes
    text = refused(
        "CONTOURS_SPARSE", structures(tmp_path / "rt.dcm", image, {"GTV": [on(k, OUTER) for k in (1, 3, 5)]}), image
    )
    assert "3 in all" in text


def test_contours_given_twice_or_crossing(make_series: Series, structures: Writer, tmp_path: Path) -> None:
    image, _ = make_series()
    turned = [*OUTER[2:], *OUTER[:2]][::-1]
    mask = read(structures(tmp_path / "rt.dcm", image, {"GTV": [on(3, OUTER), on(3, turned)]}), image)
    assert "CONTOUR_REPEATED" in mask.notes
    assert_array_equal(mask.array[0], stack(image, {3: [OUTER]}))
    shifted = [(u + 2.2, v + 1.1) for u, v in OUTER]
    mask = read(structures(tmp_path / "rt.dcm", image, {"GTV": [on(3, OUTER), on(3, shifted)]}), image)
    assert "CONTOURS_CROSS" in mask.notes
    assert_array_equal(mask.array[0], stack(image, {3: [OUTER, shifted]}))


def test_contours_that_enclose_nothing(make_series: Series, structures: Writer, tmp_path: Path) -> None:
    image, _ = make_series()
    tiny = [(3.2, 3.2), (3.6, 3.2), (3.4, 3.6)]
    for contours, kind in (
        ([], "CLOSED_PLANAR"),
        ([on(3, tiny)], "CLOSED_PLANAR"),
        ([on(3, OUTER[:2])], "CLOSED_PLANAR"),
        ([on(3, OUTER[:1])], "POINT"),
    ):
        mask = read(structures(tmp_path / "rt.dcm", image, {"GTV": contours}, kind=kind), image)
        assert not mask.array.any()
        assert "SEGMENT_EMPTY" in mask.notes
    for kind in ("OPEN_PLANAR", "OPEN_NONPLANAR", ""):
        refused("CONTOUR_TYPE", structures(tmp_path / "rt.dcm", image, {"GTV": [on(3, OUTER)]}, kind=kind), image)


def first_contour(dataset: Any) -> Any:
    return dataset.ROIContourSequence[0].ContourSequence[0]


def two_frames(dataset: Any) -> None:
    for number, roi in enumerate(dataset.StructureSetROISequence):
        roi.ReferencedFrameOfReferenceUID = f"1.{number}"


DAMAGED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "a coordinate less": ("UNREADABLE", lambda d: first_contour(d).ContourData.pop()),
    "no number": ("UNREADABLE", lambda d: first_contour(d).add_new("ContourData", "UT", "1\\x\\3")),
    "another count": ("UNREADABLE", lambda d: setattr(first_contour(d), "NumberOfContourPoints", 4)),
    "an offset": ("CONTOUR_TYPE", lambda d: setattr(first_contour(d), "ContourOffsetVector", [0, 0, 2])),
    "no ROI number": ("UNREADABLE", lambda d: delattr(d.StructureSetROISequence[0], "ROINumber")),
    "two frames": ("FRAME_OF_REFERENCE", two_frames),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_damage_is_refused(make_series: Series, structures: Writer, tmp_path: Path, fault: str) -> None:
    image, _ = make_series()
    path = structures(tmp_path / "rt.dcm", image, {"tumour": [on(3, OUTER)], "b": [on(3, FAR)]})
    code, change = DAMAGED[fault]
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)
    refused(code, path, image)


@pytest.mark.parametrize("size", [140, 400, 700, 900])
def test_a_file_cut_short_is_never_half_read(
    make_series: Series, structures: Writer, tmp_path: Path, size: int
) -> None:
    image, _ = make_series()
    path = structures(tmp_path / "rt.dcm", image, {"tumour": [on(3, OUTER), on(4, OUTER)]})
    whole = path.read_bytes()
    path.write_bytes(whole[: min(size, len(whole) - 10)])
    with pytest.raises(MedsegError):
        read(path, image)


# --- filling -----------------------------------------------------------------------------------------------------

COORDINATE = st.integers(-300, 3300).map(lambda n: n / 128)
POLYGON = st.lists(st.tuples(COORDINATE, COORDINATE), min_size=3, max_size=7)


@settings(deadline=None)
@given(POLYGON, st.tuples(COORDINATE, COORDINATE))
def test_cutting_a_polygon_gives_parts_that_make_up_the_whole(
    polygon: list[tuple[float, float]], point: tuple[float, float]
) -> None:
    """Triangles from any point to each edge: by even-odd the whole, with not a voxel lost or counted twice."""
    triangles = [np.array([point, a, b]) for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True)]
    whole = fill([np.array(polygon)], (24, 23))
    assert_array_equal(whole, fill(triangles, (24, 23)))
    assert_array_equal(whole, np.sum([fill([t], (24, 23)) for t in triangles], axis=0) % 2 == 1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=3, max_size=6), st.integers(0, 2**16))
def test_filling_agrees_with_angles(polygon: list[tuple[float, float]], seed: int) -> None:
    """Moved by a little that keeps every centre off the lines."""
    moved = np.array(polygon) + np.random.default_rng(seed).uniform(0.0003, 0.0009, (len(polygon), 2))
    assert_array_equal(fill([moved], (10, 9)), oracle([list(map(tuple, moved))], (10, 9)))


def test_filling_nothing() -> None:
    assert not fill([], (4, 5)).any()
    assert fill([np.array([(-5.0, -5), (50, -5), (50, 50), (-5, 50)])], (4, 5)).all()
