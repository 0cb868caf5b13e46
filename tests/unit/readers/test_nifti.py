"""The NIfTI reader against nibabel, and against damaged files: never silently wrong."""

from __future__ import annotations

import contextlib
import gzip
import struct
import tracemalloc
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Header
from numpy.testing import assert_array_equal

from medseg.errors import GeometryError, MedsegError, ReadError
from medseg.readers import nifti as module
from medseg.readers import read_image
from medseg.readers.nifti import holds, is_nifti, read_nifti, stem
from medseg.volume import Volume

# Not a rotation by 90 degrees, not isotropic, not at the origin.
AFFINE = nibabel.affines.from_matvec(
    np.array([[-0.9, 0.1, 0.0], [0.1, 1.1, 0.2], [0.02, -0.2, 2.5]]) @ np.eye(3), [12.5, -7.25, 100.0]
)
ROTATED = nibabel.affines.from_matvec(
    nibabel.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([0.8, 0.9, 2.5]), [5, 6, 7]
)


def save(path: Path, array: np.ndarray, affine: np.ndarray = ROTATED, *, kind=nibabel.Nifti1Image) -> Path:
    nibabel.save(kind(array, affine), path)
    return path


def code_of(path: Path, **options: object) -> str:
    with pytest.raises((ReadError, GeometryError)) as caught:
        read_nifti(path, **options)
    assert path.name in str(caught.value)
    assert str(path.parent) not in str(caught.value)
    return caught.value.code


def patch(path: Path, offset: int, content: bytes) -> None:
    """Overwrite bytes of an uncompressed file."""
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


# --- what is read equals what nibabel reads ----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "float32", "float64"])
def test_values_types_and_affine_are_those_of_nibabel(tmp_path, rng, suffix, kind, dtype) -> None:
    array = (rng.random((5, 6, 7)) * 100).astype(dtype)
    path = save(tmp_path / f"a{suffix}", array, kind=kind)
    volume, oracle = read_nifti(path), nibabel.load(path)
    assert volume.array.shape == (1, 5, 6, 7)
    assert_array_equal(volume.array[0], np.asarray(oracle.dataobj).astype(volume.array.dtype))
    assert volume.array.dtype == ("float32" if dtype.startswith("float") else dtype)
    assert_array_equal(volume.affine, oracle.affine)
    assert (volume.unit, volume.array.dtype.isnative, volume.array.flags.c_contiguous) == ("mm", True, True)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_big_endian_files(tmp_path, rng, kind) -> None:
    array = rng.integers(-1000, 1000, (4, 5, 6)).astype(">i2")
    header = kind.header_class(endianness=">")
    header.set_data_dtype(">i2")
    image = kind(array, ROTATED, header)
    image.header.set_xyzt_units("mm")
    path = tmp_path / "big.nii"
    nibabel.save(image, path)
    assert path.read_bytes()[:2] == b"\0\0"
    volume = read_nifti(path)
    assert_array_equal(volume.array[0], array)
    assert volume.array.dtype.isnative
    assert_array_equal(volume.affine, nibabel.load(path).affine)


def test_slope_and_intercept_are_applied_once(tmp_path, rng) -> None:
    image = nibabel.Nifti1Image(rng.integers(0, 1000, (4, 5, 6)).astype(np.int16), ROTATED)
    path = tmp_path / "scaled.nii"
    nibabel.save(image, path)
    patch(path, 112, struct.pack("<ff", 0.5, -1024.0))
    stored = nibabel.load(path)
    assert (stored.dataobj.slope, stored.dataobj.inter) == (0.5, -1024)
    volume = read_nifti(path)
    assert volume.array.dtype == np.float32
    assert_array_equal(volume.array[0], stored.get_fdata().astype(np.float32))


@pytest.mark.parametrize("part", [1, 700, 1 << 24])
def test_parts_of_any_size_are_scaled_alike(tmp_path, rng, monkeypatch, part) -> None:
    path = tmp_path / "scaled.nii"
    nibabel.save(nibabel.Nifti1Image(rng.integers(0, 1000, (4, 5, 7, 2)).astype(np.int16), ROTATED), path)
    patch(path, 112, struct.pack("<ff", 0.3, -7.0))
    monkeypatch.setattr(module, "_CHUNK", part)
    wanted = nibabel.load(path).get_fdata().astype(np.float32)
    assert_array_equal(read_nifti(path).array, np.moveaxis(wanted, 3, 0))


