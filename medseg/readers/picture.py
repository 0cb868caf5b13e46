"""PNG, TIFF and JPEG pictures -> Volume in pixels, or a refusal with a reason code.

Policies (a file that meets none of them is refused, never guessed at):

- place: I is the column and J the row of the picture as people see it (EXIF and TIFF orientation applied), K the page
  of a TIFF. The unit is the pixel and the affine the identity: a resolution tag says how to print, not what was seen;
- values: as stored. Grey of 1, 2 or 4 bits is 0 to 1, 3 or 15; RGB is three channels; NaN or infinity is NON_FINITE;
- alpha: dropped with a note where it is the same everywhere, else TRANSPARENT;
- palette: PALETTE for an image, whose indices mean nothing; in a label map the indices are the labels;
- size: compared with a budget before anything is allocated.

Pillow decodes what it represents to the bit. 16-bit colour and the wide types of TIFF are SimpleITK's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from medseg.errors import ReadError
from medseg.readers.picture_facts import PictureFacts, picture_facts, unsupported
from medseg.volume import Volume

SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")
MAX_BYTES = 4 * 2**30
"""Largest picture that is read, decoded (4 GiB)."""
MAX_PIXELS = 89_478_485
"""Largest page (Pillow's own limit): beyond it a small file is more likely a trap than a picture."""
_PLUGINS: dict[str, Callable[[BinaryIO], Image.Image]] = {
    "PNG": PngImageFile,
    "TIFF": TiffImageFile,
    "JPEG": JpegImageFile,
}
_MODES = ("1", "L", "LA", "RGB", "RGBA", "P", "I;16", "I;16B", "I;16L")
"""What Pillow decodes to the bit."""
Pixels = NDArray[Any]


def is_picture(path: Path) -> bool:
    """Tell by its name whether `path` is a picture."""
    return path.suffix.lower() in SUFFIXES


def read_picture(path: Path, *, max_bytes: int = MAX_BYTES) -> Volume:
    """Read a picture as an image.

    Returns
    -------
    Volume : (C, I, J, K) in pixels; C is 1 (grey) or 3 (RGB), K the number of pages; uint8, uint16, uint32, int8,
        int16, int32 or float32.

    Raises
    ------
    ReadError : UNREADABLE, TRUNCATED, CORRUPT, OVERSIZED, UNSUPPORTED_TYPE, MIXED_PAGES, PALETTE, TRANSPARENT,
        NON_FINITE.
    """
    facts = _allowed(path, max_bytes)
    if facts.colours == "palette":
        raise ReadError(
            f"{path.name}: its pixels are numbers of a palette, which are no intensities; save it as RGB or grey",
            code="PALETTE",
        )
    return _read(path, facts)


def read_picture_labels(path: Path, *, max_bytes: int = MAX_BYTES) -> Volume:
    """Read a picture as a label map (1, I, J, K): the indices of a palette; RGB only where it is grey.

    Raises
    ------
    ReadError : as `read_picture`, but for PALETTE; LABEL_LOSSY (JPEG), NOT_3D (colours).
    """
    facts = _allowed(path, max_bytes)
    if facts.format == "JPEG":
        raise ReadError(
            f"{path.name}: JPEG changes values near edges, so it holds no labels; save label maps as PNG or TIFF",
            code="LABEL_LOSSY",
        )
    volume = _read(path, facts)
    array = volume.array
    if len(array) == 3 and (array == array[:1]).all():
        return Volume(array[:1], volume.affine, volume.unit, volume.notes, volume.meta)
    if len(array) != 1:
        raise ReadError(f"{path.name}: the mask holds colours; save label values as grey", code="NOT_3D")
    return volume


def _allowed(path: Path, max_bytes: int) -> PictureFacts:
    """Return the facts of a picture that fits the budget."""
    facts = picture_facts(path)
    if facts.width * facts.height > MAX_PIXELS or facts.bytes > max_bytes:
        raise ReadError(
            f"{path.name}: {facts.width}×{facts.height} pixels, {facts.pages} page(s), {facts.bytes / 2**30:.2f} GiB, "
            f"is more than is read ({MAX_PIXELS} pixels a page, {max_bytes / 2**30:.1f} GiB); cut it into tiles",
            code="OVERSIZED",
        )
    return facts


def _read(path: Path, facts: PictureFacts) -> Volume:
    wide = facts.kind != "u" or facts.bits > 16 or (facts.bits == 16 and facts.samples > 1)
    try:
        pages = _decode_wide(path, facts) if wide else _decode(path, facts)
    except ReadError:
        raise
    except Exception as error:
        cut = "truncated" in str(error).lower()
        what = "ends too early" if cut else f"is damaged ({type(error).__name__})"
        raise ReadError(
            f"{path.name}: the picture {what}; copy the file again from its source",
            code="TRUNCATED" if cut else "CORRUPT",
        ) from error
    notes = ["LOSSY"] if facts.format == "JPEG" else []
    if facts.orientation != 1:
        notes.append("ORIENTATION_APPLIED")
    pages, dropped = _without_alpha(path, pages, facts)
    array = np.ascontiguousarray(pages.transpose(3, 2, 1, 0))
    if array.dtype.kind == "f" and (bad := int(array.size - np.count_nonzero(np.isfinite(array)))):
        raise ReadError(
            f"{path.name}: {bad} of {array.size} pixels are NaN or infinite; replace them where the picture is made",
            code="NON_FINITE",
        )
    return Volume(array, np.eye(4), "pixel", (*notes, *dropped), {"Format": facts.format})


def _decode(path: Path, facts: PictureFacts) -> Pixels:
    """Return (pages, rows, columns, samples) of a picture of up to 8 bits a sample, or of 16 grey ones."""
    if facts.colours == "inverted" and facts.bits == 16:
        raise unsupported(path, "16-bit grey in which 0 is white", "save it with 0 as black")
    pages = []
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata; what is wrong with pixels is raised
        picture = _PLUGINS[facts.format](file)
        for number in range(facts.pages):
            if facts.pages > 1:
                picture.seek(number)
            picture.load()
            if picture.mode not in _MODES:
                raise unsupported(path, f"a picture of the kind {picture.mode}", "save it as grey or RGB")
            if len(picture.getbands()) != facts.samples:
                raise unsupported(path, f"a picture of {facts.samples} samples a pixel", "save it as grey or RGB")
            if facts.colour_key and picture.mode in ("1", "L", "RGB"):
                picture = picture.convert("RGBA" if picture.mode == "RGB" else "LA")
            pages.append(np.asarray(ImageOps.exif_transpose(picture)))
    array = np.stack(pages)
    array = array[..., None] if array.ndim == 3 else array
    if array.dtype == bool:
        return array.astype(np.uint8)
    if facts.format == "PNG" and facts.bits in (2, 4) and facts.colours == "grey":
        return array // np.uint8(255 // (2**facts.bits - 1))  # Pillow stretches them to 0..255
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _decode_wide(path: Path, facts: PictureFacts) -> Pixels:
    """Return (pages, rows, columns, samples) of the types that Pillow narrows or swaps."""
    import SimpleITK

    plain = facts.orientation == 1 and facts.colours in ("grey", "rgb") and not (facts.colour_key or facts.planar)
    expected = np.dtype(f"{facts.kind}{facts.bits // 8}") if facts.bits in (8, 16, 32) else None
    if not plain or expected is None or expected == np.float16 or facts.samples not in (1, 3, 4):
        layout = f"orientation {facts.orientation}{', in planes' if facts.planar else ''}"
        what = f"{facts.bits}-bit samples ({facts.kind}), {facts.samples} a pixel, {layout}"
        raise unsupported(path, f"a picture of {what}", "save it as 8- or 16-bit PNG, or as 32-bit float TIFF")
    array = np.asarray(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path), imageIO=f"{facts.format}ImageIO")))
    shape = (facts.pages, facts.height, facts.width, facts.samples)
    if array.dtype != expected or array.size != np.prod(shape):  # libtiff's way out is 8-bit RGBA
        raise unsupported(path, f"a picture that is decoded as {array.dtype}, not {expected}", "save it as PNG")
    return array.reshape(shape)


def _without_alpha(path: Path, pages: Pixels, facts: PictureFacts) -> tuple[Pixels, tuple[str, ...]]:
    samples = pages.shape[-1]
    if samples in (1, 3):
        return pages, ()
    alpha = pages[..., -1]
    if alpha.min() != alpha.max():
        raise ReadError(
            f"{path.name}: its alpha channel takes values from {alpha.min()} to {alpha.max()}, so what its pixels show "
            "depends on what lies behind them; save it without transparency",
            code="TRANSPARENT",
        )
    return pages[..., :-1], ("ALPHA_DROPPED",)
