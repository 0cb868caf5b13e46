"""Split the images of one SeriesInstanceUID into parts that are one volume each, by headers alone.

headers -> parts of one grid (size, directions, spacing, stack) -> parts in which every place is there once
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.readers.dicom_geometry import repeats, same_orientation, same_spacing
from medseg.readers.dicom_header import TELLING, Header

WEAK = ("AcquisitionTime", "ContentTime")
"""Asked last: the clock also runs within a volume."""
SEPARATE = ("AcquisitionNumber", *WEAK)
"""Two acquisitions may cover different places; two times, echoes or b-values of one acquisition may not."""


@dataclass(frozen=True)
class Part:
    """Images that belong to one volume.

    Attributes
    ----------
    why : the code of what set them apart from the rest of the series, "" when nothing did.
    lacks : at how many places this part has no image where those that it belongs together with have one.
    """

    headers: tuple[Header, ...]
    why: str = ""
    lacks: int = 0


def split(headers: Sequence[Header]) -> list[Part]:
    """Split the images of one series; what cannot be split cleanly stays together, to be refused."""
    grids = _by_grid(headers)
    if len(grids) > 1 and all(len(part) == 1 for _, part in grids):
        grids = [("", list(headers))]
    parts = []
    for why, part in grids:
        pieces = _by_repeats(part)
        parts += [Part(tuple(piece), "MIXED_SERIES" if len(pieces) > 1 else why, lacks) for piece, lacks in pieces]
    return parts


def _same_stack(one: Header, other: Header) -> bool:
    return one.stack == other.stack


SPLITS: dict[str, Callable[[Header, Header], bool]] = {
    "LOCALIZER": lambda one, other: ("LOCALIZER" in one.image_type) == ("LOCALIZER" in other.image_type),
    "UNSUPPORTED_CLASS": lambda one, other: one.sop_class == other.sop_class and one.samples == other.samples,
    "MIXED_MATRIX": lambda one, other: (one.rows, one.columns) == (other.rows, other.columns),
    "MIXED_ORIENTATION": same_orientation,
    "MIXED_SPACING": same_spacing,
    "MIXED_SERIES": _same_stack,
}
"""What must be the same inside one part, in the order in which it is asked."""


def _by_grid(headers: Sequence[Header]) -> list[tuple[str, list[Header]]]:
    """Sort headers into parts of one kind and one grid; each with what set it apart from the largest."""
    parts: list[list[Header]] = []
    for header in headers:
        for part in parts:
            if all(same(part[0], header) for same in SPLITS.values()):
                part.append(header)
                break
        else:
            parts.append([header])
    main = max(parts, key=len)
    reasons = {
        id(part): next(word for word, same in SPLITS.items() if not same(main[0], part[0]))
        for part in parts
        if part is not main
    }
    whole = next((reasons[id(part)] for part in parts if part is not main and reasons[id(part)] != "LOCALIZER"), "")
    return [(reasons.get(id(part), whole), part) for part in parts]


Key = tuple[str, int]


def _by_repeats(headers: list[Header]) -> list[tuple[list[Header], int]]:
    """Split images of the same places (time points, echoes, ...) by the attributes that separate them cleanly.

    Returns
    -------
    list of (headers, lacks)
        One with all headers where no place is there twice, or where nothing tells the repeats apart.
    """
    once = list({header.key: header for header in headers}.values())
    if len(once) < 4 or any(header.position is None or header.orientation is None for header in once):
        return [(headers, 0)]
    places = repeats(once)
    place_of = {header.key: int(place) for header, place in zip(once, places, strict=True)}
    found = list(_separate(headers, place_of, []))
    covers = [{place_of[header.key] for header in part} for part, _ in found]
    if len(found) == 1 or any(_most(part, place_of) > 1 for part, _ in found) or max(map(len, covers)) == 1:
        return [(headers, 0)]
    return [
        (part, _lacking(covers[number], covers, separate=any(word in SEPARATE for word in words)))
        for number, (part, words) in enumerate(found)
    ]


def _separate(
    headers: Sequence[Header], place_of: dict[Key, int], words: list[str]
) -> Iterator[tuple[list[Header], list[str]]]:
    """Yield the parts, each with the words that led to it, split by one attribute after the other.

    An attribute separates cleanly when its values share out the repeats of the fullest place: what each value has of
    them adds up to what there is. The clock of each slice does not: its values would add up to the number of slices.
    """
    most = _most(headers, place_of)
    for word in _asked(headers) if most > 1 else ():
        groups: dict[str, list[Header]] = {}
        for header in headers:
            groups.setdefault(header.telling.get(word, ""), []).append(header)
        if len(groups) < 2 or sum(_most(group, place_of) for group in groups.values()) != most:
            continue
        if word in WEAK and not _all_large(groups, place_of):
            continue
        for _, group in sorted(groups.items(), key=lambda entry: _rank(entry[0])):
            yield from _separate(group, place_of, [*words, word])
        return
    yield list(headers), words


def _asked(headers: Sequence[Header]) -> list[str]:
    """Return the attributes in the order in which they are asked: those of the standard, dimensions, the clock."""
    further = {word for header in headers for word in header.telling} - set(TELLING)
    return [word for word in TELLING if word not in WEAK] + sorted(further, key=_dimensions_first) + [*WEAK]


def _dimensions_first(word: str) -> tuple[bool, str]:
    return not word.startswith("dimension"), word


def _rank(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value


def _most(headers: Sequence[Header], place_of: dict[Key, int]) -> int:
    """Return how many images the fullest place has; a file that is there twice counts once."""
    keys = {header.key for header in headers}
    return int(np.bincount([place_of[key] for key in keys]).max())


def _all_large(groups: dict[str, list[Header]], place_of: dict[Key, int]) -> bool:
    """Tell whether each group has two places at least, and half of what the largest has."""
    sizes = [len({place_of[header.key] for header in group}) for group in groups.values()]
    return min(sizes) >= max(2, max(sizes) / 2)


def _lacking(own: set[int], all_covers: Sequence[set[int]], *, separate: bool) -> int:
    """Count the places that a part lacks: of all parts, or only of one that holds it wholly."""
    if not separate:
        return len(set().union(*all_covers) - own)
    return max((len(other - own) for other in all_covers if own < other), default=0)
