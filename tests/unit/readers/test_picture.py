"""Pictures: what is read is what another library wrote, whatever the type; what cannot be read right is refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import tifffile
from numpy.typing import NDArray
from PIL import Image

from medseg.errors import ReadError
from medseg.readers import read_image, read_labels
from medseg.readers.picture import read_picture, read_picture_labels
from medseg.spec import load_dataset
from medseg.studies import read_study

RNG = np.random.default_rng(20260405)
HEIGHT, WIDTH = 13, 9
TURNED = {  # TIFF 6.0, tag Orientation: what is stored -> what people see
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def noise(dtype: str, *more: int) -> NDArray[Any]:
    shape = (HEIGHT, WIDTH, *more)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return RNG.normal(size=shape).astype(kind)
    info = np.iinfo(kind)
    return RNG.integers(info.min, info.max, shape, dtype=kind, endpoint=True)


def expected(rows: NDArray[Any]) -> NDArray[Any]:
    """(rows, columns[, channels]) -> (C, I, J, 1)."""
    rows = rows[..., None] if rows.ndim == 2 else rows
    return rows.transpose(2, 1, 0)[..., None]


def png(width: int, height: int, depth: int, colour: int, raw: bytes, *, extra: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND")


def chunk(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def refusal(path: Path) -> str:
    with pytest.raises(ReadError) as caught:
        read_picture(path)
    return caught.value.code


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_png_is_read_as_simpleitk_wrote_it(tmp_path: Path, dtype: str, channels: tuple[int, ...]) -> None:
    rows = noise(dtype, *channels)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(rows, isVector=bool(channels)), str(tmp_path / "a.png"))
    volume = read_image(tmp_path / "a.png")
    assert volume.array.dtype == rows.dtype
    np.testing.assert_array_equal(volume.array, expected(rows))
    assert volume.unit == "pixel"
    np.testing.assert_array_equal(volume.affine, np.eye(4))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8", "int16", "int32", "float32"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("pages", [1, 4])
def test_tiff_of_every_type_is_read_as_tifffile_wrote_it(
    tmp_path: Path, dtype: str, order: Any, compression: str | None, pages: int
) -> None:
    """Pillow alone swaps the bytes of half of these and says nothing."""
    stack = np.stack([noise(dtype) for _ in range(pages)])
    file = tmp_path / "a.tif"
    written = stack if pages > 1 else stack[0]
    tifffile.imwrite(file, written, byteorder=order, compression=compression, photometric="minisblack")
    volume = read_image(file)
    assert volume.array.dtype == stack.dtype
    np.testing.assert_array_equal(volume.array, stack.transpose(2, 1, 0)[None])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_colour_tiff(tmp_path: Path, dtype: str, planar: Any, bigtiff: bool) -> None:
    rows = noise(dtype, 3)
    stored = rows if planar == "contig" else np.moveaxis(rows, -1, 0)
    file = tmp_path / "a.TIFF"
    tifffile.imwrite(file, stored, photometric="rgb", planarconfig=planar, bigtiff=bigtiff)
    if (dtype, planar) == ("uint16", "separate"):
        assert refusal(file) == "UNSUPPORTED_TYPE"
    else:
        np.testing.assert_array_equal(read_image(file).array, expected(rows))


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_tiff_compressions_of_pillow(tmp_path: Path, compression: str) -> None:
    rows = noise("uint16")
    Image.fromarray(rows).save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array, expected(rows))


def test_white_is_zero(tmp_path: Path) -> None:
    rows = noise("uint8")
    tifffile.imwrite(tmp_path / "a.tif", rows, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array, expected(255 - rows))
    tifffile.imwrite(tmp_path / "b.tif", noise("uint16"), photometric="miniswhite")
    assert refusal(tmp_path / "b.tif") == "UNSUPPORTED_TYPE"


@pytest.mark.parametrize(("bits", "top"), [(1, 1), (2, 3), (4, 15), (8, 255)])
def test_small_grey_png_holds_the_stored_values(tmp_path: Path, bits: int, top: int) -> None:
    rows = RNG.integers(0, top, (HEIGHT, 8), dtype=np.uint8, endpoint=True)
    spread = np.unpackbits(rows[..., None], axis=-1)[..., 8 - bits :].reshape(HEIGHT, -1)
    raw = b"".join(b"\0" + np.packbits(row).tobytes() for row in spread)
    (tmp_path / "a.png").write_bytes(png(8, HEIGHT, bits, 0, raw))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").array, expected(rows))


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["png", "jpg", "tif"])
def test_orientation_is_honoured(tmp_path: Path, orientation: int, kind: str) -> None:
    rows = np.zeros((16, 32), np.uint8)
    rows[:8, :8], rows[:8, 24:], rows[8:, :8] = 200, 120, 60  # three corners tell all eight apart
    file = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[274] = orientation
    options: dict[str, Any] = {"exif": exif} if kind != "tif" else {"tiffinfo": {274: orientation}}
    Image.fromarray(rows).save(file, **options)
    volume = read_image(file)
    np.testing.assert_allclose(volume.array, expected(TURNED[orientation](rows)), atol=12 if kind == "jpg" else 0)
    assert ("ORIENTATION_APPLIED" in volume.notes) == (orientation != 1)


def test_orientation_of_pages_and_of_wide_types(tmp_path: Path) -> None:
    stack = np.stack([noise("uint8") for _ in range(3)])
    tag = [(274, "H", 1, 6, True)]
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", extratags=[(274, "H", 1, 6, False)])
    turned = np.stack([np.rot90(page, -1) for page in stack])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array, turned.transpose(2, 1, 0)[None])
    tifffile.imwrite(tmp_path / "b.tif", noise("float32"), photometric="minisblack", extratags=tag)
    assert refusal(tmp_path / "b.tif") == "UNSUPPORTED_TYPE"


def test_jpeg_is_noted_as_lossy_and_never_a_label_map(tmp_path: Path) -> None:
    Image.new("RGB", (32, 16), (200, 30, 90)).save(tmp_path / "a.jpg", quality=95)
    volume = read_image(tmp_path / "a.jpg")
    assert volume.array.shape == (3, 32, 16, 1)
    assert "LOSSY" in volume.notes
    with pytest.raises(ReadError) as caught:
        read_labels(tmp_path / "a.jpg")
    assert caught.value.code == "LABEL_LOSSY"


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha(tmp_path: Path, mode: str) -> None:
    rows = noise("uint8", len(mode))
    Image.fromarray(rows, mode).save(tmp_path / "varied.png")
    assert refusal(tmp_path / "varied.png") == "TRANSPARENT"
    rows[..., -1] = 255
    Image.fromarray(rows, mode).save(tmp_path / "same.png")
    volume = read_image(tmp_path / "same.png")
    np.testing.assert_array_equal(volume.array, expected(rows[..., :-1]))
    assert volume.notes == ("ALPHA_DROPPED",)


@pytest.mark.parametrize("samples", [3, 4])
def test_alpha_of_16_bits(tmp_path: Path, samples: int) -> None:
    rows = noise("uint16", samples)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(rows, isVector=True), str(tmp_path / "a.png"))
    if samples == 4:
        assert refusal(tmp_path / "a.png") == "TRANSPARENT"
        rows[..., -1] = 65535
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(rows, isVector=True), str(tmp_path / "a.png"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").array, expected(rows[..., :3]))


def test_grey_and_alpha_of_16_bits_is_refused(tmp_path: Path) -> None:
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in noise("uint16", 2))
    (tmp_path / "a.png").write_bytes(png(WIDTH, HEIGHT, 16, 4, raw))
    assert refusal(tmp_path / "a.png") == "UNSUPPORTED_TYPE"


def test_a_colour_declared_transparent(tmp_path: Path) -> None:
    rows = np.full((HEIGHT, WIDTH), 7, np.uint8)
    rows[3, 4] = 9
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    unused, used = (chunk(b"tRNS", struct.pack(">H", value)) for value in (200, 9))
    (tmp_path / "a.png").write_bytes(png(WIDTH, HEIGHT, 8, 0, raw, extra=unused))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").array, expected(rows))
    (tmp_path / "a.png").write_bytes(png(WIDTH, HEIGHT, 8, 0, raw, extra=used))
    assert refusal(tmp_path / "a.png") == "TRANSPARENT"


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_palette_is_labels_but_no_image(tmp_path: Path, kind: str) -> None:
    rows = RNG.integers(0, 4, (HEIGHT, WIDTH), dtype=np.uint8)
    picture = Image.fromarray(rows).convert("P")
    picture.putdata(rows.ravel().tolist())
    picture.putpalette([9, 8, 7, 250, 0, 0, 0, 250, 0, 0, 0, 250])
    file = tmp_path / f"a.{kind}"
    picture.save(file)
    assert refusal(file) == "PALETTE"
    np.testing.assert_array_equal(read_labels(file).array, expected(rows))


def test_label_maps(tmp_path: Path) -> None:
    ids = RNG.integers(0, 40_000, (HEIGHT, WIDTH), dtype=np.uint16)
    Image.fromarray(ids).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png").array, expected(ids))
    grey = np.repeat(noise("uint8")[..., None], 3, axis=-1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_picture_labels(tmp_path / "grey.png").array, expected(grey[..., 0]))
    grey[0, 0, 0] ^= 1
    Image.fromarray(grey).save(tmp_path / "colour.png")
    with pytest.raises(ReadError) as caught:
        read_picture_labels(tmp_path / "colour.png")
    assert caught.value.code == "NOT_3D"


@pytest.mark.parametrize("metadata", [{"axes": "ZYX"}, {"axes": "TYX"}, {"axes": "CYX"}])
@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_pages_that_are_more_than_slices(tmp_path: Path, metadata: dict[str, str], kind: str) -> None:
    stack = np.stack([noise("uint16") for _ in range(4)])
    options: dict[str, Any] = {kind: True}
    tifffile.imwrite(tmp_path / "a.tif", stack, metadata=metadata, photometric="minisblack", **options)
    if metadata["axes"] == "ZYX":
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array, stack.transpose(2, 1, 0)[None])
    else:
        assert refusal(tmp_path / "a.tif") == "MIXED_PAGES"


def test_pages_of_several_sizes_and_animations(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(np.zeros((8, 8), np.uint8), photometric="minisblack")
        writer.write(np.zeros((4, 4), np.uint8), photometric="minisblack")
    assert refusal(tmp_path / "a.tif") == "MIXED_PAGES"
    frames = [Image.fromarray(noise("uint8")) for _ in range(2)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    assert refusal(tmp_path / "a.png") == "MIXED_PAGES"


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8)).save(tmp_path / "a.jpg")
    assert refusal(tmp_path / "a.jpg") == "UNSUPPORTED_TYPE"
    Image.new("CMYK", (8, 8)).save(tmp_path / "a.tif")
    assert refusal(tmp_path / "a.tif") == "UNSUPPORTED_TYPE"
    Image.new("LAB", (8, 8)).save(tmp_path / "b.tif")
    assert refusal(tmp_path / "b.tif") == "UNSUPPORTED_TYPE"
    tifffile.imwrite(tmp_path / "c.tif", noise("float64"), photometric="minisblack")
    assert refusal(tmp_path / "c.tif") == "UNSUPPORTED_TYPE"
    tifffile.imwrite(tmp_path / "d.tif", noise("float16"), photometric="minisblack")
    assert refusal(tmp_path / "d.tif") == "UNSUPPORTED_TYPE"
    tifffile.imwrite(tmp_path / "e.tif", noise("uint8", 5), photometric="rgb", extrasamples=[0, 0])
    assert refusal(tmp_path / "e.tif") == "UNSUPPORTED_TYPE"
    Image.new("L", (8, 8)).save(tmp_path / "gif.png", format="GIF")
    assert refusal(tmp_path / "gif.png") == "UNREADABLE"
    (tmp_path / "empty.png").write_bytes(b"")
    assert refusal(tmp_path / "empty.png") == "UNREADABLE"


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    rows = noise("uint8")
    Image.fromarray(rows).save(tmp_path / "a.jpg", format="PNG")
    volume = read_image(tmp_path / "a.jpg")
    np.testing.assert_array_equal(volume.array, expected(rows))
    assert volume.notes == ()


def test_bombs_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(60_000, 60_000, 8, 0, b"\0" * 100))
    assert refusal(tmp_path / "a.png") == "OVERSIZED"
    tifffile.imwrite(tmp_path / "a.tif", noise("uint8"), photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        for name in ("ImageWidth", "ImageLength"):
            file.pages[0].tags[name].overwrite(60_000)
    assert refusal(tmp_path / "a.tif") == "OVERSIZED"
    Image.new("L", (64, 64)).save(tmp_path / "b.png")
    with pytest.raises(ReadError) as caught:
        read_picture(tmp_path / "b.png", max_bytes=4095)
    assert caught.value.code == "OVERSIZED"
    assert read_picture(tmp_path / "b.png", max_bytes=4096).shape == (64, 64, 1)


def test_non_finite(tmp_path: Path) -> None:
    rows = noise("float32")
    rows[2, 3] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", rows, photometric="minisblack")
    assert refusal(tmp_path / "a.tif") == "NON_FINITE"


def _files(folder: Path) -> list[Path]:
    grey, wide = noise("uint8"), noise("uint16", 3)
    Image.fromarray(grey).save(folder / "grey.png")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(wide, isVector=True), str(folder / "wide.png"))
    for compression in (None, "zlib"):
        name = compression or "plain"
        tifffile.imwrite(
            folder / f"{name}.tif", np.stack([grey] * 3), compression=compression, photometric="minisblack"
        )
        tifffile.imwrite(folder / f"{name}32.tif", noise("float32"), compression=compression, photometric="minisblack")
    smooth = np.add.outer(np.arange(64), np.arange(48)).astype(np.uint8)
    Image.fromarray(smooth).save(folder / "a.jpg")
    return sorted(folder.iterdir())


def test_a_file_cut_anywhere_is_refused_or_the_same(tmp_path: Path) -> None:
    codes = set()
    for file in _files(tmp_path):
        whole, bytes_ = read_picture(file).array, file.read_bytes()
        for length in sorted({*range(0, len(bytes_), max(1, len(bytes_) // 25)), len(bytes_) - 1}):
            file.write_bytes(bytes_[:length])
            try:
                found = read_picture(file).array
            except ReadError as error:
                codes.add(error.code)
            else:
                np.testing.assert_array_equal(found, whole, err_msg=f"{file.name} cut at {length}")
    assert codes == {"TRUNCATED", "CORRUPT", "UNREADABLE"}


def test_a_flipped_bit_is_an_error_or_a_picture_never_a_crash(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    for file in _files(tmp_path):
        bytes_ = file.read_bytes()
        whole = read_picture(file)
        for _ in range(25):
            damaged = bytearray(bytes_)
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
            try:
                found = read_picture(file)
            except ReadError:
                continue
            if file.suffix == ".png":
                np.testing.assert_array_equal(found.array, whole.array)  # each byte is under a checksum


def test_real_membranes(data: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSEG_DATA", str(data))
    dataset = load_dataset(repository / "data_specs" / "em_isbi2012.yaml")
    assert len(dataset.cases) == 24
    study = read_study(dataset.spec, dataset.cases[3])
    assert study.mask is not None
    assert (study.image.shape, study.image.unit, study.image.notes) == ((512, 512, 1), "pixel", ())
    assert set(np.unique(study.mask.array)) == {0, 255}
    rows = np.asarray(Image.open(dataset.cases[3].images[0]))
    np.testing.assert_array_equal(study.image.array, expected(rows))
    membranes = study.mask.array == 0
    assert study.image.array[membranes].mean() < study.image.array[~membranes].mean() - 30, "membranes are dark"


def test_real_nuclei(data: Path) -> None:
    for file in sorted((data / "nuclei" / "images").iterdir())[::20]:
        image, ids = read_image(file), read_labels(data / "nuclei" / "labels" / file.name)
        assert image.array.shape[0] == 3
        assert image.notes == ("ALPHA_DROPPED",)
        np.testing.assert_array_equal(image.array, expected(np.asarray(Image.open(file))[..., :3]))
        assert ids.array.dtype == np.uint16
        assert ids.shape == image.shape
        assert ids.array.max() > 0
