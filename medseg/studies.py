"""From a Case to checked voxels: the one place where images and masks of a dataset are opened."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg.channels import choose_channels, combine, read_chosen
from medseg.errors import GeometryError, MedsegError, ReadError, SpecError
from medseg.joined import own_spec
from medseg.readers import READERS, read_image, read_labels, reader_for
from medseg.readers.allowances import Allowance
from medseg.readers.label_request import LabelRequest, Wanted
from medseg.spec import Case, Spec
from medseg.volume import Volume, align_to, grid_distance, reorient


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
    """Read and check one case; one of several datasets by its own spec, with channels and values as `spec` has them.

    Raises
    ------
    MedsegError : any reading error, CHANNEL_MISSING, CHANNEL_AMBIGUOUS, CHANNEL_COUNT, CHANNEL_GRID,
        CHANNEL_COVERAGE, FRAME_OF_REFERENCE_DIFFERS, LABEL_BETWEEN_SLICES, LABEL_GRID, LABEL_VALUES,
        LABEL_NOT_INTEGER, UNIT_DIFFERS, any refusal of DICOM labels; the message starts with the case id.
    """
    own = own_spec(spec, case)
    try:
        image, drawn_on = _read_images(own, case)
        mask = None if case.mask is None else _read_mask(own, case, image, drawn_on)
    except MedsegError as error:
        raise _named(error, f"case {case.id}: {error}") from error
    return Study(case, image, mask) if own is spec else _brought(Study(case, image, mask), own, spec)


def _brought(study: Study, own: Spec, spec: Spec) -> Study:
    """Bring the channels and label values of a dataset to those of a spec for several; names decide."""
    image, mask = study.image, study.mask
    order = [list(own.channels).index(name) for name in spec.channels]
    if order != sorted(order):
        image = image.with_array(image.array[order])
    if mask is not None:
        pairs = {0: 0, **{value: spec.foreground[name] for name, value in own.foreground.items()}}
        if own.ignore is not None and spec.ignore is not None:
            pairs[own.ignore] = spec.ignore
        have = np.array(sorted(pairs))
        want = np.array([pairs[value] for value in sorted(pairs)], _label_map(spec))
        mask = mask.with_array(want[np.searchsorted(have, mask.array)])
    return Study(study.case, image, mask)


def _label_map(spec: Spec) -> type[np.uint8] | type[np.int32]:
    return np.uint8 if max(spec.values) < 256 else np.int32


def _read_images(spec: Spec, case: Case) -> tuple[Volume, tuple[Path, ...]]:
    """Return the image of a case, and the files or folders that its labels may refer to."""
    if not spec.rules:
        return read_channels(spec, case.images, allow=spec.allow), case.images
    chosen = choose_channels(spec, case.images)
    return read_chosen(spec, chosen, allow=spec.allow), chosen[spec.reference_channel].files


def _named(error: MedsegError, message: str) -> MedsegError:
    return type(error)(message, code=error.code)


def read_channels(spec: Spec, paths: tuple[Path, ...], *, allow: Collection[Allowance] = ()) -> Volume:
    """Read files that hold the channels of the spec, in its order, as one volume; raises as `read_study` does.

    `allow` as for `read_series`.
    """
    names = list(spec.channels)
    for name, path in zip(names, paths, strict=False):
        if not path.exists():
            raise ReadError(f"the file of channel {name!r} ({path.name}) is missing", code="CHANNEL_MISSING")
    # paths and channels differ in number where one file holds all channels
    suv = [channel.suv for channel in spec.channels.values()] if len(paths) == len(names) else [None] * len(paths)
    volumes = [read_image(path, suv=wanted, allow=allow) for path, wanted in zip(paths, suv, strict=True)]
    if spec.unit == "mm" and any(volume.unit == "pixel" for volume in volumes):
        raise ReadError(
            "a picture has no scale, and lengths in mm are wanted; say `unit: pixel` in the spec of a dataset of "
            "pictures, or give images in mm",
            code="UNIT_DIFFERS",
        )
    counts = [volume.array.shape[0] for volume in volumes]
    if sum(counts) != len(names) or (len(counts) > 1 and max(counts) > 1):
        raise ReadError(
            f"{sum(counts)} channel(s) found, the spec names {len(names)}: {', '.join(names)}", code="CHANNEL_COUNT"
        )
    return volumes[0] if len(volumes) == 1 else combine(spec, dict(zip(names, volumes, strict=True)))


def _apart(first: Volume, second: Volume) -> str:
    """Return how far two grids of one size lie apart, which their sizes and spacings do not show."""
    turned = reorient(first, second.axis_codes)
    if turned.shape != second.shape:
        return ""
    distance = grid_distance(second.shape, turned.affine, second.affine)
    return f"; corresponding corners lie up to {distance:.3g} {second.unit} apart"


def _read_mask(spec: Spec, case: Case, image: Volume, drawn_on: tuple[Path, ...]) -> Volume:
    paths = case.label_files
    for path in paths:
        if not path.exists():
            raise ReadError(f"its mask ({path.name}) is missing", code="LABEL_MISSING")
    by_name = READERS["dicom"].labels if spec.studies else reader_for(paths[0]).labels
    if by_name is not None:
        if "SPACING_REGULARISED" in image.notes:
            raise GeometryError(
                "its slices were brought to even steps, and DICOM labels are drawn on the slices as they were: between "
                "them nobody drew any; leave the case out, or give a mask on the corrected grid",
                code="LABEL_BETWEEN_SLICES",
            )
        return by_name(paths, LabelRequest(image, wanted_labels(spec), drawn_on, spec.overlap))
    stored = _first_channel(read_labels(paths[0]))
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
    return mask.with_array(array.astype(_label_map(spec)))


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
