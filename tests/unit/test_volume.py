"""Volumes: valid when constructed, and nothing that is lossless loses anything."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.testing import assert_allclose, assert_array_equal

from medseg.errors import GeometryError
from medseg.volume import Volume, align_to, corners, grid_distance, reorient, same_grid

ALL_CODES = [
    "".join(letters) for order in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*order)
]


def rotation(x: float, y: float, z: float) -> np.ndarray:
    return nibabel.eulerangles.euler2mat(z, y, x)


def volume(shape=(3, 4, 5), affine=None, channels: int = 1) -> Volume:
    array = np.arange(channels * np.prod(shape), dtype=np.int32).reshape(channels, *shape)
    return Volume(array, np.diag([1.5, 0.7, 3.0, 1.0]) if affine is None else affine)


@st.composite
def volumes(draw: st.DrawFn) -> Volume:
    """Any small volume: any rotation (also beyond 45 degrees), mirrored or not, sheared a little or not."""
    shape = draw(st.tuples(*[st.integers(1, 4)] * 3))
    angles = [draw(st.floats(-3.1, 3.1)) for _ in range(3)]
    spacing = [draw(st.floats(0.3, 5)) for _ in range(3)]
    signs = [draw(st.sampled_from([-1, 1])) for _ in range(3)]
    shear = np.eye(3)
    shear[1, 2] = draw(st.floats(-0.2, 0.2))
    matrix = rotation(*angles) @ shear @ np.diag(np.multiply(spacing, signs))
    origin = [draw(st.floats(-300, 300)) for _ in range(3)]
    array = draw(hnp.arrays(np.int16, (draw(st.integers(1, 2)), *shape)))
    return Volume(array, nibabel.affines.from_matvec(matrix, origin))


def value_at(vol: Volume, index: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the place (mm) and the values of a voxel."""
    return vol.affine[:3, :3] @ index + vol.affine[:3, 3], vol.array[(slice(None), *index)]


def contents(vol: Volume) -> dict[tuple[float, ...], tuple[int, ...]]:
    """Return place -> values of every voxel."""
    rows = [value_at(vol, index) for index in np.ndindex(*vol.shape)]
    return {tuple(np.round(place, 3) + 0.0): tuple(values.tolist()) for place, values in rows}


# --- construction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 3, 4), (1, 2, 3, 4, 5), (1, 0, 4, 5), (0, 3, 4, 5)])
def test_an_array_of_another_kind_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(GeometryError, match="C, I, J, K"):
        Volume(np.zeros(shape), np.eye(4))


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(3),
        np.zeros((4, 4)),
        np.diag([1.0, 1.0, 0.0, 1.0]),
        np.diag([1.0, np.nan, 1.0, 1.0]),
        np.diag([1.0, np.inf, 1.0, 1.0]),
        np.diag([1.0, 1.0, 1.0, 2.0]),
        np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    ],
)
def test_an_affine_that_places_nothing_is_refused(affine: np.ndarray) -> None:
    with pytest.raises(GeometryError) as caught:
        Volume(np.zeros((1, 2, 2, 2)), affine)
    assert caught.value.code == "BAD_AFFINE"


def test_fine_microscopy_is_no_singular_affine() -> None:
    """Voxels of 4 nm (electron microscopy) are small, not flat."""
    assert Volume(np.zeros((1, 2, 2, 2)), np.diag([4e-6, 4e-6, 4e-6, 1.0])).spacing == pytest.approx((4e-6,) * 3)


