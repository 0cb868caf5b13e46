"""Room for the probabilities of a study: on the disk, because they may be larger than the memory."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import ExportError
from medseg.sizes import said


def on_disk(folder: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return an array (segments, I, J, K) of zeros in a file without a name in `folder`, which goes with the process.

    Its slices K lie one after the other: as they are written, and as a DICOM object wants them.

    Raises
    ------
    ExportError : DISK_FULL, NOT_WRITABLE.
    """
    segments, i, j, k = shape
    size = segments * i * j * k
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Asked for now: a disk that becomes full under a mapped file ends the process without a word.
            os.posix_fallocate(file.fileno(), 0, size)
            array = np.memmap(file, np.uint8, "r+", shape=(segments, k, j, i))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        text = f"no room for {said(size)} of probabilities" if full else f"cannot be written ({error.strerror})"
        raise ExportError(f"OUT: {text}", code="DISK_FULL" if full else "NOT_WRITABLE") from error
    return array.transpose(0, 3, 2, 1)
