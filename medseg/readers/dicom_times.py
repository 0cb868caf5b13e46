"""Moments from DICOM dates and times of day, some of which have no date; differences in seconds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date

DAY = 86400.0
_TIME = re.compile(r"(\d\d):?(\d\d)?:?(\d\d(?:\.\d{1,6})?)?")
_DATE = re.compile(r"(\d{4})[.]?(\d\d)[.]?(\d\d)")
_STAMP = re.compile(r"(\d{8})(\d{2,6}(?:\.\d{1,6})?)([+-]\d{4})?")


@dataclass(frozen=True)
class Moment:
    """A time of day (s), and its day (ordinal) where it is known; never shown, dates may identify a patient.

    Attributes
    ----------
    zoned : it was written with another time zone than the rest and has been brought to theirs.
    """

    day: int | None
    clock: float
    zoned: bool = False

    def since(self, other: Moment) -> float:
        """Return the seconds from `other` to this; both have a day, or neither."""
        days = 0 if self.day is None or other.day is None else self.day - other.day
        return days * DAY + self.clock - other.clock

    def later(self, seconds: float) -> Moment:
        """Return the moment so many seconds later; a clock may run beyond its day."""
        return replace(self, clock=self.clock + seconds)

    def last(self, clock: float) -> Moment:
        """Return the last moment, up to this one, at which a clock showed `clock`."""
        return replace(self, clock=self.clock - (self.clock - clock) % DAY)


def moment_of(day: str, time: str) -> Moment | None:
    """Read a DA and a TM value (PS3.5 6.2, also the older forms with dots and colons); None without a valid time."""
    found = _TIME.fullmatch(time.strip())
    if found is None:
        return None
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    if hours > 23 or minutes > 59 or seconds >= 61:
        return None
    return Moment(_ordinal(day), hours * 3600 + minutes * 60 + seconds)


def _ordinal(day: str) -> int | None:
    found = _DATE.fullmatch(day.strip())
    try:
        return None if found is None else date(*(int(part) for part in found.groups())).toordinal()
    except ValueError:
        return None


def stamp_of(text: str, zone: str) -> Moment | None:
    """Read a DT value; one of another time zone than `zone` (TimezoneOffsetFromUTC) is brought to that."""
    found = _STAMP.fullmatch(text.strip())
    if found is None:
        return None
    moment = moment_of(found[1], found[2])
    if moment is None or not found[3] or not zone or found[3] == zone:
        return moment
    return replace(moment.later(_offset(zone) - _offset(found[3])), zoned=True)


def _offset(zone: str) -> float:
    sign = -1.0 if zone.startswith("-") else 1.0
    return sign * (float(zone[1:3]) * 3600 + float(zone[3:5]) * 60)


def same_day(moments: Sequence[Moment]) -> list[Moment]:
    """Make moments comparable: where one has no day, all are taken within half a day of the first."""
    if all(moment.day is not None for moment in moments):
        return list(moments)
    first = moments[0]
    return [
        Moment(first.day, first.clock + (moment.clock - first.clock + DAY / 2) % DAY - DAY / 2) for moment in moments
    ]
