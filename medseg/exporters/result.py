"""What an exporter is given, and how it says that a file is not what it should be."""

from __future__ import annotations

from dataclasses import dataclass, field

from medseg.errors import ExportError
from medseg.readers.dicom_index import SeriesFiles
from medseg.spec import Spec
from medseg.volume import Volume

DICOM_ONLY = "this format describes a DICOM series: it needs one as the input; leave the format out for NIfTI images"


@dataclass(frozen=True)
class Result:
    """A mask and what it was made from.

    Attributes
    ----------
    mask : (1, I, J, K) label values of `spec`, on the grid of the image.
    spec : of the model.
    model : what the mask was made by: the digest of the model and the options that change its answer.
    image : (channels, I, J, K) what was segmented, on the grid of the mask; the first channel is that of `series`.
    series : the DICOM series that was segmented; None for other images.
    probabilities : (segments, I, J, K) float32 from 0 to 1, on the grid of the mask: one channel a label of the spec,
        or a region where it has regions, in its order; None unless an exporter asks for it (Exporter.soft).
    """

    mask: Volume
    spec: Spec
    model: str
    image: Volume
    series: SeriesFiles | None = field(default=None, repr=False)
    probabilities: Volume | None = None

    def need_series(self) -> SeriesFiles:
        """Return the series; raise ExportError(NEEDS_DICOM) where there is none."""
        if self.series is None:
            raise ExportError(DICOM_ONLY, code="NEEDS_DICOM")
        return self.series


def read_back_error(name: str, what: str) -> ExportError:
    """Return the error of a file that does not hold the mask that was written."""
    return ExportError(f"{name}: what was written reads back differently ({what})", code="READ_BACK")