def test_a_volume_is_frozen_and_its_affine_its_own() -> None:
    given_affine = np.eye(4)
    made = Volume(np.zeros((1, 2, 2, 2)), given_affine)
    given_affine[0, 0] = 9
    assert made.affine[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        made.affine[0, 0] = 2
    with pytest.raises(FrozenInstanceError):
        made.unit = "pixel"  # type: ignore[misc]


def test_what_an_affine_says() -> None:
    affine = nibabel.affines.from_matvec(rotation(0.1, 0.2, 0.3) @ np.diag([-1.5, 0.7, 3.0]), [1, 2, 3])
    made = volume(affine=affine)
    assert made.spacing == pytest.approx((1.5, 0.7, 3.0))
    assert made.voxel_volume == pytest.approx(1.5 * 0.7 * 3)
    assert made.axis_codes == "".join(nibabel.aff2axcodes(affine)) == "LAS"
    assert made.orthogonal
    sheared = affine @ np.array([[1, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert not volume(affine=sheared).orthogonal
    # A shear keeps the volume of a voxel though the product of the spacings grows.
    assert volume(affine=sheared).voxel_volume == pytest.approx(1.5 * 0.7 * 3)


def test_another_array_must_fit() -> None:
    assert volume().with_array(np.zeros((7, 3, 4, 5))).array.shape == (7, 3, 4, 5)
    with pytest.raises(GeometryError, match="does not fit"):
        volume().with_array(np.zeros((1, 3, 4, 6)))


# --- axes --------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(volumes(), st.sampled_from(ALL_CODES))
def test_turning_axes_moves_no_voxel_and_can_be_undone(vol: Volume, codes: str) -> None:
    turned = reorient(vol, codes)
    assert turned.axis_codes == codes
    assert contents(turned) == contents(vol)
    back = reorient(turned, vol.axis_codes)
    assert_array_equal(back.array, vol.array)
    assert_allclose(back.affine, vol.affine, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(volumes(), st.sampled_from(ALL_CODES))
def test_turning_axes_is_what_nibabel_does(vol: Volume, codes: str) -> None:
    image = nibabel.Nifti1Image(vol.array[0], vol.affine)
    oracle = image.as_reoriented(ornt_transform(io_orientation(vol.affine), axcodes2ornt(tuple(codes))))
    turned = reorient(vol, codes)
    assert_array_equal(turned.array[0], np.asarray(oracle.dataobj))
    assert_allclose(turned.affine, oracle.affine, atol=1e-9)


@pytest.mark.parametrize("codes", ALL_CODES)
def test_a_label_map_in_any_of_the_48_orientations_is_aligned_without_loss(codes: str) -> None:
    affine = nibabel.affines.from_matvec(rotation(0.2, -0.1, 0.3) @ np.diag([0.8, 0.9, 2.0]), [10, -20, 30])
    reference = volume(affine=affine)
    aligned = align_to(reorient(reference, codes), reference)
    assert aligned is not None
    assert_array_equal(aligned.array, reference.array)
    # To the last bit: what is computed from the mask is computed on the very grid of the image.
    assert_array_equal(aligned.affine, reference.affine)


def test_all_48_are_there() -> None:
    assert len(set(ALL_CODES)) == 48


@pytest.mark.parametrize("less", [1e-5, 1e-7, -1e-5])
def test_a_rounding_that_renames_the_axes_does_not_separate_one_grid(less: float) -> None:
    """At 45 degrees an axis is as much R as A: the last digit decides, and two headers may decide differently."""
    angle = np.pi / 4
    reference = volume(shape=(4, 4, 4), affine=nibabel.affines.from_matvec(rotation(0, 0, angle + less), [0, 0, 0]))
    nearly = nibabel.affines.from_matvec(rotation(0, 0, angle - less), [0, 0, 0])
    aligned = align_to(Volume(reference.array, nearly), reference)
    assert aligned is not None
    assert_array_equal(aligned.array, reference.array)


def moved(vol: Volume, by: float, axis: int = 0) -> Volume:
    affine = vol.affine.copy()
    affine[axis, 3] += by
    return Volume(vol.array, affine)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: moved(v, 0.1),
        lambda v: Volume(v.array, v.affine @ np.diag([1, 1, 1.05, 1])),
        lambda v: Volume(v.array[:, :-1], v.affine),
        lambda v: Volume(v.array[:, ::-1], v.affine @ np.diag([-1, 1, 1, 1])),
        lambda v: Volume(v.array, nibabel.affines.from_matvec(rotation(0, 0, 0.05) @ v.affine[:3, :3])),
    ],
)
def test_another_grid_is_never_aligned(change) -> None:
    reference = volume()
    assert align_to(change(reference), reference) is None


def test_rounding_of_a_header_is_forgiven_and_a_hundredth_of_a_voxel_no_more() -> None:
    reference = volume(affine=np.diag([1.0, 1.0, 1.0, 1.0]))
    assert same_grid(moved(reference, 0.0099), reference)
    assert not same_grid(moved(reference, 0.0101), reference)
    fine = volume(affine=np.diag([0.01, 0.01, 0.01, 1.0]))
    assert same_grid(moved(fine, 0.0009), fine)
    assert not same_grid(moved(fine, 0.0011), fine)


def test_in_microscopy_a_shift_by_a_voxel_is_another_grid() -> None:
    reference = volume(affine=np.diag([4e-6, 4e-6, 4e-6, 1.0]))
    assert same_grid(moved(reference, 1e-7), reference)
    assert not same_grid(moved(reference, 4e-6), reference)


def test_a_mirrored_image_is_not_its_original() -> None:
    """The classic silent error: same size, same spacing, left and right exchanged."""
    right = volume(shape=(4, 4, 4), affine=np.diag([1.0, 1.0, 1.0, 1.0]))
    left = Volume(right.array, nibabel.affines.from_matvec(np.diag([-1.0, 1, 1]), [3, 0, 0]))
    aligned = align_to(left, right)
    assert aligned is not None
    assert_array_equal(aligned.array, right.array[:, ::-1])


def test_corners_and_distance() -> None:
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    assert (
        sorted(map(tuple, corners((3, 2, 1), affine)))
        == [(0, 0, 0)] * 2 + [(0, 1, 0)] * 2 + [(4, 0, 0)] * 2 + [(4, 1, 0)] * 2
    )
    # The far corner moves by 2 voxels x 0.5 mm.
    assert grid_distance((3, 2, 1), affine, np.diag([2.5, 1.0, 1.0, 1.0])) == pytest.approx(1.0)
