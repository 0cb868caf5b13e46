"""The fingerprint: what a dataset is, in the numbers that planning needs.

All sizes and spacings are those of the cases turned to RAS, so that axes mean the same in every case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from medseg.config import Config
from medseg.errors import MedsegError, SpecError
from medseg.joined import dataset_of
from medseg.spec import Case, Spec
from medseg.studies import Study, read_study
from medseg.volume import reorient

SAMPLES_PER_CASE = 5000
GROUPING = ("Manufacturer", "Modality")


def tidy(number: float) -> float:
    """Return a number as people write it, to six significant digits (spacings of microscopes are small)."""
    return float(f"{number:.6g}")


class ChannelStatistics(Config):
    """Foreground intensities of one channel over the dataset (percentiles 0.5, 50, 99.5, mean and deviation)."""

    low: float
    median: float
    high: float
    mean: float
    deviation: float


class Fingerprint(Config):
    """What the planner knows of a dataset.

    Attributes
    ----------
    cases, patients : how many.
    shapes, spacings : percentiles (0, 10, 50, 90, 100) over the cases, of sizes in voxels and of spacings, RAS axes.
    voxels : voxels of all cases together.
    channels : name -> ChannelStatistics.
    label_ml : label -> median volume (mL; for pictures, kilopixels) over the cases that have it.
    label_cases : label -> number of cases that have it.
    annotated_share : share of voxels that are not marked "ignore".
    label_thickness : label -> twice its volume over its surface (mm or pixel; see `thickness`), median over the cases
        that have it. Empty in fingerprints from before it was taken.
    """

    cases: int
    patients: int
    shapes: tuple[tuple[int, int, int], ...]
    spacings: tuple[tuple[float, float, float], ...]
    voxels: int
    channels: dict[str, ChannelStatistics]
    label_ml: dict[str, float]
    label_cases: dict[str, int]
    annotated_share: float = 1.0
    label_thickness: dict[str, float] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what older fingerprints do not have: plans that hold one keep their digest."""
        return {key: value for key, value in values(self).items() if key != "label_thickness" or value}

    @property
    def median_shape(self) -> tuple[int, int, int]:
        """Median size along R, A, S in voxels."""
        return self.shapes[2]

    @property
    def median_spacing(self) -> tuple[float, float, float]:
        """Median spacing along R, A, S."""
        return self.spacings[2]


class CaseFacts(Config):
    """What is known of one case, by which cases can be spread over folds.

    Attributes
    ----------
    label_ml : label -> volume (mL; for pictures, kilopixels), labels that are absent left out.
    origin : words of the header that name a kind of scanner (GROUPING), where there are any, and (as "dataset") the
        name of the dataset, where there are several.
    """

    label_ml: dict[str, float]
    origin: dict[str, str] = Field(default_factory=dict)


