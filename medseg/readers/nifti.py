"""NIfTI-1 and NIfTI-2 single files (.nii, .nii.gz) -> Volume, or a refusal with a reason code.

Policies (a file that meets none of them is refused, never guessed at):

- size: the bytes that the header promises are compared with a budget and with the file before anything is
  allocated; compressed files are read to their end, so that the CRC of gzip (RFC 1952) is checked;
- affine: the sform if its code is not 0, else the qform; where both are set they must agree in axis directions
  and in spacing (1 %), otherwise FORMS_DISAGREE; neither set is NO_ORIENTATION;
- axes: 3-D is one channel; 4-D is (I, J, K, channel); 5-D only as (I, J, K, 1, channel);
- values: NaN or infinity anywhere is NON_FINITE; complex and RGB voxels are refused;
- unit: mm; metres and micrometres are converted, an unknown unit is taken as mm (what every program writes).
"""

from __future__ import annotations

import gzip
import io
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medseg.errors import GeometryError, ReadError
from medseg.volume import Affine, Volume, same_grid, singular

MAX_BYTES = 16 * 2**30
"""Largest voxel array that is read (16 GiB): beyond it a header is more likely damaged than true."""
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}
"""By NIfTI's code of the unit of space: metres and micrometres; 2 is mm, 0 unknown."""
_CHUNK = 1 << 24
_SILENT = logging.getLogger("medseg.readers.nifti.header")
_SILENT.disabled = True


