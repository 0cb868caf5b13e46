"""What an exporter is given, and how it says that a file is not what it should be."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from medseg.errors import ExportError
from medseg.readers.dicom_geometry import Stack
from medseg.readers.dicom_index import SeriesFiles
from medseg.spec import Spec
from medseg.volume import Volume

DICOM_ONLY = "this format describes a DICOM series: it needs one as the input; leave the format out for NIfTI images"
PICTURES_ONLY = "this format holds pixels without a place: the image is in mm; write nifti"


@dataclass(frozen=True)
class Result:
    """A mask and what it was made from.

    Attributes
    ----------
    mask : (1, I, J, K) label values of `spec`, on the grid of the image unless `measured` is there.
    spec : of the model.
    model : what the mask was made by: the digest of the model and the options that change its answer.
    image : (channels, I, J, K) what was segmented, in the order of the spec; its grid, notes and meta are those of the
        spec's reference channel.
    series : the DICOM series that was segmented; None for other images.
    probabilities : (segments, I, J, K) float32 from 0 to 1, or uint8 in steps of 1/255, on the grid of the mask: one
        channel a label of the spec, or a region where it has regions, in its order; None unless an exporter asks for it
        (Exporter.soft).
    stack : where each slice lies, for a mask on the slices of an uneven stack: its affine is then true of none but the
        first and the last.
    measured : the mask on the grid of `image`, where `mask` lies on the slices of a series that was corrected; volumes
        and statistics are taken there.
    """

    mask: Volume
    spec: Spec
    model: str
    image: Volume
    series: SeriesFiles | None = field(default=None, repr=False)
    probabilities: Volume | None = None
    stack: Stack | None = field(default=None, repr=False)
    measured: Volume | None = None

    @property
    def on_image(self) -> Volume:
        """The mask on the grid of `image`."""
        return self.measured or self.mask

    @property
    def planes(self) -> NDArray[np.float64]:
        """(K, 3, 3), of each slice of the mask: (column, row, 1) -> mm in RAS+."""
        if self.stack is not None:
            return self.stack.planes
        affine, k = self.mask.affine, np.arange(self.mask.shape[2])[:, None]
        origins = affine[:3, 3] + k * affine[:3, 2]
        ways = np.broadcast_to(affine[:3, :2], (len(k), 3, 2))
        return np.concatenate([ways, origins[:, :, None]], axis=2)

    @property
    def source(self) -> Volume:
        """The channel (1, I, J, K) of the image that is `series`: the reference channel of the spec."""
        channel = list(self.spec.channels).index(self.spec.reference_channel)
        return replace(self.image, array=self.image.array[channel : channel + 1])

    def need_series(self) -> SeriesFiles:
        """Return the series; raise ExportError(NEEDS_DICOM) where there is none."""
        if self.series is None:
            raise ExportError(DICOM_ONLY, code="NEEDS_DICOM")
        return self.series


def read_back_error(name: str, what: str) -> ExportError:
    """Return the error of a file that does not hold the mask that was written."""
    return ExportError(f"{name}: what was written reads back differently ({what})", code="READ_BACK")
