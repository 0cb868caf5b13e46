"""Mutate valid files and read them: `python fuzz_campaign.py SUBJECT SEED COUNT FOLDER` prints its findings as JSON.

A process of its own, so that a crash, a hang or hunger for memory is seen from outside: its address space is limited,
and a case that takes minutes ends it with a traceback (nothing here takes longer than a second).
"""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import highdicom
import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from medseg.errors import MedsegError
from medseg.phantom import damage
from medseg.phantom.dicom import write_series
from medseg.phantom.hazards import HAZARDS, phantom
from medseg.phantom.multiframe import write_multiframe
from medseg.phantom.mutations import mutate_bytes, mutate_dataset, rewrite
from medseg.phantom.verdicts import distance_to
from medseg.readers.dicom_labels import read_dicom_labels
from medseg.readers.dicom_series import read_series
from medseg.readers.label_request import LabelRequest, Wanted
from medseg.volume import Volume

HANG_SECONDS = 180
ADDRESS_SPACE = 6 * 2**30
PLACE_MM = 0.1
"""The reader allows a slice 0.05 mm and directions 1e-4 of slack."""

GEOMETRY = {"ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns"}
VALUES = {
    *("RescaleSlope", "RescaleIntercept", "PixelRepresentation", "BitsStored", "HighBit", "BitsAllocated"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "PixelData", "ModalityLUTSequence", "Units", "Modality"),
    *("PixelValueTransformationSequence", "RealWorldValueMappingSequence"),
}
LABELS = frozenset(
    {
        *("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence", "PlanePositionSequence"),
        *("PlaneOrientationSequence", "PixelMeasuresSequence", "SegmentIdentificationSequence", "NumberOfFrames"),
        *("SegmentSequence", "SegmentNumber", "ReferencedSegmentNumber", "SegmentLabel", "SegmentationType"),
        *("MaximumFractionalValue", "StructureSetROISequence", "ROINumber", "ROIName", "ROIContourSequence"),
        *("ReferencedROINumber", "ContourSequence", "ContourData", "NumberOfContourPoints", "ContourGeometricType"),
    }
)
FRAMES = frozenset(
    {
        *("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence", "PlaneOrientationSequence"),
        *("PixelMeasuresSequence", "PixelValueTransformationSequence", "NumberOfFrames"),
    }
)
"""Stand once for all frames, or hold them; PlanePositionSequence and what is in it belong to one frame."""


@dataclass
class Subject:
    """Valid files, what they hold, and how they are read.

    relevant : for a single object, keywords (beside the geometry's) that say what it holds; altered, it may be
        consistent and yet another than the truth. All others must change nothing.
    """

    files: dict[str, bytes]
    read: Callable[[Path], Volume]
    truth: Volume
    relevant: frozenset[str] = frozenset()


# ---- subjects -------------------------------------------------------------------------------------------------------


def series(folder: Path, how: damage.Damage = lambda paths: None, modality: str = "CT") -> Subject:
    volume = HAZARDS["PET, slope per slice"].start() if modality == "PT" else phantom()
    how(write_series(volume, folder, modality=modality))
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return Subject(files, read_series, read_series(folder))


def enhanced(folder: Path, how: damage.Damage = lambda paths: None) -> Subject:
    path = write_multiframe([phantom()], folder / "frames.dcm", modality="CT", seed=5)
    how([path])
    return Subject({path.name: path.read_bytes()}, read_series, read_series(folder), FRAMES)


def labels(folder: Path, write: Callable[[Path, list[Dataset], np.ndarray], None]) -> Subject:
    """Two structures drawn on an MR series; the image itself stays whole."""
    image_folder = folder.with_name("image")
    sources = write_series(phantom(lowest=0), image_folder, modality="MR")
    image = read_series(image_folder)
    mask = np.zeros((*image.shape, 2), bool)
    mask[4:12, 5:20, 1:6, 0] = True
    mask[20:30, 8:11, 2:4, 1] = True
    write(folder / "labels.dcm", [pydicom.dcmread(path) for path in sources], mask)
    wanted = (Wanted("first", 1), Wanted("second", 2))
    request = LabelRequest(image, wanted, (image_folder,))
    files = {"labels.dcm": (folder / "labels.dcm").read_bytes()}
    subject = Subject(files, lambda path: read_dicom_labels(path, request), image, LABELS)
    subject.truth = subject.read(folder)
    assert np.array_equal(subject.truth.array[0], mask @ np.array([1, 2]))
    return subject