def test_scaling_takes_no_more_than_what_is_stored_and_what_is_asked_for(tmp_path) -> None:
    path = save(tmp_path / "a.nii", np.ones((256, 256, 256), np.int16))
    patch(path, 112, struct.pack("<ff", 0.5, 0.0))
    tracemalloc.start()
    read_nifti(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (2 + 4 + 3) * 256**3


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("part", [1, 100, 1 << 24])
def test_a_file_holds_one_volume_only(tmp_path, rng, monkeypatch, suffix, part) -> None:
    array = rng.integers(0, 50, (6, 5, 7)).astype(np.int16)
    path = save(tmp_path / f"a{suffix}", array)
    monkeypatch.setattr(module, "_CHUNK", part)
    volume = Volume(array[None], ROTATED)
    assert holds(path, volume)
    assert holds(path, Volume(array[None].astype(np.int32), ROTATED))
    for place in np.ndindex(2, 2, 2):
        other = array.copy()
        other[tuple(-at for at in place)] += 1
        assert not holds(path, Volume(other[None], ROTATED))
    assert not holds(path, Volume(array[None, :, :, :-1], ROTATED))
    assert not holds(path, Volume(array[None], ROTATED + np.eye(4, k=3)))
    data = gzip.decompress(path.read_bytes()) if suffix == ".nii.gz" else path.read_bytes()
    longer, shorter = tmp_path / f"longer{suffix}", tmp_path / f"shorter{suffix}"
    pack = gzip.compress if suffix == ".nii.gz" else bytes
    longer.write_bytes(pack(data + b"\0"))
    shorter.write_bytes(pack(data[:-1]))
    assert not holds(longer, volume)
    assert not holds(shorter, volume)


def test_what_is_scaled_or_damaged_is_not_what_was_written(tmp_path, rng) -> None:
    array = rng.integers(0, 50, (6, 5, 7)).astype(np.int16)
    volume = Volume(array[None], ROTATED)
    path = save(tmp_path / "a.nii", array)
    patch(path, 112, struct.pack("<ff", 2.0, 0.0))
    assert not holds(path, volume)
    packed = save(tmp_path / "b.nii.gz", array)
    damaged = bytearray(packed.read_bytes())
    damaged[-6] ^= 1  # the CRC of gzip
    packed.write_bytes(damaged)
    with pytest.raises(ReadError, match="damaged"):
        holds(packed, volume)


@pytest.mark.parametrize("slope", [0.0, 1.0, np.nan])
def test_a_slope_that_says_nothing_leaves_integers_alone(tmp_path, slope) -> None:
    path = save(tmp_path / "a.nii", np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    patch(path, 112, struct.pack("<ff", slope, 0.0))
    volume = read_nifti(path)
    assert volume.array.dtype == np.int16
    assert_array_equal(volume.array[0].ravel(), np.arange(60))


def test_four_axes_are_channels_and_five_only_with_one_time(tmp_path, rng) -> None:
    four = rng.random((3, 4, 5, 2)).astype(np.float32)
    assert_array_equal(read_nifti(save(tmp_path / "4.nii", four)).array, np.moveaxis(four, 3, 0))
    assert_array_equal(read_nifti(save(tmp_path / "5.nii", four[:, :, :, None])).array, np.moveaxis(four, 3, 0))
    assert code_of(save(tmp_path / "no.nii", np.zeros((3, 4, 5, 2, 2), np.uint8))) == "NOT_3D"


def test_one_slice_is_a_volume_of_one_slice(tmp_path) -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    volume = read_nifti(save(tmp_path / "flat.nii.gz", array))
    assert volume.array.shape == (1, 3, 4, 1)
    assert_array_equal(volume.array[0, :, :, 0], array)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1.0), ("meter", 1000.0), ("micron", 0.001), ("unknown", 1.0)])
