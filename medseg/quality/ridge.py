"""A ridge regression of the logit of Dice, small enough for sixteen cases.

The penalty is the one with the least error when each case is left out (closed form: PRESS, Allen 1974). The mean of
Dice, not its median, is wanted back: the inverse logit is averaged over the residuals (Duan 1983).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.quality.model import Ridge, logit, tidy

PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
REACH = 4.0
"""Signs are kept within this many scales of their centre: a line is not followed to where no case was."""
QUANTILES = tuple(range(5, 100, 10))
EDGE = 0.01
"""Dice is kept this far from 0 and 1 before its logit is taken."""
Floats = NDArray[np.float64]
Numbers = Mapping[str, float]


def fit_ridge(rows: Sequence[Numbers], dice: Sequence[float]) -> Ridge:
    """Fit to rows with the same names and the Dice of each; two rows at least."""
    names = tuple(rows[0])
    values = _table(names, rows)
    target = np.array([logit(one, edge=EDGE) for one in dice])
    centre, spread = values.mean(0), values.std(0)
    scale = np.where(spread > 1e-9, spread, 1.0)
    z = np.clip((values - centre) / scale, -REACH, REACH)
    offset, shift = float(target.mean()), z.mean(0)
    left, sizes, right = np.linalg.svd(z - shift, full_matrices=False)
    inner = left.T @ (target - offset)
    errors = {penalty: _left_out(left, sizes, inner, target - offset, penalty) for penalty in PENALTIES}
    penalty = min(PENALTIES, key=lambda p: float(np.square(errors[p]).sum()))
    weights = right.T @ (sizes / (sizes**2 + penalty) * inner)
    return Ridge(
        names=names,
        centre=_tidied(centre),
        scale=_tidied(scale),
        weights=_tidied(weights),
        intercept=tidy(offset - float(shift @ weights)),
        residuals=_tidied(np.percentile(errors[penalty], QUANTILES)),
        penalty=penalty,
    )


def mean_logit(dice: Iterable[float]) -> float:
    """Return the level about which `fit_ridge` fits."""
    return float(np.mean([logit(one, edge=EDGE) for one in dice]))


def _left_out(left: Floats, sizes: Floats, inner: Floats, target: Floats, penalty: float) -> Floats:
    """Return the residual of each case when it is left out of the fit."""
    shares = sizes**2 / (sizes**2 + penalty)
    fitted = left @ (shares * inner)
    leverage = np.square(left) @ shares + 1 / len(target)
    return np.asarray((target - fitted) / np.maximum(1 - leverage, 1e-3))


def expected_dice(ridge: Ridge, row: Numbers) -> float:
    """Return the mean Dice to expect, from 0 to 1."""
    values = _table(ridge.names, [row])[0]
    z = np.clip((values - np.array(ridge.centre)) / np.array(ridge.scale), -REACH, REACH)
    middle = ridge.intercept + float(z @ np.array(ridge.weights))
    return float(np.mean(1 / (1 + np.exp(-(middle + np.array(ridge.residuals))))))


def _table(names: Sequence[str], rows: Sequence[Numbers]) -> Floats:
    return np.array([[row[name] for name in names] for row in rows], dtype=np.float64)


def _tidied(values: Floats) -> tuple[float, ...]:
    return tuple(tidy(float(value)) for value in values)