def seg(kind: str, syntax: str = "") -> Callable[[Path, list[Dataset], np.ndarray], None]:
    def write(path: Path, sources: list[Dataset], mask: np.ndarray) -> None:
        parts = [
            highdicom.seg.SegmentDescription(number, name, codes.SCT.Organ, codes.SCT.Liver, "MANUAL")
            for number, name in enumerate(("first", "second"), start=1)
        ]
        frames = mask.transpose(2, 1, 0, 3)
        array = frames.astype(float) if kind == "FRACTIONAL" else frames.astype(np.uint8)
        highdicom.seg.Segmentation(
            sources, array, kind, parts, uid.generate_uid(), 2, uid.generate_uid(), 1, "m", "m", "1", "1"
        ).save_as(path)
        if syntax:  # by pydicom: GDCM's encoder ends the process on frames of an odd length
            damage.edit(path, lambda dataset: dataset.compress(syntax, encoding_plugin="pydicom"))

    return write


def rtstruct(path: Path, sources: list[Dataset], mask: np.ndarray) -> None:
    first = sources[0]
    dataset = Dataset()
    dataset.StudyInstanceUID, dataset.PatientID = first.StudyInstanceUID, first.PatientID
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.RTStructureSetStorage, uid.generate_uid()
    dataset.SeriesInstanceUID, dataset.Modality = uid.generate_uid(), "RTSTRUCT"
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, name in enumerate(("first", "second"), start=1):
        roi, group = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        roi.ReferencedFrameOfReferenceUID = first.FrameOfReferenceUID
        group.ReferencedROINumber, group.ContourSequence = number, []
        for k in np.flatnonzero(mask[..., number - 1].any(axis=(0, 1))):
            i, j = np.nonzero(mask[:, :, k, number - 1])
            low, high = (i.min() - 0.5, j.min() - 0.5), (i.max() + 0.5, j.max() + 0.5)
            corners = [low, (high[0], low[1]), high, (low[0], high[1])]
            x, y, z = (float(value) for value in sources[k].ImagePositionPatient)
            points = [(x + 0.7 * a, y + 0.9 * b, z) for a, b in corners]
            contour, image = Dataset(), Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 4
            contour.ContourData = [f"{value:.6f}" for point in points for value in point]
            image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = first.SOPClassUID, sources[k].SOPInstanceUID
            contour.ContourImageSequence = [image]
            group.ContourSequence.append(contour)
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(group)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def mixed(paths: damage.Files) -> None:
    """Another lossless compression in every slice."""
    syntaxes = (uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless)
    for number, path in enumerate(paths):
        damage.compressed(syntaxes[number % 3])([path])


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "classic": series,
    "implicit": lambda folder: series(folder, damage.rewritten(uid.ImplicitVRLittleEndian, implicit=True)),
    "deflated": lambda folder: series(folder, damage.rewritten(uid.DeflatedExplicitVRLittleEndian)),
    "compressed": lambda folder: series(folder, mixed),
    "pet": lambda folder: series(folder, modality="PT"),
    "enhanced": enhanced,
    "enhanced-rle": lambda folder: enhanced(folder, damage.compressed(uid.RLELossless)),
    "seg": lambda folder: labels(folder, seg("BINARY")),
    "fractional": lambda folder: labels(folder, seg("FRACTIONAL", uid.RLELossless)),
    "labelmap": lambda folder: labels(folder, seg("LABELMAP")),
    "rtstruct": lambda folder: labels(folder, rtstruct),
}


# ---- one case -------------------------------------------------------------------------------------------------------


def mutate(subject: Subject, rng: np.random.Generator) -> tuple[dict[str, bytes | None], str, str]:
    """Return the changed files (None: deleted), what may have changed ("", values, part, any), and words for it."""
    names = list(subject.files)
    scope = [names[rng.integers(len(names))]]
    kind = rng.random()
    if len(names) > 1 and kind < 0.1:
        return swapped(subject, rng)
    everywhere = kind > 0.85
    if everywhere:
        scope = names
    seed = int(rng.integers(2**32))
    if kind < 0.45:
        raw = subject.files[scope[0]]
        header = raw.rfind(b"\xe0\x7f\x10\x00")
        other = subject.files[names[rng.integers(len(names))]]
        changed = mutate_bytes(raw, rng, header=header if header > 0 else len(raw), other=other)
        return {scope[0]: changed}, "any" if len(names) == 1 else "values", "bytes"
    changes: dict[str, bytes | None] = {}
    hit: set[str] = set()
    for name in scope:
        done = rewrite(subject.files[name], lambda dataset: mutate_dataset(dataset, np.random.default_rng(seed)))
        if done is not None:
            changes[name] = done[0]
            hit |= done[1]
    return changes, may_change(hit, subject, everywhere=len(scope) == len(names)), f"{'+'.join(sorted(hit))}"


