"""Siemens mosaics: many slices tiled into one picture; where each tile lies stands in the CSA header.

The picture's own ImagePositionPatient is that of a slice as large as the whole mosaic with the same centre as the
first tile's (as nibabel and dcm2niix read it); the direction of the stack is the CSA header's SliceNormalVector.
Nothing of this is in the standard, so whatever is absent or contradicts another value means no geometry.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

MAX_CSA_TAGS = 4096
MAX_TILES = 1024
NORMAL_TOLERANCE = 1e-3
"""How far the stated direction of the stack may differ from the normal of the slices."""
_CSA_TAG = struct.Struct("<64si4siii")
_CSA_ITEM = struct.Struct("<4i")


@dataclass(frozen=True)
class Mosaic:
    """Where the slices of a mosaic lie.

    Attributes
    ----------
    across : tiles in a row (and in a column).
    rows, columns : size of one tile.
    positions : (slices, 3), centre of the first pixel of each slice, mm in LPS.
    """

    across: int
    rows: int
    columns: int
    positions: tuple[tuple[float, ...], ...]


def mosaic_of(dataset: Dataset) -> Mosaic:
    """Return the slices of a mosaic.

    Parameters
    ----------
    dataset : the whole header of the file, private elements included.

    Raises
    ------
    ValueError : a fact is missing or contradicts another; PARSE_ERRORS of pydicom.
    """
    csa = csa_values(bytes(_private(dataset, 0x0029, "SIEMENS CSA HEADER", 0x10)))
    count = int(_private(dataset, 0x0019, "SIEMENS MR HEADER", 0x0A))
    if count < 1 or count > MAX_TILES or count != int(csa["NumberOfImagesInMosaic"][0]):
        raise ValueError("the number of tiles is absent or stated twice with different values")
    across = math.isqrt(count - 1) + 1
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows % across or columns % across:
        raise ValueError("the picture is not a whole number of tiles")
    directions = np.array(dataset.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    down, right = (float(value) for value in dataset.PixelSpacing)
    normal = np.array([float(value) for value in csa["SliceNormalVector"]], dtype=np.float64)
    cross = np.cross(directions[0], directions[1])
    if normal.shape != (3,) or not min(np.abs(normal - cross).max(), np.abs(normal + cross).max()) < NORMAL_TOLERANCE:
        raise ValueError("the direction of the stack is not the normal of the slices")
    step = float(dataset.SpacingBetweenSlices) * np.sign(normal @ cross) * cross
    size = np.array([columns, rows])
    offset = (size - size // across) / 2 * [right, down]  # from the corner of the picture to that of the first tile
    first = np.array(dataset.ImagePositionPatient, dtype=np.float64) + offset @ directions
    positions = tuple(tuple(float(x) for x in first + k * step) for k in range(count))
    return Mosaic(across, rows // across, columns // across, positions)


def _private(dataset: Dataset, group: int, creator: str, element: int) -> Any:
    return dataset.private_block(group, creator)[element].value


def csa_values(data: bytes) -> dict[str, tuple[str, ...]]:
    """Return the values of a CSA2 header as text, by name; every length is checked against the bytes that are there.

    Layout (from nibabel's and dcm2niix's descriptions; Siemens publishes none): "SV10", 4 bytes, number of tags, 77;
    each tag: name, multiplicity, VR, type, number of items, 77 or 205; each item: four numbers, of which the second is
    its length, and the value padded to four bytes.

    Raises
    ------
    ValueError : it is no CSA2 header or is damaged.
    """
    if data[:4] != b"SV10" or len(data) < 16:
        raise ValueError("this is no CSA2 header")
    count = int.from_bytes(data[8:12], "little")
    if count > MAX_CSA_TAGS:
        raise ValueError("the CSA header declares too many tags")
    found: dict[str, tuple[str, ...]] = {}
    at = 16
    for _ in range(count):
        name, _, _, _, items, check = _unpack(_CSA_TAG, data, at)
        at += _CSA_TAG.size
        if check not in (77, 205) or not 0 <= items <= len(data):
            raise ValueError("the CSA header is damaged")
        values = []
        for _ in range(items):
            length = _unpack(_CSA_ITEM, data, at)[1]
            at += _CSA_ITEM.size
            if length < 0 or at + length > len(data):
                raise ValueError("the CSA header is damaged")
            values.append(_text(data[at : at + length]))
            at += -(-length // 4) * 4
        found[_text(name)] = tuple(value for value in values if value)
    return found


def _unpack(layout: struct.Struct, data: bytes, at: int) -> tuple[Any, ...]:
    if at + layout.size > len(data):
        raise ValueError("the CSA header ends early")
    return layout.unpack_from(data, at)


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("latin-1").strip()
