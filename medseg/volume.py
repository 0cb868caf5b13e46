"""The Volume: voxels with a place in the patient, and the lossless operations on them.

Axes I, J, K are the array's own; the affine maps an index (i, j, k) to millimetres in RAS+ (x grows towards the
patient's right, y towards anterior, z towards superior), as NIfTI and nibabel do. DICOM's LPS is converted at the
door (readers), never here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import nibabel.orientations as orientations
import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryError

Unit = Literal["mm", "pixel"]
Affine = NDArray[np.float64]
GRID_TOLERANCE_MM = 1e-3
"""Two grids are one when no corner voxel is further apart than this or 1 % of a voxel, and never a tenth of one."""


@dataclass(frozen=True)
class Volume:
    """An image or a label map: valid when constructed.

    Attributes
    ----------
    array : (C, I, J, K), any numeric dtype.
    affine : (4, 4) float64, index -> mm in RAS+ (index -> pixel when `unit` is "pixel").
    unit : "mm", or "pixel" for pictures without a scale, which are never given an invented one.
    notes : what the reader did that a person should know (stable words, see docs/reference/reason-codes.md).
    meta : plain values from the header that help to group and check (Modality, Manufacturer, ...); no identity.

    Raises
    ------
    GeometryError : the array is not 4-D, a size is zero, or the affine is not finite or not invertible.
    """

    array: NDArray[Any]
    affine: Affine
    unit: Unit = "mm"
    notes: tuple[str, ...] = ()
    meta: dict[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if self.array.ndim != 4 or 0 in self.array.shape:
            raise GeometryError(f"a volume is (C, I, J, K) without empty axes, got shape {self.array.shape}")
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or _bottom_differs(affine[3]):
            raise GeometryError(
                f"the affine must be a finite 4x4 matrix with last row 0 0 0 1, got {affine.tolist()}",
                code="BAD_AFFINE",
            )
        if singular(affine):
            raise GeometryError(f"the affine is singular: {affine.tolist()}", code="BAD_AFFINE")
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Size (I, J, K) in voxels."""
        return (self.array.shape[1], self.array.shape[2], self.array.shape[3])

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between voxel centres along I, J, K, in mm (or pixel)."""
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        return (float(lengths[0]), float(lengths[1]), float(lengths[2]))

    @property
    def voxel_volume(self) -> float:
        """Volume of one voxel in mm³ (or pixel³); right for sheared grids too."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def axis_codes(self) -> str:
        """Direction of I, J, K as letters, "RAS" for a canonical volume."""
        return "".join(orientations.aff2axcodes(self.affine))

    @property
    def orthogonal(self) -> bool:
        """Whether the three axes are at right angles (to 0.1 degree); a tilted gantry's are not."""
        unit = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return bool(np.abs(unit.T @ unit - np.eye(3)).max() < np.sin(np.radians(0.1)))

    @property
    def grid(self) -> str:
        """The grid in words, for messages."""
        size = "×".join(str(n) for n in self.shape)
        spacing = "×".join(f"{s:.4g}" for s in self.spacing)
        corner = ", ".join(f"{x:.4g}" for x in self.affine[:3, 3])
        return f"{size} voxels of {spacing} {self.unit} from ({corner}), axes {self.axis_codes}"

    def with_array(self, array: NDArray[Any]) -> Volume:
        """Return the same geometry around another array of the same (I, J, K)."""
        if array.shape[1:] != self.shape:
            raise GeometryError(f"array of shape {array.shape} does not fit a grid of {self.shape}")
        return replace(self, array=array)


def _bottom_differs(row: NDArray[np.float64]) -> bool:
    return bool((np.abs(row - (0, 0, 0, 1)) > (1e-8, 1e-8, 1e-8, 1e-5)).any())


def singular(affine: Affine) -> bool:
    """Tell whether an affine flattens space, at any scale: voxels of 4 nm are small, not flat."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(lengths.min() == 0 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6)


def corners(shape: tuple[int, int, int], affine: Affine) -> NDArray[np.float64]:
    """Return the positions of the eight corner voxels' centres, (8, 3) in mm."""
    index = np.array(np.meshgrid(*[(0, size - 1) for size in shape], indexing="ij")).reshape(3, -1)
    return np.asarray((affine[:3, :3] @ index).T + affine[:3, 3])


def grid_distance(shape: tuple[int, int, int], first: Affine, second: Affine) -> float:
    """Return how far (mm) two affines place the same corner voxel of a grid apart, at most."""
    difference = corners(shape, first) - corners(shape, second)
    return float(np.linalg.norm(difference, axis=1).max())


def same_grid(first: Volume, second: Volume) -> bool:
    """Tell whether two volumes have the same size and place the same voxel at the same point."""
    voxel = min(first.spacing)
    # In microscopy a thousandth of a millimetre is many voxels.
    tolerance = min(max(GRID_TOLERANCE_MM, 0.01 * voxel), 0.1 * voxel)
    return first.shape == second.shape and grid_distance(first.shape, first.affine, second.affine) <= tolerance


Flips = NDArray[np.float64]
"""nibabel's orientation array (3, 2): for each axis its output axis and direction."""


def orientation_to(affine: Affine, axis_codes: str) -> Flips:
    """Return the axis swaps and flips that bring a grid closest to `axis_codes`."""
    start = orientations.io_orientation(affine)
    return np.asarray(orientations.ornt_transform(start, orientations.axcodes2ornt(tuple(axis_codes))))


def reorient(volume: Volume, axis_codes: str) -> Volume:
    """Swap and flip axes so that they point closest to `axis_codes`; no voxel changes its value or its place."""
    return _turn(volume, orientation_to(volume.affine, axis_codes))


def shown_axes(unit: Unit) -> str:
    """Return the axes to which an image is turned to be shown against them: from left to right and down.

    A patient is looked at from the front and from below (RAS); a picture as it is stored.
    """
    return "RAS" if unit == "mm" else "LPS"


def _turn(volume: Volume, flips: Flips) -> Volume:
    array = np.stack([orientations.apply_orientation(channel, flips) for channel in volume.array])
    affine = volume.affine @ orientations.inv_ornt_aff(flips, volume.shape)
    return replace(volume, array=array, affine=affine)


def align_to(volume: Volume, reference: Volume) -> Volume | None:
    """Return `volume` with the axes of `reference` where both are one grid stored in different axis order, else None.

    Lossless: a label map saved by another program in another orientation still matches its image.
    """
    if volume.shape == reference.shape and np.array_equal(volume.affine, reference.affine):
        return volume
    # Not by the letters of the axes: near 45 degrees the last digit of an affine decides between them.
    relative = np.linalg.inv(reference.affine) @ volume.affine
    turned = _turn(volume, np.asarray(orientations.io_orientation(relative)))
    return replace(turned, affine=reference.affine) if same_grid(turned, reference) else None


def on_one_grid(volumes: Mapping[str, Volume]) -> list[Volume]:
    """Return the volumes with the axes of the first, where all are one grid stored in any axis order.

    Raises
    ------
    GeometryError : CHANNEL_GRID, naming the first that lies on another grid.
    """
    (name, first), *others = volumes.items()
    fitted = [first]
    for other, volume in others:
        turned = align_to(volume, first)
        if turned is None:
            raise GeometryError(
                f"channel {other!r} has a grid of {volume.grid}, channel {name!r} one of {first.grid}; "
                "bring all channels of a case to one grid, or say `resample: true` in the spec",
                code="CHANNEL_GRID",
            )
        fitted.append(turned)
    return fitted
