"""The pixels of slices, each a DICOM file or a frame of one, as values in their unit (HU, Bq/mL, arbitrary for MR).

The modality LUT (rescale slope and intercept, or a lookup table) is what is applied, as for display. A real-world value
map or a private scale is another scale of the same numbers: never mixed in, but noted where it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from medseg.readers.dicom_budget import open_dataset
from medseg.readers.dicom_codecs import Layout, decode, decode_rle, own_bits
from medseg.readers.dicom_colour import rgb_values
from medseg.readers.dicom_frames import frame_datasets
from medseg.readers.dicom_header import PARSE_ERRORS, Header
from medseg.readers.dicom_refusals import refuse

BARE_SYNTAX: dict[tuple[bool | None, bool | None], UID] = {
    (True, True): ImplicitVRLittleEndian,
    (False, True): ExplicitVRLittleEndian,
    (False, False): ExplicitVRBigEndian,
}
"""Transfer syntax of a file without file meta information, by what pydicom found: (implicit VR, little endian)."""

FLOATS = {"FloatPixelData": ("f4", "FloatPixelPadding"), "DoubleFloatPixelData": ("f8", "DoubleFloatPixelPadding")}
"""Element of pixels that are no whole numbers -> its type, and the beginning of the words for its padding."""
ALLOCATED = (8, 16, 32)
GREY = ("MONOCHROME2", "MONOCHROME1")
EXACT_IN_FLOAT32 = 2**24


@dataclass(frozen=True)
class Pixels:
    """One slice.

    Attributes
    ----------
    values : (columns, rows) float32, stored * slope + intercept rounded once; MONOCHROME1 is not inverted. A colour
        picture is (3, columns, rows) uint8.
    padding : same shape, True where the scanner recorded nothing (PixelPaddingValue); None when there is none.
    notes : LOSSY, REAL_WORLD_MAP, NOT_HU, as they hold for this slice.
    """

    values: NDArray[np.float32] | NDArray[np.uint8]
    padding: NDArray[np.bool_] | None
    notes: frozenset[str] = frozenset()


def read_slices(headers: Sequence[Header], factors: Sequence[float] = ()) -> Iterator[tuple[int, Pixels]]:
    """Read, check and decode slices, each file once; call inside `quiet`.

    Parameters
    ----------
    factors : for each slice what its values are multiplied by before they are rounded to float32 (Bq/mL to SUV);
        1 when empty.

    Yields
    ------
    int, Pixels
        Which of `headers`, and its pixels; file by file, not in their order.

    Raises
    ------
    ReadError : TRUNCATED, LENGTH_MISMATCH, CODESTREAM_MISMATCH, NO_DECODER, MODALITY_LUT, OVERSIZED or UNREADABLE.
    """
    files: dict[Path, list[int]] = {}
    for index, header in enumerate(headers):
        files.setdefault(header.path, []).append(index)
    for path, indices in files.items():
        if headers[indices[0]].across:
            mosaic = _mosaic(headers[indices[0]])
            picture = _guarded(_whole(path, mosaic), mosaic, factors[indices[0]] if factors else 1.0)
            yield from ((index, _tile(picture, headers[index])) for index in indices)
            continue
        indices.sort(key=lambda index: headers[index].key)
        single = headers[indices[0]].frame is None
        datasets = _frames_of([headers[index] for index in indices])
        for index in indices:
            found = _whole(path, headers[index]) if single else datasets
            yield index, _guarded(found, headers[index], factors[index] if factors else 1.0)


def _mosaic(tile: Header) -> Header:
    """Return the header of the mosaic to which a tile belongs."""
    return replace(tile, frame=None, across=0, rows=tile.rows * tile.across, columns=tile.columns * tile.across)


def _tile(picture: Pixels, tile: Header) -> Pixels:
    """Cut one tile out of a mosaic; tiles follow each other along the rows."""
    down, right = divmod(tile.frame or 0, tile.across)
    where = np.s_[right * tile.columns : (right + 1) * tile.columns, down * tile.rows : (down + 1) * tile.rows]
    return replace(
        picture,
        values=picture.values[where],
        padding=None if picture.padding is None else picture.padding[where],
    )


def _whole(path: Path, header: Header) -> Iterator[Dataset]:
    """Yield the one data set of a single-frame file."""
    yield open_dataset(path, pixel_bytes=header.rows * header.columns * header.samples * header.bits // 8)


def _frames_of(headers: Sequence[Header]) -> Iterator[Dataset]:
    """Yield the frames of one file, each as a single-frame data set."""
    first = headers[0]
    size = first.rows * first.columns * first.bits * first.samples // 8
    frames = [header.frame or 0 for header in headers]
    return frame_datasets(first.path, frames, size=size, count=first.frames)


def _guarded(datasets: Iterator[Dataset], header: Header, factor: float) -> Pixels:
    """Turn the next data set into values; what goes wrong gets the code of its kind."""
    try:
        dataset = next(datasets)
        if not dataset.file_meta.get("TransferSyntaxUID"):
            dataset.file_meta.TransferSyntaxUID = BARE_SYNTAX[dataset.original_encoding]
        return _values(dataset, header, factor)
    except EOFError as error:
        raise refuse("TRUNCATED", f"instance {header.instance} ends inside its pixels") from error
    except PARSE_ERRORS as error:
        kind = "too deeply nested" if isinstance(error, RecursionError) else f"{type(error).__name__} while decoding"
        raise refuse("UNREADABLE", f"the pixels of instance {header.instance} cannot be read ({kind})") from error


def _values(dataset: Dataset, header: Header, factor: float) -> Pixels:
    if header.samples == 3:
        lossy = dataset.get("LossyImageCompression") == "01"
        return Pixels(rgb_values(dataset, header), None, frozenset(["LOSSY"] * lossy))
    if dataset.get("PhotometricInterpretation", GREY[0]) not in GREY:
        raise refuse("COLOUR", f"the numbers of instance {header.instance} are no intensities but places in a palette")
    stored, exact = stored_values(dataset, header)
    padding = _padding(dataset, stored)
    notes = {
        "LOSSY": not exact or dataset.get("LossyImageCompression") == "01",
        "REAL_WORLD_MAP": _other_scale(dataset, header),
        "NOT_HU": header.modality == "CT" and dataset.get("RescaleType", "HU") not in ("", "HU", "US"),
    }
    if header.modality_lut:
        values = _by_table(dataset, stored, header).astype(np.float64) * factor
    else:
        values = _rescaled(stored, *(header.rescale or (1.0, 0.0)), factor)
    return Pixels(
        values.astype(np.float32, copy=False).T,
        None if padding is None else padding.T,
        frozenset(note for note, holds in notes.items() if holds),
    )


def _rescaled(stored: NDArray[Any], slope: float, intercept: float, factor: float) -> NDArray[Any]:
    """Return (stored * slope + intercept) * factor, in float32 where that is exact, else in float64."""
    whole = stored.dtype.kind in "iu" and slope == factor == 1 and intercept.is_integer()
    if whole and stored.dtype.itemsize <= 2 and abs(intercept) < EXACT_IN_FLOAT32 - 2**16:
        return np.asarray(np.add(stored, np.float32(intercept), dtype=np.float32))
    values: NDArray[np.float64] = np.multiply(stored, slope, dtype=np.float64)
    values += intercept
    values *= factor
    return values


def stored_values(dataset: Dataset, header: Header) -> tuple[NDArray[Any], bool]:
    """Decode the stored numbers of one frame, (rows, columns), with their sign; and whether they are free of loss.

    Raises
    ------
    ReadError : TRUNCATED, LENGTH_MISMATCH, CODESTREAM_MISMATCH or NO_DECODER; PARSE_ERRORS: what is damaged.
    """
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    for keyword, (kind, _) in FLOATS.items():
        if keyword in dataset:
            return _native(dataset, keyword, np.dtype(kind), header), True
    if "PixelData" not in dataset:
        raise EOFError("the file ends before its pixels")
    layout = _layout(dataset, header)
    if not syntax.is_encapsulated:
        kind = f"{'i' if layout.signed else 'u'}{layout.allocated // 8}"
        return own_bits(_native(dataset, "PixelData", np.dtype(kind), header), layout), True
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if syntax == RLELossless:
        data = np.frombuffer(decode_rle(frame, layout), f"<{'i' if layout.signed else 'u'}{layout.allocated // 8}")
        return own_bits(data.reshape(layout.rows, layout.columns), layout), True
    return decode(frame, str(syntax), layout, f"instance {header.instance}")


def _layout(dataset: Dataset, header: Header) -> Layout:
    allocated, used = int(dataset.BitsAllocated), int(dataset.BitsStored)
    shift = int(dataset.get("HighBit", used - 1)) + 1 - used
    if not (0 < used <= allocated and 0 <= shift <= allocated - used and allocated in ALLOCATED):
        raise ValueError("BitsStored and HighBit do not fit BitsAllocated")
    signed = bool(int(dataset.PixelRepresentation))
    return Layout(header.rows, header.columns, allocated, used, shift, signed)


def _native(dataset: Dataset, keyword: str, kind: np.dtype[Any], header: Header) -> NDArray[Any]:
    """Return uncompressed numbers, (rows, columns), where as many bytes are there as declared, or one more to pad."""
    element = dataset[keyword]
    data, wanted = element.value or b"", header.rows * header.columns * kind.itemsize
    row = header.columns * kind.itemsize
    if len(data) < wanted:
        raise refuse("TRUNCATED", f"instance {header.instance} holds {len(data)} of {wanted} bytes of pixels")
    if len(data) >= wanted + row:
        raise refuse(
            "LENGTH_MISMATCH", f"instance {header.instance} holds {len(data)} bytes of pixels, declared are {wanted}"
        )
    big = dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
    if big and kind.itemsize == 1 and element.VR == "OW":
        # single bytes written as words have changed places (PS3.5 7.1, annex D)
        data = np.frombuffer(data[: len(data) // 2 * 2], np.uint16).byteswap().tobytes()
    return np.frombuffer(data, kind.newbyteorder(">" if big else "<"), count=header.rows * header.columns).reshape(
        header.rows, header.columns
    )


def _padding(dataset: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Return where `stored` is padding: PixelPaddingValue, or the range up to PixelPaddingRangeLimit."""
    start = next((words for keyword, (_, words) in FLOATS.items() if keyword in dataset), "PixelPadding")
    read: Callable[[Any], float] = float if start != "PixelPadding" else lambda value: _signed(int(value), dataset)
    first, limit = (dataset.get(start + word) for word in ("Value", "RangeLimit"))
    if first is None:
        return None
    low, high = sorted(read(bound) for bound in (first, first if limit is None else limit))
    where = np.asarray((stored >= low) & (stored <= high))
    return where if where.any() else None