def take_fingerprint(
    spec: Spec, cases: Sequence[Case], *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Fingerprint:
    """Read every case once and summarise them; parameters and errors as for `survey`."""
    return survey(spec, cases, progress=progress)[0]


def survey(
    spec: Spec, cases: Sequence[Case], *, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Fingerprint, dict[str, CaseFacts]]:
    """Read every case once; return what they are together, and by case id. `progress` is told (done, total).

    Raises
    ------
    SpecError : cases that cannot be used, each named with its reason (all of them, not the first); no case at all; no
        voxel of a label in any of them (NO_FOREGROUND).
    """
    if not cases:
        raise SpecError(f"dataset {spec.name}: there is no case to learn from")
    facts, problems = [], []
    for number, case in enumerate(cases):
        try:
            study = read_study(spec, case)
            if study.mask is None:
                problems.append(f"case {case.id}: it has no mask (LABEL_MISSING)")
            else:
                facts.append(_facts(spec, study))
        except MedsegError as error:
            problems.append(f"{error} ({error.code})")
        progress(number + 1, len(cases))
    if problems:
        raise SpecError(
            f"{len(problems)} of {len(cases)} cases cannot be used; repair or remove them "
            "(medseg check lists everything):\n  " + "\n  ".join(problems)
        )
    if not any(row.label_ml for row in facts):
        values = ", ".join(f"{name} = {value}" for name, value in spec.foreground.items())
        raise SpecError(
            f"none of the {len(cases)} training cases holds a voxel of a label ({values}): there is nothing to learn. "
            "Look at the values in the masks (medseg check) and at `labels` in the spec",
            code="NO_FOREGROUND",
        )
    kept = {
        case.id: CaseFacts(label_ml=row.label_ml, origin=row.origin) for case, row in zip(cases, facts, strict=True)
    }
    return _summarise(spec, cases, facts), kept


@dataclass(frozen=True)
class _Facts:
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    samples: tuple[list[float], ...]
    label_ml: dict[str, float]
    thickness: dict[str, float]
    annotated: float
    origin: dict[str, str]


def _facts(spec: Spec, study: Study) -> _Facts:
    assert study.mask is not None
    image, mask = reorient(study.image, "RAS"), reorient(study.mask, "RAS").array[0]
    known = mask != spec.ignore if spec.ignore is not None else np.ones(mask.shape, bool)
    foreground = (mask > 0) & known
    counts = {name: int((mask == value).sum()) for name, value in spec.foreground.items()}
    dataset = {"dataset": name} if (name := dataset_of(study.case)) else {}
    return _Facts(
        shape=image.shape,
        spacing=image.spacing,
        samples=tuple(_sample(channel, foreground) for channel in image.array),
        label_ml={name: count * image.voxel_volume / 1000 for name, count in counts.items() if count},
        thickness=thickness(mask, image.spacing, spec.foreground, counts),
        annotated=float(known.mean()),
        origin={word: study.image.meta[word] for word in GROUPING if word in study.image.meta} | dataset,
    )


def thickness(
    mask: NDArray[np.generic], spacing: tuple[float, float, float], labels: Mapping[str, int], counts: Mapping[str, int]
) -> dict[str, float]:
    """Return twice volume over surface of each label that is there: the thickness of a sheet, a third of a ball's.

    Parameters
    ----------
    mask : (I, J, K) label values.
    spacing : of its voxels.
    counts : label -> its voxels.

    The surface is that of the voxels' faces, which is larger than a smooth one (by a half on average), so that no
    label is taken for thicker than it is. Faces on the border of the image count: nothing is known behind them. Axes of
    a single voxel have no faces.
    """
    faces = dict.fromkeys(labels.values(), 0.0)
    voxel = float(np.prod(spacing))
    for axis, step in enumerate(spacing):
        if mask.shape[axis] < 2:
            continue
        rows = np.moveaxis(mask, axis, 0)
        change = rows[1:] != rows[:-1]
        ends = np.concatenate([rows[1:][change], rows[:-1][change], rows[-1].ravel(), rows[0].ravel()])
        for value, count in zip(*np.unique(ends, return_counts=True), strict=True):
            if int(value) in faces:
                faces[int(value)] += float(count) * voxel / step
    return {
        name: tidy(2 * counts[name] * voxel / faces[value])
        for name, value in labels.items()
        if counts[name] and faces[value]
    }


def _sample(channel: NDArray[np.generic], foreground: NDArray[np.bool_]) -> list[float]:
    """Return up to SAMPLES_PER_CASE foreground values, evenly spread (all voxels where there is no foreground)."""
    values = channel[foreground] if foreground.any() else channel.ravel()
    spread = np.linspace(0, values.size - 1, min(values.size, SAMPLES_PER_CASE)).round().astype(np.int64)
    rows: list[float] = values[spread].astype(np.float64).tolist()
    return rows


def _summarise(spec: Spec, cases: Sequence[Case], facts: list[_Facts]) -> Fingerprint:
    quantiles = (0, 10, 50, 90, 100)
    shapes = np.percentile([f.shape for f in facts], quantiles, axis=0)
    spacings = np.percentile([f.spacing for f in facts], quantiles, axis=0)
    channels = {}
    for index, name in enumerate(spec.channels):
        values = np.concatenate([np.asarray(f.samples[index]) for f in facts])
        low, median, high = (tidy(v) for v in np.percentile(values, (0.5, 50, 99.5)))
        channels[name] = ChannelStatistics(
            low=low, median=median, high=high, mean=tidy(values.mean()), deviation=tidy(values.std())
        )
    volumes = {name: [f.label_ml[name] for f in facts if name in f.label_ml] for name in spec.foreground}
    across = {name: [f.thickness[name] for f in facts if name in f.thickness] for name in spec.foreground}
    return Fingerprint(
        cases=len(facts),
        patients=len({case.patient for case in cases}),
        shapes=tuple((int(a), int(b), int(c)) for a, b, c in np.rint(shapes)),
        spacings=tuple((tidy(a), tidy(b), tidy(c)) for a, b, c in spacings),
        voxels=int(sum(int(np.prod(f.shape)) for f in facts)),
        channels=channels,
        label_ml={name: tidy(float(np.median(v))) if v else 0.0 for name, v in volumes.items()},
        label_cases={name: len(v) for name, v in volumes.items()},
        annotated_share=tidy(float(np.mean([f.annotated for f in facts]))),
        label_thickness={name: tidy(float(np.median(v))) for name, v in across.items() if v},
    )
