"""READERS: one row per kind of image on disk; ``read_image`` picks the row by looking at the path."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from medseg.errors import ReadError
from medseg.readers.allowances import Allowance
from medseg.readers.label_request import LabelReader, LabelRequest
from medseg.readers.nifti import is_nifti, read_nifti
from medseg.readers.picture import is_picture, read_picture, read_picture_labels
from medseg.registry import Registry
from medseg.volume import Volume


@dataclass(frozen=True)
class Reader:
    """How one kind of image is recognised and read.

    Attributes
    ----------
    can_read : path -> whether this reader is responsible for it (by name and kind, without opening it).
    read : (path, what may be corrected) -> Volume; raises ReadError or GeometryError with a reason code.
    identifying : whether names on disk may identify a patient, so that case ids must be hashed.
    labels : reads masks of this kind where they are no label map of their own but name structures; None where
        `read` gives the label map.
    read_labels : reads a label map, where that is done otherwise than reading an image.
    read_series : as `read`, and whether values are brought to SUV (None: if they are PET), and what may be corrected by
        resampling; None for files that do not say what they hold.
    """

    can_read: Callable[[Path], bool]
    read: Callable[[Path], Volume]
    identifying: bool = False
    labels: LabelReader | None = None
    read_labels: Callable[[Path], Volume] | None = None
    read_series: Callable[[Path, bool | None, Collection[Allowance]], Volume] | None = None


def _read_dicom(path: Path, suv: bool | None = False, allow: Collection[Allowance] = ()) -> Volume:
    from medseg.readers.dicom_series import read_series

    return read_series(path, suv=suv, allow=allow)


def _read_dicom_labels(paths: tuple[Path, ...], request: LabelRequest) -> Volume:
    from medseg.readers.dicom_labels import read_dicom_labels

    return read_dicom_labels(paths, request)


def _is_dicom(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in (".dcm", ".ima", ".seg", "")


READERS: Registry[Reader] = Registry(
    "readers",
    {
        "nifti": Reader(is_nifti, read_nifti),
        "picture": Reader(is_picture, read_picture, read_labels=read_picture_labels),
        "dicom": Reader(_is_dicom, _read_dicom, True, _read_dicom_labels, read_series=_read_dicom),
    },
)


def reader_for(path: Path) -> Reader:
    """Return the row responsible for `path`; raise ReadError(UNKNOWN_FORMAT) naming the kinds that exist."""
    for _, reader in READERS.items():
        if reader.can_read(path):
            return reader
    raise ReadError(
        f"{path.name}: none of the readers ({', '.join(READERS)}) takes this kind of file; "
        "give a .nii or .nii.gz file, a PNG, TIFF or JPEG picture, or a folder that holds one DICOM series",
        code="UNKNOWN_FORMAT",
    )


def read_image(path: Path, *, suv: bool | None = False, allow: Collection[Allowance] = ()) -> Volume:
    """Read one image file or series folder as a Volume (C, I, J, K), whatever its format.

    Parameters
    ----------
    suv : bring the values of a DICOM series to SUV; None: if it is PET. Other kinds of files are taken as they are.
    allow : what is corrected in a DICOM series by resampling instead of refused, see `read_series`.

    Raises
    ------
    ReadError, GeometryError : with the reason code of the reader, or NOT_FOUND / UNKNOWN_FORMAT.
    """
    reader = _reader_of(path)
    return reader.read(path) if reader.read_series is None else reader.read_series(path, suv, allow)


def read_labels(path: Path) -> Volume:
    """Read a label map, whatever its format, as it is stored; raises as `read_image` does."""
    reader = _reader_of(path)
    return (reader.read_labels or reader.read)(path)


def _reader_of(path: Path) -> Reader:
    if not path.exists():
        raise ReadError(f"{path.name}: this file or folder does not exist", code="NOT_FOUND")
    return reader_for(path)
