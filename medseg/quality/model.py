"""The fitted quality estimate as it stands in a bundle: numbers and names, nothing that could run."""

from __future__ import annotations

import math

from pydantic import Field

from medseg.config import Config

SIGNS = frozenset({"confidence", "edge", "closer"})
"""What is noted of each label while it is predicted (medseg.quality.witness)."""


class Cloud(Config):
    """Where the training cases lie in a space of named numbers.

    Attributes
    ----------
    centre, scale : of each number; `scale` is never less than a floor, so that what never varied may vary a little.
    low, high : range over the training cases.
    precision : inverse of the correlations, shrunken towards none (d, d).
    unit : the distance within which nine tenths of the training cases lie when each is left out.
    """

    names: tuple[str, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    precision: tuple[tuple[float, ...], ...]
    unit: float = Field(default=1.0, gt=0)


class Ridge(Config):
    """A ridge regression of the logit of Dice.

    Attributes
    ----------
    centre, scale : by which each sign is standardised; what comes out is kept within ±REACH.
    weights, intercept : of the standardised signs.
    residuals : quantiles of what was left out of fold; the expected Dice is the mean over them.
    penalty : the one chosen by leaving out one case at a time.
    """

    names: tuple[str, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float
    residuals: tuple[float, ...]
    penalty: float


class LabelQuality(Config):
    """The estimate of one label.

    Attributes
    ----------
    typical : mean out-of-fold Dice.
    always : whether every training case has the label, so that a mask without it is wrong.
    ridge : None where there were too few cases; there is no expected Dice then.
    shape : cloud of the reference labels; None where there were too few.
    """

    typical: float | None = None
    always: bool = False
    ridge: Ridge | None = None
    shape: Cloud | None = None


class QualityModel(Config):
    """What a bundle knows of how good its masks are.

    Attributes
    ----------
    cases, patients, folds : that it was fitted on; one fold: the validation cases of a single split.
    mirror : whether the networks' answers were averaged over mirrored inputs; only such predictions are estimated.
    layout : mean of the training images, coarse (channels * GRID³).
    review_below : a case is flagged where its expected Dice lies this far below (or further) what is typical, on the
        mean of its labels; None without any expected Dice.
    beyond : a case is flagged where it lies further than this from the training cases, in units of its clouds.
    """

    cases: int
    patients: int
    folds: int
    mirror: bool
    layout: tuple[float, ...]
    image: Cloud
    labels: dict[str, LabelQuality]
    review_below: float | None
    beyond: float

    @property
    def outdated(self) -> bool:
        """Whether it asks for signs that are not noted any more, so that nothing can be estimated."""
        ridges = [row.ridge for row in self.labels.values() if row.ridge is not None]
        return not all(SIGNS.issuperset(ridge.names) for ridge in ridges)


def tidy(value: float) -> float:
    """Return a number to six significant digits, as models keep it."""
    return float(f"{value:.6g}")


def logit(share: float, *, edge: float = 0.005) -> float:
    """Return the logit of a number from 0 to 1, which is kept `edge` away from both ends."""
    inner = min(max(share, edge), 1 - edge)
    return math.log(inner / (1 - inner))
