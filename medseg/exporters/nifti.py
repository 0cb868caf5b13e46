"""Masks, and images that they lie on, as NIfTI files, read back before they count."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np

from medseg.errors import ExportError
from medseg.files import write_atomically
from medseg.readers.nifti import holds
from medseg.volume import Volume


def write_nifti(path: Path, mask: Volume) -> None:
    """Write a label map (or image; 1, I, J, K) as .nii.gz: its affine is the sform and, if a rotation, the qform.

    The file carries no time stamp, so that the same mask is the same bytes.

    Raises
    ------
    ExportError : it cannot be written, or what is read back differs.
    """

    def write(temporary: Path) -> None:
        array = np.ascontiguousarray(mask.array[0])
        if array.dtype.kind == "b" or array.dtype.itemsize == 8:
            # Few programs read booleans or 64 bits; what does not fit 32 shows when it is read back.
            array = array.astype(np.uint8 if array.dtype.kind == "b" else np.int32)
        image = nibabel.Nifti1Image(array, mask.affine)
        image.header.set_xyzt_units("mm" if mask.unit == "mm" else "unknown")
        image.set_sform(mask.affine, code=1)
        image.set_qform(mask.affine if mask.orthogonal else None, code=1 if mask.orthogonal else 0)
        # A slice at a time, without the name of the file and a time.
        with open(temporary, "wb") as file, gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as stream:
            image.to_stream(stream)
        if not holds(temporary, mask):
            raise ExportError(f"{path.name}: what was written reads back differently", code="READ_BACK")

    write_atomically(path, write)