def test_metres_and_micrometres_become_millimetres(tmp_path, unit, factor) -> None:
    image = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.uint8), ROTATED)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_nifti(tmp_path / "a.nii")
    expected = nibabel.load(tmp_path / "a.nii").affine
    np.testing.assert_allclose(volume.affine[:3], expected[:3] * factor, rtol=1e-12)
    assert_array_equal(volume.affine[3], (0, 0, 0, 1))


# --- the affine --------------------------------------------------------------------------------------------------


def forms(path: Path, sform: np.ndarray | None, qform: np.ndarray | None) -> Path:
    image = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.uint8), None)
    image.set_sform(sform, code=0 if sform is None else 1)
    image.set_qform(qform, code=0 if qform is None else 1)
    nibabel.save(image, path)
    return path


def test_the_sform_wins_and_either_alone_will_do(tmp_path) -> None:
    moved = ROTATED.copy()
    moved[:3, 3] += 3
    assert_array_equal(
        read_nifti(forms(tmp_path / "both.nii", moved, ROTATED)).affine, nibabel.load(tmp_path / "both.nii").get_sform()
    )
    np.testing.assert_allclose(read_nifti(forms(tmp_path / "q.nii", None, ROTATED)).affine, ROTATED, atol=1e-5)
    np.testing.assert_allclose(read_nifti(forms(tmp_path / "s.nii", AFFINE, None)).affine, AFFINE, atol=1e-5)


def test_no_form_is_refused(tmp_path) -> None:
    assert code_of(forms(tmp_path / "none.nii", None, None)) == "NO_ORIENTATION"


def test_forms_that_disagree_are_refused(tmp_path) -> None:
    mirrored, coarser = ROTATED @ np.diag([-1, 1, 1, 1]), ROTATED @ np.diag([1, 1, 1.05, 1])
    for number, other in enumerate((mirrored, coarser)):
        path = forms(tmp_path / f"{number}.nii", ROTATED, ROTATED)
        image = nibabel.load(path)
        image.set_qform(other, code=1)
        image.set_sform(ROTATED, code=1)
        nibabel.save(image, path)
        assert code_of(path) == "FORMS_DISAGREE"


def test_forms_that_differ_by_rounding_are_accepted(tmp_path) -> None:
    assert read_nifti(forms(tmp_path / "a.nii", ROTATED * (1 + 1e-4), ROTATED)).spacing == pytest.approx(
        (0.8, 0.9, 2.5), rel=1e-3
    )


@pytest.mark.parametrize("row", [np.zeros(4), np.full(4, np.nan), np.full(4, np.inf)])
def test_an_affine_that_is_none_is_refused(tmp_path, row) -> None:
    path = forms(tmp_path / "a.nii", ROTATED, None)
    patch(path, 280, row.astype("<f4").tobytes())  # srow_x
    assert code_of(path) == "BAD_AFFINE"


def test_a_qform_that_is_no_rotation_is_refused(tmp_path) -> None:
    path = forms(tmp_path / "a.nii", None, ROTATED)
    patch(path, 256, struct.pack("<fff", 1.0, 1.0, 1.0))  # quatern_b, c, d: longer than a unit quaternion
    assert code_of(path) == "BAD_AFFINE"


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, rng: np.random.Generator) -> Path:
    return save(tmp_path / "small.nii", rng.integers(0, 50, (6, 5, 4)).astype(np.int16))


def test_a_plain_file_cut_anywhere_is_truncated(small: Path) -> None:
    whole = small.read_bytes()
    for length in (0, 1, 100, 347, 348, 351, 352, 353, len(whole) - 1):
        small.write_bytes(whole[:length])
        assert code_of(small) == "TRUNCATED"


def test_a_compressed_file_cut_anywhere_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    path = save(tmp_path / "a.nii.gz", rng.integers(0, 50, (6, 5, 4)).astype(np.int16))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert code_of(path) == "TRUNCATED"


