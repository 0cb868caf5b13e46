"""Label maps of pictures as PNG and TIFF, read back before they count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medseg.errors import ExportError
from medseg.exporters.result import PICTURES_ONLY
from medseg.files import write_atomically
from medseg.readers.picture import read_picture_labels
from medseg.volume import Volume, same_grid


def write_png(path: Path, mask: Volume) -> None:
    """Write the label values (1, I, J, 1) of a picture as grey PNG of 8 bits, of 16 where the mask's type is wider.

    Raises
    ------
    ExportError : NEEDS_PICTURE (the mask of a volume, or of several pages), LABEL_RANGE (a value above 65535), or as
        `write_atomically`, READ_BACK.
    """
    pages = _pages(mask)
    if len(pages) > 1:
        raise ExportError(
            f"{path.name}: the picture has {len(pages)} pages, a PNG holds one; write tiff", code="NEEDS_PICTURE"
        )
    if pages.max() > np.iinfo(np.uint16).max:
        raise ExportError(
            f"{path.name}: a PNG holds values up to 65535, the mask has {pages.max()}; write tiff", code="LABEL_RANGE"
        )
    wide = pages.dtype.itemsize > 1
    picture = Image.fromarray(pages[0].astype(np.uint16 if wide else np.uint8))
    _write(path, mask, lambda file: picture.save(file, format="PNG"))


def write_tiff(path: Path, mask: Volume) -> None:
    """Write the label values (1, I, J, K) of a picture as grey TIFF (deflate), one page a plane, of 8 or 32 bits.

    Raises
    ------
    ExportError : NEEDS_PICTURE (the mask of a volume), or as `write_atomically`, READ_BACK.
    """
    pages = _pages(mask)
    wide = pages.dtype.itemsize > 1
    pictures = [Image.fromarray(page.astype(np.int32 if wide else np.uint8)) for page in pages]

    def save(file: Path) -> None:
        pictures[0].save(
            file, format="TIFF", save_all=True, append_images=pictures[1:], compression="tiff_adobe_deflate"
        )

    _write(path, mask, save)


def _pages(mask: Volume) -> NDArray[Any]:
    """Return (pages, rows, columns)."""
    if mask.unit != "pixel":
        raise ExportError(PICTURES_ONLY, code="NEEDS_PICTURE")
    return np.ascontiguousarray(mask.array[0].transpose(2, 1, 0))


def _write(path: Path, mask: Volume, save: Callable[[Path], None]) -> None:
    def write(temporary: Path) -> None:
        save(temporary)
        found = read_picture_labels(temporary)
        if not (same_grid(found, mask) and np.array_equal(found.array, mask.array)):
            raise ExportError(f"{path.name}: what was written reads back differently", code="READ_BACK")

    write_atomically(path, write)
