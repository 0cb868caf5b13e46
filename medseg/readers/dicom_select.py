"""Choose the series of a study that are the channels of a model, by rules on their headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medseg.errors import MedsegError, ReadError
from medseg.readers.dicom_geometry import series_grid
from medseg.readers.dicom_header import Header
from medseg.readers.dicom_index import SeriesFiles
from medseg.readers.series_rules import WORDS, SeriesRule

NO_VOLUME = ("COLOUR", "LOCALIZER", "SINGLE_SLICE", "UNSUPPORTED_CLASS")
"""Refusals of what is no volume and competes with none; nor do single slices and colour pictures, which can be read."""


def choose_series(series: Sequence[SeriesFiles], rules: Mapping[str, SeriesRule]) -> dict[str, SeriesFiles]:
    """Return the one series of each channel, in the order of the rules.

    Damaged and irregular series compete, too: another one that happens to fit never silently takes their place.

    Raises
    ------
    ReadError : CHANNEL_MISSING (no series fits), CHANNEL_AMBIGUOUS (several fit, or one fits two channels); the
        message tells sizes and numbers, nothing of a header's text.
    """
    chosen = {name: _one(name, rule, series) for name, rule in rules.items()}
    names = list(chosen)
    for number, name in enumerate(names):
        for other in names[:number]:
            if chosen[name] is chosen[other]:
                raise ReadError(
                    f"one series ({describe(chosen[name])}) fits the rules of the channels {other!r} and {name!r}; "
                    "make the rules narrower",
                    code="CHANNEL_AMBIGUOUS",
                )
    return chosen


def fitting(series: Sequence[SeriesFiles], rule: SeriesRule) -> list[SeriesFiles]:
    """Return the series that a rule fits and that may be volumes, in the order given."""
    return [part for part in series if not _no_volume(part) and _fits(rule, part)]


def _one(name: str, rule: SeriesRule, series: Sequence[SeriesFiles]) -> SeriesFiles:
    found = fitting(series, rule)
    if len(found) == 1:
        return found[0]
    if found:
        sizes = "; ".join(describe(part) for part in found)
        raise ReadError(
            f"{len(found)} series fit the rule of channel {name!r} ({rule}): {sizes}; make the rule narrower",
            code="CHANNEL_AMBIGUOUS",
        )
    others = [part for part in series if _no_volume(part) and _fits(rule, part)]
    aside = f"; {len(others)} fit and are no volumes ({'; '.join(map(describe, others))})" if others else ""
    raise ReadError(
        f"none of the {len(series)} series fits the rule of channel {name!r} ({rule}){aside}; "
        "correct the rule, or add the series",
        code="CHANNEL_MISSING",
    )


def _no_volume(part: SeriesFiles) -> bool:
    """Tell localizers, colour pictures, screen captures and single slices from what may be a channel."""
    if part.refusal is not None and part.refusal.code in NO_VOLUME:
        return True
    return part.headers[0].samples != 1 or _slices(part) == 1


def _slices(part: SeriesFiles) -> int:
    once = {header.key: header for header in part.headers}.values()
    return sum(header.frames if header.frame is None else 1 for header in once)


def _fits(rule: SeriesRule, part: SeriesFiles) -> bool:
    """Tell whether every file of a part fits: where they differ, the part is not what the rule describes."""
    different = {header.described for header in part.headers}
    return all(rule.fits(part.modality, dict(zip(WORDS, values, strict=True))) for values in different)


def describe(part: SeriesFiles) -> str:
    """Return the size of a series in words, and why it would be refused."""
    first = part.headers[0]
    once = list({header.key: header for header in part.headers}.values())
    gap = _gap(once)
    spacing = "×".join(f"{value:.4g}" for value in (*reversed(first.spacing or ()), *gap)) or "unknown"
    text = f"{first.columns}×{first.rows}×{_slices(part)} at {spacing} mm"
    return f"{text}, refused ({part.refusal.code})" if part.refusal is not None else text


def _gap(headers: Sequence[Header]) -> tuple[float, ...]:
    try:
        affine = series_grid(headers).affine
    except MedsegError:
        return ()
    return (float((affine[:3, 2] @ affine[:3, 2]) ** 0.5),)
