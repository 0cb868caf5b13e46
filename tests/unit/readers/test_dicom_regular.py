"""Tilted and unevenly spaced series: refused, or on request brought to an upright, even grid that is true to place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.interpolate import RegularGridInterpolator
from scipy.ndimage import affine_transform, binary_erosion

from medseg.errors import ConfigError, GeometryError, ReadError
from medseg.phantom.dicom import write_series
from medseg.readers.allowances import ALLOWANCES, BEYOND, CORRECTABLE, NOTES, choose_allowances, still_true
from medseg.readers.dicom_geometry import faults, series_grid, series_stack
from medseg.readers.dicom_index import SeriesFiles
from medseg.readers.dicom_refusals import REFUSALS
from medseg.readers.dicom_regular import to_slices, to_upright, upright_grid
from medseg.readers.dicom_scan import find_series
from medseg.readers.dicom_series import each_once, read_series
from medseg.volume import Volume

Array = NDArray[np.float64]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
PIXEL = (0.8, 1.1)
SIZE = (40, 31)
BOTH = frozenset(ALLOWANCES)
ROOT3 = 3**-0.5

# direction of a row and of a column in LPS, by the way the patient lies and is sliced
WAYS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "axial, head first": ((1, 0, 0), (0, 1, 0)),
    "axial, feet first": ((-1, 0, 0), (0, 1, 0)),
    "axial, prone": ((-1, 0, 0), (0, -1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "oblique": ((ROOT3, ROOT3, ROOT3), (2**-0.5, -(2**-0.5), 0)),
}
GAPS = {
    "even": [2.5] * 8,
    "one missing": [2.5] * 3 + [5] + [2.5] * 3,
    "two missing": [2.5] * 3 + [7.5] + [2.5] * 3,
    "2.5, then 5": [2.5] * 4 + [5] * 4,
    "two stacks": [4] * 5 + [1.1] + [7] * 4,
    "one slice 0.4 mm off": [2.5, 2.5, 2.9, 2.1, 2.5, 2.5],
    "slowly wider": [2.5, 2.55, 2.6, 2.65, 2.7, 2.75, 2.8],
}


def linear(points: Array) -> Array:
    """A field without any symmetry that linear interpolation knows exactly: 9 HU a mm, each way another."""
    return np.asarray(points @ np.array([3.0, -5.0, 7.0]) + 20)


def blobs(points: Array) -> Array:
    """Three balls with soft edges around the middle of the stack: asymmetric in every direction."""
    value = np.full(points.shape[:-1], -900.0)
    for centre, height in (((0, 0, 0), 900), ((9, 2, 1), 500), ((-2, 8, -4), 300)):
        value += height * np.exp(-((points - np.array(centre)) ** 2).sum(axis=-1) / (2 * 6.0**2))
    return value


def stack(
    folder: Path,
    field: Callable[[Array], Array],
    *,
    way: str = "axial, head first",
    gaps: Sequence[float] = (2.5,) * 8,
    lean: tuple[float, float] = (0, 0),
    aside: dict[int, tuple[float, float]] | None = None,
    modality: str = "CT",
) -> list[Path]:
    """Write slices through `field` at their true places.

    lean: degrees along rows and columns; aside: slice -> mm along rows and columns off the line.
    """
    rows, columns = (np.array(direction, float) for direction in WAYS[way])
    normal = np.cross(rows, columns)
    depth = np.concatenate([[0], np.cumsum(gaps)])
    local = np.c_[depth[:, None] * np.tan(np.radians(lean)), depth]
    for number, shift in (aside or {}).items():
        local[number, :2] += shift
    local -= [(SIZE[0] - 1) / 2 * PIXEL[0], (SIZE[1] - 1) / 2 * PIXEL[1], depth[-1] / 2]
    positions = local @ np.array([rows, columns, normal])
    ij = np.stack(np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij"), axis=-1)
    inside = ij[..., :1] * PIXEL[0] * rows + ij[..., 1:] * PIXEL[1] * columns
    array = np.stack([field((position + inside) @ LPS_TO_RAS) for position in positions], axis=-1)
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ np.array([rows * PIXEL[0], columns * PIXEL[1], normal]).T
    files = write_series(Volume(array[None].astype(np.float32), affine), folder, modality=modality)  # type: ignore[arg-type]
    for file, position in zip(files, positions, strict=True):
        dataset = pydicom.dcmread(file)
        dataset.ImagePositionPatient = [f"{value + 0.0:.8f}"[:16] for value in position]
        dataset.save_as(file)
    return files


def places(volume: Volume) -> Array:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in volume.shape), indexing="ij"), axis=-1)
    return np.asarray(index @ volume.affine[:3, :3].T + volume.affine[:3, 3])


def covered(volume: Volume, margin: int = 2) -> NDArray[np.bool_]:
    """Voxels to which both neighbouring slices contribute: those some pixels away from the border of each plane."""
    disc = np.ones((3, 3, 1), bool)
    return np.asarray(binary_erosion(volume.array[0] != volume.array.min(), disc, iterations=margin))


LEANS = {"18 degrees": (0, 18.0), "-18 degrees": (0, -18.0), "along rows": (14.0, 0), "both ways": (-9.0, 11.0)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lean", LEANS)
def test_a_tilted_stack_becomes_upright_in_its_true_place(way: str, lean: str, tmp_path: Path) -> None:
    files = stack(tmp_path, linear, way=way, lean=LEANS[lean])
    with pytest.raises(GeometryError, match=r"--allow tilt") as refused:
        read_series(files)
    assert refused.value.code == "GANTRY_TILT"
    with pytest.raises(GeometryError):
        read_series(files, allow={"irregular"})
    volume = read_series(files, allow={"tilt"})
    assert volume.orthogonal
    assert volume.notes == ("TILT_CORRECTED",)
    assert float(volume.meta["TiltDegrees"]) == pytest.approx(
        np.degrees(np.arctan(np.hypot(*np.tan(np.radians(LEANS[lean]))))), abs=0.01
    )
    assert volume.shape[2] == 9
    np.testing.assert_allclose(volume.spacing, (*PIXEL, 2.5), rtol=1e-6)
    inner = covered(volume)
    assert inner.sum() > 5000
    # half a HU by rounding
    np.testing.assert_allclose(volume.array[0][inner], linear(places(volume))[inner], atol=0.51)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gaps", [name for name in GAPS if name != "even"])
@pytest.mark.parametrize("lean", [(0.0, 0.0), (3.0, -18.5)])
def test_an_uneven_stack_becomes_even_in_its_true_place(
    way: str, gaps: str, lean: tuple[float, float], tmp_path: Path
) -> None:
    files = stack(tmp_path, linear, way=way, gaps=GAPS[gaps], lean=lean)
    with pytest.raises(GeometryError) as refused:
        read_series(files)
    assert CORRECTABLE[refused.value.code] == "irregular"
    if any(lean):
        with pytest.raises(GeometryError) as refused:
            read_series(files, allow={"irregular"})
        assert refused.value.code == "GANTRY_TILT"
    volume = read_series(files, allow=BOTH)
    assert volume.orthogonal
    assert volume.notes == (("SPACING_REGULARISED", "TILT_CORRECTED") if any(lean) else ("SPACING_REGULARISED",))
    assert volume.meta["SliceGaps"] == f"{min(GAPS[gaps]):.3f} to {max(GAPS[gaps]):.3f} mm"
    length = (volume.shape[2] - 1) * volume.spacing[2]
    assert length == pytest.approx(sum(GAPS[gaps]), abs=1e-4), "the first and last plane are the first and last slice"
    inner = covered(volume, margin=5)  # 7.5 mm at 18.5 degrees are 3.1 pixels
    assert inner.sum() > 3000
    # a slice within 0.05 mm of a plane counts as on it: 7 HU a mm along the normal at most
    np.testing.assert_allclose(volume.array[0][inner], linear(places(volume))[inner], atol=0.51 + 0.05 * 9.2)


def test_the_step_is_the_finest_usual_gap(tmp_path: Path) -> None:
    steps = {}
    for name, gaps in GAPS.items():
        volume = read_series(stack(tmp_path / name.replace(",", ""), blobs, gaps=gaps), allow=BOTH)
        steps[name] = round(volume.spacing[2], 2)
    assert steps == {
        "even": 2.5,
        "one missing": 2.5,
        "two missing": 2.5,
        "2.5, then 5": 2.5,
        "two stacks": 4.09,  # 49.1 mm in 12 steps: the seam of 1.1 mm does not set the step
        "one slice 0.4 mm off": 2.5,
        "slowly wider": 2.65,
    }


def test_slices_on_a_plane_keep_their_values_to_the_bit(tmp_path: Path) -> None:
    files = stack(tmp_path, blobs, gaps=GAPS["two missing"])
    volume = read_series(files, allow={"irregular"})
    single = [pydicom.dcmread(file) for file in files]
    for dataset, k in zip(single, (0, 1, 2, 3, 6, 7, 8, 9), strict=True):
        values = dataset.pixel_array.T * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        np.testing.assert_array_equal(volume.array[0, :, :, k], values)


def test_a_slice_aside_is_brought_back_to_its_place(tmp_path: Path) -> None:
    files = stack(tmp_path, linear, aside={4: (3.1, -2.3)})
    with pytest.raises(GeometryError) as refused:
        read_series(files, allow={"tilt"})
    assert refused.value.code == "IRREGULAR_SPACING"
    volume = read_series(files, allow={"irregular"})
    inner = covered(volume)
    np.testing.assert_allclose(volume.array[0][inner], linear(places(volume))[inner], atol=0.51)


@pytest.mark.parametrize("lean", LEANS)
def test_tilt_agrees_with_scipy(lean: str, tmp_path: Path) -> None:
    files = stack(tmp_path, blobs, lean=LEANS[lean])
    headers = find_series(tmp_path)[0].headers
    slices = np.stack([pydicom.dcmread(f).pixel_array.T - 1024.0 for f in files], axis=-1)
    sheared = series_stack(headers).affine
    volume = read_series(files, allow={"tilt"})
    to_index = np.linalg.inv(sheared) @ volume.affine
    oracle = affine_transform(slices, to_index, output_shape=volume.shape, order=1, cval=np.nan)
    known = np.isfinite(oracle)
    assert known.mean() > 0.5
    np.testing.assert_allclose(volume.array[0][known], oracle[known], atol=2e-3)


@pytest.mark.parametrize("gaps", GAPS)
def test_uneven_gaps_agree_with_scipy(gaps: str, tmp_path: Path) -> None:
    files = stack(tmp_path, blobs, gaps=GAPS[gaps])
    slices = np.stack([pydicom.dcmread(f).pixel_array.T - 1024.0 for f in files], axis=-1)
    depth = np.concatenate([[0], np.cumsum(GAPS[gaps])])
    volume = read_series(files, allow=BOTH)
    planes = np.clip(np.arange(volume.shape[2]) * volume.spacing[2], 0, depth[-1])
    oracle = RegularGridInterpolator((np.arange(SIZE[0]), np.arange(SIZE[1]), depth), slices)
    index = np.stack(np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]), planes, indexing="ij"), axis=-1)
    # 60 HU a mm at the steepest, slices count as on a plane within 0.05 mm
    np.testing.assert_allclose(volume.array[0], oracle(index), atol=5)


@pytest.mark.parametrize("gaps", GAPS)
def test_what_lies_in_the_body_stays_in_its_place(gaps: str, tmp_path: Path) -> None:
    """The centre of what is bright is where it is in the patient, for tilt and gaps together."""
    files = stack(tmp_path, blobs, gaps=GAPS[gaps], lean=(0, 20), way="sagittal")
    volume = read_series(files, allow=BOTH)
    truth, found = blobs(places(volume)), volume.array[0]
    inner = covered(volume, margin=5)
    # linear interpolation over a length h is off by h^2/8 of the second derivative at most, here 1700 / 6^2 HU/mm^2
    most = (max(GAPS[gaps]) ** 2 + PIXEL[0] ** 2 + PIXEL[1] ** 2) / 8 * 1700 / 36 + 0.05 * 100
    assert np.abs(truth - found)[inner].max() < most
    bright = (truth > -300) & inner
    assert bright.sum() > 300
    dice = 2 * (bright & (found > -300)).sum() / (bright.sum() + ((found > -300) & inner).sum())
    assert dice > 0.95


@settings(max_examples=25, deadline=None)
@given(
    gaps=st.lists(st.floats(1.0, 2.9), min_size=2, max_size=9),
    lean=st.tuples(st.floats(-20, 20), st.floats(-20, 20)),
    way=st.sampled_from(sorted(WAYS)),
)
def test_any_allowed_geometry_is_true_to_place(
    gaps: list[float], lean: tuple[float, float], way: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    volume = read_series(stack(tmp_path_factory.mktemp("any"), linear, gaps=gaps, lean=lean, way=way), allow=BOTH)
    inner = covered(volume, margin=4)
    np.testing.assert_allclose(volume.array[0][inner], linear(places(volume))[inner], atol=0.51 + 0.05 * 9.2)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_a_regular_series_is_not_touched(modality: str, tmp_path: Path) -> None:
    files = stack(tmp_path, lambda points: np.abs(blobs(points)), modality=modality)
    plain, allowed = read_series(files), read_series(files, allow=BOTH)
    np.testing.assert_array_equal(allowed.array, plain.array)
    np.testing.assert_array_equal(allowed.affine, plain.affine)
    assert (allowed.notes, allowed.meta) == (plain.notes, plain.meta)


def test_outside_of_the_slices_is_air_in_ct_and_the_lowest_value_in_mr(tmp_path: Path) -> None:
    lean = (0.0, 25.0)
    ct = read_series(stack(tmp_path / "ct", lambda p: blobs(p) + 700, lean=lean), allow={"tilt"})
    assert ct.array[0, 0, -1, 0] == ct.array.min() == pytest.approx(-200, abs=5), "not below the image's own values"
    low = read_series(stack(tmp_path / "low", lambda p: blobs(p) - 1000, lean=lean), allow={"tilt"})
    assert low.array[0, 0, -1, 0] == -1024 > low.array.min()
    mr = read_series(stack(tmp_path / "mr", lambda p: blobs(p) + 1000, lean=lean, modality="MR"), allow={"tilt"})
    assert mr.array[0, 0, -1, 0] == mr.array.min() > 0


def incomplete(folder: Path, field: Callable[[Array], Array]) -> SeriesFiles:
    """Two time points of a tilted stack, the second without its last slice."""
    stack(folder / "first", field, lean=(0, 10))
    for number, file in enumerate(stack(folder / "second", field, lean=(0, 10))):
        dataset = pydicom.dcmread(file)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{dataset.SOPInstanceUID[:-3]}.7"
        dataset.AcquisitionNumber = 2
        dataset.save_as(file)
        if number == 8:
            file.unlink()
    whole, part = sorted(find_series(folder), key=lambda entry: -len(entry.files))
    assert [len(entry.files) for entry in (whole, part)] == [9, 8]
    assert read_series(whole, allow={"tilt"}).notes == ("TILT_CORRECTED",)
    return part


BEYOND_LIMITS = {
    "PART_INCOMPLETE": incomplete,
    "TILT_TOO_STEEP": partial(stack, lean=(0, 32)),
    "GAP_TOO_WIDE": partial(stack, gaps=[2.5] * 4 + [10] + [2.5] * 4),
    "SLICES_ASIDE": partial(stack, aside={3: (20, 0)}),
}


@pytest.mark.parametrize("code", BEYOND_LIMITS)
def test_what_goes_too_far_is_refused_even_if_allowed(code: str, tmp_path: Path) -> None:
    files = BEYOND_LIMITS[code](tmp_path, linear)
    with pytest.raises(GeometryError) as refused:
        read_series(files)
    assert refused.value.code in CORRECTABLE
    with pytest.raises(GeometryError) as refused:
        read_series(files, allow=BOTH)
    assert refused.value.code == code


def test_every_limit_has_a_case() -> None:
    assert set(BEYOND_LIMITS) == set(BEYOND)
    assert set(CORRECTABLE) | set(BEYOND) <= set(REFUSALS)


def test_a_corrected_volume_must_fit_memory_too(tmp_path: Path) -> None:
    files = stack(tmp_path, linear, lean=(0, 25))
    slices = 4 * SIZE[0] * SIZE[1] * 9
    with pytest.raises(ReadError) as refused:
        read_series(files, allow={"tilt"}, max_bytes=slices + 1000)
    assert refused.value.code == "OVERSIZED"


def test_damaged_files_beside_a_correctable_series_are_not_overlooked(tmp_path: Path) -> None:
    files = stack(tmp_path, linear, gaps=GAPS["one missing"])
    (tmp_path / "lost.dcm").write_bytes(files[0].read_bytes()[:400])
    (entry,) = find_series(tmp_path)
    assert entry.refusal is not None
    assert entry.refusal.code == "UNREADABLE"
    with pytest.raises(ReadError):
        read_series(entry, allow=BOTH)


def test_allowed_faults_excuse_no_other(tmp_path: Path) -> None:
    files = stack(tmp_path, linear, gaps=GAPS["one missing"], lean=(0, 10))
    dataset = pydicom.dcmread(files[2])
    dataset.PixelData = dataset.PixelData[:-100]
    dataset.save_as(files[2])
    with pytest.raises(ReadError) as refused:
        read_series(files, allow=BOTH)
    assert refused.value.code == "TRUNCATED"


# ---- back to the slices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gaps", GAPS)
def test_labels_come_back_to_every_slice_at_its_own_place(way: str, gaps: str, tmp_path: Path) -> None:
    stack(tmp_path, blobs, way=way, gaps=GAPS[gaps], lean=(5, -15))
    headers = each_once(find_series(tmp_path)[0].headers)[0]
    found = series_stack(headers)
    grid = upright_grid(found, BOTH)
    assert grid is not None
    empty = Volume(np.zeros((1, *grid.shape), np.uint8), grid.affine)
    labels = (blobs(places(empty)) > -500).astype(np.uint8)[None]
    slices = to_slices(labels, grid, found.size)
    ij = np.stack(np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij"), axis=-1)
    inside = ij[..., :1] * PIXEL[0] * found.axes[0] + ij[..., 1:] * PIXEL[1] * found.axes[1]
    truth = np.stack([blobs((p + inside) @ LPS_TO_RAS) > -500 for p in found.positions], axis=-1)
    assert slices.shape == (1, *SIZE, len(headers))
    dice = 2 * (truth & (slices[0] > 0)).sum() / (truth.sum() + slices.sum())
    # nearest voxels: half a pixel within the slice, half a step between slices
    assert dice > 0.9
    where = found.positions[:, None, None].transpose(1, 2, 0, 3) + inside[:, :, None]
    centre = where[truth].mean(axis=0) - where[slices[0] > 0].mean(axis=0)
    assert np.linalg.norm(centre) < 1.2, "half a step of 4.1 mm at most, evened out over the slices"


def test_whole_pixels_are_moved_and_moved_back_without_loss(tmp_path: Path) -> None:
    lean = (0, float(np.degrees(np.arctan(2 * PIXEL[1] / 2.5))))
    stack(tmp_path, linear, lean=lean)
    headers = find_series(tmp_path)[0].headers
    grid = upright_grid(series_stack(headers), {"tilt"}) if lean[1] < 31 else None
    if grid is None:
        lean = (0, float(np.degrees(np.arctan(PIXEL[1] / 2.5))))
        for file in tmp_path.iterdir():
            file.unlink()
        stack(tmp_path, linear, lean=lean)
        grid = upright_grid(series_stack(find_series(tmp_path)[0].headers), {"tilt"})
    assert grid is not None
    labels = np.random.default_rng(0).integers(0, 5, (1, *SIZE, 9))
    upright = to_upright(labels.astype(np.float32), grid, fill=0)
    np.testing.assert_array_equal(to_slices(upright.astype(np.uint8), grid, SIZE), labels)


# ---- words ----------------------------------------------------------------------------------------------------------


def test_words_are_chosen_by_name() -> None:
    assert choose_allowances([]) == choose_allowances([""]) == frozenset()
    assert choose_allowances(["tilt,irregular"]) == choose_allowances(["irregular", " tilt"]) == BOTH
    with pytest.raises(ConfigError, match="did you mean 'tilt'"):
        choose_allowances(["tilt,tilted"])


def test_a_result_stays_true_only_while_it_would_come_out_again() -> None:
    assert still_true(code="", notes=("DERIVED",), allow=())
    assert still_true(code="", notes=(), allow=BOTH)
    assert not still_true(code="GANTRY_TILT", notes=(), allow={"tilt"})
    assert still_true(code="GANTRY_TILT", notes=(), allow={"irregular"})
    assert not still_true(code="MISSING_SLICES", notes=(), allow=BOTH)
    assert not still_true(code="", notes=("TILT_CORRECTED",), allow=())
    assert still_true(code="", notes=("TILT_CORRECTED",), allow=BOTH)
    assert not still_true(code="GAP_TOO_WIDE", notes=(), allow={"tilt"})
    assert still_true(code="GAP_TOO_WIDE", notes=(), allow=BOTH)
    assert still_true(code="NO_POSITION", notes=(), allow=BOTH)


def test_the_sheared_affine_is_that_of_every_slice(tmp_path: Path) -> None:
    files = stack(tmp_path, linear, lean=(0, -18), way="oblique")
    headers = find_series(tmp_path)[0].headers
    found = series_stack(headers)
    assert faults(found).keys() == {"GANTRY_TILT"}
    with pytest.raises(GeometryError):
        series_grid(headers)
    for k, position in enumerate(found.positions):
        np.testing.assert_allclose(found.affine @ [0, 0, k, 1], [*(LPS_TO_RAS @ position), 1], atol=1e-6)
    assert len(files) == len(found.order)


def test_every_note_is_documented(repository: Path) -> None:
    page = (repository / "docs/reference/reason-codes.md").read_text(encoding="utf-8")
    assert all(f"| `{word}` |" in page for word in (*NOTES, *BEYOND))


# ---- real series ----------------------------------------------------------------------------------------------------

REAL = {
    # folder: what it is refused for, step and planes once corrected
    "dcm_qa_ct_ge_tilt": ("IRREGULAR_SPACING", 4.0025, (512, 611, 37), ("SPACING_REGULARISED", "TILT_CORRECTED")),
    "dicom2nifti/failing/gantrytilting/001": ("GANTRY_TILT", 4.8515, (512, 521, 4), ("TILT_CORRECTED",)),
    "dicom2nifti/failing/sliceincrement/001": ("MISSING_SLICES", 5.0, (512, 512, 5), ("SPACING_REGULARISED",)),
    "dicom2nifti/failing/sliceincrement/002": (
        "MISSING_SLICES",
        0.7497,
        (512, 514, 5),
        ("SPACING_REGULARISED", "TILT_CORRECTED"),
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_series_are_corrected(name: str, data: Path) -> None:
    code, step, shape, notes = REAL[name]
    (entry,) = find_series(data / "dicom_hard" / name)
    assert entry.refusal is not None
    assert entry.refusal.code == code
    volume = read_series(entry, allow=BOTH)
    assert volume.shape == shape
    assert volume.orthogonal
    np.testing.assert_allclose(volume.spacing[2], step, atol=1e-3)
    assert set(notes) <= set(volume.notes)
