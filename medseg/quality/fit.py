"""Fit the quality estimate on out-of-fold cases, and say honestly how good it is.

Every figure is of cases that the fit in question has not seen: for each patient the regressions and clouds are fitted
again without them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.quality.apply import deviation, image_numbers
from medseg.quality.clouds import fit_cloud, left_out, strangest
from medseg.quality.model import Cloud, LabelQuality, QualityModel, tidy
from medseg.quality.ridge import expected_dice, fit_ridge, mean_logit
from medseg.quality.shape import Shapes
from medseg.quality.signs import Signs

MIN_CASES = 12
"""With fewer cases there is no estimate; with fewer that hold a label, none of that label."""
REVIEW_SHARE = 0.2
"""Of out-of-fold cases, the share that is flagged: those that are strange, and those with the lowest expected Dice."""
NEAR = 0.975
"""Of out-of-fold cases, the share that must lie within `beyond`."""
MOST_GROUPS = 200
"""More patients are left out several at a time."""
Floats = NDArray[np.float64]
Numbers = Mapping[str, float]
Cells = dict[int, float]
"""Number of a case -> value."""


@dataclass(frozen=True)
class Observed:
    """One case that its networks have not learnt from.

    Attributes
    ----------
    signs : of its prediction.
    reference : what its true labels are like; those that are not there are left out.
    dice : label -> Dice of the final mask; labels that are neither there nor found are left out.
    known : labels of which the reference tells whether they are there; None: all.
    """

    case: str
    patient: str
    signs: Signs
    reference: Shapes
    dice: dict[str, float]
    known: frozenset[str] | None = None


@dataclass(frozen=True)
class Judged:
    """What the estimate said of a case that it was not fitted on, beside the truth.

    Attributes
    ----------
    dice, expected, volume_only : label -> Dice: real, estimated, and estimated from the volume alone.
    low : whether it is flagged for its expected Dice.
    far : in what it is unlike the other cases, if it is flagged for that.
    missing : labels that are missing and must not be.
    """

    case: str
    patient: str
    dice: dict[str, float]
    expected: dict[str, float]
    volume_only: dict[str, float]
    low: bool
    far: str
    missing: tuple[str, ...]

    @property
    def flagged(self) -> bool:
        """Whether a person would be asked to look at it."""
        return self.low or bool(self.far) or bool(self.missing)


@dataclass(frozen=True)
class Fitted:
    """A model and how it did on the cases, each left out."""

    model: QualityModel
    judged: tuple[Judged, ...]


def fit_quality(cases: Sequence[Observed], labels: Sequence[str], *, folds: int, mirror: bool) -> Fitted | None:
    """Fit on cases; None for fewer than MIN_CASES.

    Parameters
    ----------
    folds : networks of which each has predicted those that it has not seen.
    mirror : whether they were asked with mirrored inputs, too.
    """
    if len(cases) < MIN_CASES:
        return None
    groups = _groups([case.patient for case in cases])
    layouts = np.array([case.signs.image.layout for case in cases])
    template = tuple(tidy(float(value)) for value in layouts.mean(0))
    images = _image_rows(cases, layouts, groups)
    image, far = _with_unit(fit_cloud(images), np.nan_to_num(left_out(images, groups, images)))
    distances, rows, crossed = {"": far}, {}, {}
    for label in labels:
        rows[label], distances[label], crossed[label] = _fit_label(cases, label, groups)
    largest = np.max([np.nan_to_num(values) for values in distances.values()], axis=0)
    beyond = tidy(float(np.quantile(largest, NEAR, method="higher")) * (1 + 1e-5))
    expected, volume = (_by_case(len(cases), {label: cells[n] for label, cells in crossed.items()}) for n in (0, 1))
    typical = {label: row.typical for label, row in rows.items() if row.typical is not None}
    scores = [deviation(row, typical) for row in expected]
    missing = [_missing(case, rows) for case in cases]
    strange = [far > beyond or bool(labels) for far, labels in zip(largest, missing, strict=True)]
    model = QualityModel(
        cases=len(cases),
        patients=len({case.patient for case in cases}),
        folds=folds,
        mirror=mirror,
        layout=template,
        image=image,
        labels=rows,
        review_below=_lowest(scores, strange),
        beyond=beyond,
    )
    judged = [
        Judged(
            case=case.case,
            patient=case.patient,
            dice=dict(case.dice),
            expected=expected[i],
            volume_only=volume[i],
            low=_is_low(model, scores[i]),
            far=_furthest(model, case, images[i], {name: values[i] for name, values in distances.items()}),
            missing=missing[i],
        )
        for i, case in enumerate(cases)
    ]
    return Fitted(model, tuple(judged))


def _by_case(count: int, cells: Mapping[str, Cells]) -> list[dict[str, float]]:
    return [{label: found[i] for label, found in cells.items() if i in found} for i in range(count)]


def _missing(case: Observed, rows: Mapping[str, LabelQuality]) -> tuple[str, ...]:
    return tuple(label for label, row in rows.items() if row.always and label not in case.signs.shapes)


def _is_low(model: QualityModel, score: float | None) -> bool:
    return score is not None and model.review_below is not None and score <= model.review_below


def _furthest(model: QualityModel, case: Observed, image: Numbers, distances: Mapping[str, float]) -> str:
    """Say in what a case is unlike the others; "" where it is not."""
    label = max(distances, key=lambda name: -1.0 if np.isnan(distances[name]) else distances[name])
    if not distances[label] > model.beyond:
        return ""
    shape = model.labels[label].shape if label else None
    if shape is None:
        return f"image: {strangest(model.image, image)[0]}"
    return f"{label}: {strangest(shape, case.signs.shapes[label])[0]}"


def _groups(patients: Sequence[str]) -> list[int]:
    """Return the number of the group in which each case is left out: one a patient, up to MOST_GROUPS."""
    order = {patient: n for n, patient in enumerate(sorted(set(patients)))}
    return [order[patient] % MOST_GROUPS for patient in patients]


def _image_rows(cases: Sequence[Observed], layouts: Floats, groups: Sequence[int]) -> list[dict[str, float]]:
    """Return the numbers of each image; its layout is held against the mean of the others', as a new one's will be."""
    rows, numbered = [], np.array(groups)
    for case, group in zip(cases, groups, strict=True):
        others = numbered != group
        template = layouts[others].mean(0) if others.any() else layouts.mean(0)
        rows.append(image_numbers(case.signs.image, template.tolist()))
    return rows


def _with_unit(cloud: Cloud, far: Floats) -> tuple[Cloud, Floats]:
    """Return a cloud whose unit is the distance of nine tenths of the left-out cases, and their distances in it."""
    there = far[np.isfinite(far)]
    unit = tidy(max(1e-3, float(np.quantile(there, 0.9)))) if there.size else 1.0
    return cloud.model_copy(update={"unit": unit}), far / unit


def _fit_label(
    cases: Sequence[Observed], label: str, groups: Sequence[int]
) -> tuple[LabelQuality, Floats, tuple[Cells, Cells]]:
    """Return the model of a label, the distances of its shapes, and what each left-out case was expected to have.

    The latter by number of the case: by all signs, and by the volume alone.
    """
    truth = [case.reference.get(label) for case in cases]
    found = [case.signs.shapes.get(label) for case in cases]
    told = [case.known is None or label in case.known for case in cases]
    always = any(told) and all(row is not None for row, tells in zip(truth, told, strict=True) if tells)
    known = [row for row in truth if row is not None]
    shape, far = None, np.full(len(cases), np.nan)
    if len(known) >= MIN_CASES:
        shape, far = _with_unit(fit_cloud(known), left_out(truth, groups, found))
    both = [i for i, case in enumerate(cases) if label in case.dice and label in case.signs.passes and found[i]]
    rows = {i: cases[i].signs.passes[label] for i in both}
    volumes = {i: cases[i].signs.shapes[label]["volume"] for i in both}
    scored = [case.dice[label] for case in cases if label in case.dice]
    if len(rows) < MIN_CASES or len({groups[i] for i in rows}) < 3:
        return LabelQuality(always=always, shape=shape), far, ({}, {})
    dice = {i: cases[i].dice[label] for i in rows}
    nothing = {i: 0.0 for i, case in enumerate(cases) if always and told[i] and label not in case.signs.shapes}
    crossed = tuple(_cross_fit(table, dice, groups) | nothing for table in (rows, _volume_only(volumes)))
    ridge = fit_ridge(list(rows.values()), list(dice.values()))
    typical = tidy(math.fsum(scored) / len(scored))
    return LabelQuality(typical=typical, always=always, ridge=ridge, shape=shape), far, (crossed[0], crossed[1])


def _volume_only(volumes: Mapping[int, float]) -> dict[int, dict[str, float]]:
    """Return the rows of the baseline: the volume, and how far it is from the middle."""
    values = np.array(list(volumes.values()))
    middle, spread = float(values.mean()), max(float(values.std()), 1e-6)
    return {i: {"volume": volume, "far": ((volume - middle) / spread) ** 2} for i, volume in volumes.items()}


def _cross_fit(rows: Mapping[int, Numbers], dice: Mapping[int, float], groups: Sequence[int]) -> Cells:
    """Return what each case is expected to have by a fit without its group.

    The general level is that of all cases, and only what tells cases apart is fitted anew: the mean of the others is
    low exactly where a case is high, so that signs that know nothing would seem to know the opposite.
    """
    found: Cells = {}
    whole = fit_ridge(list(rows.values()), list(dice.values()))
    level = mean_logit(dice.values())
    for group in sorted({groups[i] for i in rows}):
        rest = [i for i in rows if groups[i] != group]
        others = {i: dice[i] for i in rest}
        ridge = fit_ridge([rows[i] for i in rest], list(others.values()))
        intercept = ridge.intercept + level - mean_logit(others.values())
        ridge = ridge.model_copy(update={"intercept": intercept, "residuals": whole.residuals})
        found |= {i: expected_dice(ridge, rows[i]) for i in rows if groups[i] == group}
    return found


def _lowest(scores: Sequence[float | None], strange: Sequence[bool]) -> float | None:
    """Return the score at and below which cases are flagged: one at least, no more than REVIEW_SHARE with the strange.

    Of equal scores all are flagged or none; where that leaves none, only what is lower than all of them will be.
    """
    ranked = sorted(score for score, odd in zip(scores, strange, strict=True) if score is not None and not odd)
    if not ranked:
        return None
    count = max(1, round(REVIEW_SHARE * len(scores)) - sum(strange))
    within = [score for score in ranked if bisect_right(ranked, score) <= count]
    return within[-1] if within else math.nextafter(ranked[0], -math.inf)
