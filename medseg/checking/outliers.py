"""Cases unlike the others, by robust z-scores.

z = |x − median| / max(1.4826 · MAD, floor). 1.4826 · MAD estimates the standard deviation of a normal distribution
and is not moved by the outliers themselves (Iglewicz and Hoaglin 1993, who call 3.5 an outlier). Here Z is 5, because
several quantities of hundreds of cases are tried and a false alarm costs a person's time. The floor keeps datasets
that are alike to the last digit from calling a harmless difference an outlier: with Z it is the smallest difference
that is ever reported. Quantities that vary by factors (spacing, size, volume, MR intensity) are compared as logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.checking.facts import CaseFacts
from medseg.checking.findings import Finding, finding, short
from medseg.spec import Channel, Spec

Z = 5.0
MINIMUM = 8
"""With fewer cases nothing is called usual."""
RARE = 0.1
"""Where more than this share of the cases would be outliers, they are a second kind of data: said once."""


@dataclass(frozen=True)
class Quantity:
    """One number of a case that is compared with the others' (``value``; already a logarithm where `factor`)."""

    name: str
    value: Callable[[CaseFacts], float]
    floor: float
    factor: bool = True
    unit: str = ""

    def shown(self, number: float) -> str:
        """Return the number as a person reads it."""
        return f"{short(float(np.exp(number)) if self.factor else number)}{self.unit and ' ' + self.unit}"

    def range(self, numbers: Sequence[float]) -> str:
        """Return "a to b", or just "a" where they look the same."""
        low, high = self.shown(min(numbers)), self.shown(max(numbers))
        return low if low == high else f"{low} to {high}"


def z_scores(values: Sequence[float], floor: float) -> list[float]:
    """Return the robust z-score of every value (zeros for fewer than MINIMUM values)."""
    if len(values) < MINIMUM:
        return [0.0] * len(values)
    array = np.asarray(values, dtype=np.float64)
    distance = np.abs(array - np.median(array))
    return [float(z) for z in distance / max(1.4826 * float(np.median(distance)), floor)]


def outliers(cases: Sequence[CaseFacts], quantities: Sequence[Quantity], code: str, mixed: str | None) -> list[Finding]:
    """Return one finding per case that is far from the others in any of the quantities (in its worst one).

    Too many of them become one finding `mixed` (none if that is None).
    """
    values = [[quantity.value(case) for case in cases] for quantity in quantities]
    scores = np.array([z_scores(row, q.floor) for row, q in zip(values, quantities, strict=True)])
    if not scores.size or scores.max() <= Z:
        return []
    flagged = [n for n in range(len(cases)) if scores[:, n].max() > Z]
    if len(flagged) > max(1, RARE * len(cases)):
        worst = int(scores[:, flagged].max(axis=1).argmax())
        return [] if mixed is None else [_mixture(cases, flagged, quantities[worst], values[worst], mixed)]
    found = []
    for n in flagged:
        worst = int(scores[:, n].argmax())
        quantity, row = quantities[worst], values[worst]
        low, middle, high = np.percentile([v for m, v in enumerate(row) if m not in flagged], (0, 50, 100))
        number = float(np.exp(row[n])) if quantity.factor else row[n]
        text = (
            f"{quantity.name} is {quantity.shown(row[n])}; the others' is {quantity.shown(middle)} "
            f"({quantity.shown(low)} to {quantity.shown(high)}), robust z {scores[worst, n]:.0f}"
        )
        found.append(finding(code, text, case=cases[n].id, value=number))
    return found


def _mixture(
    cases: Sequence[CaseFacts], flagged: list[int], quantity: Quantity, row: Sequence[float], code: str
) -> Finding:
    middle = float(np.median(row))
    usual = [row[n] for n in range(len(cases)) if n not in flagged]
    below, above = ([row[n] for n in flagged if (row[n] < middle) == side] for side in (True, False))
    shown = [f"{quantity.range(group)} in {len(group)}" for group in (usual, below, above) if group]
    text = (
        f"{len(flagged)} of {len(cases)} cases are unlike the others, too many to be called outliers: "
        f"{quantity.name} is {', '.join(shown)} cases"
    )
    spread = max(row) - min(row)
    return finding(code, text, value=float(np.exp(spread) if quantity.factor else spread))


