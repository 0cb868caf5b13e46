"""What is asked of a reader of labels: which structures, on which grid, and what happens where two overlap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medseg.volume import Volume

Overlap = Literal["refuse", "later"]


@dataclass(frozen=True)
class Wanted:
    """One label of a spec and the structures that belong to it.

    Attributes
    ----------
    name, value : as in the spec.
    expression : regular expression for the name of the structure (whole, upper and lower case alike); None: `name`
        is the name, and a file with one structure needs no name where one label is asked for.
    optional : a case without such a structure has none of it; else it is refused.
    regions : the learning targets that the label belongs to; a label of no region is a target by itself.
    """

    name: str
    value: int
    expression: str | None = None
    optional: bool = False
    regions: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", self.regions or frozenset({self.name}))


@dataclass(frozen=True)
class LabelRequest:
    """Labels asked for on the grid of an image.

    Attributes
    ----------
    image : its grid is the mask's.
    wanted : the labels, in the order of the spec.
    image_paths : files or folders of the image, for its frame of reference and instances.
    overlap : "refuse", or "later": a label that stands later in the spec is painted over an earlier one.
    """

    image: Volume
    wanted: tuple[Wanted, ...]
    image_paths: tuple[Path, ...] = ()
    overlap: Overlap = "refuse"


LabelReader = Callable[[tuple[Path, ...], LabelRequest], Volume]
"""(files or folders, request) -> (1, I, J, K) label values on the grid of the request's image."""
