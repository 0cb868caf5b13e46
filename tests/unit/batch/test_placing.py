"""Results of corrected series: every voxel of every file lies where it was scanned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from highdicom.seg import Segmentation, segread
from numpy.typing import NDArray

from medseg.batch.placing import place
from medseg.batch.run import BatchResult, predict
from medseg.errors import MedsegError
from medseg.exporters import EXPORTERS
from medseg.exporters.result import Result
from medseg.inference.predict import Model, load_model
from medseg.phantom.dicom import write_series
from medseg.readers.dicom_labels import read_dicom_labels
from medseg.readers.dicom_scan import find_series
from medseg.readers.dicom_series import read_series
from medseg.readers.label_request import LabelRequest, Wanted
from medseg.spec import Case, Spec
from medseg.studies import read_study
from medseg.volume import Volume

Array = NDArray[np.float64]
SIZE = (40, 34, 12)
TURNS = {
    "axial": np.diag([-1.0, -1.0, 1.0]),
    "feet first": np.diag([1.0, -1.0, -1.0]),
    "sagittal": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
    "oblique": np.array([[-0.36, 0.48, -0.8], [-0.8, -0.6, 0.0], [-0.48, 0.64, 0.6]]),
}
SPEC = Spec.model_validate(
    {"name": "balls", "channels": {"ct": {"modality": "CT"}}, "labels": {"ball": 1, "egg": 2, "absent": 3}}
)
LEAN = {"tilt": 17.0, "irregular": 0.0, "both": -17.0}
DICE = 0.9
"""Half a pixel within a slice and half a step between slices of 3 mm, at balls of 9 mm."""


def labels(points: Array) -> NDArray[np.uint8]:
    """A ball and an egg, asymmetric in every direction."""
    ball = ((points - (0, 0, 0)) ** 2).sum(axis=-1) < 9**2
    egg = (((points - (11, 3, -4)) / (4, 5, 6)) ** 2).sum(axis=-1) < 1
    return np.where(ball, 1, np.where(egg, 2, 0)).astype(np.uint8)


def places(affine: Array, shape: tuple[int, ...]) -> Array:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return np.asarray(index @ affine[:3, :3].T + affine[:3, 3])


def write(folder: Path, kind: str, turn: str = "axial") -> list[Path]:
    """A series through the balls that leans, lacks two slices in the middle of them, or both."""
    local = np.diag([0.9, 1.1, 3.0])
    local[1, 2] = 3 * np.tan(np.radians(LEAN[kind]))
    affine = np.eye(4)
    affine[:3, :3] = TURNS[turn] @ local
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(SIZE) - 1) / 2)
    array = labels(places(affine, SIZE)) * 100.0
    files = write_series(Volume(array[None].astype(np.float32), affine), folder, modality="MR", shuffle=True)
    for number in (5, 8) if kind != "tilt" else ():
        files[number].unlink()
    return [file for file in files if file.exists()]


def placed(folder: Path, kind: str, turn: str = "axial") -> tuple[Result, Any]:
    write(folder, kind, turn)
    (series,) = find_series(folder)
    image = read_series(series, allow={"tilt", "irregular"})
    mask = Volume(labels(places(image.affine, image.shape))[None], image.affine)
    soft = Volume(np.stack([(mask.array[0] == value) * np.float32(0.8) for value in (1, 2, 3)]), image.affine)
    result = Result(mask, SPEC, "5eed" * 16, image, series, soft)
    return result, place(result, {"tilt", "irregular"})


def dice(found: NDArray[Any], truth: NDArray[Any], value: int) -> float:
    a, b = found == value, truth == value
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def to_ras(dataset: Any) -> Array:
    """(column, row, 1) -> mm in RAS+, from a source file alone."""
    cosines = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
    down, across = (float(v) for v in dataset.PixelSpacing)
    lps = np.stack([cosines[0] * across, cosines[1] * down, np.array(dataset.ImagePositionPatient, float)], axis=1)
    return np.array([[-1.0], [-1.0], [1.0]]) * lps


def truth_of(file: Path) -> NDArray[np.uint8]:
    """(columns, rows): the labels where the pixels of one source file lie."""
    plane = to_ras(pydicom.dcmread(file, stop_before_pixels=True))
    ij = np.stack(np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]), [1], indexing="ij"), axis=-1)[:, :, 0]
    return labels(ij @ plane.T)


@pytest.mark.parametrize("turn", TURNS)
def test_the_nifti_mask_of_a_tilted_series_lies_on_its_slices(turn: str, tmp_path: Path) -> None:
    result, found = placed(tmp_path / "in", "tilt", turn)
    assert found.image is None
    EXPORTERS["nifti"].write(tmp_path / "m.nii.gz", found.nifti)
    image = nibabel.load(tmp_path / "m.nii.gz")
    array = np.asarray(image.dataobj)
    assert array.shape == SIZE, "voxel k is slice k of the source"
    truth = labels(places(image.affine, SIZE))
    assert min(dice(array, truth, value) for value in (1, 2)) > DICE
    by_position = {tuple(np.round(to_ras(pydicom.dcmread(f))[:, 2], 3)) for f in (tmp_path / "in").iterdir()}
    assert {tuple(np.round(image.affine[:3] @ [0, 0, k, 1], 3)) for k in range(SIZE[2])} == by_position
    assert result.mask.shape != SIZE


@pytest.mark.parametrize("kind", ["irregular", "both"])
def test_the_nifti_mask_of_an_uneven_series_lies_on_the_image_beside_it(kind: str, tmp_path: Path) -> None:
    result, found = placed(tmp_path / "in", kind)
    assert found.image is not None
    np.testing.assert_array_equal(found.nifti.mask.affine, found.image.affine)
    assert found.nifti.mask.shape == found.image.shape == result.mask.shape
    np.testing.assert_array_equal(found.nifti.mask.array, result.mask.array)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", LEAN)
@pytest.mark.parametrize("name", ["seg", "seg-labelmap", "seg-fractional", "rtstruct", "sr", "sc"])
def test_dicom_objects_hold_each_slice_at_its_own_place(name: str, kind: str, turn: str, tmp_path: Path) -> None:
    _, found = placed(tmp_path / "in", kind, turn)
    out = tmp_path / "out.dcm"
    EXPORTERS[name].write(out, found.dicom)  # reads it back, voxel by voxel
    sources = {pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID: f for f in (tmp_path / "in").iterdir()}
    if name == "seg":
        check_frames(segread(out), sources)
    if name == "rtstruct":
        check_contours(pydicom.dcmread(out), sources)


def check_frames(seg: Segmentation, sources: dict[str, Path]) -> None:
    """Each frame refers to a slice, lies where that lies, and holds what is there (read by highdicom)."""
    assert len(seg.PerFrameFunctionalGroupsSequence) == 3 * len(sources)
    for group in seg.PerFrameFunctionalGroupsSequence:
        uid = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        position = pydicom.dcmread(sources[uid], stop_before_pixels=True).ImagePositionPatient
        np.testing.assert_allclose(
            np.array(group.PlanePositionSequence[0].ImagePositionPatient, float), np.array(position, float), atol=1e-4
        )
    uids = list(sources)
    pixels = seg.get_pixels_by_source_instance(uids, combine_segments=True)
    truth = np.stack([truth_of(sources[uid]).T for uid in uids])
    assert min(dice(pixels, truth, value) for value in (1, 2)) > DICE


def check_contours(dataset: Any, sources: dict[str, Path]) -> None:
    """Each contour lies on the slice that it refers to, around the middle of what is there."""
    seen = 0
    for roi in dataset.ROIContourSequence:
        for contour in roi.get("ContourSequence", ()):
            file = sources[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            points = np.array(contour.ContourData, float).reshape(-1, 3) * (-1, -1, 1)
            index = np.linalg.solve(
                np.c_[to_ras(pydicom.dcmread(file))[:, :2], normal(file)],
                (points - to_ras(pydicom.dcmread(file))[:, 2]).T,
            )
            assert np.abs(index[2]).max() < 1e-3
            there = truth_of(file) == roi.ReferencedROINumber
            if there.sum() > 30:
                seen += 1
                middle = (index[:2].max(axis=1) + index[:2].min(axis=1)) / 2
                own = np.argwhere(there)
                assert np.abs(middle - (own.max(axis=0) + own.min(axis=0)) / 2).max() <= 1.01, "half a pixel each way"
    assert seen > 4


def normal(file: Path) -> Array:
    plane = to_ras(pydicom.dcmread(file))
    way = np.cross(plane[:, 0], plane[:, 1])
    return np.asarray(way / np.linalg.norm(way))


@pytest.mark.parametrize("kind", LEAN)
def test_volumes_are_those_of_the_upright_mask_in_every_file(kind: str, tmp_path: Path) -> None:
    result, found = placed(tmp_path / "in", kind)
    EXPORTERS["sr"].write(tmp_path / "out.dcm", found.dicom)
    due = np.count_nonzero(result.mask.array == 1) * result.mask.voxel_volume / 1000
    nifti = found.nifti.mask
    assert np.count_nonzero(nifti.array == 1) * nifti.voxel_volume / 1000 == pytest.approx(due, rel=1e-6)
    numbers: list[float] = []
    pydicom.dcmread(tmp_path / "out.dcm").walk(
        lambda _, element: numbers.append(float(element.value)) if element.keyword == "NumericValue" else None
    )
    assert round(due, 4) in numbers
    assert due == pytest.approx(4 / 3 * np.pi * 9**3 / 1000, rel=0.02)


def test_nothing_is_found_where_no_slice_is(tmp_path: Path) -> None:
    result, _ = placed(tmp_path / "in", "tilt")
    everywhere = result.mask.with_array(np.ones_like(result.mask.array))
    found = place(Result(everywhere, SPEC, "5eed" * 16, result.image, result.series), {"tilt"})
    assert found.nifti.mask.array.all()
    assert found.nifti.measured is not None
    assert np.count_nonzero(found.nifti.measured.array) == np.prod(SIZE)


@pytest.mark.parametrize("turn", TURNS)
def test_labels_drawn_on_a_tilted_series_are_read_on_its_slices(turn: str, tmp_path: Path) -> None:
    """Round trip: our own objects, read as labels of the sheared grid."""
    _, found = placed(tmp_path / "in", "tilt", turn)
    wanted = tuple(Wanted(name, value, optional=True) for name, value in SPEC.foreground.items())
    for name in ("seg", "rtstruct"):
        EXPORTERS[name].write(tmp_path / f"{name}.dcm", found.dicom)
        read = read_dicom_labels(tmp_path / f"{name}.dcm", LabelRequest(found.nifti.mask, wanted))
        np.testing.assert_array_equal(read.array, found.nifti.mask.array)


READ_AS = {
    ("rtstruct", "tilt"): "",
    ("seg", "tilt"): "LABEL_GRID",
    ("rtstruct", "irregular"): "LABEL_BETWEEN_SLICES",
    ("seg", "irregular"): "LABEL_BETWEEN_SLICES",
    ("rtstruct", "both"): "LABEL_BETWEEN_SLICES",
    ("seg", "both"): "LABEL_BETWEEN_SLICES",
}
"""Format and kind of series -> the reason why a dataset cannot learn from such labels; empty: it can."""


@pytest.mark.parametrize(("name", "kind"), READ_AS)
def test_labels_of_a_corrected_case_are_right_or_refused(name: str, kind: str, tmp_path: Path) -> None:
    """What a dataset with `allow` learns from: drawn on the slices, read on the corrected grid."""
    _, found = placed(tmp_path / "in", kind, "oblique")
    EXPORTERS[name].write(tmp_path / "labels.dcm", found.dicom)
    spec = SPEC.model_copy(update={"allow": ("tilt", "irregular")})
    case = Case("one", (tmp_path / "in",), tmp_path / "labels.dcm", "one")
    if READ_AS[name, kind]:
        with pytest.raises(MedsegError) as refused:
            read_study(spec, case)
        assert refused.value.code == READ_AS[name, kind]
        return
    study = read_study(spec, case)
    assert study.mask is not None
    assert "MATCHED_BY_POSITION" not in study.mask.notes
    truth = labels(places(study.image.affine, study.image.shape))
    assert min(dice(study.mask.array[0], truth, value) for value in (1, 2)) > DICE


def test_a_dataset_without_allow_refuses(tmp_path: Path) -> None:
    write(tmp_path / "in", "tilt")
    with pytest.raises(MedsegError) as refused:
        read_study(SPEC, Case("one", (tmp_path / "in",), None, "one"))
    assert refused.value.code == "GANTRY_TILT"


# ---- in a batch -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(model: Path) -> Model:
    return load_model(model)


@pytest.fixture
def run(loaded: Model, tmp_path: Path) -> Callable[..., BatchResult]:
    def go(**options: Any) -> BatchResult:
        return predict([tmp_path / "in"], model=loaded, out=tmp_path / "out", **options)

    return go


def files(out: Path) -> list[str]:
    return sorted(p.name.removeprefix(p.name.split(".")[0]) for p in out.iterdir() if p.name.startswith("case"))


def attempts(out: Path) -> int:
    (file,) = (out / "journal").glob("*.json")
    return int(json.loads(file.read_text())["attempts"])


def test_a_batch_corrects_what_is_allowed_and_says_so(run: Callable[..., BatchResult], tmp_path: Path) -> None:
    write(tmp_path / "in", "both")
    out = tmp_path / "out"
    (entry,) = run().entries
    assert (entry.state, entry.code) == ("refused", "MISSING_SLICES")
    assert "--allow irregular" in entry.message
    (entry,) = run(allow={"irregular"}).entries
    assert (entry.state, entry.code) == ("refused", "GANTRY_TILT")
    (entry,) = run(allow={"irregular", "tilt"}, formats=["nifti", "seg"]).entries
    assert entry.state == "done"
    assert {"TILT_CORRECTED", "SPACING_REGULARISED"} <= set(entry.notes)
    assert entry.correction == {
        "TiltDegrees": "17.00",
        "SliceGaps": "3.000 to 6.000 mm",
        "SliceStep": "3.000 mm",
    }
    assert files(out) == [".image.nii.gz", ".nii.gz", ".seg.dcm"]
    assert set(entry.outputs) == {p.name for p in out.iterdir() if p.name.startswith("case")}
    mask, image = (nibabel.load(out / f"{entry.id}{suffix}") for suffix in (".nii.gz", ".image.nii.gz"))
    assert mask.shape == image.shape
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert "TILT_CORRECTED" in (out / "summary.csv").read_text()
    assert attempts(out) == 3


def test_only_what_would_end_otherwise_is_done_again(run: Callable[..., BatchResult], tmp_path: Path) -> None:
    write(tmp_path / "in", "tilt")
    out = tmp_path / "out"
    counts = []
    for allow in ((), (), ("irregular",), ("tilt",), ("tilt",), ("tilt", "irregular"), (), ("tilt",)):
        (entry,) = run(allow=allow).entries
        counts.append((entry.code or entry.state, attempts(out), files(out)))
    refused, done = "GANTRY_TILT", [".nii.gz"]
    assert counts == [
        (refused, 1, []),
        (refused, 1, []),
        (refused, 1, []),
        ("done", 2, done),
        ("done", 2, done),
        ("done", 2, done),
        (refused, 3, []),
        ("done", 4, done),
    ]


def test_a_lost_image_is_written_again_and_is_no_input(run: Callable[..., BatchResult], tmp_path: Path) -> None:
    write(tmp_path / "in", "irregular")
    (entry,) = run(allow={"irregular"}).entries
    image = tmp_path / "out" / f"{entry.id}.image.nii.gz"
    content = image.read_bytes()
    image.unlink()
    (again,) = run(allow={"irregular"}).entries
    assert image.read_bytes() == content
    assert again == entry
    (tmp_path / "out").rename(tmp_path / "in" / "earlier")
    assert [row.id for row in run(allow={"irregular"}).entries] == [entry.id]