def test_bytes_after_the_voxels_are_refused(small: Path) -> None:
    whole = small.read_bytes()
    small.write_bytes(whole + b"\0")
    assert code_of(small) == "SIZE_MISMATCH"
    packed = small.with_suffix(".nii.gz")
    packed.write_bytes(gzip.compress(whole + b"\0"))
    assert code_of(packed) == "SIZE_MISMATCH"


def test_no_flipped_bit_of_a_compressed_file_is_silent(tmp_path: Path, rng: np.random.Generator) -> None:
    """Flip every bit of a whole .nii.gz: each file is refused, or gives the very same volume."""
    array = np.zeros((8, 8, 6), np.int16)
    array[3:6, 3:6, 2:4] = rng.integers(0, 300, (3, 3, 2))
    path = save(tmp_path / "a.nii.gz", array)
    whole, good = path.read_bytes(), read_nifti(path)
    refused = silent = 0
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            volume = read_nifti(path)
        except MedsegError:
            refused += 1
        else:
            same = np.array_equal(volume.array, good.array) and np.array_equal(volume.affine, good.affine)
            silent += not same
    assert silent == 0
    # All but the few bits of gzip's own header that say nothing about the content (time, system, name).
    assert refused > 0.9 * len(whole) * 8


def test_damage_within_the_deflate_stream_is_corrupt(tmp_path: Path, rng: np.random.Generator) -> None:
    path = save(tmp_path / "a.nii.gz", rng.integers(0, 2**15, (16, 16, 16)).astype(np.int16))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 16
    path.write_bytes(whole)
    assert code_of(path) == "CORRUPT"


def test_a_second_gzip_member_with_more_bytes_is_refused(small: Path) -> None:
    packed = small.with_suffix(".nii.gz")
    packed.write_bytes(gzip.compress(small.read_bytes()) + gzip.compress(b"more"))
    assert code_of(packed) == "SIZE_MISMATCH"


def test_garbage_after_the_gzip_member_is_refused(small: Path) -> None:
    packed = small.with_suffix(".nii.gz")
    packed.write_bytes(gzip.compress(small.read_bytes()) + b"garbage")
    assert code_of(packed) in ("CORRUPT", "SIZE_MISMATCH")


def test_two_members_that_together_make_the_file_are_one_file(small: Path) -> None:
    """RFC 1952 section 2.2: a gzip file is a series of members (pigz and bgzip write several)."""
    whole, packed = small.read_bytes(), small.with_suffix(".nii.gz")
    packed.write_bytes(gzip.compress(whole[:400]) + gzip.compress(whole[400:]))
    assert_array_equal(read_nifti(packed).array, read_nifti(small).array)


def code_and_peak(path: Path) -> tuple[str, int]:
    """Return the reason code of the refusal, and how many bytes were allocated at most until then."""
    tracemalloc.start()
    try:
        return code_of(path), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def header_bytes(shape: tuple[int, ...], dtype: str = "<i2") -> bytes:
    header = Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(np.eye(4), code=1)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    return header.binaryblock + b"\0" * 4


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_that_promises_too_much_is_refused_before_anything_is_allocated(tmp_path: Path, suffix: str) -> None:
    content = header_bytes((32767, 32767, 32767))
    path = tmp_path / f"huge{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    code, peak = code_and_peak(path)
    assert code == "OVERSIZED"
    assert peak < 5_000_000


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_promise_within_the_budget_is_not_believed_either(tmp_path: Path, suffix: str) -> None:
    content = header_bytes((1024, 1024, 1024)) + b"\0" * 1000
    path = tmp_path / f"liar{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    code, peak = code_and_peak(path)
    assert code == "TRUNCATED"
    assert peak < 50_000_000


def test_a_bomb_is_not_inflated_beyond_what_its_header_promises(tmp_path: Path) -> None:
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(header_bytes((10, 10, 10)) + b"\0" * 200_000_000, 1))
    code, peak = code_and_peak(path)
    assert code == "SIZE_MISMATCH"
    assert peak < 5_000_000


def test_a_bomb_before_the_voxels_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.nii.gz"
    header = bytearray(header_bytes((10, 10, 10)))
    header[108:112] = struct.pack("<f", 2.0**60)
    path.write_bytes(gzip.compress(bytes(header) + b"\0" * 100_000_000, 1))
    code, peak = code_and_peak(path)
    assert code == "TRUNCATED"
    assert peak < 50_000_000


