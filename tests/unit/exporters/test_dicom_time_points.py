"""Results on one of two time points of a multi-frame file: they refer to its frames, not to those of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from medseg.exporters import EXPORTERS
from medseg.exporters.dicom_frames import frame_uid
from medseg.exporters.result import Result
from medseg.readers.dicom_scan import find_series
from medseg.readers.dicom_series import read_series

Build = Callable[..., Any]
FORMATS = ["seg", "seg-labelmap", "rtstruct", "sr", "sc"]


@pytest.fixture
def enhanced(dicom_result: Build, write_enhanced: Callable[..., Path], tmp_path: Path) -> Result:
    """A result on the second of two time points of one file."""
    classic = dicom_result(tmp_path / "classic", "oblique")
    other = classic.image.with_array(classic.image.array + 1)
    write_enhanced(tmp_path / "in/x.dcm", other, classic.image, tags=[{"time": 1}, {"time": 2}])
    series = find_series(tmp_path / "in")[1]
    image = read_series(series)
    np.testing.assert_array_equal(image.array, classic.image.array)
    return replace(classic, image=image, series=series)


def references(dataset: Dataset) -> Iterator[Dataset]:
    for element in dataset:
        for row in element.value if element.VR == "SQ" else ():
            if "ReferencedSOPInstanceUID" in row:
                yield row
            yield from references(row)


@pytest.mark.parametrize("name", FORMATS)
def test_every_reference_is_to_the_file_or_a_frame_of_it(enhanced: Result, tmp_path: Path, name: str) -> None:
    exporter = EXPORTERS[name]
    path = tmp_path / f"x{exporter.suffix}"
    exporter.write(path, enhanced)
    source = pydicom.dcmread(enhanced.series.files[0])
    written = pydicom.dcmread(path)
    numbers = {header.frame + 1 for header in enhanced.series.headers}
    found = [row for row in references(written) if row.ReferencedSOPInstanceUID == source.SOPInstanceUID]
    assert found or name == "sc"  # a picture refers to nothing
    assert {row.ReferencedSOPClassUID for row in found} <= {source.SOPClassUID}
    assert not any(frame_uid(header).encode() in path.read_bytes() for header in enhanced.series.headers)
    named = [int(row.ReferencedFrameNumber) for row in found if "ReferencedFrameNumber" in row]
    assert set(named) <= numbers
    assert set(named) == numbers or name != "seg"
    assert named or name not in ("seg-labelmap", "rtstruct")
    # Others are to objects of ours: a report names its segmentation.
    strangers = {str(row.ReferencedSOPClassUID) for row in references(written)} - {str(source.SOPClassUID)}
    assert not any("Image Storage" in pydicom.uid.UID(c).name and "MR" in pydicom.uid.UID(c).name for c in strangers)
    for kind in ("ReferencedInstanceSequence", "ReferencedSOPSequence"):
        for holder in (row for row in written.iterall() if row.keyword == kind):
            uids = [row.ReferencedSOPInstanceUID for row in holder.value]
            assert len(uids) == len(set(uids))


def test_each_frame_of_a_segmentation_is_on_the_frame_that_it_names(enhanced: Result, tmp_path: Path) -> None:
    EXPORTERS["seg"].write(tmp_path / "x.dcm", enhanced)
    frames = pydicom.dcmread(enhanced.series.files[0]).PerFrameFunctionalGroupsSequence
    for item in pydicom.dcmread(tmp_path / "x.dcm").PerFrameFunctionalGroupsSequence:
        (source,) = item.DerivationImageSequence[0].SourceImageSequence
        there = frames[int(source.ReferencedFrameNumber) - 1].PlanePositionSequence[0].ImagePositionPatient
        here = item.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose([float(x) for x in here], [float(x) for x in there], atol=1e-6)
    volume = highdicom.seg.segread(tmp_path / "x.dcm").get_volume(combine_segments=True)
    assert (volume.array > 0).sum() == (enhanced.mask.array > 0).sum()


def test_same_file_and_model_give_the_same_bytes_and_time_points_differ(enhanced: Result, tmp_path: Path) -> None:
    for name in "ab":
        EXPORTERS["seg"].write(tmp_path / f"{name}.dcm", enhanced)
    assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.dcm").read_bytes()
    first = find_series(enhanced.series.files[0])[0]
    EXPORTERS["seg"].write(tmp_path / "c.dcm", replace(enhanced, series=first))
    uids = {pydicom.dcmread(tmp_path / f"{name}.dcm").SOPInstanceUID for name in "abc"}
    assert len(uids) == 2