def is_nifti(path: Path) -> bool:
    """Tell by its name whether `path` is a NIfTI file."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def stem(path: Path) -> str:
    """Return the file name without .nii or .nii.gz: the case id of a NIfTI file."""
    name = path.name
    for suffix in (".nii.gz", ".nii"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return path.stem


def read_nifti(path: Path, *, max_bytes: int = MAX_BYTES) -> Volume:
    """Read a NIfTI file completely and strictly.

    Returns
    -------
    Volume : (C, I, J, K); float32 where a scale factor applies or the file holds floats, else the stored integers.

    Raises
    ------
    ReadError : UNREADABLE, TRUNCATED, CORRUPT, OVERSIZED, SIZE_MISMATCH, NOT_3D, NON_FINITE, UNSUPPORTED_TYPE.
    GeometryError : NO_ORIENTATION, FORMS_DISAGREE, BAD_AFFINE.
    """
    with _opened(path) as stream:
        header = _read_header(path, stream)
        raw = _read_voxels(path, stream, header, max_bytes)
    affine = _affine(path, header)
    return Volume(_scaled(path, header, raw), affine, meta={"Format": "NIfTI"})


def holds(path: Path, volume: Volume) -> bool:
    """Tell whether a NIfTI file holds this volume (1, I, J, K) on its grid, to its last byte; raises as `read_nifti`.

    The file is compared in parts of about 16 MiB.
    """
    with _opened(path) as stream:
        header = _read_header(path, stream)
        dtype, array = header.get_data_dtype(), volume.array[0]
        if header.get_data_shape() != array.shape or header.get_slope_inter() not in ((None, None), (1.0, 0.0)):
            return False
        if not same_grid(Volume(volume.array, _affine(path, header)), volume):
            return False
        _skip_to_voxels(path, stream, header)
        count = max(1, _CHUNK // (math.prod(array.shape[:2]) * dtype.itemsize))
        for first in range(0, array.shape[2], count):
            part = array[:, :, first : first + count]
            piece = stream.read(part.size * dtype.itemsize)
            if len(piece) != part.size * dtype.itemsize:
                return False
            if not np.array_equal(np.frombuffer(piece, dtype).reshape(part.shape, order="F"), part):
                return False
        return not stream.read(1)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, compressed or not; what goes wrong while it is read is a ReadError."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream: Any = gzip.GzipFile(fileobj=file) if packed else file
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        truncated = isinstance(error, EOFError)
        what = "ends too early" if truncated else f"is damaged ({error})"
        raise ReadError(
            f"{path.name}: the compressed file {what}; copy it again from its source",
            code="TRUNCATED" if truncated else "CORRUPT",
        ) from error
    except OSError as error:
        raise ReadError(f"{path.name}: cannot be read ({error.strerror or error})") from error


def _read_header(path: Path, stream: BinaryIO) -> Nifti1Header:
    """Read the header and position the stream at its end."""
    start = stream.read(348)
    if len(start) < 348:
        raise ReadError(f"{path.name}: {len(start)} bytes are too few for a NIfTI header (348)", code="TRUNCATED")
    wide = int.from_bytes(start[:4], "little") == 540 or int.from_bytes(start[:4], "big") == 540
    kind = Nifti2Header if wide else Nifti1Header
    block = start + (stream.read(192) if wide else b"")
    try:
        header = kind.from_fileobj(io.BytesIO(block + b"\0" * 4), check=False)
        # Raises where a field makes no sense; harmless repairs (a wrong sizeof_hdr) are not worth a line on stderr.
        header.check_fix(logger=_SILENT)
        shape = header.get_data_shape()
        header.get_data_dtype()
    except Exception as error:
        raise ReadError(f"{path.name}: not a NIfTI header ({error})") from error
    if block[-4:-1] in (b"ni1", b"ni2") or header["magic"].item()[:2] == b"ni":
        raise ReadError(
            f"{path.name}: the header belongs to an .hdr/.img pair; save it as one .nii.gz file",
            code="UNSUPPORTED_TYPE",
        )
    if not shape or min(shape) < 1:
        raise ReadError(f"{path.name}: the header declares the impossible size {shape}", code="CORRUPT")
    return header


def _read_voxels(path: Path, stream: BinaryIO, header: Nifti1Header, max_bytes: int) -> bytearray:
    """Return exactly the voxel bytes that the header promises, having read the stream to its end."""
    dtype = header.get_data_dtype()
    promised = int(np.prod([int(n) for n in header.get_data_shape()], dtype=object)) * dtype.itemsize
    if promised > max_bytes:
        raise ReadError(
            f"{path.name}: the header declares {header.get_data_shape()} voxels, {promised / 2**30:.1f} GiB, "
            f"more than the {max_bytes / 2**30:.1f} GiB that are read; the header is damaged or the file a trap",
            code="OVERSIZED",
        )
    _skip_to_voxels(path, stream, header)
    found, raw = _read_pieces(stream, promised)
    if found < promised:
        raise ReadError(
            f"{path.name}: {found} bytes of voxels, the header promises {promised}; copy the file again",
            code="TRUNCATED",
        )
    if found > promised:
        raise ReadError(
            f"{path.name}: the file goes on after the {promised} bytes of voxels that its header promises; "
            "one of the two is damaged",
            code="SIZE_MISMATCH",
        )
    return raw


def _skip_to_voxels(path: Path, stream: BinaryIO, header: Nifti1Header) -> None:
    offset, size = float(header["vox_offset"]), header.template_dtype.itemsize
    if not offset.is_integer() or offset < size:
        raise ReadError(f"{path.name}: the header says that the voxels begin at byte {offset:g}", code="CORRUPT")
    skip = int(offset) - size
    while skip and (piece := stream.read(min(_CHUNK, skip))):
        skip -= len(piece)
    if skip:
        raise ReadError(f"{path.name}: the file ends before its voxels begin", code="TRUNCATED")


def _read_pieces(stream: BinaryIO, promised: int) -> tuple[int, bytearray]:
    """Read at most one byte more than `promised`, in pieces: a lying header cannot make us allocate.

    Reading past the last byte makes gzip compare its CRC and length.
    """
    # Not pieces that are joined: then all would be there twice.
    raw = bytearray()
    while len(raw) <= promised and (piece := stream.read(min(_CHUNK, promised + 1 - len(raw)))):
        raw += piece
    return len(raw), raw


def _scaled(path: Path, header: Nifti1Header, raw: bytearray) -> NDArray[Any]:
    """Return (C, I, J, K) with the header's slope and intercept applied."""
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ReadError(
            f"{path.name}: voxels of type {dtype} (complex or colour) are not read; one number per voxel is needed",
            code="UNSUPPORTED_TYPE",
        )
    stored = np.frombuffer(raw, dtype).reshape(header.get_data_shape(), order="F")
    try:
        slope, inter = header.get_slope_inter()
    except nibabel.spatialimages.HeaderDataError as error:
        raise ReadError(f"{path.name}: the scale factor in the header is damaged ({error})", code="CORRUPT") from error
    array = _channels_first(path, stored)
    scaled = slope is not None and (slope, inter or 0.0) != (1.0, 0.0)
    if not scaled and dtype.kind != "f":
        return array.astype(dtype.newbyteorder("="), order="C", copy=False)
    found, bad = np.empty(array.shape, np.float32), 0
    # In parts: the whole in double precision would be four times what was asked for.
    count = max(1, _CHUNK // (8 * math.prod(array.shape[:3])))
    for first in range(0, array.shape[3], count):
        at = (..., slice(first, first + count))
        # What overflows becomes infinite, and is counted.
        with np.errstate(over="ignore", invalid="ignore"):
            found[at] = array[at].astype(np.float64) * slope + (inter or 0.0) if scaled else array[at]
        bad += found[at].size - int(np.count_nonzero(np.isfinite(found[at])))
    if bad:
        raise ReadError(
            f"{path.name}: {bad} of {array.size} voxels are NaN, infinite or above 3.4e38; replace them "
            "where the image is made",
            code="NON_FINITE",
        )
    return found


def _channels_first(path: Path, stored: NDArray[Any]) -> NDArray[Any]:
    """Return (C, I, J, K) for the layouts that have one meaning, and refuse the others."""
    if stored.ndim == 3:
        return stored[None]
    if stored.ndim == 2:
        return stored[None, :, :, None]
    if stored.ndim == 4:
        return np.moveaxis(stored, 3, 0)
    if stored.ndim == 5 and stored.shape[3] == 1:
        return np.moveaxis(stored[:, :, :, 0], 3, 0)
    raise ReadError(
        f"{path.name}: an image of size {stored.shape} has no single meaning here; give 3-D, or 4-D "
        "with the channels last",
        code="NOT_3D",
    )


def _affine(path: Path, header: Nifti1Header) -> Affine:
    """Return index -> mm (RAS+) by the policy of the module."""
    use_s, use_q = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not (use_s or use_q):
        raise GeometryError(
            f"{path.name}: neither qform nor sform is set, so left and right cannot be told apart; "
            "set one (for example with nibabel's set_qform) where the image is made",
            code="NO_ORIENTATION",
        )
    scale = np.array([[_MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)]] * 3 + [[1.0]])
    try:
        sform = scale * np.asarray(header.get_sform(), np.float64) if use_s else None
        qform = scale * np.asarray(header.get_qform(), np.float64) if use_q else None
    except (ValueError, HeaderDataError) as error:
        raise GeometryError(f"{path.name}: the qform is not a rotation ({error})", code="BAD_AFFINE") from error
    chosen = sform if sform is not None else qform
    if chosen is None or not np.isfinite(chosen).all() or singular(chosen):
        raise GeometryError(
            f"{path.name}: its affine {_rounded(chosen)} is not finite or not invertible",
            code="BAD_AFFINE",
        )
    if sform is not None and qform is not None and not _agree(sform, qform):
        raise GeometryError(
            f"{path.name}: sform and qform disagree (spacing {_spacing(sform)} and {_spacing(qform)} mm, axes "
            f"{_axes(sform)} and {_axes(qform)}); correct the one that is wrong where the image is made",
            code="FORMS_DISAGREE",
        )
    return np.asarray(chosen, np.float64)


def _agree(sform: Affine, qform: Affine) -> bool:
    if np.array_equal(sform[:3, :3], qform[:3, :3]):  # as most programs write them
        return True
    return bool(np.allclose(_spacing(sform), _spacing(qform), rtol=0.01)) and _axes(sform) == _axes(qform)


def _spacing(affine: Affine) -> list[float]:
    return [round(float(x), 4) for x in np.linalg.norm(affine[:3, :3], axis=0)]


def _axes(affine: Affine) -> str:
    return "".join(str(code) for code in nibabel.aff2axcodes(affine))


def _rounded(affine: Affine | None) -> list[list[float]]:
    return [] if affine is None else np.round(affine, 4).tolist()
