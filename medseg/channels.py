"""From the series or files of a study to one image with the channels of a spec, on one grid."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from medseg import config
from medseg.config import Config
from medseg.errors import GeometryError, MedsegError, ReadError, SpecError
from medseg.readers.allowances import Allowance
from medseg.readers.dicom_index import SeriesFiles
from medseg.readers.dicom_scan import scan
from medseg.readers.dicom_select import choose_series
from medseg.readers.dicom_series import read_series
from medseg.regrid import resample_to
from medseg.spec import Spec
from medseg.volume import Volume, align_to, on_one_grid

LEAST_SHARED = 0.5
"""Two channels that share less than this of the smaller one's space show different parts of the body."""
PADDED = 1e-3
"""A channel that misses more of the reference's voxels than this is noted."""


class Rule(Config):
    """How the series of one channel is found, as in a spec; `modality` stays the spec's unless told."""

    modality: str | None = None
    match: dict[str, Any] = Field(default_factory=dict)


class Rules(Config):
    """A file that says how the channels of a model are found where another site describes its series otherwise."""

    channels: dict[str, Rule]
    frame_of_reference: Literal["same", "any"] | None = None


def with_rules(spec: Spec, file: Path) -> Spec:
    """Return a spec whose channels are found by the rules of a YAML file.

    Raises
    ------
    SpecError : the file is wrong, or does not name the channels of the spec, each once.
    """
    rules = config.load(Rules, file, error=SpecError)
    if set(rules.channels) != set(spec.channels):
        raise SpecError(
            f"{file}: it names the channels {', '.join(rules.channels) or 'none'}, the model needs "
            f"{', '.join(spec.channels)}"
        )
    # The patterns are those of the training's files, and exclude rules.
    values = spec.model_dump() | {"images": "", "masks": ""}
    for name, rule in rules.channels.items():
        values["channels"][name] |= rule.model_dump(exclude_none=True)
    values["frame_of_reference"] = rules.frame_of_reference or spec.frame_of_reference
    try:
        return Spec.model_validate(values)
    except ValidationError as invalid:
        problems = "; ".join(str(item["msg"]).removeprefix("Value error, ") for item in invalid.errors())
        raise SpecError(f"{file}: {problems}") from invalid


def choose_channels(spec: Spec, paths: tuple[Path, ...]) -> dict[str, SeriesFiles]:
    """Return the series below `paths` that the rules of the spec choose, in the order of its channels.

    Raises
    ------
    ReadError : CHANNEL_MISSING, CHANNEL_AMBIGUOUS, NOT_FOUND.
    """
    return choose_series(scan(paths).series, spec.rules)


def read_chosen(spec: Spec, chosen: Mapping[str, SeriesFiles], *, allow: Collection[Allowance] = ()) -> Volume:
    """Read the chosen series as one volume on the grid of the reference channel; `allow` as for `read_series`.

    Raises
    ------
    ReadError, GeometryError : as `read_series` and `combine`; FRAME_OF_REFERENCE_DIFFERS, two series do not lie in
        one frame of reference and the spec does not allow it. The message names the channel.
    """
    differs = _frames_differ(chosen)
    if differs and spec.frame_of_reference == "same":
        raise GeometryError(
            f"{differs}: where one lies in the other is unknown; register them first, or say "
            "`frame_of_reference: any` in the spec if their positions are known to agree",
            code="FRAME_OF_REFERENCE_DIFFERS",
        )
    volumes = {}
    for name, series in chosen.items():
        try:
            volumes[name] = read_series(series, suv=spec.channels[name].suv, allow=allow)
        except MedsegError as error:
            raise type(error)(f"channel {name!r}: {error}", code=error.code) from error
    image = combine(spec, volumes)
    return replace(image, notes=tuple(sorted({*image.notes, *(["FRAME_OF_REFERENCE_DIFFERS"] if differs else [])})))


def _frames_differ(chosen: Mapping[str, SeriesFiles]) -> str:
    """Say which two channels do not lie in one known frame of reference; "" where all do."""
    frames = {name: {header.frame_of_reference for header in series.headers} for name, series in chosen.items()}
    (first, known), *others = frames.items()
    for name, frame in others:
        if frame != known:
            return f"channels {first!r} and {name!r} lie in different frames of reference"
        if "" in frame:
            return f"channels {first!r} and {name!r} name no frame of reference"
    return ""


def combine(spec: Spec, volumes: Mapping[str, Volume]) -> Volume:
    """Put the channels of a case together on the grid of the reference channel.

    Another order or direction of axes is undone; where the spec says so (`resample`), other grids are resampled, too.

    Returns
    -------
    Volume
        (channels, I, J, K) float32 in the order of `volumes`, affine and meta of the reference, the notes of all and
        CHANNEL_RESAMPLED, CHANNEL_PADDED.

    Raises
    ------
    ReadError : CHANNEL_COUNT, a volume has several channels.
    GeometryError : CHANNEL_GRID (other grid, and `resample` is false), CHANNEL_COVERAGE (a channel shares less than
        half of its space, or of the reference's if that is smaller).
    """
    for name, volume in volumes.items():
        if volume.array.shape[0] != 1:
            text = f"channel {name!r} holds {volume.array.shape[0]} channels of its own, one is needed"
            raise ReadError(text, code="CHANNEL_COUNT")
    reference = volumes[spec.reference_channel]
    order = {spec.reference_channel: reference, **volumes}
    notes = {note for volume in volumes.values() for note in volume.notes}
    fitted = dict(zip(order, on_one_grid(order), strict=True)) if not spec.resamples else {}
    array = np.empty((len(volumes), *reference.shape), np.float32)
    for number, (name, volume) in enumerate(volumes.items()):
        turned = fitted.get(name) or align_to(volume, reference)
        if turned is None:
            turned, covered = resample_to(volume, reference)
            _check_shared(spec, name, volume, reference, covered)
            notes |= {"CHANNEL_RESAMPLED"} | ({"CHANNEL_PADDED"} if covered < 1 - PADDED else set())
        array[number] = turned.array[0]
    return replace(reference, array=array, notes=tuple(sorted(notes)))


def _check_shared(spec: Spec, name: str, volume: Volume, reference: Volume, covered: float) -> None:
    whole, other = (np.prod(v.shape) * v.voxel_volume for v in (reference, volume))
    shared = float(covered * whole / min(whole, other))
    if shared < LEAST_SHARED:
        raise GeometryError(
            f"channel {name!r} and the reference channel {spec.reference_channel!r} share {shared:.0%} of the space "
            f"of the smaller one, at least {LEAST_SHARED:.0%} are needed: give series of the same part of the body",
            code="CHANNEL_COVERAGE",
        )
