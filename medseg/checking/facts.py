"""What is remembered about a case after its voxels are gone: some hundred numbers and three small pictures."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.spec import Case, Spec
from medseg.studies import Study
from medseg.volume import Unit, Volume, reorient, shown_axes

SAMPLES = 1_000_000
"""Percentiles are taken from at most about this many voxels, evenly spaced through the image."""
THUMBNAIL = 96
"""Longest side of a thumbnail, in pixels."""


@dataclass(frozen=True)
class Intensity:
    """Values of one channel: smallest, 0.5th percentile, median, 99.5th percentile, largest."""

    smallest: float
    low: float
    middle: float
    high: float
    largest: float

    @property
    def span(self) -> float:
        """Distance between the 0.5th and the 99.5th percentile, of all values where that is nothing."""
        return (self.high - self.low) or (self.largest - self.smallest)


@dataclass(frozen=True)
class CaseFacts:
    """A case in numbers. Triples are in the patient's order: right-left, back-front, foot-head.

    Attributes
    ----------
    size : voxels.
    spacing : mm (or pixel).
    unit : of the spacing.
    dtype : of the voxels as read ("float32" where a scale factor applied).
    orthogonal : False for a sheared grid.
    intensities : one per channel, in the order of the spec.
    volumes : label name -> volume in mL (in pixels for pictures); None without a mask.
    touching : labels that reach the edge of the image.
    image_hash, mask_hash : of the voxel values in patient order, whatever the data type, file format or axis order.
    notes : what the reader noticed.
    """

    id: str
    patient: str
    split: str
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    unit: Unit
    dtype: str
    orthogonal: bool
    intensities: tuple[Intensity, ...]
    volumes: dict[str, float] | None
    touching: tuple[str, ...]
    image_hash: str
    mask_hash: str | None
    notes: tuple[str, ...]

    @property
    def extent(self) -> tuple[float, float, float]:
        """Size in mm (or pixel)."""
        a, b, c = (n * s for n, s in zip(self.size, self.spacing, strict=True))
        return (a, b, c)


@dataclass(frozen=True)
class Slice:
    """One plane for the page: grey values and label values (rows, columns), and the distance of their pixels."""

    grey: NDArray[np.uint8]
    labels: NDArray[Any] | None
    spacing: tuple[float, float]


def case_facts(spec: Spec, study: Study) -> CaseFacts:
    """Reduce a study to its facts."""
    image = reorient(study.image, "RAS")
    mask = None if study.mask is None else reorient(study.mask, "RAS")
    counts = None if mask is None else _counts(spec, mask.array)
    return CaseFacts(
        id=study.case.id,
        patient=study.case.patient,
        split=study.case.split,
        size=image.shape,
        spacing=image.spacing,
        unit=image.unit,
        dtype=study.image.array.dtype.name,
        orthogonal=image.orthogonal,
        intensities=tuple(_intensity(channel) for channel in image.array),
        volumes=None if counts is None else {name: n * _unit_volume(image) for name, n in counts.items()},
        touching=() if mask is None else _touching(spec, mask.array[0]),
        image_hash=image_hash(image),
        mask_hash=None if mask is None else _hash(mask.array),
        notes=tuple(dict.fromkeys((*study.image.notes, *(() if study.mask is None else study.mask.notes)))),
    )


def _unit_volume(image: Volume) -> float:
    """Return what one voxel counts: mL, or 1 for pictures without a scale."""
    return image.voxel_volume / 1000 if image.unit == "mm" else 1.0


def _counts(spec: Spec, mask: NDArray[Any]) -> dict[str, int]:
    return {name: int(np.count_nonzero(mask == value)) for name, value in spec.foreground.items()}


def _intensity(channel: NDArray[Any]) -> Intensity:
    flat = channel.ravel()
    # An odd step never walks along one column of an image whose width is a power of two.
    sample = flat[:: max(1, flat.size // SAMPLES) | 1]
    low, middle, high = (float(v) for v in np.percentile(sample, (0.5, 50, 99.5)))
    return Intensity(float(flat.min()), low, middle, high, float(flat.max()))


def _touching(spec: Spec, mask: NDArray[Any]) -> tuple[str, ...]:
    found: set[int] = set()
    for axis in range(3):
        # A picture's only plane is no edge.
        if mask.shape[axis] > 1:
            found.update(int(v) for end in (0, -1) for v in np.unique(mask.take(end, axis=axis)))
    return tuple(name for name, value in spec.foreground.items() if value in found)


def image_hash(image: Volume) -> str:
    """Return a digest of the voxel values in patient order: the same for a copy in another format or axis order."""
    return _hash(reorient(image, "RAS").array)


def _hash(array: NDArray[Any]) -> str:
    state = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    for channel in array:
        # Adding zero makes one of -0.0 and 0.0, which are equal values with different bits.
        state.update((np.ascontiguousarray(channel, dtype=np.float32) + np.float32(0)).data)
    return state.hexdigest()


def thumbnail(spec: Spec, study: Study) -> tuple[Slice, ...]:
    """Return the axial, coronal and sagittal slice with most labelled voxels (the middle one without labels).

    Slices are shown as a radiologist reads them, the patient's right on the left, and are thinned to THUMBNAIL
    pixels; a picture has one, as it is.
    """
    axes = shown_axes(study.image.unit)
    image = reorient(study.image, axes)
    labels = None if study.mask is None else reorient(study.mask, axes).array[0]
    inside = np.zeros(image.shape, bool) if labels is None else np.isin(labels, list(spec.foreground.values()))
    facts = _intensity(image.array[0])
    slices = []
    for axis in (2, 1, 0):
        others = [a for a in range(3) if a != axis]
        if min(image.shape[a] for a in others) == 1:
            continue
        areas = inside.sum(axis=tuple(others))
        index = int(areas.argmax()) if areas.any() else image.shape[axis] // 2
        step = -(-max(image.shape[a] for a in others) // THUMBNAIL)
        cut = image.array[0].take(index, axis=axis).T[::-step, ::-step].astype(np.float64)
        grey = np.clip((cut - facts.low) / (facts.span or 1), 0, 1)
        painted = None if labels is None else labels.take(index, axis=axis).T[::-step, ::-step].copy()
        spacing = (image.spacing[others[1]] * step, image.spacing[others[0]] * step)
        slices.append(Slice(np.rint(grey * 255).astype(np.uint8), painted, spacing))
    return tuple(slices)


def without_names(text: str, spec: Spec, case: Case) -> str:
    """Take the names of a case's files and folders out of a message, unless its id shows them anyway.

    Below the dataset's root every part of a path may name the patient, except what the spec itself says.
    """
    text = text.removeprefix(f"case {case.id}: ")
    paths = [*case.images, *case.label_files]
    for path in paths:
        text = text.replace(str(path), path.name)
    if any(case.id in path.as_posix() for path in paths):
        return text
    tokens = {*spec.channels, *(channel.file for channel in spec.channels.values())}
    said = tokens.union(PurePosixPath(spec.images).parts, PurePosixPath(spec.masks).parts)
    # Of a study only the file's own name could be told; the readers of series tell none.
    depth = max(1, *(len(PurePosixPath(pattern).parts) for pattern in (spec.images, spec.masks)))
    parts = {part for path in paths for part in path.parts[-depth:]} - said
    for word in sorted({w for part in parts for w in (part, part.split(".")[0]) if w}, key=len, reverse=True):
        text = text.replace(word, "…")
    return text
