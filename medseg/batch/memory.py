"""What the largest image of a run will take, told before the run begins, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from medseg.batch.disk import input_bytes
from medseg.batch.foretell import Asked, foretold, foretold_aside
from medseg.batch.study_input import StudyInput
from medseg.errors import BundleError, GeometryError
from medseg.readers.dicom_geometry import series_stack
from medseg.readers.dicom_index import SeriesFiles
from medseg.readers.nifti import is_nifti
from medseg.volume import Affine

if TYPE_CHECKING:
    from medseg.bundle import BundleInfo

Grid = tuple[tuple[int, int, int], Affine, int]
"""Size, affine and bytes a voxel of an image."""
UNPACKED = 40
"""Bytes of float32 a byte of a compressed picture becomes, rather too many."""


def memory_text(
    studies: Sequence[StudyInput],
    models: Sequence[BundleInfo],
    limit: int,
    *,
    soft: bool = False,
    mirror: bool | None = None,
    aside: bool = False,
) -> str:
    """Return what the prediction of the largest image is expected to take within `limit` bytes, for a person.

    Parameters
    ----------
    models : the members of an ensemble, or the one model.
    soft : whether probabilities are written, too.
    mirror : whether inputs are mirrored; None: as planned.
    aside : whether a process of its own computes it, so that this one needs no torch.
    """
    grids = [grid for grid in map(_grid, studies) if grid is not None]
    if not grids:
        return "memory: not known before the images are read"
    asked = Asked(*max(grids, key=lambda grid: _weight(grid, models)), models, limit, soft=soft, mirror=mirror)
    try:
        return f"memory: {foretold_aside(asked) if aside else foretold(asked)}"
    except BundleError as error:  # nobody needs the estimate so much that the run should not begin
        return f"memory: not known ({error})"


def image_bytes(study: StudyInput) -> int:
    """Return about how many bytes the image of a study takes once it is read, all its channels as float32.

    Of formats whose header is not looked at here, or makes no sense, it is what their files may unpack to.
    """
    rows = study.channels or ((study.series,) if study.series else ())
    headers = [row.headers for row in rows if row.headers]
    if headers:
        return sum(4 * row[0].columns * row[0].rows * len(row) for row in headers)
    grid = _grid(study)
    if grid is not None:
        return 4 * math.prod(grid[0]) * len(study.images)
    return UNPACKED * input_bytes(study)


def _weight(grid: Grid, models: Sequence[BundleInfo]) -> float:
    """Return about how many bytes a channel takes as it is and on the networks' grids.

    Of two images with as many voxels, that with the larger voxels takes more.
    """
    shape, affine, itemsize = grid
    voxels = math.prod(shape)
    space = voxels * abs(float(np.linalg.det(affine[:3, :3])))
    plans = [model.plan for model in models if model.plan.monai is None or model.plan.monai.resample]
    return voxels * itemsize + 4 * max((space / math.prod(plan.spacing) for plan in plans), default=0.0)


def _grid(study: StudyInput) -> Grid | None:
    """Return size, affine and bytes a voxel of a study by its headers; None where these do not say it."""
    if study.series is not None and study.series.headers:
        return _dicom_grid(study.series)
    if study.refusal is None and study.images and is_nifti(study.images[0]):
        return _nifti_grid(study)
    return None


def _dicom_grid(series: SeriesFiles) -> Grid | None:
    headers = list({header.key: header for header in series.headers}.values())
    try:
        stack = series_stack(headers)
    except GeometryError:  # whoever reads the study says it
        return None
    return (headers[0].columns, headers[0].rows, len(headers)), stack.affine, 4


def _nifti_grid(study: StudyInput) -> Grid | None:
    import nibabel

    try:
        image = nibabel.load(study.images[0])
        i, j, k = (*image.shape[:3], 1, 1)[:3]
        affine = np.asarray(image.affine, np.float64)
        dtype = image.header.get_data_dtype()
        floats = dtype.kind == "f" or image.header.get_slope_inter()[0] not in (None, 1.0)
    except Exception:  # noqa: BLE001 - of many kinds; whoever reads the study says what is wrong, here nothing may stop
        return None
    return ((int(i), int(j), int(k)), affine, 4 if floats else dtype.itemsize) if min(i, j, k) > 0 else None
