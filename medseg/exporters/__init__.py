"""EXPORTERS: one row per format of a result; every file is read back before it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import ConfigError
from medseg.readers.picture import is_picture
from medseg.registry import Registry

if TYPE_CHECKING:
    from medseg.exporters.result import Result


@dataclass(frozen=True)
class Exporter:
    """How a result becomes a file.

    Attributes
    ----------
    suffix : of the file, after the id of the study.
    write : (path, result) -> notes; raises ExportError with a reason code, and then leaves no file.
    dicom : whether it describes a DICOM series, so that other images cannot be written so.
    refers_to : formats that it points into, which are written too.
    picture : whether it holds pixels without a place, so that images in mm cannot be written so.
    soft : whether it needs probabilities beside the mask.
    """

    suffix: str
    write: Callable[[Path, Result], tuple[str, ...]]
    dicom: bool = False
    picture: bool = False
    refers_to: tuple[str, ...] = ()
    soft: bool = False


def _nifti(path: Path, result: Result) -> tuple[str, ...]:
    from medseg.exporters.nifti import write_nifti

    write_nifti(path, result.mask)
    return ()


def _png(path: Path, result: Result) -> tuple[str, ...]:
    from medseg.exporters.picture import write_png

    write_png(path, result.mask)
    return ()


def _tiff(path: Path, result: Result) -> tuple[str, ...]:
    from medseg.exporters.picture import write_tiff

    write_tiff(path, result.mask)
    return ()


def _seg(path: Path, result: Result) -> tuple[str, ...]:
    from medseg.exporters.dicom_seg import write_seg

    return write_seg(path, result)


def _labelmap(path: Path, result: Result) -> tuple[str, ...]:
    from medseg.exporters.dicom_seg import write_labelmap

    return write_labelmap(path, result)


def _fractional(path: Path, result: Result) -> tuple[str, ...]:
    from medseg.exporters.dicom_seg import write_fractional

    return write_fractional(path, result)


def _rtstruct(path: Path, result: Result) -> tuple[str, ...]:
    from medseg.exporters.dicom_rtstruct import write_rtstruct

    return write_rtstruct(path, result)


def _sr(path: Path, result: Result) -> tuple[str, ...]:
    from medseg.exporters.dicom_sr import write_sr

    return write_sr(path, result)


def _sc(path: Path, result: Result) -> tuple[str, ...]:
    from medseg.exporters.dicom_sc import write_sc

    return write_sc(path, result)


EXPORTERS: Registry[Exporter] = Registry(
    "exporters",
    {
        "nifti": Exporter(".nii.gz", _nifti),
        "png": Exporter(".png", _png, picture=True),
        "tiff": Exporter(".tif", _tiff, picture=True),
        "seg": Exporter(".seg.dcm", _seg, dicom=True),
        "seg-labelmap": Exporter(".labelmap.dcm", _labelmap, dicom=True),
        "seg-fractional": Exporter(".fractional.dcm", _fractional, dicom=True, soft=True),
        "rtstruct": Exporter(".rtstruct.dcm", _rtstruct, dicom=True),
        "sr": Exporter(".sr.dcm", _sr, dicom=True, refers_to=("seg",)),
        "sc": Exporter(".sc.dcm", _sc, dicom=True),
    },
)


def usual_format(image: Path) -> str:
    """Return the format of the mask of an image where none is asked for: that of its own kind."""
    suffix = image.suffix.lower()
    return "tiff" if suffix in (".tif", ".tiff") else "png" if is_picture(image) else "nifti"


def choose_formats(words: Iterable[str]) -> tuple[str, ...]:
    """Return the formats that are meant by words like "nifti,seg", with those that they refer to, each once.

    Raises
    ------
    ConfigError : no format, or one that does not exist.
    """
    chosen: dict[str, None] = {}
    for name in (part.strip() for word in words for part in word.split(",")):
        if name:
            chosen |= dict.fromkeys((*EXPORTERS[name].refers_to, name))
    if not chosen:
        raise ConfigError(f"no format is given; choose from {', '.join(EXPORTERS)}")
    return tuple(chosen)