DIRECTIONS = ("right-left", "back-front", "foot-head")


def _spacing(axis: int, unit: str) -> Quantity:
    return Quantity(f"spacing {DIRECTIONS[axis]}", lambda c: float(np.log(c.spacing[axis])), np.log(1.05), unit=unit)


def _extent(axis: int, unit: str) -> Quantity:
    return Quantity(f"size {DIRECTIONS[axis]}", lambda c: float(np.log(c.extent[axis])), np.log(1.1), unit=unit)


def geometry_outliers(cases: Sequence[CaseFacts], spec: Spec) -> list[Finding]:
    """Compare spacing (differences below a factor of 1.28 never count) and size in mm (1.61)."""
    spacings = [_spacing(axis, spec.unit) for axis in range(3)]
    extents = [_extent(axis, spec.unit) for axis in range(3)]
    return [
        *outliers(cases, spacings, "OUTLIER_SPACING", "SEVERAL_SPACINGS"),
        *outliers(cases, extents, "OUTLIER_SIZE", "SEVERAL_SIZES"),
    ]


def intensity_outliers(cases: Sequence[CaseFacts], spec: Spec) -> list[Finding]:
    """Compare the values of every channel, constant images left out.

    CT (and channels that are not normalised) mean what they say: their 0.5th, 50th and 99.5th percentiles are
    compared, differences below a quarter of the usual range never count. Other images have values up to an unknown
    factor and offset: the range is compared as a logarithm (a factor below 2 never counts), and the place of its
    lower end and of the median relative to the range.
    """
    found = []
    for index, (name, channel) in enumerate(spec.channels.items()):
        usable = [case for case in cases if case.intensities[index].span > 0]
        if usable:
            prefix = f"channel {name}: " if len(spec.channels) > 1 else ""
            span = float(np.median([case.intensities[index].span for case in usable]))
            rows = _absolute(index, prefix, span) if means_what_it_says(channel) else _relative(index, prefix)
            found += outliers(usable, rows, "OUTLIER_INTENSITY", "MIXED_INTENSITY_RANGE")
    return found


def means_what_it_says(channel: Channel) -> bool:
    """Tell whether equal values mean equal tissue in all images of a channel (Hounsfield units, or by order)."""
    if channel.normalisation == "auto":
        return channel.modality.upper() == "CT"
    return channel.normalisation in ("ct", "none")


def _absolute(index: int, prefix: str, span: float) -> list[Quantity]:
    floor = 0.05 * span
    return [
        Quantity(f"{prefix}the 0.5th percentile", lambda c: c.intensities[index].low, floor, factor=False),
        Quantity(f"{prefix}the median intensity", lambda c: c.intensities[index].middle, floor, factor=False),
        Quantity(f"{prefix}the 99.5th percentile", lambda c: c.intensities[index].high, floor, factor=False),
    ]


def _relative(index: int, prefix: str) -> list[Quantity]:
    def low(case: CaseFacts) -> float:
        return case.intensities[index].low / case.intensities[index].span

    def middle(case: CaseFacts) -> float:
        values = case.intensities[index]
        return (values.middle - values.low) / values.span

    return [
        Quantity(f"{prefix}the intensity range", lambda c: float(np.log(c.intensities[index].span)), np.log(1.15)),
        Quantity(f"{prefix}the darkest intensity, in ranges,", low, 0.1, factor=False),
        Quantity(f"{prefix}the median's place in the range", middle, 0.1, factor=False),
    ]


def volume_outliers(cases: Sequence[CaseFacts], spec: Spec) -> list[Finding]:
    """Compare each label's volume where it is not empty (differences below a factor of 7.6 never count)."""
    found = []
    for name in spec.foreground:
        having = [case for case in cases if case.volumes and case.volumes[name] > 0]
        unit = "mL" if spec.unit == "mm" else "pixels"
        quantity = Quantity(f"the volume of {name}", _log_volume(name), np.log(1.5), unit=unit)
        found += outliers(having, [quantity], "OUTLIER_LABEL_VOLUME", None)
    return found


def _log_volume(name: str) -> Callable[[CaseFacts], float]:
    return lambda case: float(np.log((case.volumes or {})[name]))
