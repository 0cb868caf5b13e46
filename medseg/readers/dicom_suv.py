"""From PET values to standardised uptake values by body weight (g/mL), or a refusal that names what is missing.

SUV = activity concentration (Bq/mL) * weight (g) / dose (Bq) at the time to which the image is decay-corrected. What
goes wrong in practice is that time: the rules are those of QIBA's FDG-PET profile and of the IBSI recipe
(https://oncoray.github.io/suv_computation), with every fact checked against its neighbours. An error of the decay of
more than `MOST_DECAY_ERROR` is never risked. Messages name attributes, never a weight, a date or a time of day.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from medseg.errors import MedsegError
from medseg.readers.dicom_budget import open_dataset
from medseg.readers.dicom_header import PARSE_ERRORS, Header, quiet
from medseg.readers.dicom_refusals import refuse
from medseg.readers.dicom_times import Moment, moment_of, same_day, stamp_of

MOST_DECAY_ERROR = 0.01
"""Largest relative doubt about the dose that two attributes may leave by giving different times."""
MOST_HALF_LIVES = 8.0
"""After more half-lives nothing is left to see: a start time is wrong, or a half-life is in another unit."""
SHORT_LIVED = 4 * 3600.0
"""With a longer half-life (s) the day of injection cannot be guessed: it may have been the day before."""
PHILIPS, GE = "Philips PET Private Group", "GEMS_PETD_01"
_BLOCKS = range(0x10, 0x20)

LIMITS = {
    "PatientWeight": (0.3, 500.0, "kg"),
    "RadionuclideTotalDose": (4e6, 2e10, "Bq"),
    "RadionuclideHalfLife": (30.0, 1e6, "s"),
}
"""What may be true of a person; outside, a number is in another unit (g, MBq, minutes) or made up."""

TAGS: list[Any] = [
    *("Units", "SUVType", "CorrectedImage", "DecayCorrection", "PatientWeight", "ActualFrameDuration"),
    *("SeriesDate", "SeriesTime", "AcquisitionDate", "AcquisitionTime", "FrameReferenceTime", "TimezoneOffsetFromUTC"),
    "RadiopharmaceuticalInformationSequence",
    *(Tag(group, block) for group in (0x0009, 0x7053) for block in _BLOCKS),
    *(Tag(0x0009, (block << 8) + 0x0D) for block in _BLOCKS),
    *(Tag(0x7053, (block << 8) + word) for block in _BLOCKS for word in (0x00, 0x09)),
]


@dataclass(frozen=True)
class Slice:
    """What one file says about its activity: the data set, and the slice in words."""

    dataset: Dataset
    who: str

    def text(self, keyword: str) -> str:
        """Return an attribute as text, "" when absent; several values joined by a backslash."""
        value = self.dataset.get(keyword)
        several = isinstance(value, (list, pydicom.multival.MultiValue))
        return "" if value is None else "\\".join(map(str, value)) if several else str(value).strip()

    def number(self, keyword: str, source: Dataset | None = None) -> float:
        """Return an attribute as a plausible number, or refuse."""
        try:
            value = (self.dataset if source is None else source).get(keyword)
            number = math.nan if value is None or value == "" else float(value)
        except PARSE_ERRORS as error:
            raise incomplete(f"{keyword} is no number ({self.who})") from error
        if math.isnan(number):
            raise incomplete(f"{keyword} is absent ({self.who})")
        low, high, unit = LIMITS.get(keyword, (0.0, math.inf, "ms"))
        if not low < number < high:
            raise incomplete(f"{keyword} is implausible; {low:g} to {high:g} {unit} can be true ({self.who})")
        return number

    def private(self, group: int, creator: str, element: int) -> str:
        """Return an element of a private block as text, "" when absent."""
        try:
            value = self.dataset.private_block(group, creator)[element].value
        except KeyError:
            return ""
        return value.decode("ascii", "replace").strip("\0 ") if isinstance(value, bytes) else str(value or "").strip()

    @property
    def injection(self) -> Dataset:
        """The one radiopharmaceutical that was given."""
        items = list(self.dataset.get("RadiopharmaceuticalInformationSequence") or [])
        if len(items) != 1:
            raise incomplete(f"RadiopharmaceuticalInformationSequence has {len(items)} items, not one ({self.who})")
        item: Dataset = items[0]
        return item


def incomplete(text: str) -> MedsegError:
    """Return (not raise) the refusal of a series whose SUV cannot be known."""
    return refuse("SUV_INCOMPLETE", text)


def suv_factors(headers: Sequence[Header]) -> list[float]:
    """Return for each slice of a PET series what its rescaled values are multiplied by to give SUV (g/mL).

    Units may be BQML, CNTS with a private factor of Philips, or GML (SUV already).

    Parameters
    ----------
    headers : the slices of one series, at least one.

    Raises
    ------
    ReadError : SUV_INCOMPLETE, a fact is missing, implausible or contradicted; UNREADABLE.
    """
    if headers[0].modality != "PT":
        raise incomplete("the modality is not PT: only PET has uptake values")
    if any(header.frame is not None for header in headers):
        raise incomplete("Units is absent: enhanced PET files are read in their stored unit only")
    with quiet():
        slices = [_read(header) for header in headers]
        try:
            units = _same(slices, "Units")
            if units not in UNITS:
                raise incomplete(
                    f"Units is {'another' if units else 'absent'}; {', '.join(UNITS)} can be brought to SUV"
                )
            if "ATTN" not in _same(slices, "CorrectedImage").split("\\"):
                raise incomplete("CorrectedImage does not name ATTN: without attenuation correction there is no SUV")
            return UNITS[units](slices)
        except PARSE_ERRORS as error:
            raise incomplete(f"an attribute has no valid value ({type(error).__name__})") from error


def _read(header: Header) -> Slice:
    try:
        dataset = open_dataset(header.path, stop_before_pixels=True, specific_tags=TAGS)
    except PARSE_ERRORS as error:
        raise refuse("UNREADABLE", f"the header of instance {header.instance} is damaged") from error
    return Slice(dataset, f"instance {header.instance}")


def _same(slices: Sequence[Slice], keyword: str) -> str:
    """Return an attribute that all slices must share."""
    values = {one.text(keyword) for one in slices}
    if len(values) > 1:
        raise incomplete(f"{keyword} differs between slices")
    return values.pop()


def _same_number(slices: Sequence[Slice], keyword: str, source: Callable[[Slice], Dataset]) -> float:
    values = {one.number(keyword, source(one)) for one in slices}
    if len(values) > 1:
        raise incomplete(f"{keyword} differs between slices")
    return values.pop()


# ---- by unit --------------------------------------------------------------------------------------------------------


def _of_uptake(slices: Sequence[Slice]) -> list[float]:
    """Return the factors of values that are SUV already, if by body weight."""
    kind = _same(slices, "SUVType")
    if kind not in ("", "BW"):
        raise incomplete("SUVType is not BW: the values are not by body weight")
    return [1.0] * len(slices)


def _of_counts(slices: Sequence[Slice]) -> list[float]:
    """Return the factors of Philips's counts: its own to SUV (7053,xx00), or those to Bq/mL (7053,xx09)."""
    for element, rest in ((0x00, None), (0x09, _of_activity)):
        texts = [one.private(0x7053, PHILIPS, element) for one in slices]
        own = [float(text) if text else 0.0 for text in texts]
        if all(factor > 0 and math.isfinite(factor) for factor in own):
            further = [1.0] * len(own) if rest is None else rest(slices)
            return [one * other for one, other in zip(own, further, strict=True)]
    raise incomplete(
        "Units is CNTS and the private factors of Philips, (7053,1000) and (7053,1009), are absent or zero"
    )


