"""What goes wrong with DICOM series on their way: each is done to the files of a healthy one, in place.

A `Damage` takes the files of one series, one per slice along the normal, as `write_series` returns them.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UID, RLELossless, generate_uid

Files = Sequence[Path]
Damage = Callable[[Files], object]
Edit = Callable[[Dataset], object]


# ---- of one data set ------------------------------------------------------------------------------------------------


def edit(path: Path, change: Edit) -> None:
    """Change the data set of one file."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path)
        change(dataset)
        dataset.save_as(path)


def put(**values: Any) -> Edit:
    """Set attributes by keyword."""

    def change(dataset: Dataset) -> None:
        for keyword, value in values.items():
            setattr(dataset, keyword, value)

    return change


def drop(*keywords: str) -> Edit:
    """Delete attributes by keyword."""

    def change(dataset: Dataset) -> None:
        for keyword in keywords:
            dataset.pop(keyword, None)

    return change


def both(*changes: Edit) -> Edit:
    """Make several changes in a row."""
    return lambda dataset: [change(dataset) for change in changes]


def renew(dataset: Dataset) -> None:
    """Give a file an identity of its own, derived from the one it had."""
    uid = generate_uid(entropy_srcs=[dataset.SOPInstanceUID, "renewed"])
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid


def shift(x: float, y: float, z: float) -> Edit:
    """Move a slice, mm in LPS."""

    def change(dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [a + b for a, b in zip(dataset.ImagePositionPatient, (x, y, z), strict=True)]

    return change


def restore(values: Callable[[NDArray[np.int64]], NDArray[Any]]) -> Edit:
    """Change the stored numbers, whole and (rows, columns)."""

    def change(dataset: Dataset) -> None:
        dtype = np.dtype("<i2" if dataset.PixelRepresentation else "<u2")
        stored = np.frombuffer(dataset.PixelData, dtype).reshape(dataset.Rows, dataset.Columns)
        dataset.PixelData = np.ascontiguousarray(values(stored.astype(np.int64))).astype("<u2").tobytes()

    return change


brighter = restore(lambda stored: stored + 1)
"""One more in every pixel."""


def unsigned(dataset: Dataset) -> None:
    """Store the same values of a CT as unsigned numbers."""
    restore(lambda stored: stored + 40000)(dataset)
    dataset.RescaleIntercept, dataset.PixelRepresentation = -41024, 0


def fourteen_bits(dataset: Dataset) -> None:
    """Store signed 14-bit numbers without sign extension; the two bits above hold something else."""
    restore(lambda stored: ((stored - 4096) & 0x3FFF) | 0x4000)(dataset)
    dataset.RescaleIntercept, dataset.BitsStored, dataset.HighBit = 3072, 14, 13


def halved_scale(dataset: Dataset) -> None:
    """Store the same values of a CT with another slope and intercept."""
    restore(lambda stored: 2 * stored - 2000)(dataset)
    dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, -24


def without_rescale(dataset: Dataset) -> None:
    """Store HU as they are."""
    restore(lambda stored: stored - 1024)(dataset)
    drop("RescaleSlope", "RescaleIntercept")(dataset)


def padded(written: int) -> Edit:
    """Fill the first three pixels of the first row with -2000 and declare that as `written`."""

    def fill(stored: NDArray[np.int64]) -> NDArray[Any]:
        stored[0, :3] = -2000
        return stored

    def change(dataset: Dataset) -> None:
        restore(fill)(dataset)
        dataset.add_new("PixelPaddingValue", "SS" if written < 0 else "US", written)

    return change


def real_world_map(dataset: Dataset) -> None:
    """Add a second, private scale beside the rescale, as Philips does; the rescale stays the one to use."""
    item = Dataset()
    item.RealWorldValueFirstValueMapped, item.RealWorldValueLastValueMapped = -32768, 32767
    item.RealWorldValueIntercept, item.RealWorldValueSlope, item.LUTLabel = 5.0, 3.0, "other"
    dataset.RealWorldValueMappingSequence = [item]


# ---- of a whole series ----------------------------------------------------------------------------------------------


def each(*changes: Edit) -> Damage:
    """Change every slice."""
    return numbered(lambda number: both(*changes))


def one(*changes: Edit, index: int = 3) -> Damage:
    """Change one slice."""
    return lambda paths: edit(paths[index], both(*changes))


def numbered(change: Callable[[int], Edit]) -> Damage:
    """Change every slice by its number along the normal."""

    def damage(paths: Files) -> None:
        for number, path in enumerate(paths):
            edit(path, change(number))

    return damage


def copied(*changes: Edit, index: int = 3) -> Damage:
    """Add a changed copy of one slice beside it."""

    def damage(paths: Files) -> None:
        target = paths[index].with_name("another")
        shutil.copy(paths[index], target)
        edit(target, both(*changes))

    return damage


def second_time(**tags: Any) -> Damage:
    """Add a second, brighter image of every place to the series, told apart by `tags` (else 1)."""

    def damage(paths: Files) -> None:
        for number, path in enumerate(paths):
            target = path.with_name(f"second{number}")
            shutil.copy(path, target)
            edit(target, both(renew, brighter, put(InstanceNumber=len(paths) + number + 1, **tags)))
            edit(path, put(**dict.fromkeys(tags, 1)))

    return damage


def removed(*indices: int) -> Damage:
    """Delete slices."""

    def damage(paths: Files) -> None:
        for index in indices:
            paths[index].unlink()

    return damage


def tilted(degrees: float, gap: float) -> Damage:
    """Lean the stack towards posterior, slices `gap` mm apart."""
    lean = gap * float(np.tan(np.radians(degrees)))
    return numbered(lambda number: shift(0, number * lean, 0))


def cut(keep: float, index: int = 3) -> Damage:
    """Cut one file short."""

    def damage(paths: Files) -> None:
        data = paths[index].read_bytes()
        paths[index].write_bytes(data[: int(len(data) * keep)])

    return damage


def compressed(syntax: str) -> Damage:
    """Compress every slice, without loss."""
    return each(lambda dataset: dataset.compress(syntax, generate_instance_uid=False))


def then(*damages: Damage) -> Damage:
    """Do several in a row."""
    return lambda paths: [damage(paths) for damage in damages]


def rewritten(syntax: str, *, implicit: bool = False, little: bool = True) -> Damage:
    """Write every slice in another uncompressed transfer syntax."""

    def damage(paths: Files) -> None:
        for path in paths:
            dataset = pydicom.dcmread(path)
            if not little:
                dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
            fresh = Dataset()
            fresh.file_meta = dataset.file_meta
            fresh.file_meta.TransferSyntaxUID = UID(syntax)
            for element in dataset:
                fresh.add(element)
            fresh.save_as(path, implicit_vr=implicit, little_endian=little, enforce_file_format=True)

    return damage


def without_preamble(paths: Files) -> None:
    """Write bare data sets, as some old archives hold them."""
    for path in paths:
        dataset = pydicom.dcmread(path)
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(path, implicit_vr=True, little_endian=True)


def taller(paths: Files) -> None:
    """Add an empty row to the second half of the slices."""
    for path in paths[len(paths) // 2 :]:
        edit(path, lambda dataset: put(Rows=dataset.Rows + 1, PixelData=_with_row(dataset))(dataset))


def _with_row(dataset: Dataset) -> bytes:
    return bytes(dataset.PixelData) + bytes(2 * dataset.Columns)


def scout(paths: Files) -> None:
    """Add a sagittal planning image to the series."""
    plane = put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    copied(renew, plane, index=0)(paths)


def of_class(sop_class: str) -> Damage:
    """Declare another kind of object."""

    def change(dataset: Dataset) -> None:
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID(sop_class)

    return each(change)


def unknown_syntax(paths: Files) -> None:
    """Declare one slice to be compressed by a method for films that nobody decodes as a still."""
    compressed(RLELossless)(paths)
    edit(paths[3], lambda dataset: setattr(dataset.file_meta, "TransferSyntaxUID", "1.2.840.10008.1.2.4.100"))


def nested(paths: Files) -> None:
    """Put sequences into sequences, 2000 deep and of undefined length, into one slice."""
    dataset = pydicom.dcmread(paths[3])
    head = Dataset()
    head.file_meta = dataset.file_meta
    head.SOPClassUID, head.SOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    head.save_as(paths[3], enforce_file_format=True)
    inner = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 2000
    outer = b"\xfe\xff\x0d\xe0\x00\x00\x00\x00\xfe\xff\xdd\xe0\x00\x00\x00\x00" * 2000
    paths[3].write_bytes(paths[3].read_bytes() + inner + outer)
