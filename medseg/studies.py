"""From a Case to checked voxels: the one place where images and masks of a dataset are opened."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medseg.errors import GeometryError, MedsegError, ReadError, SpecError
from medseg.readers import read_image, reader_for
from medseg.readers.label_request import LabelRequest, Wanted
from medseg.spec import Case, Spec
from medseg.volume import Volume, align_to, grid_distance, on_one_grid, reorient


@dataclass(frozen=True)
class Study:
    """A case in memory.

    Attributes
    ----------
    case : whose it is.
    image : (channels, I, J, K), all channels on one grid.
    mask : (1, I, J, K) uint8 or int32 label values on the image's grid; None for a case without a mask.
    """

    case: Case
    image: Volume
    mask: Volume | None


def read_study(spec: Spec, case: Case) -> Study:
    """Read and check one case.

    Raises
    ------
    MedsegError : any reading error, CHANNEL_MISSING, CHANNEL_COUNT, CHANNEL_GRID, LABEL_GRID, LABEL_VALUES,
        LABEL_NOT_INTEGER, any refusal of DICOM labels; the message starts with the case id.
    """
    try:
        image = read_channels(spec, case.images)
        mask = None if case.mask is None else _read_mask(spec, case, case.mask, image)
    except MedsegError as error:
        raise _named(error, f"case {case.id}: {error}") from error
    return Study(case, image, mask)


def _named(error: MedsegError, message: str) -> MedsegError:
    return type(error)(message, code=error.code)


def read_channels(spec: Spec, paths: tuple[Path, ...]) -> Volume:
    """Read the images of one case as a volume with the channels of the spec; raises as `read_study` does."""
    names = list(spec.channels)
    for name, path in zip(names, paths, strict=False):
        if not path.exists():
            raise ReadError(f"the file of channel {name!r} ({path.name}) is missing", code="CHANNEL_MISSING")
    volumes = [read_image(path) for path in paths]
    if len(volumes) > 1:
        turned = on_one_grid(dict(zip(names, volumes, strict=True)))
        notes = tuple(dict.fromkeys(note for volume in turned for note in volume.notes))
        array = np.concatenate([volume.array.astype(np.float32) for volume in turned])
        image = replace(turned[0], array=array, notes=notes)
    else:
        image = volumes[0]
    if image.array.shape[0] != len(names):
        raise ReadError(
            f"{image.array.shape[0]} channel(s) found, the spec names {len(names)}: {', '.join(names)}",
            code="CHANNEL_COUNT",
        )
    return image


def _apart(first: Volume, second: Volume) -> str:
    """Return how far two grids of one size lie apart, which their sizes and spacings do not show."""
    turned = reorient(first, second.axis_codes)
    if turned.shape != second.shape:
        return ""
    distance = grid_distance(second.shape, turned.affine, second.affine)
    return f"; corresponding corners lie up to {distance:.3g} {second.unit} apart"


def _read_mask(spec: Spec, case: Case, path: Path, image: Volume) -> Volume:
    if not path.exists():
        raise ReadError(f"its mask ({path.name}) is missing", code="LABEL_MISSING")
    by_name = reader_for(path).labels
    if by_name is not None:
        return by_name(path, LabelRequest(image, wanted_labels(spec), case.images, spec.overlap))
    stored = _first_channel(read_image(path))
    mask = align_to(stored, image)
    if mask is None:
        raise GeometryError(
            f"the mask has a grid of {stored.grid}, the image one of {image.grid}{_apart(stored, image)}",
            code="LABEL_GRID",
        )
    array = mask.array
    if array.dtype.kind == "f":
        broken = array[np.rint(array) != array]
        if broken.size:
            raise SpecError(
                f"the mask holds {float(broken[0]):g}, label values are whole numbers", code="LABEL_NOT_INTEGER"
            )
    # Before any cast: 2**32 + 1 would become a 1.
    found = np.unique(array)
    foreign = [int(v) for v in found if int(v) not in spec.values]
    if foreign:
        allowed = ", ".join(str(v) for v in sorted(spec.values))
        raise SpecError(
            f"the mask holds the value(s) {', '.join(map(str, foreign[:5]))}; the spec allows {allowed}",
            code="LABEL_VALUES",
        )
    small = np.uint8 if max(spec.values) < 256 else np.int32
    return mask.with_array(array.astype(small))


def wanted_labels(spec: Spec) -> tuple[Wanted, ...]:
    """Return how the labels of a spec are found among named structures (DICOM segments, ROIs)."""

    def regions(name: str) -> frozenset[str]:
        return frozenset(key for key, region in spec.regions.items() if name in region.labels)

    return tuple(
        Wanted(
            name,
            value,
            expression=spec.labels[name].dicom,
            optional=spec.labels[name].optional,
            regions=regions(name),
        )
        for name, value in spec.foreground.items()
    )


def _first_channel(volume: Volume) -> Volume:
    if volume.array.shape[0] != 1:
        raise ReadError(f"the mask has {volume.array.shape[0]} channels, one is needed", code="NOT_3D")
    return volume
