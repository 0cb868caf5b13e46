"""Where the slices of one DICOM series lie: order and affine from positions and directions, or a refusal.

InstanceNumber, SliceLocation and file names are never asked, SliceThickness and SpacingBetweenSlices only for a single
slice. The rules and what other readers do on
the same cases: docs/reference/reason-codes.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.readers.dicom_header import TELLING, Header
from medseg.readers.dicom_refusals import refuse
from medseg.volume import Affine

ORIENTATION_TOLERANCE = 1e-4
"""Largest difference of a direction cosine inside a series: 0.04 mm over a field of 400 mm."""
SPACING_TOLERANCE = 1e-4
"""Largest relative difference of the pixel spacing inside a series: 0.04 mm over 400 mm."""
TILT_DEGREES = 0.1
"""A stack that leans more than this against the normal of its slices is tilted."""
SAME_PLACE = 0.05
"""Two slices closer than this share of the usual gap lie at the same position."""
NOMINAL_THICKNESS = 1.0
"""Thickness (mm) of a single slice that does not say its own; the place of its voxels does not depend on it."""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])

Positions = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """The slices in order and the place of their voxels.

    Attributes
    ----------
    order : indices into the headers, along the normal cross(row, column).
    affine : (4, 4), index (column, row, slice) -> mm in RAS+.
    """

    order: tuple[int, ...]
    affine: Affine


@dataclass(frozen=True)
class Stack:
    """Parallel slices in order, each where its own position says, evenly spaced or not.

    Attributes
    ----------
    order : indices into the headers, along the normal cross(row, column).
    size : (columns, rows) of a slice.
    spacing : mm between columns and between rows: along I and along J.
    axes : (3, 3) unit directions in LPS: of a row, of a column, and the normal.
    positions : (N, 3) centre of the first pixel of each slice in this order, mm in LPS.
    thickness : mm; the step of a single slice, and of no other stack.
    """

    order: tuple[int, ...]
    size: tuple[int, int]
    spacing: tuple[float, float]
    axes: NDArray[np.float64]
    positions: Positions
    thickness: float = NOMINAL_THICKNESS

    @property
    def offsets(self) -> Positions:
        """(N, 3) mm along row, column and normal from the first slice to each."""
        return np.asarray((self.positions - self.positions[0]) @ np.linalg.inv(self.axes))

    @property
    def tilt(self) -> float:
        """Degrees by which the line from the first to the last slice leans against the normal."""
        aside = self.offsets[-1]
        return float(np.degrees(np.arctan2(np.linalg.norm(aside[:2]), aside[2])))

    @property
    def planes(self) -> NDArray[np.float64]:
        """(N, 3, 3), of each slice: (column, row, 1) -> mm in RAS+."""
        ways = np.broadcast_to((self.axes[:2] * np.array(self.spacing)[:, None]).T, (len(self.positions), 3, 2))
        return np.asarray(LPS_TO_RAS @ np.concatenate([ways, self.positions[:, :, None]], axis=2))

    @property
    def affine(self) -> Affine:
        """(4, 4), index -> mm in RAS+ where every slice lies an even step further; sheared where the stack leans.

        It is true of every slice only if `faults` finds nothing but a tilt.
        """
        affine = np.eye(4)
        affine[:3, 0] = LPS_TO_RAS @ self.axes[0] * self.spacing[0]
        affine[:3, 1] = LPS_TO_RAS @ self.axes[1] * self.spacing[1]
        single = len(self.positions) == 1
        step = (
            self.axes[2] * self.thickness
            if single
            else (self.positions[-1] - self.positions[0]) / (len(self.positions) - 1)
        )
        affine[:3, 2] = LPS_TO_RAS @ step
        affine[:3, 3] = LPS_TO_RAS @ self.positions[0]
        return affine


def series_grid(headers: Sequence[Header]) -> Grid:
    """Order the slices of one series and derive its affine.

    Parameters
    ----------
    headers : one per slice, each SOP instance once. One alone is as thick as it says, else NOMINAL_THICKNESS.

    Raises
    ------
    GeometryError : NO_POSITION, NO_PIXEL_SPACING, BAD_ORIENTATION, MIXED_*, DUPLICATE_POSITION, MIXED_SERIES,
        GANTRY_TILT, MISSING_SLICES, IRREGULAR_SPACING.
    """
    stack = series_stack(headers)
    for code, text in faults(stack).items():
        raise refuse(code, text)
    return Grid(stack.order, stack.affine)


def series_stack(headers: Sequence[Header]) -> Stack:
    """Order the slices of one series, evenly spaced or not; `faults` says what keeps them from being a grid.

    Parameters
    ----------
    headers : one per slice, each SOP instance once.

    Raises
    ------
    GeometryError : as series_grid, without GANTRY_TILT, MISSING_SLICES and IRREGULAR_SPACING.
    """
    _check_each(headers)
    _check_same(headers)
    rows, columns = mean_directions(headers)
    normal = np.cross(rows, columns)
    positions = np.array([header.position for header in headers], dtype=np.float64)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    if len(headers) > 1:
        _check_repeats([headers[index] for index in order], positions @ normal)
    between_rows, between_columns = headers[0].spacing or (0.0, 0.0)
    return Stack(
        tuple(int(index) for index in order),
        (headers[0].columns, headers[0].rows),
        (between_columns, between_rows),
        np.array([rows, columns, normal / np.linalg.norm(normal)]),
        positions,
        headers[0].thickness or NOMINAL_THICKNESS,
    )


def faults(stack: Stack) -> dict[str, str]:
    """Return code -> facts of what keeps a stack from being an upright grid of even steps; empty for most."""
    depth = stack.offsets[:, 2]
    if len(depth) == 1:
        return {}
    found = _uneven(np.diff(depth))
    if stack.tilt > TILT_DEGREES:
        found["GANTRY_TILT"] = f"the stack leans {stack.tilt:.2f} degrees against the normal of its slices"
    # Where the gaps are uneven, only what a slice lies aside is a fault of its own.
    share = depth / depth[-1] if found.keys() - {"GANTRY_TILT"} else np.linspace(0, 1, len(depth))
    off = float(np.linalg.norm(stack.offsets - share[:, None] * stack.offsets[-1], axis=1).max())
    if off > tolerance(float(np.linalg.norm(stack.offsets[-1])) / (len(depth) - 1)):
        found.setdefault("IRREGULAR_SPACING", f"a slice lies {off:.3f} mm off the line of even steps")
    return found


def mean_directions(headers: Sequence[Header]) -> NDArray[np.float64]:
    """Return the unit directions of rows and columns, (2, 3) in LPS, averaged over slices that agree."""
    directions = np.array([header.orientation for header in headers], dtype=np.float64).mean(axis=0).reshape(2, 3)
    return np.asarray(directions / np.linalg.norm(directions, axis=1, keepdims=True))


def same_orientation(first: Header, second: Header) -> bool:
    """Tell whether two slices are parallel with the same directions; two without orientation are."""
    return _close(first.orientation, second.orientation, ORIENTATION_TOLERANCE, relative=False)


def same_spacing(first: Header, second: Header) -> bool:
    """Tell whether two slices have the same pixel size; two without are."""
    return _close(first.spacing, second.spacing, SPACING_TOLERANCE, relative=True)


def repeats(headers: Sequence[Header]) -> NDArray[np.intp]:
    """Give each slice the number of its place along the normal; slices at the same place share it.

    Needs positions and one common orientation.
    """
    directions = mean_directions(headers)
    depth = np.array([header.position for header in headers]) @ np.cross(directions[0], directions[1])
    order = np.argsort(depth, kind="stable")
    gaps = np.diff(depth[order])
    places = np.empty(len(headers), dtype=np.intp)
    places[order] = np.concatenate([[0], np.cumsum(gaps >= _least_gap(gaps))])
    return places


def _close(first: Sequence[float] | None, second: Sequence[float] | None, tolerance: float, *, relative: bool) -> bool:
    if first is None or second is None:
        return first is second
    return all(
        abs(one - other) <= tolerance * (abs(one) if relative else 1.0)
        for one, other in zip(first, second, strict=True)
    )


def _check_each(headers: Sequence[Header]) -> None:
    """Refuse slices whose place or size is unknown."""
    missing = [header.instance for header in headers if header.position is None or header.orientation is None]
    if missing:
        raise refuse(
            "NO_POSITION",
            f"{len(missing)} of {len(headers)} slices have no position or orientation (instance {missing[0]})",
        )
    for header in headers:
        if header.spacing is None or min(header.spacing) <= 0:
            found = "not positive" if header.spacing else "absent"
            imager = ", only ImagerPixelSpacing (at the detector) is there" if header.imager_spacing else ""
            raise refuse("NO_PIXEL_SPACING", f"PixelSpacing is {found}{imager} (instance {header.instance})")
        rows, columns = np.array(header.orientation, dtype=np.float64).reshape(2, 3)
        lengths = np.linalg.norm((rows, columns), axis=1)
        if np.abs(lengths - 1).max() > 0.01 or abs(rows @ columns) > 1e-3:
            raise refuse(
                "BAD_ORIENTATION",
                f"ImageOrientationPatient is not two unit vectors at right angles (instance {header.instance}: "
                f"{header.orientation})",
            )


def _check_same(headers: Sequence[Header]) -> None:
    """Refuse slices that do not share one grid."""
    first = headers[0]
    sizes = sorted({f"{header.columns}x{header.rows}" for header in headers})
    if len(sizes) > 1:
        raise refuse("MIXED_MATRIX", f"slices of different sizes: {', '.join(sizes[:4])}")
    if not all(same_orientation(first, header) for header in headers):
        raise refuse("MIXED_ORIENTATION", "the slices are not parallel")
    if not all(same_spacing(first, header) for header in headers):
        found = sorted({f"{header.spacing}" for header in headers})
        raise refuse("MIXED_SPACING", f"slices of different pixel spacing: {', '.join(found[:4])} mm")
    frames = {header.frame_of_reference for header in headers}
    if len(frames) > 1:
        raise refuse("MIXED_FRAME_OF_REFERENCE", f"{len(frames)} frames of reference")


def _least_gap(gaps: NDArray[np.float64]) -> float:
    """Return the gap (mm) below which two slices lie at the same place."""
    real = gaps[gaps > 1e-3]
    return max(1e-3, SAME_PLACE * float(np.median(real))) if real.size else np.inf


def _check_repeats(headers: Sequence[Header], depth: NDArray[np.float64]) -> None:
    """Refuse several images of one place; say how often and what tells them apart."""
    places = repeats(headers)
    counts = np.bincount(places)
    if counts.max() == 1:
        return
    if counts.min() == counts.max():
        differing = [word for word in TELLING if len({header.telling.get(word) for header in headers}) > 1]
        raise refuse(
            "MIXED_SERIES",
            f"each of {len(counts)} positions is there {counts[0]} times; "
            f"what differs: {', '.join(differing) or 'nothing in the header but the identifiers'}",
        )
    place = int(np.argmax(counts > 1))
    where = float(depth[places == place][0])
    instances = [header.instance for header, at in zip(headers, places, strict=True) if at == place]
    raise refuse(
        "DUPLICATE_POSITION",
        f"{int((counts > 1).sum())} of {len(counts)} positions are there more than once "
        f"(first at {where:.2f} mm along the normal, instances {', '.join(instances)})",
    )


def _uneven(gaps: NDArray[np.float64]) -> dict[str, str]:
    """Find missing slices or uneven spacing."""
    median, least = float(np.median(gaps)), float(gaps.min())
    if np.abs(gaps - median).max() <= tolerance(median):
        return {}
    counts = np.rint(gaps / least)
    multiples = np.abs(gaps - counts * least).max() <= tolerance(least) * counts.max()
    holes = int((counts > 1).sum())
    if multiples and holes <= max(1, len(gaps) // 4):
        text = f"{int((counts - 1).sum())} slices are missing in {holes} places (spacing {least:.3f} mm, "
        return {"MISSING_SLICES": f"{text}largest gap {gaps.max():.3f} mm)"}
    return {"IRREGULAR_SPACING": f"gaps between slices run from {least:.3f} to {gaps.max():.3f} mm"}


def tolerance(gap: float) -> float:
    """Return how far (mm) a slice may lie from its even place: 1 % of the gap, at least 0.05 mm."""
    return max(0.01 * gap, 0.05)
