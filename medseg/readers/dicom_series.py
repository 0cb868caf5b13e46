"""Read one DICOM series (CT, MR, PET; a file per slice or many frames in one) as a Volume, exactly or not at all.

Never silently wrong: order and affine come from positions and directions only, values from each slice's own rescale,
and whatever is irregular is refused with a code (docs/reference/reason-codes.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.readers.allowances import Allowance
from medseg.readers.dicom_geometry import series_stack
from medseg.readers.dicom_header import Header, quiet
from medseg.readers.dicom_index import SeriesFiles
from medseg.readers.dicom_pixels import Pixels, read_slices
from medseg.readers.dicom_refusals import Refusal, refuse
from medseg.readers.dicom_regular import to_upright, upright_grid
from medseg.readers.dicom_scan import Found, scan
from medseg.readers.dicom_suv import suv_factors
from medseg.volume import Volume

MAX_BYTES = 4 * 2**30
"""Largest volume (float32) that is read unless more is allowed: 512 x 512 x 4096."""
AIR_HU = -1024.0


def read_series(
    source: Path | SeriesFiles | Iterable[Path],
    *,
    allow: Collection[Allowance] = (),
    max_bytes: int = MAX_BYTES,
    suv: bool | None = False,
) -> Volume:
    """Read one series.

    Parameters
    ----------
    source : a folder (searched to the bottom) or files that hold one series, or one entry of `find_series`.
    allow : what is corrected by resampling instead of refused: "tilt" (GANTRY_TILT), "irregular" (IRREGULAR_SPACING,
        MISSING_SLICES). A series without such a fault is read as without it, bit for bit.
    max_bytes : refuse a larger volume before anything is allocated.
    suv : bring PET values to SUV by body weight, or refuse (SUV_INCOMPLETE); None: if it is PET.

    Returns
    -------
    Volume
        array (1, I, J, K) float32: I along a row (column index), J down the rows, K along cross(row, column); values
        in HU for CT, the stored unit for MR and PET. A colour series gives (3, I, J, K) uint8: red, green, blue.
        affine exact from position, directions and spacing, RAS+ mm; of a single slice, K has its thickness.
        notes: COLOUR_PICTURE, DERIVED, DUPLICATES_DROPPED, LOCALIZER_SET_ASIDE, LOSSY, NOT_HU (CT),
        NO_FRAME_OF_REFERENCE, NO_RESCALE and RESCALE_VARIES (CT), NO_THICKNESS, PADDING_MASKED, REAL_WORLD_MAP,
        SINGLE_SLICE, SPACING_REGULARISED, SUV_BW, TILT_CORRECTED.
        A corrected one lies on an upright grid (see dicom_regular) that covers all slices; where none is, it holds air
        (CT) or the lowest value.
        meta: Modality, Manufacturer, Units when present, and how a corrected series lay; no free text.

    Raises
    ------
    ReadError, GeometryError : with a code of REFUSALS; NOT_FOUND when a path does not exist.
    """
    notes: list[str] = []
    if not isinstance(source, SeriesFiles):
        found = scan(source)
        source = _only(found)
        notes += ["LOCALIZER_SET_ASIDE"] * (len(found.series) > 1)
    if (refusal := source.refused(allow)) is not None:
        raise refusal.error()
    headers, duplicates = each_once(source.headers)
    _check_size((headers[0].columns, headers[0].rows, len(headers)), max_bytes)
    stack = series_stack(headers)
    upright = upright_grid(stack, () if headers[0].samples == 3 else allow)  # colours are not blended
    ordered = [headers[index] for index in stack.order]
    suv = headers[0].modality == "PT" and headers[0].samples == 1 if suv is None else suv
    factors = suv_factors(ordered) if suv else [1.0] * len(ordered)
    with quiet():
        _check_duplicates(duplicates, headers)
        if upright is not None:
            _check_size(upright.shape, max_bytes)
        array, seen = _stack(ordered, factors)
    affine, meta = stack.affine, dict(headers[0].meta)
    if upright is not None:
        array = to_upright(array, upright, fill=_outside(array, headers[0].modality))
        affine, meta = upright.affine, meta | upright.figures
        notes += upright.notes
    notes += ["COLOUR_PICTURE"] * (headers[0].samples == 3)
    if len(headers) == 1:
        notes += ["SINGLE_SLICE"] + ["NO_THICKNESS"] * (headers[0].thickness is None)
    notes += ["DERIVED"] * ("DERIVED" in headers[0].image_type)
    notes += ["DUPLICATES_DROPPED"] * bool(duplicates)
    notes += ["NO_FRAME_OF_REFERENCE"] * (not headers[0].frame_of_reference)
    if headers[0].modality == "CT":
        notes += ["NO_RESCALE"] * (headers[0].rescale is None)
        notes += ["RESCALE_VARIES"] * (len({header.rescale for header in headers}) > 1)
    if suv:
        notes, meta = [*notes, "SUV_BW"], meta | {"Units": "GML"}
    return Volume(array, affine, notes=tuple(sorted({*notes, *seen})), meta=meta)


def _check_size(shape: tuple[int, int, int], max_bytes: int) -> None:
    """Refuse more voxels than memory is granted for, before any is read."""
    size = 4 * int(np.prod(shape, dtype=object))
    if size > max_bytes:
        raise refuse(
            "OVERSIZED",
            f"{shape[0]} x {shape[1]} x {shape[2]} voxels need {size / 2**30:.1f} GiB, "
            f"allowed are {max_bytes / 2**30:.1f} GiB",
        )


def _only(found: Found) -> SeriesFiles:
    """Return the one series that was found, localizers aside, or refuse."""
    if found.lost:
        text, passing = f"{found.describe()}: slices may be missing", all(part.unread for part in found.lost)
        raise Refusal("UNREADABLE", text, passing).error()
    series = [entry for entry in found.series if entry.refusal is None or entry.refusal.code != "LOCALIZER"]
    if len(series) == 1 or (not series and len(found.series) == 1):
        return (series or list(found.series))[0]
    if not series:
        kind = "LOCALIZER" if found.series else "NOT_AN_IMAGE" if found.ignored else "NO_SERIES"
        raise refuse(kind, f"found {found.describe()}")
    parts = {entry.part for entry in series} - {"", "LOCALIZER"}
    if len({entry.uid for entry in series}) == 1 and parts:
        sizes = ", ".join(_describe(entry) for entry in series)
        code = sorted(parts)[0]
        raise refuse(code, f"one series holds {len(series)} parts: {sizes}{_what_differs(series, code)}")
    raise refuse("MULTIPLE_SERIES", f"found {found.describe()}")


def _describe(series: SeriesFiles) -> str:
    return f"{len(series.headers)} slices of {series.headers[0].columns}x{series.headers[0].rows}"


def _what_differs(series: Sequence[SeriesFiles], code: str) -> str:
    """Name the attributes that tell the parts apart, for parts that lie at the same places."""
    if code != "MIXED_SERIES":
        return ""
    first, second = (entry.headers[0].telling for entry in series[:2])
    return f"; what differs: {', '.join(word for word in first if first[word] != second.get(word))}"


def each_once(headers: Sequence[Header]) -> tuple[list[Header], list[Header]]:
    """Return the first image of each SOP instance and frame, and the further ones."""
    first: dict[tuple[str, int], Header] = {}
    further = [header for header in headers if first.setdefault(header.key, header) is not header]
    return list(first.values()), further


def _check_duplicates(duplicates: Sequence[Header], headers: Sequence[Header]) -> None:
    """Refuse a second file of an instance with other pixels than the first; their places agree."""
    doubled = {header.key for header in duplicates}
    firsts = [header for header in headers if header.key in doubled]
    known = {firsts[index].key: _digest(pixels) for index, pixels in read_slices(firsts)}
    for index, pixels in read_slices(duplicates):
        if _digest(pixels) != known[duplicates[index].key]:
            text = f"instance {duplicates[index].instance} is there twice, with different pixels"
            raise refuse("DUPLICATE_POSITION", text)


def _digest(pixels: Pixels) -> bytes:
    content = np.ascontiguousarray(pixels.values)
    return hashlib.sha256(repr(content.shape).encode() + content.tobytes()).digest()


def _stack(headers: Sequence[Header], factors: Sequence[float]) -> tuple[NDArray[Any], set[str]]:
    """Read the slices in order into (C, I, J, K); padding becomes the lowest real value. Also: what to note."""
    first = headers[0]
    kind: type[Any] = np.uint8 if first.samples == 3 else np.float32
    array = np.empty((first.samples, len(headers), first.rows, first.columns), kind).transpose(0, 3, 2, 1)
    padded: dict[int, NDArray[np.bool_]] = {}
    notes: set[str] = set()
    lowest = np.inf
    for k, pixels in read_slices(headers, factors):
        notes |= pixels.notes
        array[:, :, :, k] = pixels.values
        real = pixels.values if pixels.padding is None else pixels.values[~pixels.padding]
        lowest = min(lowest, float(real.min())) if real.size else lowest
        if pixels.padding is not None:
            padded[k] = pixels.padding
    fill = np.float32(_fill(lowest, first.modality))
    for k, where in padded.items():
        notes |= {"PADDING_MASKED"} if (array[0, :, :, k][where] != fill).any() else set()
        array[0, :, :, k][where] = fill
    return array, notes


def _fill(lowest: float, modality: str) -> float:
    """Return what stands for padding: the lowest real value; 0 where MR and PET have their own empty value."""
    if not np.isfinite(lowest):
        return AIR_HU if modality == "CT" else 0.0
    return lowest if modality == "CT" else min(lowest, 0.0)


def _outside(array: NDArray[np.float32], modality: str) -> float:
    """Return what stands where no slice is: air for CT, but no value below those of the image."""
    lowest = float(array.min())
    return max(lowest, AIR_HU) if modality == "CT" else lowest