def _of_activity(slices: Sequence[Slice]) -> list[float]:
    """Return the factors of Bq/mL: weight over the dose that was left at the time of the image."""
    weight = 1000 * _same_number(slices, "PatientWeight", lambda one: one.dataset)
    dose = _same_number(slices, "RadionuclideTotalDose", lambda one: one.injection)
    correction = _same(slices, "DecayCorrection")
    corrected = bool({"DECY", "DECAY"} & set(_same(slices, "CorrectedImage").split("\\")))
    if corrected != (correction != "NONE") or correction not in DECAYS:
        raise incomplete(
            f"DecayCorrection is {correction if correction in DECAYS else 'absent or unknown'} and CorrectedImage "
            f"{'names' if corrected else 'does not name'} DECY; they must agree, and {', '.join(DECAYS)} are known"
        )
    return [weight / (dose * left) for left in DECAYS[correction](slices)]


UNITS: dict[str, Callable[[Sequence[Slice]], list[float]]] = {
    "BQML": _of_activity,
    "CNTS": _of_counts,
    "GML": _of_uptake,
}
"""Units (PS3.3 C.8.9.1.1.3) -> factors to SUV."""


# ---- by decay correction --------------------------------------------------------------------------------------------


def _none_lost(slices: Sequence[Slice]) -> list[float]:
    """Return the share of the dose that counts where the image is corrected to the time of injection: all of it."""
    return [1.0] * len(slices)