def _signed(value: int, dataset: Dataset) -> int:
    """Read a padding value with the sign of the pixels: files often write -2000 as the unsigned 63536."""
    size = 1 << int(dataset.BitsAllocated)
    value %= size
    return value - size if dataset.PixelRepresentation == 1 and value >= size // 2 else value


def _by_table(dataset: Dataset, stored: NDArray[Any], header: Header) -> NDArray[Any]:
    """Look the stored values up in the modality LUT (PS3.3 C.11.1.1); beyond its ends the end values hold."""
    (item,) = dataset.ModalityLUTSequence
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    count = count or 2**16
    if dataset.PixelRepresentation == 1 and first >= 2**15:
        first -= 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        order = ">" if dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian else "<"
        data = np.frombuffer(data, np.uint8 if bits == 8 and len(data) < 2 * count else f"{order}u2")
    table = np.asarray(data, dtype=np.int64).ravel()
    if bits not in (8, 16) or not count <= table.size <= count + 1 or (table < 0).any() or (table >= 1 << bits).any():
        raise refuse("MODALITY_LUT", f"the lookup table of instance {header.instance} does not fit its descriptor")
    return np.asarray(table[np.clip(stored.astype(np.int64) - first, 0, count - 1)])


def _other_scale(dataset: Dataset, header: Header) -> bool:
    """Tell whether a real-world value map exists that does not say what the modality LUT says (PS3.3 C.7.6.16.2.11)."""
    here = header.rescale or (1.0, 0.0)
    groups = [dataset, *(dataset.get("SharedFunctionalGroupsSequence") or ())]
    if header.frame is not None:
        groups.append(dataset.PerFrameFunctionalGroupsSequence[header.frame])
    for item in (item for group in groups for item in group.get("RealWorldValueMappingSequence") or ()):
        there = item.get("RealWorldValueSlope"), item.get("RealWorldValueIntercept")
        if None in there or not np.allclose([float(value) for value in there], here, rtol=1e-6, atol=0):
            return True
    return False
