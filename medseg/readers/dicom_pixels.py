"""The pixels of slices, each a DICOM file or a frame of one, as values in their unit (HU, Bq/mL, arbitrary for MR)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medseg.readers.dicom_frames import frame_datasets
from medseg.readers.dicom_header import PARSE_ERRORS, Header
from medseg.readers.dicom_refusals import refuse

BARE_SYNTAX: dict[tuple[bool | None, bool | None], UID] = {
    (True, True): ImplicitVRLittleEndian,
    (False, True): ExplicitVRLittleEndian,
    (False, False): ExplicitVRBigEndian,
}
"""Transfer syntax of a file without file meta information, by what pydicom found: (implicit VR, little endian)."""


@dataclass(frozen=True)
class Pixels:
    """One slice.

    Attributes
    ----------
    values : (columns, rows) float64, stored * slope + intercept; MONOCHROME1 is not inverted.
    padding : same shape, True where the scanner recorded nothing (PixelPaddingValue); None when there is none.
    """

    values: NDArray[np.float64]
    padding: NDArray[np.bool_] | None


def read_slices(headers: Sequence[Header]) -> Iterator[tuple[int, Pixels]]:
    """Read, check and decode slices, each file once; call inside `quiet`.

    Yields
    ------
    int, Pixels
        Which of `headers`, and its pixels; file by file, not in their order.

    Raises
    ------
    ReadError : TRUNCATED, LENGTH_MISMATCH, NO_DECODER or UNREADABLE.
    """
    files: dict[Path, list[int]] = {}
    for index, header in enumerate(headers):
        files.setdefault(header.path, []).append(index)
    for indices in files.values():
        if headers[indices[0]].frame is None:
            yield from ((index, read_pixels(headers[index])) for index in indices)
            continue
        indices.sort(key=lambda index: headers[index].key)
        datasets = _frames_of([headers[index] for index in indices])
        for index in indices:
            yield index, _guarded(datasets, headers[index])


def read_pixels(header: Header) -> Pixels:
    """Read, check and decode the slice of a single-frame file; call inside `quiet`.

    Raises
    ------
    ReadError : TRUNCATED, LENGTH_MISMATCH, NO_DECODER or UNREADABLE.
    """
    return _guarded((pydicom.dcmread(path, force=True) for path in [header.path]), header)


def _frames_of(headers: Sequence[Header]) -> Iterator[Dataset]:
    """Yield the frames of one file, each as a single-frame data set."""
    first = headers[0]
    size = first.rows * first.columns * first.bits * first.samples // 8
    frames = [header.frame or 0 for header in headers]
    return frame_datasets(first.path, frames, size=size, count=first.frames)


def _guarded(datasets: Iterator[Dataset], header: Header) -> Pixels:
    """Turn the next data set into values; what goes wrong gets the code of its kind."""
    try:
        return _values(next(datasets), header)
    except EOFError as error:
        raise refuse("TRUNCATED", f"instance {header.instance} ends inside its pixels") from error
    except PARSE_ERRORS as error:
        kind = "too deeply nested" if isinstance(error, RecursionError) else f"{type(error).__name__} while decoding"
        raise refuse("UNREADABLE", f"the pixels of instance {header.instance} cannot be read ({kind})") from error


def _values(dataset: Dataset, header: Header) -> Pixels:
    stored = stored_values(dataset, header)
    padding = _padding(dataset, stored)
    slope, intercept = header.rescale or (1.0, 0.0)
    values = stored.astype(np.float64) * slope + intercept
    return Pixels(values.T, None if padding is None else padding.T)


def stored_values(dataset: Dataset, header: Header) -> NDArray[Any]:
    """Decode the stored numbers, (rows, columns), as whole numbers with their sign.

    Raises
    ------
    ReadError : TRUNCATED, LENGTH_MISMATCH or NO_DECODER; PARSE_ERRORS: what pydicom finds damaged.
    """
    if "PixelData" not in dataset:
        raise EOFError("the file ends before its pixels")
    if not dataset.file_meta.get("TransferSyntaxUID"):
        dataset.file_meta.TransferSyntaxUID = BARE_SYNTAX[dataset.original_encoding]
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    if not syntax.is_encapsulated:
        _check_length(len(dataset.PixelData), header)
        return _own_bits(pixel_array(dataset, raw=True), dataset)
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise refuse("NO_DECODER", f"no decoder for {syntax.name} is installed")
    return np.asarray(pixel_array(dataset, raw=True))


def _check_length(length: int, header: Header) -> None:
    """Compare the bytes that are there with those that the size declares, before anything is decoded."""
    row = header.columns * header.bits // 8
    if length < row * header.rows:
        raise refuse("TRUNCATED", f"instance {header.instance} holds {length} of {row * header.rows} bytes of pixels")
    if length >= row * (header.rows + 1):
        raise refuse(
            "LENGTH_MISMATCH",
            f"instance {header.instance} holds {length} bytes of pixels where {row * header.rows} are declared",
        )


def _own_bits(array: NDArray[Any], dataset: Dataset) -> NDArray[Any]:
    """Keep the BitsStored bits below HighBit (others may hold overlays) and extend the sign."""
    allocated, used = int(dataset.BitsAllocated), int(dataset.BitsStored)
    shift = int(dataset.get("HighBit", used - 1)) + 1 - used
    if not (0 < used <= allocated and 0 <= shift <= allocated - used):
        raise ValueError("BitsStored and HighBit do not fit BitsAllocated")
    if used == allocated:
        return array
    raw = array.view(f"u{array.dtype.itemsize}").astype(np.int64)
    raw = (raw >> shift) & ((1 << used) - 1)
    if dataset.PixelRepresentation == 1:
        raw -= (raw >> (used - 1)) << used
    return raw


def _padding(dataset: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Return where `stored` is padding: PixelPaddingValue, or the range up to PixelPaddingRangeLimit."""
    bounds = [dataset.get(word) for word in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if bounds[0] is None:
        return None
    low, high = sorted(_signed(int(bound if bound is not None else bounds[0]), dataset) for bound in bounds)
    where = (stored >= low) & (stored <= high)
    return where if where.any() else None


def _signed(value: int, dataset: Dataset) -> int:
    """Read a padding value with the sign of the pixels: files often write -2000 as the unsigned 63536."""
    size = 1 << int(dataset.BitsAllocated)
    value %= size
    return value - size if dataset.PixelRepresentation == 1 and value >= size // 2 else value
