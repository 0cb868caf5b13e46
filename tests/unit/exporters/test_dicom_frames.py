"""Results on a multi-frame source: the same voxels, and references to the frames on which they lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest

from medseg.exporters import EXPORTERS
from medseg.exporters.dicom_frames import frame_uid

Build = Callable[..., Any]


@pytest.fixture(params=["oblique", "feet-first"])
def source(dicom_result: Build, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A result on one legacy-converted file, written by highdicom from files in an order of no meaning."""
    return dicom_result(tmp_path / "in", request.param, enhanced=True, PatientID="7", AccessionNumber="A7")


def frame_positions(file: Path) -> dict[int, Any]:
    groups = pydicom.dcmread(file).PerFrameFunctionalGroupsSequence
    return {n: np.array(g.PlanePositionSequence[0].ImagePositionPatient, float) for n, g in enumerate(groups, start=1)}


def test_every_format_is_written_and_read_back(source: Any, tmp_path: Path) -> None:
    assert source.series.headers[0].frame is not None
    (file,) = set(source.series.files)
    whole = pydicom.dcmread(file)
    own = [frame_uid(header) for header in source.series.headers]
    for row in (row for _, row in EXPORTERS.items() if not row.picture):
        for copy in "ab":
            row.write(tmp_path / f"{copy}{row.suffix}", source)
        content = (tmp_path / f"a{row.suffix}").read_bytes()
        assert content == (tmp_path / f"b{row.suffix}").read_bytes()
        assert not any(uid.encode() in content for uid in own), "the frames' UIDs are in no file"
        if row.dicom:
            dataset = pydicom.dcmread(tmp_path / f"a{row.suffix}")
            assert (dataset.PatientID, dataset.AccessionNumber) == ("7", "A7")
            assert dataset.StudyInstanceUID == whole.StudyInstanceUID
            assert "NumberOfFrames" not in dataset or row.suffix in (".seg.dcm", ".labelmap.dcm", ".fractional.dcm")


@pytest.mark.parametrize("kind", ["seg", "seg-labelmap", "seg-fractional"])
def test_frames_of_a_segmentation_refer_to_frames_of_their_place(source: Any, tmp_path: Path, kind: str) -> None:
    EXPORTERS[kind].write(tmp_path / "x.dcm", source)
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    (file,) = set(source.series.files)
    places, whole = frame_positions(file), pydicom.dcmread(file)
    seen = set()
    for group in dataset.PerFrameFunctionalGroupsSequence:
        (reference,) = group.DerivationImageSequence[0].SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == whole.SOPInstanceUID
        assert reference.ReferencedSOPClassUID == whole.SOPClassUID
        place = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        assert np.abs(place - places[reference.ReferencedFrameNumber]).max() < 1e-3
        seen.add(int(reference.ReferencedFrameNumber))
    assert seen == set(places)
    (series,) = dataset.ReferencedSeriesSequence
    (instance,) = series.ReferencedInstanceSequence
    assert instance.ReferencedSOPInstanceUID == whole.SOPInstanceUID
    assert series.SeriesInstanceUID == whole.SeriesInstanceUID


def test_highdicom_finds_the_segment_of_each_source_frame(source: Any, tmp_path: Path) -> None:
    EXPORTERS["seg"].write(tmp_path / "x.dcm", source)
    (file,) = set(source.series.files)
    places = frame_positions(file)
    segmentation = highdicom.seg.segread(tmp_path / "x.dcm")
    uid = pydicom.dcmread(file).SOPInstanceUID
    found = segmentation.get_pixels_by_source_frame(uid, sorted(places), segment_numbers=[1])[..., 0]
    grid = source.mask
    for number, frame in zip(sorted(places), found, strict=True):
        k = round(float((np.linalg.inv(grid.affine) @ [*(places[number] * [-1, -1, 1]), 1])[2]))
        assert np.array_equal(frame.T, grid.array[0, :, :, k] == 1)


def test_contours_refer_to_the_frame_in_whose_plane_they_lie(source: Any, tmp_path: Path) -> None:
    EXPORTERS["rtstruct"].write(tmp_path / "x.dcm", source)
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    (file,) = set(source.series.files)
    places, whole = frame_positions(file), pydicom.dcmread(file)
    normal = np.cross(source.mask.affine[:3, 0], source.mask.affine[:3, 1]) * [-1, -1, 1]
    normal = normal / np.linalg.norm(normal)
    contours = [contour for roi in dataset.ROIContourSequence for contour in roi.get("ContourSequence", ())]
    assert len(contours) >= 10
    for contour in contours:
        (reference,) = contour.ContourImageSequence
        assert reference.ReferencedSOPInstanceUID == whole.SOPInstanceUID
        points = np.array(contour.ContourData, float).reshape(-1, 3) - places[reference.ReferencedFrameNumber]
        assert np.abs(points @ normal).max() < 1e-3
    study = dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    (image,) = study.RTReferencedSeriesSequence[0].ContourImageSequence
    assert image.ReferencedSOPInstanceUID == whole.SOPInstanceUID
    assert "ReferencedFrameNumber" not in image


def test_a_report_names_the_file_once(source: Any, tmp_path: Path) -> None:
    EXPORTERS["sr"].write(tmp_path / "x.dcm", source)
    (file,) = set(source.series.files)
    (study,) = pydicom.dcmread(tmp_path / "x.dcm").CurrentRequestedProcedureEvidenceSequence
    named = [row.ReferencedSOPInstanceUID for s in study.ReferencedSeriesSequence for row in s.ReferencedSOPSequence]
    assert len(named) == len(set(named)) == 2, "the images and the Segmentation"
    assert pydicom.dcmread(file).SOPInstanceUID in named
