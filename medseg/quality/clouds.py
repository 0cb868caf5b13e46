"""How far a case lies from the training cases: a Mahalanobis distance with shrunken correlations.

Cases are few and numbers many, so the correlations are drawn towards none by d / (d + n), at least a tenth; how large
a distance is large is measured by leaving each patient out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.quality.model import Cloud, tidy

FLOOR = 0.05
"""Least scale of a number: what never varied in the training may differ by this much (5 % for logarithms)."""
EDGE, CLIP = 3.0, 50.0
"""In units of scale: beyond EDGE a training case pulls no further at the correlations; CLIP is as far as it goes."""
WINSOR = (2.5, 97.5)
LEAST_SHRINKAGE = 0.1
Numbers = Mapping[str, float]


def fit_cloud(rows: Sequence[Numbers]) -> Cloud:
    """Describe where rows with the same names lie; there must be one at least."""
    names = tuple(rows[0])
    values = np.array([[row[name] for name in names] for row in rows], dtype=np.float64)
    inner = np.clip(values, *np.percentile(values, WINSOR, axis=0))
    centre, scale = inner.mean(0), np.maximum(inner.std(0), FLOOR)
    z = np.clip((values - centre) / scale, -EDGE, EDGE)
    count, size = values.shape
    moments = z.T @ z / count
    shrink = max(LEAST_SHRINKAGE, size / (size + count))
    # A number that varies less than the floor allows keeps a variance of one, or its freedom would be lost.
    mixed = (1 - shrink) * moments
    np.fill_diagonal(mixed, np.maximum(1.0, moments.diagonal()))
    return Cloud(
        names=names,
        centre=_tidied(centre),
        scale=_tidied(scale),
        low=_tidied(values.min(0)),
        high=_tidied(values.max(0)),
        precision=tuple(_tidied(row) for row in np.linalg.inv(mixed)),
    )


def distance(cloud: Cloud, row: Numbers) -> float:
    """Return the distance of a case in units of the cloud: nine tenths of the training cases are within 1."""
    z = _standard(cloud, row)
    squared = float(z @ np.array(cloud.precision) @ z)
    return float(np.sqrt(max(0.0, squared) / len(z))) / cloud.unit


def strangest(cloud: Cloud, row: Numbers) -> tuple[str, bool]:
    """Return the number that lies furthest out, and whether it lies beyond the training range."""
    z = np.abs(_standard(cloud, row))
    ranges = zip(cloud.names, cloud.low, cloud.high, strict=True)
    outside = np.array([not low <= row[name] <= high for name, low, high in ranges])
    rank = np.where(outside, z + CLIP, z)
    worst = int(rank.argmax())
    return cloud.names[worst], bool(outside[worst])


def left_out(
    train: Sequence[Numbers | None],
    groups: Sequence[int],
    asked: Sequence[Numbers | None],
) -> NDArray[np.float64]:
    """Return the distance of asked[i] from the cloud of the training rows of other groups; NaN where it is None.

    `groups` are those of `asked` and `train` alike: row i of both is of one case.
    """
    found = np.full(len(asked), np.nan)
    for group in sorted(set(groups)):
        rest = [row for row, other in zip(train, groups, strict=True) if other != group and row is not None]
        own = [i for i, row in enumerate(asked) if groups[i] == group and row is not None]
        if len(rest) < 2 or not own:
            continue
        cloud = fit_cloud(rest)
        for i in own:
            found[i] = distance(cloud, asked[i] or {})
    return found


def _standard(cloud: Cloud, row: Numbers) -> NDArray[np.float64]:
    values = np.array([row[name] for name in cloud.names])
    return np.asarray(np.clip((values - np.array(cloud.centre)) / np.array(cloud.scale), -CLIP, CLIP))


def _tidied(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(tidy(float(value)) for value in values)
