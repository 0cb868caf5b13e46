"""What readers of DICOM SEG and RTSTRUCT share: the reasons to refuse, and the painting of planes into one label map.

Unlike those of series, messages name segments and ROIs, because a spec has to: their names describe anatomy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryError, MedsegError, ReadError, SpecError
from medseg.readers.dicom_refusals import Kind
from medseg.readers.label_request import LabelRequest, Wanted
from medseg.volume import Volume

_OTHER_IMAGE = "find the image that the labels were drawn on"

LABEL_REFUSALS: dict[str, Kind] = {
    "CONTOURS_SPARSE": Kind(ReadError, "interpolate the contours where they were drawn, and export them again"),
    "CONTOUR_OFF_PLANE": Kind(GeometryError, _OTHER_IMAGE),
    "CONTOUR_OUTSIDE": Kind(GeometryError, _OTHER_IMAGE + ", or give the whole series"),
    "CONTOUR_TYPE": Kind(ReadError, "only closed planar contours enclose something: close them, or correct `dicom`"),
    "DUPLICATE_POSITION": Kind(ReadError, "the object contradicts itself: export it again"),
    "FRAME_OF_REFERENCE": Kind(GeometryError, _OTHER_IMAGE),
    "LABEL_GRID": Kind(GeometryError, _OTHER_IMAGE + ", or resample the segmentation to the image"),
    "NO_DECODER": Kind(ReadError, "export the segmentation uncompressed"),
    "NO_LABELS": Kind(ReadError, "give a DICOM SEG or RTSTRUCT, or a folder that holds one"),
    "NO_PIXEL_SPACING": Kind(GeometryError, "the size of its pixels is never guessed: export it again"),
    "NO_POSITION": Kind(GeometryError, "where its frames lie is never guessed: export it again"),
    "OVERSIZED": Kind(ReadError, "the header is damaged, or the file a trap"),
    "SEGMENT_AMBIGUOUS": Kind(SpecError, "write expressions for `dicom` that tell the structures apart"),
    "SEGMENT_MISSING": Kind(SpecError, "name it with `dicom: EXPRESSION`, or mark the label `optional: true`"),
    "SEGMENT_OUTSIDE": Kind(GeometryError, _OTHER_IMAGE + ", or give the whole series"),
    "SEGMENT_OVERLAP": Kind(SpecError, "say `overlap: later` in the spec, or give `regions` that nest"),
    "TRUNCATED": Kind(ReadError, "the file is cut short: copy or export it again"),
    "UNREADABLE": Kind(ReadError, "the file is damaged: copy or export it again"),
    "UNSUPPORTED_CLASS": Kind(ReadError, "give a DICOM SEG or RTSTRUCT"),
}


def refuse_labels(code: str, text: str) -> MedsegError:
    """Return (not raise) the error of `code` with the facts of this case and the advice."""
    kind = LABEL_REFUSALS[code]
    return kind.error(f"DICOM labels refused, {code}: {text}; {kind.advice}", code=code)


@dataclass(frozen=True)
class Plane:
    """One slice of one structure.

    Attributes
    ----------
    axis, index : the slice of the image: all voxels with this index along this axis.
    inside : bool over the two other axes, in their order.
    """

    axis: int
    index: int
    inside: NDArray[np.bool_]


@dataclass(frozen=True)
class LabelObject:
    """One opened SEG or RTSTRUCT.

    Attributes
    ----------
    names : number of each segment or ROI -> its name.
    frame : frame of reference, "" when it names none.
    references : SOP instances that it says it was drawn on.
    planes : (number, image, notes) -> its planes on the grid of the image, in any order; adds to the notes; raises
        ReadError or GeometryError with a code of LABEL_REFUSALS.
    """

    names: dict[int, str]
    frame: str = field(repr=False)
    references: frozenset[str] = field(repr=False)
    planes: Callable[[int, Volume, set[str]], Iterator[Plane]]


class Painter:
    """One label map that labels are painted into, the winner of every overlap first.

    Where labels meet, the winner is one that belongs to every region the others belong to, so that no target loses a
    voxel; where `overlap` is "later", the later one of the spec. Anything else is refused at the end, with numbers.
    """

    def __init__(self, request: LabelRequest) -> None:
        self.later = request.overlap == "later"
        place = {label.name: number for number, label in enumerate(request.wanted)}
        self.order: tuple[Wanted, ...] = tuple(
            sorted(
                request.wanted,
                key=lambda label: (0 if self.later else -len(label.regions), -place[label.name]),
            )
        )
        largest = max((label.value for label in request.wanted), default=0)
        self.array: NDArray[Any] = np.zeros(request.image.shape, np.uint8 if largest < 256 else np.int32)
        self._known = {label.value: label for label in request.wanted}
        self._lost: dict[tuple[str, str], int] = {}
        self._met = False

    def add(self, label: Wanted, plane: Plane) -> int:
        """Paint one plane of `label` where no earlier label is; return how many voxels it covers, hidden or not."""
        target = np.moveaxis(self.array, plane.axis, 0)[plane.index]
        there = target[plane.inside]
        for value in np.unique(there[(there != 0) & (there != label.value)]):
            other = self._known[int(value)]
            self._met = True
            if not self.later and not other.regions >= label.regions:
                pair = (other.name, label.name)
                self._lost[pair] = self._lost.get(pair, 0) + int(np.count_nonzero(there == value))
        target[plane.inside & (target == 0)] = label.value
        return int(plane.inside.sum())

    def finish(self) -> tuple[NDArray[Any], set[str]]:
        """Return the label map (I, J, K) and its notes; raise SEGMENT_OVERLAP where labels exclude each other."""
        if self._lost:
            pairs = "; ".join(f"{a!r} and {b!r} share {n} voxels" for (a, b), n in sorted(self._lost.items())[:5])
            raise refuse_labels("SEGMENT_OVERLAP", pairs)
        return self.array, {"OVERLAP_RESOLVED"} if self._met else set()