@pytest.mark.parametrize("offset", [np.nan, np.inf, -np.inf, -1.0, 1e30, 3.0])
def test_an_impossible_voxel_offset_is_refused(small: Path, offset: float) -> None:
    patch(small, 108, struct.pack("<f", offset))
    assert code_of(small) in ("CORRUPT", "TRUNCATED", "UNREADABLE", "OVERSIZED")


@pytest.mark.parametrize("size", [(0, 5, 4), (-6, 5, 4)])
def test_an_impossible_size_is_refused(small: Path, size: tuple[int, ...]) -> None:
    patch(small, 42, struct.pack("<3h", *size))
    assert code_of(small) in ("CORRUPT", "UNREADABLE")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    array = np.zeros((3, 4, 5), np.float32)
    array[1, 2, 3] = value
    path = save(tmp_path / "a.nii.gz", array)
    with pytest.raises(ReadError, match="1 of 60 voxels") as caught:
        read_nifti(path)
    assert caught.value.code == "NON_FINITE"


def test_a_double_too_large_for_single_precision_is_refused(tmp_path: Path) -> None:
    assert code_of(save(tmp_path / "a.nii", np.full((3, 4, 5), 1e300))) == "NON_FINITE"


def test_a_scale_factor_that_overflows_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.full((3, 4, 5), 30000, np.int16))
    patch(path, 112, struct.pack("<ff", 3e38, 0.0))
    assert code_of(path) == "NON_FINITE"


def test_complex_and_colour_voxels_are_refused(tmp_path: Path) -> None:
    assert code_of(save(tmp_path / "c.nii", np.zeros((3, 4, 5), np.complex64))) == "UNSUPPORTED_TYPE"
    rgb = np.zeros((3, 4, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert code_of(save(tmp_path / "rgb.nii", rgb)) == "UNSUPPORTED_TYPE"


def test_a_header_of_a_pair_is_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(np.zeros((3, 4, 5), np.uint8), ROTATED), tmp_path / "pair.img")
    (tmp_path / "pair.nii").write_bytes((tmp_path / "pair.hdr").read_bytes())
    assert code_of(tmp_path / "pair.nii") in ("UNSUPPORTED_TYPE", "TRUNCATED")


def test_something_else_under_the_name_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "text.nii"
    path.write_text("This is no image. " * 100)
    assert code_of(path) == "UNREADABLE"
    path.write_bytes(rng.bytes(5000))
    assert code_of(path) in ("UNREADABLE", "CORRUPT", "TRUNCATED", "OVERSIZED", "UNSUPPORTED_TYPE")
    path.write_bytes(zlib.compress(b"no gzip" * 100))
    assert code_of(path) in ("UNREADABLE", "TRUNCATED")


def test_random_damage_of_a_header_never_escapes_as_another_error(small: Path, rng: np.random.Generator) -> None:
    whole = small.read_bytes()
    for _ in range(800):
        damaged = bytearray(whole)
        for place in rng.integers(0, 352, rng.integers(1, 6)):
            damaged[place] = int(rng.integers(0, 256))
        small.write_bytes(damaged)
        with contextlib.suppress(MedsegError):
            read_nifti(small, max_bytes=10**6)


def test_a_folder_or_a_missing_file(tmp_path: Path) -> None:
    assert code_of(tmp_path / "gone.nii") == "UNREADABLE"
    (tmp_path / "folder.nii").mkdir()
    assert code_of(tmp_path / "folder.nii") == "UNREADABLE"
    with pytest.raises(ReadError) as caught:
        read_image(tmp_path / "gone.nii")
    assert caught.value.code == "NOT_FOUND"


def test_names() -> None:
    assert is_nifti(Path("a.nii"))
    assert is_nifti(Path("a.NII.GZ"))
    assert not is_nifti(Path("a.gz"))
    assert stem(Path("/x/case.1.nii.gz")) == "case.1"
    assert stem(Path("case.nii")) == "case"
