"""HAZARDS: one row per thing that goes wrong with DICOM series, with the truth and what a reader must do.

The same rows are the tests of medseg's reader and the benchmark against others (docs/reference/dicom-matrix.md).
Every series is a 33 x 35 x 8 phantom in which each voxel has its own value, so that any flip, swap or shift shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import nibabel.orientations as orientations
import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset
from scipy.spatial.transform import Rotation

from medseg.phantom import damage as d
from medseg.phantom.dicom import write_series
from medseg.phantom.multiframe import write_multiframe
from medseg.volume import Affine, Volume

SHAPE = (33, 35, 8)
GAP = 2.5
ORIGIN = (12.5, -31.25, 101.0)
Outcome = Literal["read", "split"] | str
"""What must happen: read exactly; split into volumes that are read exactly; else the reason code of the refusal."""
Truth = Callable[[], tuple[Volume, ...]]


def axes(codes: str) -> Affine:
    """Return the phantom's affine with columns, rows and slices counted towards the letters of `codes`."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (row, direction) in enumerate(orientations.axcodes2ornt(tuple(codes))):
        affine[int(row), axis] = direction * (0.7, 0.9, GAP)[axis]
    affine[:3, 3] = ORIGIN
    return affine


def oblique(degrees: tuple[float, float, float], spacing: tuple[float, float, float]) -> Affine:
    """Return an affine turned about x, y and z."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * np.array(spacing)
    affine[:3, 3] = (-20.5, 33.25, -77.125)
    return affine


AXIAL = axes("LPS")
_OBLIQUE = oblique((20, -15, 40), (0.8, 1.1, 3.0))


def phantom(affine: Affine = AXIAL, *, lowest: int = -300, seed: int = 0) -> Volume:
    """Return the phantom on a grid; its values are a permutation of whole numbers from `lowest` upwards."""
    values = np.random.default_rng(seed).permutation(int(np.prod(SHAPE))) + float(lowest)
    return Volume(values.reshape((1, *SHAPE)).astype(np.float32), affine)


def _with_slope_per_slice(first: float = 0.763) -> Volume:
    """Return a PET: whole multiples of another slope in each slice, the largest of each being 32767 of them."""
    stored = phantom(lowest=0).array.astype(np.float64) % 5000
    stored[0, 0, 0] = 32767
    return Volume((stored * (first, *SLOPES[1:])).astype(np.float32), AXIAL)


SLOPES = tuple(float(slope) for slope in np.round(0.763 + 0.211 * np.arange(SHAPE[2]), 3))


def _leaning(degrees: float) -> Volume:
    affine = AXIAL.copy()
    affine[1, 2] = -GAP * np.tan(np.radians(degrees))
    return phantom(affine)


def _padding(value: float) -> Volume:
    array = phantom().array.copy()
    array[0, :3, 0] = np.nan
    array[np.isnan(array)] = np.nanmin(array) if np.isnan(value) else value
    return Volume(array, AXIAL)


def _halves() -> tuple[Volume, ...]:
    whole, half = phantom(), SHAPE[2] // 2
    upper = AXIAL.copy()
    upper[:3, 3] += AXIAL[:3, 2] * half
    taller = np.pad(whole.array[..., half:], ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=-1024)
    return Volume(whole.array[..., :half], AXIAL), Volume(taller, upper)


def _twice() -> tuple[Volume, ...]:
    return phantom(), phantom(lowest=-299)


@dataclass(frozen=True)
class Hazard:
    """One row.

    Attributes
    ----------
    outcome : what must happen, see `Outcome`.
    damage : done to a healthy series of `start`.
    truth : the volumes that the files hold; empty where no exact volume can be made of them.
    notes : what medseg must remark when it reads.
    asides : further volumes that a reader may return beside the truth (the localizer).
    tolerated : name -> volume that is no truth and yet no error: padding that was not masked.
    """

    outcome: Outcome
    damage: d.Damage
    truth: Truth = lambda: (phantom(),)
    notes: tuple[str, ...] = ()
    start: Callable[[], Volume] = phantom
    modality: Literal["CT", "MR", "PT"] = "CT"
    shuffle: bool = False
    asides: int = 0
    tolerated: tuple[tuple[str, Callable[[], Volume]], ...] = ()

    def write(self, folder: Path) -> list[Path]:
        """Write the damaged series below `folder`; returns the files of the healthy one (some may be gone)."""
        paths = write_series(self.start(), folder, modality=self.modality, shuffle=self.shuffle)
        self.damage(paths)
        return paths


@dataclass(frozen=True)
class EnhancedHazard(Hazard):
    """A row whose healthy series is one multi-frame file; `damage` is done to it.

    Attributes
    ----------
    slopes : of each slice.
    """

    slopes: tuple[float, ...] = (1.0,)

    def write(self, folder: Path) -> list[Path]:
        """Write the damaged file, its frames in no order."""
        volumes = self.truth() or (self.start(),)
        paths = [write_multiframe(volumes, folder / "IM1", modality=self.modality, slopes=self.slopes, seed=1)]
        self.damage(paths)
        return paths


def _nothing() -> tuple[Volume, ...]:
    return ()


def _as_is(affine: Affine) -> Hazard:
    start = cache(partial(phantom, affine))
    return Hazard("read", lambda paths: None, lambda: (start(),), start=start, shuffle=True)


def _read(damage: d.Damage, *notes: str, **others: Any) -> Hazard:
    return Hazard("read", damage, notes=notes, **others)


def _split(damage: d.Damage, truth: Truth = _twice, **others: Any) -> Hazard:
    return Hazard("split", damage, truth, **others)


def _refuse(code: str, damage: d.Damage, truth: Truth = _nothing, **others: Any) -> Hazard:
    return Hazard(code, damage, truth, **others)


def _frame(change: d.Edit, number: int = 3) -> d.Damage:
    """Change the functional groups of one frame of a multi-frame file."""
    return d.one(lambda dataset: change(dataset.PerFrameFunctionalGroupsSequence[number]), index=0)


def _nine_frames(dataset: Dataset) -> None:
    dataset.NumberOfFrames = SHAPE[2] + 1


def _without_frame(dataset: Dataset) -> None:
    """Take the frame of the fourth slice out, cleanly."""
    items = list(dataset.PerFrameFunctionalGroupsSequence)
    at = next(n for n, item in enumerate(items) if item.FrameContentSequence[0].InStackPositionNumber == 4)
    size = 2 * dataset.Rows * dataset.Columns
    data = dataset.PixelData
    dataset.PixelData = data[: at * size] + data[(at + 1) * size :]
    dataset.PerFrameFunctionalGroupsSequence = items[:at] + items[at + 1 :]
    dataset.NumberOfFrames = len(items) - 1


def _lift(dataset: Dataset) -> None:
    d.shift(0, 0, 0.4)(dataset.PlanePositionSequence[0])


def _even() -> tuple[Volume, ...]:
    """Return the truth that was there before the damage: a reader that finds it is right by luck."""
    return (phantom(),)


_NOT_MASKED = (("not masked", lambda: _padding(-3024.0)),)

READ: dict[str, Hazard] = {
    "shuffled names": _as_is(AXIAL),
    "feet first": _as_is(axes("RPI")),
    "feet first, prone": _as_is(axes("LAI")),
    "prone": _as_is(axes("RAS")),
    "sagittal": _as_is(axes("PIR")),
    "sagittal, to the left": _as_is(axes("PSL")),
    "coronal": _as_is(axes("LIP")),
    "coronal, to anterior": _as_is(axes("RIA")),
    "oblique": _as_is(_OBLIQUE),
    "double oblique": _as_is(oblique((-35, 50, 160), (0.8, 1.1, -3.0))),
    "reversed instance numbers": _read(d.numbered(lambda k: d.put(InstanceNumber=SHAPE[2] - k))),
    "every instance number 1": _read(d.each(d.put(InstanceNumber=1))),
    "exact duplicate file": _read(d.copied(), "DUPLICATES_DROPPED"),
    "orientation jitter 1e-5": _read(
        d.numbered(lambda k: d.put(ImageOrientationPatient=[1, 0, 1e-5 * (k % 2), 0, 1, 1e-5 * (k % 3)]))
    ),
    "thickness, location and gap tags that lie": _read(
        d.numbered(lambda k: d.put(SliceThickness=7, SliceLocation=-3 * k, SpacingBetweenSlices=11))
    ),
    "implicit": _read(d.rewritten(uid.ImplicitVRLittleEndian, implicit=True)),
    "deflated": _read(d.rewritten(uid.DeflatedExplicitVRLittleEndian)),
    "big endian": _read(d.rewritten(uid.ExplicitVRBigEndian, little=False)),
    "RLE": _read(d.compressed(uid.RLELossless)),
    "JPEG-LS": _read(d.compressed(uid.JPEGLSLossless)),
    "JPEG 2000": _read(d.compressed(uid.JPEG2000Lossless)),
    "no preamble": _read(d.then(d.rewritten(uid.ImplicitVRLittleEndian, implicit=True), d.without_preamble)),
    "no frame of reference": _read(d.each(d.drop("FrameOfReferenceUID")), "NO_FRAME_OF_REFERENCE"),
    "MONOCHROME1": _read(d.each(d.put(PhotometricInterpretation="MONOCHROME1"))),
    "padding -2000": _read(
        d.each(d.padded(-2000)),
        "PADDING_MASKED",
        truth=lambda: (_padding(np.nan),),
        tolerated=_NOT_MASKED,
    ),
    "padding -2000 written as 63536": _read(
        d.each(d.padded(63536)),
        "PADDING_MASKED",
        truth=lambda: (_padding(np.nan),),
        tolerated=_NOT_MASKED,
    ),
    "PET, slope per slice": _read(
        lambda paths: None, truth=lambda: (_with_slope_per_slice(),), start=_with_slope_per_slice, modality="PT"
    ),
    "PET, slope 1 on the first slice": _read(
        lambda paths: None,
        truth=lambda: (_with_slope_per_slice(1.0),),
        start=partial(_with_slope_per_slice, 1.0),
        modality="PT",
    ),
    "one slice": _read(
        d.removed(*range(1, SHAPE[2])),
        "SINGLE_SLICE",
        truth=lambda: (Volume(phantom().array[..., :1], AXIAL),),
    ),
    "MR without rescale": _read(
        lambda paths: None,
        truth=lambda: (phantom(lowest=0),),
        start=partial(phantom, lowest=0),
        modality="MR",
    ),
    "CT, another rescale on one slice": _read(d.one(d.halved_scale, index=2), "RESCALE_VARIES"),
    "CT without rescale": _read(d.each(d.without_rescale), "NO_RESCALE"),
    "signed 14 bits, dirty high bits": _read(d.each(d.fourteen_bits)),
    "big endian, signed 14 bits, dirty high bits": _read(
        d.then(d.each(d.fourteen_bits), d.rewritten(uid.ExplicitVRBigEndian, little=False))
    ),
    "unsigned 16 bits": _read(d.each(d.unsigned)),
    "real-world value map beside the rescale": _read(d.each(d.real_world_map), "REAL_WORLD_MAP"),
    "derived": _read(d.each(d.put(ImageType=["DERIVED", "SECONDARY"])), "DERIVED"),
    "no extension, text file beside": _read(
        lambda paths: (paths[0].rename(paths[0].with_suffix("")), paths[0].with_name("x.txt").write_text("no"))
    ),
    "unknown character set": _read(d.each(d.put(SpecificCharacterSet="ISO_IR 999", SeriesDescription="Sch\u00e4del"))),
    "enhanced CT, frames in no order": EnhancedHazard("read", lambda paths: None),
    "enhanced CT, oblique": EnhancedHazard("read", lambda paths: None, lambda: (phantom(_OBLIQUE),)),
    "enhanced CT, RLE": EnhancedHazard("read", d.compressed(uid.RLELossless)),
    "enhanced CT, deflated": EnhancedHazard("read", d.rewritten(uid.DeflatedExplicitVRLittleEndian)),
    "enhanced PET, slope per frame": EnhancedHazard(
        "read", lambda paths: None, lambda: (_with_slope_per_slice(),), modality="PT", slopes=SLOPES
    ),
}
"""Must be read, every voxel and its place exact."""

SPLIT: dict[str, Hazard] = {
    "localizer inside the series": _split(d.scout, _even, notes=("LOCALIZER_SET_ASIDE",), asides=1),
    "two time points": _split(d.second_time(TemporalPositionIdentifier=2)),
    "two echoes": _split(d.second_time(EchoNumbers=2, EchoTime=20), start=phantom),
    "two b-values": _split(d.second_time(DiffusionBValue=1000.0)),
    "two acquisitions": _split(d.second_time(AcquisitionNumber=2)),
    "two matrix sizes": _split(d.taller, _halves),
    "enhanced MR, two time points": EnhancedHazard(
        "split", lambda paths: None, lambda: (phantom(lowest=0), phantom(lowest=1)), modality="MR"
    ),
}
"""Must come apart into volumes that are each exact; read as one series they are refused, localizers set aside."""

REFUSE: dict[str, Hazard] = {
    "missing slice": _refuse("MISSING_SLICES", d.removed(3)),
    "two missing slices": _refuse("MISSING_SLICES", d.removed(3, 4)),
    "spacing 2.5 mm, then 5": _refuse("IRREGULAR_SPACING", d.numbered(lambda k: d.shift(0, 0, max(k - 4, 0) * GAP))),
    "one slice 0.4 mm off": _refuse("IRREGULAR_SPACING", d.one(d.shift(0, 0, 0.4))),
    "one slice 1 mm aside": _refuse("IRREGULAR_SPACING", d.one(d.shift(1, 0, 0))),
    "same position, other pixels": _refuse("DUPLICATE_POSITION", d.copied(d.renew, d.brighter)),
    "same position and pixels, other UID": _refuse("DUPLICATE_POSITION", d.copied(d.renew), _even),
    "same UID, other pixels": _refuse("DUPLICATE_POSITION", d.copied(d.brighter)),
    "same UID, other position": _refuse("DUPLICATE_POSITION", d.copied(d.shift(0, 0, 0.5))),
    "slice without position": _refuse("NO_POSITION", d.one(d.drop("ImagePositionPatient")), _even),
    "no orientation": _refuse("NO_POSITION", d.each(d.drop("ImageOrientationPatient"))),
    "slice without orientation": _refuse("MIXED_ORIENTATION", d.one(d.drop("ImageOrientationPatient")), _even),
    "one oblique slice": _refuse("MIXED_ORIENTATION", d.one(d.put(ImageOrientationPatient=[1, 0, 0, 0, 0.8, 0.6]))),
    "orientation not of unit length": _refuse(
        "BAD_ORIENTATION", d.each(d.put(ImageOrientationPatient=[1, 0, 0, 0, 2, 0]))
    ),
    "orientation not at right angles": _refuse(
        "BAD_ORIENTATION", d.each(d.put(ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0]))
    ),
    "only ImagerPixelSpacing": _refuse(
        "NO_PIXEL_SPACING", d.each(d.drop("PixelSpacing"), d.put(ImagerPixelSpacing=[1, 1]))
    ),
    "two pixel spacings": _refuse("MIXED_SPACING", d.one(d.put(PixelSpacing=[0.9, 0.71]))),
    "gantry tilt 15 degrees": _refuse("GANTRY_TILT", d.tilted(15, GAP), lambda: (_leaning(15),)),
    "gantry tilt 0.5 degrees": _refuse("GANTRY_TILT", d.tilted(0.5, GAP), lambda: (_leaning(0.5),)),
    "pixels cut short": _refuse("TRUNCATED", d.one(lambda dataset: d.put(PixelData=dataset.PixelData[:-20])(dataset))),
    "file cut in its pixels": _refuse("TRUNCATED", d.cut(0.95)),
    "compressed file cut": _refuse("TRUNCATED", d.then(d.compressed(uid.RLELossless), d.cut(0.95))),
    "file cut in its header": _refuse("UNREADABLE", d.cut(0.2)),
    "more pixels than declared": _refuse(
        "LENGTH_MISMATCH", d.each(lambda dataset: d.put(Rows=dataset.Rows - 1)(dataset))
    ),
    "60000 x 60000 declared": _refuse("OVERSIZED", d.each(d.put(Rows=60000, Columns=60000))),
    "two frames of reference": _refuse("MIXED_FRAME_OF_REFERENCE", d.one(d.put(FrameOfReferenceUID="1.2.3"))),
    "two patients in one series": _refuse("MIXED_PATIENT", d.numbered(lambda k: d.put(PatientID=f"p{k % 2}"))),
    "two echoes, each at half of the places": _refuse(
        "MIXED_SERIES", d.numbered(lambda k: d.put(EchoNumbers=1 + k % 2))
    ),
    "two of each place, nothing tells": _refuse("MIXED_SERIES", d.second_time()),
    "one slice without rescale": _refuse("BAD_RESCALE", d.one(d.drop("RescaleSlope", "RescaleIntercept"))),
    "slope zero": _refuse("BAD_RESCALE", d.one(d.put(RescaleSlope=0))),
    "no decoder": _refuse("NO_DECODER", d.unknown_syntax),
    "sequences 2000 deep": _refuse("UNREADABLE", d.nested),
    "last slice empty": _refuse("UNREADABLE", lambda paths: paths[-1].write_bytes(b"")),
    "enhanced, missing frame": EnhancedHazard("MISSING_SLICES", d.one(_without_frame, index=0), _nothing),
    "enhanced, one frame 0.4 mm off": EnhancedHazard("IRREGULAR_SPACING", _frame(_lift), _nothing),
    "enhanced, frame without position": EnhancedHazard("NO_POSITION", _frame(d.drop("PlanePositionSequence")), _even),
    "enhanced, fewer frames than declared": EnhancedHazard("UNREADABLE", d.one(_nine_frames, index=0), _nothing),
    "enhanced, pixels cut short": EnhancedHazard("TRUNCATED", d.cut(0.95, index=0), _nothing),
}
"""Must be refused with this code: no exact volume can be made, or only by trusting what contradicts the rest."""

HAZARDS: dict[str, Hazard] = READ | SPLIT | REFUSE