def _left_at_start(slices: Sequence[Slice]) -> list[float]:
    """Return the share that was left when the scan began, the same for all slices."""
    life = _half_life(slices)
    return [_left(_begin(slices, life), slices, life)] * len(slices)


def _left_in_frame(slices: Sequence[Slice]) -> list[float]:
    """Return the share that was left while each slice was measured, for images without decay correction."""
    life = _half_life(slices)
    acquired = _acquired(slices)
    return [
        _left(moment.later(_into_frame(one, life)), slices, life) for one, moment in zip(slices, acquired, strict=True)
    ]


DECAYS: dict[str, Callable[[Sequence[Slice]], list[float]]] = {
    "START": _left_at_start,
    "ADMIN": _none_lost,
    "NONE": _left_in_frame,
}
"""DecayCorrection (PS3.3 C.8.9.1) -> share of the dose that was left at the time of the image."""


def _half_life(slices: Sequence[Slice]) -> float:
    return _same_number(slices, "RadionuclideHalfLife", lambda one: one.injection)


def _left(moment: Moment, slices: Sequence[Slice], life: float) -> float:
    """Return the share of the dose that is left at a moment."""
    waited = moment.since(_injected(slices, moment, life)) / life
    if not 0 <= waited <= MOST_HALF_LIVES:
        raise incomplete(
            f"between RadiopharmaceuticalStartTime and the scan lie {waited:.1f} half-lives; 0 to "
            f"{MOST_HALF_LIVES:g} can be true"
        )
    return float(2.0**-waited)


def _injected(slices: Sequence[Slice], scan: Moment, life: float) -> Moment:
    """Return when the tracer was given; without a date on the day of the scan, or the day before if that is later."""
    words = "RadiopharmaceuticalStartDateTime", "RadiopharmaceuticalStartTime"
    found = {tuple(str(one.injection.get(word) or "") for word in words) for one in slices}
    if len(found) > 1:
        raise incomplete(f"{words[1]} differs between slices")
    stamp, clock = found.pop()
    dated = stamp_of(stamp, _same(slices, "TimezoneOffsetFromUTC")) if stamp else None
    plain = moment_of("", clock) if clock else None
    if dated is None and plain is None:
        raise incomplete(f"{words[0]} and {words[1]} are absent or damaged")
    if dated is not None and plain is not None and not dated.zoned and abs(dated.clock - plain.clock) > 60:
        raise incomplete(f"{words[0]} and {words[1]} contradict each other")
    if dated is not None and dated.day is not None and scan.day is not None:
        return dated
    if life > SHORT_LIVED:
        raise incomplete(f"{words[0]} is absent: with this RadionuclideHalfLife it may have been another day")
    return scan.last((dated or plain or scan).clock)


