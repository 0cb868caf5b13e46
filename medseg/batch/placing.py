"""Where the results of a corrected series are put: on the slices that were scanned, as far as a format can say that.

The network sees the corrected, upright volume. The grid of a stack that only leans is an affine (a sheared one), so
all its masks lie on its slices. No affine describes uneven gaps: there the NIfTI mask lies on the corrected grid and
the corrected image is written beside it, while DICOM objects, which say of each slice where it lies, hold each at its
own place. The choice and its reasons: docs/decisions/0008-masks-of-corrected-series.md.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from medseg.exporters.result import Result
from medseg.readers.allowances import NOTES, Allowance
from medseg.readers.dicom_geometry import Stack, series_stack
from medseg.readers.dicom_regular import Upright, covered, to_slices, upright_grid
from medseg.volume import Volume

IMAGE_SUFFIX = ".image.nii.gz"
"""Of the corrected image beside a mask that lies on its grid."""


@dataclass(frozen=True)
class Placed:
    """A result as the formats need it.

    Attributes
    ----------
    nifti, dicom : for files that are described by one affine, and for objects that describe each slice.
    image : the corrected image that the NIfTI mask lies on (its first channel); None where it lies on the slices.
    """

    nifti: Result
    dicom: Result
    image: Volume | None = None


def place(result: Result, allow: Collection[Allowance]) -> Placed:
    """Bring a result on a corrected grid back to the slices; others are returned as they are.

    Labels where no slice is are removed: nothing was seen there. A corrected image of a dataset, where labels are read
    on the corrected grid too, keeps its mask there.
    """
    used = {NOTES[note] for note in result.image.notes if note in NOTES}
    if not used:
        return Placed(result, result)
    if result.series is None:
        return Placed(result, result, _first(result.image))
    stack = series_stack(list({header.key: header for header in result.series.headers}.values()))
    grid = upright_grid(stack, allow)
    if grid is None:  # another channel was corrected; the mask lies on the grid of this one
        return Placed(result, result)
    seen = result.mask.with_array(np.where(covered(grid, stack.size), result.mask.array, 0))
    uneven = "SPACING_REGULARISED" in grid.notes
    sliced = replace(
        result,
        mask=_on_slices(seen, grid, stack),
        measured=seen,
        probabilities=None if result.probabilities is None else _on_slices(result.probabilities, grid, stack),
        stack=stack if uneven else None,
    )
    return Placed(replace(result, mask=seen), sliced, _first(result.image)) if uneven else Placed(sliced, sliced)


def _first(image: Volume) -> Volume:
    return replace(image, array=image.array[:1])


def _on_slices(volume: Volume, grid: Upright, stack: Stack) -> Volume:
    return replace(volume, array=to_slices(volume.array, grid, stack.size), affine=stack.affine)
