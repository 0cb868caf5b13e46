"""From the signs of a predicted case to the Dice to expect of it, and whether a person should look at it, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.quality.clouds import distance, strangest
from medseg.quality.image import GRID, ImageSigns, layout_numbers
from medseg.quality.model import LabelQuality, QualityModel
from medseg.quality.ridge import expected_dice
from medseg.quality.signs import Signs

NOTABLE = 0.02
"""A label is named as a reason where its expected Dice is this much below what is typical of it."""


@dataclass(frozen=True)
class Quality:
    """What to expect of a predicted mask.

    Attributes
    ----------
    dice : label -> expected Dice; 0 for one that is missing although every training case has it. Labels of which
        nothing can be said are left out.
    review : whether a person should look at it.
    reasons : why, in words; nothing where it is not flagged.
    """

    dice: dict[str, float]
    review: bool
    reasons: tuple[str, ...] = ()


def estimate(model: QualityModel, signs: Signs) -> Quality:
    """Apply the estimate to one case; the signs must be of the labels and channels that it was fitted on."""
    numbers = image_numbers(signs.image, model.layout)
    far = {"": distance(model.image, numbers)}
    for label, row in model.labels.items():
        if row.shape is not None and label in signs.shapes:
            far[label] = distance(row.shape, signs.shapes[label])
    dice = {label: _expected(row, signs, label) for label, row in model.labels.items()}
    known = {label: value for label, value in dice.items() if value is not None}
    reasons = [
        *(f"{label} is missing, and every training case has it" for label in _missing(model, signs)),
        *_strange(model, signs, numbers, far),
        *_at_odds(model, signs),
        *_low(model, known, signs),
    ]
    return Quality({label: round(value, 4) for label, value in known.items()}, bool(reasons), tuple(reasons))


def image_numbers(image: ImageSigns, template: Sequence[float]) -> dict[str, float]:
    """Return the numbers of an image, with those of its layout against a template, channel by channel."""
    found = dict(image.numbers)
    parts = len(image.layout) // GRID**3
    pairs = zip(np.split(image.layout, parts), np.split(np.array(template), parts), strict=True)
    for number, (own, other) in enumerate(pairs):
        tail = f" {number + 1}" if parts > 1 else ""
        found |= {f"{name}{tail}": value for name, value in layout_numbers(own, other).items()}
    return found


def at_most(between: float) -> float:
    """Return the Dice that two masks with this Dice between them can have with any third one, on average.

    1 - Jaccard is a metric: of the way from one mask to the other each goes at least half to whatever the truth is.
    """
    similar = (1 + between / (2 - between)) / 2
    return 2 * similar / (1 + similar)


def deviation(dice: Mapping[str, float], typical: Mapping[str, float]) -> float | None:
    """Return by how much the labels of a case are better than typical, on average; None without any label."""
    both = [dice[label] - typical[label] for label in dice if label in typical]
    return math.fsum(both) / len(both) if both else None


def typicals(model: QualityModel) -> dict[str, float]:
    """Return label -> mean out-of-fold Dice, for the labels that are estimated."""
    return {label: row.typical for label, row in model.labels.items() if row.typical is not None}


def _expected(row: LabelQuality, signs: Signs, label: str) -> float | None:
    if label not in signs.shapes or label not in signs.passes:
        return 0.0 if row.always else None
    if row.ridge is None:
        return None
    return min(expected_dice(row.ridge, signs.passes[label]), at_most(signs.between.get(label, 1.0)))


def _missing(model: QualityModel, signs: Signs) -> list[str]:
    return [label for label, row in model.labels.items() if row.always and label not in signs.shapes]


def _strange(model: QualityModel, signs: Signs, numbers: Mapping[str, float], far: Mapping[str, float]) -> list[str]:
    reasons = []
    for label, value in far.items():
        if value <= model.beyond:
            continue
        shape = model.labels[label].shape if label else None
        what = "the image" if shape is None else f"{label}"
        name, outside = strangest(model.image, numbers) if shape is None else strangest(shape, signs.shapes[label])
        how = f"{name} is outside of their range" if outside else f"most of all {name}"
        reasons.append(f"{what} is unlike those of the training cases: {how}")
    return reasons


def _at_odds(model: QualityModel, signs: Signs) -> list[str]:
    """Name labels that cannot be as good as is typical, whatever the truth is."""
    odds = [label for label, value in typicals(model).items() if at_most(signs.between.get(label, 1.0)) < value]
    return [f"the networks disagree about {label}: Dice {signs.between[label]:.2f} between two masks" for label in odds]


def _low(model: QualityModel, dice: Mapping[str, float], signs: Signs) -> list[str]:
    typical = typicals(model)
    score = deviation(dice, typical)
    if score is None or model.review_below is None or score > model.review_below:
        return []
    low = sorted((label for label in dice if label in typical), key=lambda label: dice[label] - typical[label])
    named = [label for label in low if typical[label] - dice[label] >= NOTABLE] or low[:1]
    present = [label for label in named if label in signs.shapes]
    rows = [f"{label} {dice[label]:.2f} where {typical[label]:.2f} is typical" for label in present]
    return [f"low expected Dice: {', '.join(rows)}"] if rows else []
