"""METRICS: what is measured for one label of one case, and what stands for it when a mask is empty or missing.

Definitions follow Metrics Reloaded (Maier-Hein, Reinke et al., Nat Methods 2024;21:195-212): per case and per label,
never pooled over voxels of several cases. Nothing is ever dropped silently: a value that does not exist is excluded
with a reason, one that a missing prediction owes is imputed, and both are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medseg.registry import Registry

Policy = float | Literal["compute", "exclude"]
"""What stands for a metric in a special situation: this number, what the function says, or nothing."""


EMPTY_REASONS = frozenset({"", "BOTH_EMPTY", "REFERENCE_EMPTY", "PREDICTION_EMPTY"})
"""Reasons that `measure` gives; any other one says why there is no prediction."""


@dataclass(frozen=True)
class Pair:
    """One label of one case, as a metric sees it.

    Attributes
    ----------
    prediction, reference : (I, J, K) bool on one grid; voxels to be ignored are False in both.
    voxel_volume : volume of a voxel in mL (in voxels where a picture has no scale).
    """

    prediction: NDArray[np.bool_]
    reference: NDArray[np.bool_]
    voxel_volume: float


@dataclass(frozen=True)
class Metric:
    """One row of METRICS.

    Attributes
    ----------
    id : name in every table; a definition that is not the only one in use stands in brackets.
    title : as a person reads it.
    function : Pair -> value; raises nothing.
    unit : "" for a plain number, "mL" for volumes.
    better : in which direction a value is better; "zero": nearer to zero, "none": neither.
    best : the value of a faultless prediction, None where there is none.
    both_empty : policy where neither mask has a voxel.
    one_empty : policy where exactly one mask has a voxel.
    failed : policy where the reference has voxels and there is no prediction at all.
    """

    id: str
    title: str
    function: Callable[[Pair], float]
    unit: str
    better: Literal["higher", "lower", "zero", "none"]
    best: float | None
    both_empty: Policy
    one_empty: Policy
    failed: Policy


@dataclass(frozen=True)
class Measurement:
    """A value and what it counts for: "used", "imputed" (a policy's number), or "excluded" (no value).

    `reason` is a stable word where a mask was empty or missing, also for a value that is used; else empty.
    """

    value: float | None
    status: Literal["used", "excluded", "imputed"]
    reason: str = ""


def dice(pair: Pair) -> float:
    """Return the Dice similarity coefficient, 2|P∩R| / (|P|+|R|); NaN where both masks are empty.

    Source: Dice, Ecology 1945;26:297-302; as SimpleITK's LabelOverlapMeasuresImageFilter and monai's DiceMetric.
    """
    total = np.count_nonzero(pair.prediction) + np.count_nonzero(pair.reference)
    if total == 0:
        return float("nan")
    return 2 * np.count_nonzero(pair.prediction & pair.reference) / total


def volume_predicted(pair: Pair) -> float:
    """Return the volume of the predicted mask: voxels × voxel volume."""
    return np.count_nonzero(pair.prediction) * pair.voxel_volume


def volume_reference(pair: Pair) -> float:
    """Return the volume of the reference mask: voxels × voxel volume."""
    return np.count_nonzero(pair.reference) * pair.voxel_volume


def volume_difference(pair: Pair) -> float:
    """Return predicted minus reference volume: positive where too much was predicted."""
    return (np.count_nonzero(pair.prediction) - np.count_nonzero(pair.reference)) * pair.voxel_volume


_ROWS = (
    Metric("dice", "Dice", dice, "", "higher", 1.0, both_empty="exclude", one_empty=0.0, failed=0.0),
    Metric(
        "volume_predicted",
        "Predicted volume",
        volume_predicted,
        "mL",
        "none",
        None,
        both_empty="compute",
        one_empty="compute",
        failed="exclude",
    ),
    Metric(
        "volume_reference",
        "Reference volume",
        volume_reference,
        "mL",
        "none",
        None,
        both_empty="compute",
        one_empty="compute",
        failed="compute",
    ),
    Metric(
        "volume_difference",
        "Volume difference (predicted \N{MINUS SIGN} reference)",
        volume_difference,
        "mL",
        "zero",
        0.0,
        both_empty="compute",
        one_empty="compute",
        failed="exclude",
    ),
)

METRICS: Registry[Metric] = Registry("metrics", {row.id: row for row in _ROWS})


def measure(metric: Metric, pair: Pair) -> Measurement:
    """Measure one label of one case under the metric's policies for empty masks.

    The reason is BOTH_EMPTY, REFERENCE_EMPTY (a false alarm) or PREDICTION_EMPTY (a miss) where it applies.
    """
    predicted, present = bool(pair.prediction.any()), bool(pair.reference.any())
    if predicted and present:
        return Measurement(metric.function(pair), "used")
    if not predicted and not present:
        return _follow(metric.both_empty, metric, pair, "BOTH_EMPTY", status="used")
    reason = "REFERENCE_EMPTY" if predicted else "PREDICTION_EMPTY"
    return _follow(metric.one_empty, metric, pair, reason, status="used")


def measure_failed(metric: Metric, reference: NDArray[np.bool_], voxel_volume: float, reason: str) -> Measurement:
    """Return what counts for a label whose prediction is missing.

    Where the reference has no voxel either, nothing was owed: the both-empty policy holds, under the reason given.
    """
    pair = Pair(np.zeros_like(reference), reference, voxel_volume)
    if metric.failed == "compute":
        return Measurement(metric.function(pair), "used")
    owed = bool(reference.any())
    return _follow(metric.failed if owed else "exclude", metric, pair, reason, status="imputed")


def _follow(
    policy: Policy, metric: Metric, pair: Pair, reason: str, *, status: Literal["used", "imputed"]
) -> Measurement:
    if policy == "exclude":
        return Measurement(None, "excluded", reason)
    if policy == "compute":
        return Measurement(metric.function(pair), status, reason)
    return Measurement(float(policy), status, reason)
