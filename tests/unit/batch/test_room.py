"""Room for probabilities is on the disk, or it is said at once that there is none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from medseg.batch.room import on_disk
from medseg.errors import ExportError


def test_it_is_a_file_without_a_name(tmp_path: Path) -> None:
    found = on_disk(tmp_path, (2, 5, 4, 3))
    assert (found.shape, found.dtype) == ((2, 5, 4, 3), np.uint8)
    assert not found.any()
    found[1, :, :, 2] = 7
    assert found[1, :, :, 2].min() == 7
    assert found[:, :, :, :2].max() == 0
    assert isinstance(found, np.memmap)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "DISK_FULL"), (errno.EIO, "NOT_WRITABLE")])
def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def full(*args: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ExportError) as caught:
        on_disk(tmp_path, (2, 5, 4, 3))
    assert caught.value.code == code
    assert str(tmp_path) not in str(caught.value)