def _acquired(slices: Sequence[Slice]) -> list[Moment]:
    """Return when each slice was acquired; without dates within half a day of SeriesTime, or of the first slice."""
    found = []
    for one in slices:
        moment = moment_of(one.text("AcquisitionDate"), one.text("AcquisitionTime"))
        if moment is None:
            raise incomplete(f"AcquisitionTime is absent or damaged ({one.who})")
        found.append(moment)
    stated = moment_of(slices[0].text("SeriesDate"), slices[0].text("SeriesTime"))
    return same_day(found) if stated is None or found[0].day is not None else same_day([stated, *found])[1:]


def _begin(slices: Sequence[Slice], life: float) -> Moment:
    """Return the moment to which a series with DecayCorrection START is corrected.

    That is SeriesTime, unless post-processing has changed it: then it lies after the first acquisition, and GE's
    private time of the scan, the times that FrameReferenceTime leads back to, or the first acquisition stand in. A
    SeriesTime well before the first acquisition is believed only where FrameReferenceTime confirms it.
    """
    acquired = _acquired(slices)
    first = min(acquired, key=lambda moment: moment.since(acquired[0]))
    back = _by_reference_time(slices, acquired, life)

    def close(one: Moment, other: Moment) -> bool:
        return abs(one.since(other)) <= life * math.log2(1 + MOST_DECAY_ERROR)

    stated = moment_of(_same(slices, "SeriesDate"), _same(slices, "SeriesTime"))
    if stated is not None:
        stated = same_day([first, stated])[1]
    if stated is not None and stated.since(first) <= 0:
        if close(stated, first) or (back is not None and close(stated, back)):
            return stated
        if back is None or not close(back, first):
            raise incomplete(
                f"SeriesTime lies {first.since(stated) / 60:.0f} minutes before the first AcquisitionTime, and "
                "FrameReferenceTime does not say that the scan began then"
            )
        return back
    text = slices[0].private(0x0009, GE, 0x0D)
    scan = stamp_of(text, "") if text else None
    if scan is not None:
        scan = same_day([first, scan])[1]
        if not close(scan, first) and scan.since(first) > 0:
            raise incomplete("the private time of the scan, (0009,100d), lies after the first AcquisitionTime")
        return scan
    if back is None:
        return first
    if back.since(first) > 0 and not close(back, first):
        raise incomplete("FrameReferenceTime leads to a start of the scan after the first AcquisitionTime")
    return back


def _by_reference_time(slices: Sequence[Slice], acquired: Sequence[Moment], life: float) -> Moment | None:
    """Return the start of the scan that AcquisitionTime and FrameReferenceTime agree on; None where they do not.

    FrameReferenceTime (ms) leads from the start of the scan to when a frame's mean activity was that measured.
    """
    found = []
    for one, moment in zip(slices, acquired, strict=True):
        text, duration = one.text("FrameReferenceTime"), one.text("ActualFrameDuration")
        if not text or not duration or float(text) <= 0:
            return None
        found.append(moment.later(_into_frame(one, life) - float(text) / 1000))
    offsets = sorted(moment.since(found[0]) for moment in found)
    if offsets[-1] - offsets[0] > life * math.log2(1 + MOST_DECAY_ERROR):
        return None
    return found[0].later(offsets[len(offsets) // 2])


def _into_frame(one: Slice, life: float) -> float:
    """Return how long (s) after its start a frame's activity equals its mean over the frame."""
    decay = math.log(2) / life
    lost = decay * one.number("ActualFrameDuration") / 1000
    return math.log(lost / -math.expm1(-lost)) / decay