def may_change(hit: set[str], subject: Subject, *, everywhere: bool) -> str:
    """Say what of the truth is lost when these elements were hit."""
    relevant = GEOMETRY | VALUES | subject.relevant
    if len(subject.files) == 1:
        # of the geometry, only the positions stand in each frame, where the others tell that one is wrong
        alone = hit - {"ImagePositionPatient"} if subject.relevant is FRAMES else hit
        return "any" if alone & relevant else ""
    return "any" if everywhere and hit & GEOMETRY else "values" if hit & VALUES else ""


def swapped(subject: Subject, rng: np.random.Generator) -> tuple[dict[str, bytes | None], str, str]:
    """Lose, repeat or exchange whole files, or the positions of two."""
    first, second = (str(name) for name in rng.choice(list(subject.files), 2, replace=False))
    raw = subject.files
    kind = int(rng.integers(5))
    if kind == 0:
        return {first: None}, "part", "file lost"
    if kind == 1:
        return {first: raw[second]}, "part", "file overwritten by another"
    if kind == 2:
        return {first: raw[second], second: raw[first]}, "", "names exchanged"
    if kind == 3:
        return {f"copy of {first}": raw[first]}, "", "file repeated"
    positions = {name: pydicom.dcmread(pydicom.filebase.DicomBytesIO(raw[name])).ImagePositionPatient for name in raw}

    def exchange(name: str, other: str) -> bytes:
        def change(dataset: Dataset) -> frozenset[str]:
            dataset.ImagePositionPatient = positions[other]
            return frozenset()

        done = rewrite(raw[name], change)
        assert done is not None
        return done[0]

    return {first: exchange(first, second), second: exchange(second, first)}, "values", "positions exchanged"


def judge(found: Volume, subject: Subject, lost: str) -> str:
    """Say what is wrong with an accepted result; "" where it is the truth, as far as that can be known."""
    if not np.isfinite(found.array).all():
        return "values are not finite"
    if lost == "any":
        return ""
    truth = subject.truth
    if found.shape != truth.shape and (lost == "part" or SET_ASIDE & set(found.notes)):
        return "" if is_part(found, truth, lost) else f"no part of the truth: {found.grid}"
    values, place = distance_to(found, truth)
    if place > PLACE_MM:
        return f"corners off by {place:.3f} mm: {found.grid}"
    if values > 0 and not (lost == "values" or "RESCALE_VARIES" in found.notes):
        return f"values off by {values:.4g}"
    return ""


SET_ASIDE = {"DUPLICATES_DROPPED", "LOCALIZER_SET_ASIDE"}
"""A file that turned into a copy of another, or into a planning image, is lost without a trace but for the note."""


def is_part(found: Volume, truth: Volume, lost: str) -> bool:
    """Tell whether `found` is a run of slices of the truth."""
    if found.shape[:2] != truth.shape[:2] or found.shape[2] > truth.shape[2]:
        return False
    first = int(np.rint(np.linalg.inv(truth.affine) @ found.affine[:, 3])[2])
    affine = truth.affine.copy()
    affine[:3, 3] += affine[:3, 2] * first
    array = truth.array[..., first : first + found.shape[2]]
    values, place = distance_to(found, Volume(array, affine)) if array.shape[3] == found.shape[2] else (1.0, 1.0)
    return (values == 0 or lost == "values") and place <= PLACE_MM


def run_case(subject: Subject, folder: Path, rng: np.random.Generator) -> tuple[str, str]:
    """Return (code of the refusal, "read" or "skipped"; finding or "")."""
    changes, lost, words = mutate(subject, rng)
    if not changes:
        return "skipped", ""
    for name, raw in changes.items():
        if raw is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(raw)
    try:
        found = subject.read(folder)
    except MedsegError as error:
        return error.code, ""
    except Exception:  # noqa: BLE001 - this is what the campaign looks for
        return "crashed", f"[{words}] {traceback.format_exc(limit=-6)}"
    else:
        wrong = judge(found, subject, lost)
        return "read", f"[{words}] {wrong}" if wrong else ""
    finally:
        for name in changes:
            (folder / name).unlink(missing_ok=True)
            if name in subject.files:
                (folder / name).write_bytes(subject.files[name])


def main(name: str, seed: int, count: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    made = folder / "made" / "series"
    made.mkdir(parents=True)
    subject = SUBJECTS[name](made)
    place = folder / "case"
    place.mkdir()
    for file, raw in subject.files.items():
        (place / file).write_bytes(raw)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    findings = []
    for number in range(seed, seed + count):
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        sys.stderr.write(f"{name} {number}\n")  # the last line names the case that ended the process
        outcome, finding = run_case(subject, place, np.random.default_rng((number, len(name))))
        outcomes[outcome] += 1
        if finding:
            findings.append(f"{name} {number}: {finding}")
    faulthandler.cancel_dump_traceback_later()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sys.stdout.write(json.dumps({"outcomes": outcomes, "findings": findings, "grown_mib": grown // 1024}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
