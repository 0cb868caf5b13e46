"""Files per second of finding series in a tree of DICOM, against pydicom's plain loop over the same files.

    python benchmarks/dicom_index.py --files 4000 --rounds 5

Both run in turn in one process, the cache warm, on two generated trees: CT slices with some 8 kB of header (nested
sequences, private elements of a vendor) and 512 x 512 pixels; and the same with JPEG-LS compressed pixels. The loop is
`dcmread(path, stop_before_pixels=True)` and one look at six attributes; `scan` also groups, splits and checks geometry.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless, generate_uid

from medseg.readers.dicom_scan import scan

SLICES = 200
"""Files of one series, in one folder."""
ASKED = ("SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")


TEXTS = (
    "AccessionNumber InstitutionName InstitutionAddress ReferringPhysicianName StationName StudyDescription StudyID "
    "SeriesDescription InstitutionalDepartmentName OperatorsName ManufacturerModelName PatientName DeviceSerialNumber "
    "SoftwareVersions ProtocolName ContrastBolusAgent BodyPartExamined PatientComments ImageComments"
)
NUMBERS = (
    "SliceThickness KVP DataCollectionDiameter ReconstructionDiameter DistanceSourceToDetector GantryDetectorTilt "
    "DistanceSourceToPatient TableHeight ExposureTime XRayTubeCurrent Exposure FocalSpots SingleCollimationWidth "
    "TotalCollimationWidth TableSpeed TableFeedPerRotation SpiralPitchFactor CTDIvol WindowCenter WindowWidth"
)
WHEN = "Study Series Acquisition Content"


def item(number: int, depth: int = 1) -> Dataset:
    found = Dataset()
    found.CodeValue, found.CodingSchemeDesignator, found.CodeMeaning = f"{number}", "DCM", f"meaning {number}"
    found.ReferencedSOPClassUID, found.ReferencedSOPInstanceUID = CTImageStorage, generate_uid()
    if depth:
        found.PurposeOfReferenceCodeSequence = Sequence([item(number, depth - 1)])
    return found


def header() -> Dataset:
    """What a CT scanner writes that no reader of volumes needs: about 8 kB."""
    dataset = Dataset()
    for word in TEXTS.split():
        setattr(dataset, word, f"SOME {word[:10].upper()}"[:16])
    for word in WHEN.split():
        setattr(dataset, f"{word}Date", "20200101")
        setattr(dataset, f"{word}Time", "120000.123456")
    for word in NUMBERS.split():
        setattr(dataset, word, 17)
    dataset.ReferencedStudySequence = Sequence([item(1)])
    dataset.ReferencedImageSequence = Sequence([item(number) for number in range(3)])
    dataset.RequestAttributesSequence = Sequence([item(4, 2)])
    dataset["ReferencedImageSequence"].is_undefined_length = True
    for group, creator in ((0x0009, "GEMS_IDEN_01"), (0x0019, "GEMS_ACQU_01"), (0x0043, "GEMS_PARM_01")):
        block = dataset.private_block(group, creator, create=True)
        for number in range(25):
            block.add_new(number, "DS", f"{number}.250000")
        block.add_new(0x60, "OB", bytes(1200))
        block.add_new(0x61, "LO", "some text of a vendor")
    return dataset


def make(folder: Path, files: int, *, compressed: bool) -> int:
    """Write the tree; return the size of one header in bytes."""
    pixels = np.random.default_rng(0).normal(0, 20, (512, 512)).cumsum(axis=1).astype(np.int16)
    dataset = header()
    dataset.SOPClassUID, dataset.Modality, dataset.Manufacturer = CTImageStorage, "CT", "SOME VENDOR"
    dataset.PatientID, dataset.ImageType = "NOBODY", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = generate_uid(), generate_uid()
    dataset.Rows, dataset.Columns, dataset.PixelSpacing = 512, 512, [0.7, 0.7]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.AcquisitionNumber = 1, -1024, 1
    dataset.PixelData = pixels.tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.set_pixel_data(pixels, "MONOCHROME2", 16)
    if compressed:
        dataset.compress(JPEGLSLossless)
    for number in range(files):
        series, slice_ = divmod(number, SLICES)
        if not slice_:
            dataset.SeriesInstanceUID = generate_uid()
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.InstanceNumber, dataset.ImagePositionPatient = slice_ + 1, [-180, -180, 1.25 * slice_]
        path = folder / f"study{series // 4:03}" / f"series{series:03}" / f"{slice_:04}"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)
    return path.stat().st_size - len(dataset.PixelData)


def plain_loop(files: list[Path]) -> int:
    count = 0
    for path in files:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        count += all(dataset.get(word) is not None for word in ASKED)
    return count


def measure(folder: Path, rounds: int) -> dict[str, object]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    seconds: dict[str, list[float]] = {"loop": [], "scan": []}
    for _ in range(rounds + 1):
        began = time.perf_counter()
        assert plain_loop(files) == len(files)
        middle = time.perf_counter()
        found = scan(folder)
        end = time.perf_counter()
        assert sum(len(series.files) for series in found.series if series.refusal is None) == len(files)
        seconds["loop"].append(middle - began)
        seconds["scan"].append(end - middle)
    ratios = [loop / own for loop, own in zip(seconds["loop"][1:], seconds["scan"][1:], strict=True)]
    return {
        "files": len(files),
        **{f"{name}_files_per_s": round(len(files) / statistics.median(s[1:])) for name, s in seconds.items()},
        "ratio_median": round(statistics.median(ratios), 1),
        "ratio_range": [round(min(ratios), 1), round(max(ratios), 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=4000)
    parser.add_argument("--compressed-files", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"cores {len(os.sched_getaffinity(0))}, python {sys.version.split()[0]}, pydicom {pydicom.__version__}")
    with tempfile.TemporaryDirectory() as work:
        for name, count in (("uncompressed", options.files), ("compressed", options.compressed_files)):
            size = make(Path(work, name), count, compressed=name == "compressed")
            row = {"tree": name, "header_bytes": size, **measure(Path(work, name), options.rounds)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
