"""Labels from DICOM: find SEG and RTSTRUCT objects, match their structures with the spec, paint one mask.

Position decides where a structure lies; frame of reference and referenced instances decide whether that may be
believed. Files often name images that were later copied, cropped or anonymised under new identifiers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from pydicom import uid
from pydicom.dataset import Dataset

from medseg.errors import GeometryError
from medseg.readers.dicom_budget import open_dataset
from medseg.readers.dicom_files import files_below
from medseg.readers.dicom_header import PARSE_ERRORS, known_class, quiet, read_header
from medseg.readers.dicom_index import LABELMAP_STORAGE
from medseg.readers.dicom_label_parts import LabelObject, Painter, refuse_labels
from medseg.readers.dicom_rtstruct import open_rtstruct
from medseg.readers.dicom_scan import scan
from medseg.readers.dicom_seg import open_seg
from medseg.readers.label_request import LabelRequest, Wanted
from medseg.volume import Volume

OPENERS: dict[str, Callable[[Dataset], LabelObject]] = {
    uid.SegmentationStorage: open_seg,
    LABELMAP_STORAGE: open_seg,
    uid.RTStructureSetStorage: open_rtstruct,
}
"""Storage class -> how its objects are opened."""
MISPLACED = ("CONTOUR_OFF_PLANE", "CONTOUR_OUTSIDE", "LABEL_GRID", "SEGMENT_OUTSIDE")

Structure = tuple[int, int]
"""Number of the object, number of the segment or ROI in it."""


def read_dicom_labels(paths: Path | tuple[Path, ...], request: LabelRequest) -> Volume:
    """Read the labels of a request from DICOM SEG or RTSTRUCT.

    Objects in another frame of reference than the image, which name none of its slices, are left out where others are
    there; and of structures of one name in several objects those that name slices of the image are taken.

    Parameters
    ----------
    paths : files, or folders searched to the bottom; images beside the objects are passed over.

    Returns
    -------
    Volume
        array (1, I, J, K) uint8 (int32 for values above 255) on the grid of `request.image`, 0 where no label is.
        notes: CONTOURS_CROSS, CONTOUR_CLIPPED, CONTOUR_GAPS, CONTOUR_NEAREST_SLICE, CONTOUR_REPEATED,
        FRACTIONAL_THRESHOLDED, FRAME_OF_REFERENCE_DIFFERS, LABELS_SET_ASIDE, MATCHED_BY_POSITION,
        OVERLAP_RESOLVED, SEGMENT_ABSENT, SEGMENT_EMPTY.

    Raises
    ------
    ReadError, GeometryError, SpecError : with a code of LABEL_REFUSALS; NOT_FOUND when the path does not exist.
    """
    with quiet():
        frames, instances = _identity(request.image_paths)
        opened = [(found, *_belongs(found, frames, instances)) for found in _open_all(paths)]
        near = [row for row in opened if not row[2]] or opened
        objects = [found for found, _, _ in near]
        named = {number for number, found in enumerate(objects) if found.references & instances}
        chosen, passed = match(request.wanted, [found.names for found in objects], named=named)
        used = {number for structures in chosen.values() for number, _ in structures}
        notes = {note for number in used for note in near[number][1]}
        notes |= {"LABELS_SET_ASIDE"} if passed or len(near) < len(opened) else set()
        doubted = {number for number in used if near[number][2]}
        painter = Painter(request)
        for label in painter.order:
            voxels = 0
            for number, structure in chosen[label.name]:
                try:
                    for plane in objects[number].planes(structure, request.image, notes):
                        voxels += painter.add(label, plane)
                except GeometryError as error:
                    raise _explained(error, doubted=number in doubted) from error
                except PARSE_ERRORS as error:
                    raise refuse_labels("UNREADABLE", f"a structure of {label.name!r} is damaged") from error
            if not voxels:
                notes.add("SEGMENT_EMPTY" if chosen[label.name] else "SEGMENT_ABSENT")
    array, said = painter.finish()
    return Volume(array[None], request.image.affine, unit=request.image.unit, notes=tuple(sorted(notes | said)))


def label_identity(path: Path) -> tuple[str, frozenset[str]]:
    """Return the frame of reference of a label object, "" if it names none, and the instances it was drawn on.

    Raises
    ------
    ReadError : UNREADABLE, UNSUPPORTED_CLASS.
    """
    with quiet():
        (found, *_) = _open_all(path)
    return found.frame, found.references


def _open_all(paths: Path | tuple[Path, ...]) -> list[LabelObject]:
    objects, others = [], set()
    for file in files_below(paths):
        try:
            header = read_header(file)
            if header is None:
                continue
            if header.sop_class not in OPENERS:
                others.add(known_class(header.sop_class) or "a private class")
                continue
            objects.append(OPENERS[header.sop_class](open_dataset(file)))
        except PARSE_ERRORS as error:
            raise refuse_labels("UNREADABLE", f"a DICOM file is damaged ({type(error).__name__})") from error
    if not objects:
        found = f"only {', '.join(sorted(others))}" if others else "no DICOM object"
        named = all(path.is_file() for path in ([paths] if isinstance(paths, Path) else paths))
        raise refuse_labels("UNSUPPORTED_CLASS" if others and named else "NO_LABELS", f"{found} was found")
    return objects


def match(
    wanted: Sequence[Wanted], names: Sequence[dict[int, str]], *, named: Collection[int] = ()
) -> tuple[dict[str, list[Structure]], bool]:
    """Find the structures of each label by name.

    Parameters
    ----------
    names : for each object, number of each structure -> its name.
    named : the objects that name slices of the image: of structures of one name, theirs are taken.

    Returns
    -------
    tuple
        Label name -> its structures, several where the expression fits several, empty for an absent optional label;
        and whether structures of objects that are not `named` were passed over.

    Raises
    ------
    SpecError : SEGMENT_MISSING, nothing fits (the message lists the names that exist); SEGMENT_AMBIGUOUS, a structure
        fits two labels, or two objects hold a structure of the same name (two readers' opinions, two versions).
    """
    found = {(at, number): name for at, group in enumerate(names) for number, name in group.items()}
    preferred = {name for (at, _), name in found.items() if at in named}
    there = {key: name for key, name in found.items() if key[0] in named or name not in preferred}
    if len(there) == len(wanted) == 1 and wanted[0].expression is None:
        return {wanted[0].name: list(there)}, len(there) < len(found)
    chosen: dict[str, list[Structure]] = {}
    taken: dict[Structure, str] = {}
    for label in wanted:
        expression = re.escape(label.name) if label.expression is None else label.expression
        fits = [key for key, name in there.items() if re.fullmatch(expression, name, re.IGNORECASE)]
        if not fits and not label.optional:
            known = ", ".join(repr(name) for name in dict.fromkeys(there.values())) or "none"
            raise refuse_labels("SEGMENT_MISSING", f"no structure fits the label {label.name!r}; there are {known}")
        for key in fits:
            if key in taken:
                text = f"{there[key]!r} fits the labels {taken[key]!r} and {label.name!r}"
                raise refuse_labels("SEGMENT_AMBIGUOUS", text)
            taken[key] = label.name
        if len({there[key] for key in fits}) < len({(key[0], there[key]) for key in fits}):
            text = f"several files hold a structure that is called as the label {label.name!r} asks"
            raise refuse_labels("SEGMENT_AMBIGUOUS", text)
        chosen[label.name] = fits
    return chosen, len(there) < len(found)


def _identity(paths: Sequence[Path]) -> tuple[set[str], set[str]]:
    """Return the frames of reference and the SOP instances of an image; empty where it is not DICOM."""
    frames, instances = set(), set()
    for series in scan(paths).series:
        if series.refusal is None or series.refusal.code != "LOCALIZER":
            frames |= {header.frame_of_reference for header in series.headers} - {""}
            instances |= {header.sop_uid for header in series.headers}
    return frames, instances


def _belongs(found: LabelObject, frames: set[str], instances: set[str]) -> tuple[set[str], bool]:
    """Say what speaks for an object belonging to the image: its notes, and whether only its position does."""
    named = bool(found.references & instances)
    differs = bool(found.frame and frames) and found.frame not in frames
    notes = {"FRAME_OF_REFERENCE_DIFFERS"} if differs else set()
    return notes | (set() if named else {"MATCHED_BY_POSITION"}), differs and not named


def _explained(error: GeometryError, *, doubted: bool) -> Exception:
    """Say that the frame of reference is another's where the position does not fit either."""
    if doubted and error.code in MISPLACED:
        return refuse_labels(
            "FRAME_OF_REFERENCE",
            f"the labels lie in another frame of reference than the image, name none of its slices, and do not fit "
            f"by position ({error.code})",
        )
    return error
