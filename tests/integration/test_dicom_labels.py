"""A tree of DICOM series with SEG and RTSTRUCT beside them is checked, learnt from, predicted and scored as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import yaml
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from medseg import api
from medseg.phantom.dicom import write_series
from medseg.readers.dicom_series import read_series
from medseg.readers.nifti import read_nifti
from medseg.spec import load_dataset
from medseg.studies import read_study
from medseg.volume import Volume

Builder = Callable[..., Path]


def save_seg(path: Path, sources: list[Path], mask: np.ndarray, kind: str) -> None:
    segments = np.stack([mask == value for value in (1, 2)], axis=-1).astype(np.uint8)
    seg = highdicom.seg.Segmentation(
        source_images=[pydicom.dcmread(file) for file in sources],
        pixel_array=segments.transpose(2, 1, 0, 3),
        segmentation_type=kind,
        segment_descriptions=[
            highdicom.seg.SegmentDescription(n, name, codes.SCT.Organ, codes.SCT.Liver, "MANUAL")
            for n, name in enumerate(("Ball", "the box"), start=1)
        ],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="test",
        manufacturer_model_name="test",
        software_versions="1",
        device_serial_number="1",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)


def save_rtstruct(path: Path, image: Volume, mask: np.ndarray) -> None:
    """Trace every row of voxels as one thin contour: any mask can be drawn so, exactly."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    dataset.SeriesInstanceUID, dataset.Modality = generate_uid(), "RTSTRUCT"
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, name in enumerate(("Ball", "the box"), start=1):
        roi, group = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        group.ReferencedROINumber, group.ContourSequence = number, []
        for i, j, k in np.argwhere(mask == number):
            contour = Dataset()
            corners = [(i + a, j + b, k) for a, b in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))]
            points = nibabel.affines.apply_affine(image.affine, corners) * [-1, -1, 1]
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 4
            contour.ContourData = [f"{value:.4f}" for value in points.ravel()]
            group.ContourSequence.append(contour)
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(group)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture
def tree(tmp_path: Path, tiny_dataset: Builder) -> Path:
    """The tiny dataset as DICOM: ROOT/patient/{image,labels}; SEG, label map and RTSTRUCT in turn."""
    source = tiny_dataset(tmp_path / "nifti", cases=6, test=2)
    root = tmp_path / "dicom"
    for number in range(6):
        volume = read_nifti(source / f"images/c{number}.nii.gz")
        mask = np.asarray(nibabel.load(source / f"masks/c{number}.nii.gz").dataobj)
        volume = volume.with_array(np.clip(np.rint(volume.array), 0, None))
        folder = root / f"c{number}"
        files = write_series(volume, folder / "image", modality="MR", shuffle=True, seed=number)
        image = read_series(folder / "image")
        np.testing.assert_allclose(image.affine, volume.affine, atol=1e-5)
        if number % 3 == 2:
            save_rtstruct(folder / "labels" / "rs.dcm", image, mask)
        else:
            save_seg(folder / "labels" / "seg.dcm", files, mask, ("BINARY", "LABELMAP")[number % 3])
    spec: dict[str, Any] = {
        "name": "tiny-dicom",
        "images": "{case}/image",
        "masks": "{case}/labels",
        "case_ids": "name",
        "channels": {"mr": {"modality": "MR"}},
        "labels": {"ball": 1, "box": {"value": 2, "dicom": ".*box"}},
        "splits": {"test": ["c4", "c5"]},
    }
    (root / "dataset.yaml").write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return root


def test_every_kind_of_labels_becomes_the_same_mask(tree: Path, tmp_path: Path) -> None:
    dataset = load_dataset(tree)
    assert len(dataset.cases) == 6
    for case in dataset.cases:
        study = read_study(dataset.spec, case)
        assert study.mask is not None
        expected = np.asarray(nibabel.load(tmp_path / f"nifti/masks/{case.id}.nii.gz").dataobj)
        np.testing.assert_array_equal(study.mask.array[0], expected)


def test_check_train_predict_evaluate(tree: Path, tmp_path: Path, tiny_plan: Builder) -> None:
    result = api.check(tree)
    assert result.ok, [finding for finding in result.findings if finding.severity == "error"]
    notes = {finding.code: finding.case for finding in result.findings if finding.severity == "note"}
    assert notes["MATCHED_BY_POSITION"] in ("c2", "c5")
    plan = tiny_plan(tree, tmp_path / "plan.yaml", steps=4)
    api.train(tree, out=tmp_path / "run", plan=plan, steps=4)
    predicted = api.predict(tree, model=tmp_path / "run", out=tmp_path / "masks")
    assert predicted.complete, [entry.message for entry in predicted.entries]
    scores = api.evaluate(tmp_path / "masks", tree, out=tmp_path / "scores")
    used = {row.label: row.n_total for row in scores.summary if row.metric == "dice"}
    assert (used["ball"], used["box"]) == (2, 2)


def test_a_reference_in_dicom_scores_itself_as_one(tree: Path, tmp_path: Path) -> None:
    """What evaluate reads from SEG and RTSTRUCT is what the same masks say in NIfTI."""
    for case in ("c4", "c5"):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / f"own/{case}.nii.gz").write_bytes((tmp_path / f"nifti/masks/{case}.nii.gz").read_bytes())
    scores = api.evaluate(tmp_path / "own", tree, out=tmp_path / "scores")
    assert {row.mean for row in scores.summary if row.metric == "dice"} == {1.0}


def test_a_name_that_does_not_fit_is_a_finding(tree: Path) -> None:
    file = tree / "dataset.yaml"
    file.write_text(file.read_text().replace("dicom: .*box", "dicom: cube"))
    result = api.check(tree)
    assert not result.ok
    found = [finding for finding in result.findings if finding.code == "SEGMENT_MISSING"]
    assert [finding.case for finding in found] == [f"c{n}" for n in range(6)]
    assert "'Ball', 'the box'" in found[0].message
    assert str(tree) not in json.dumps(result.to_dict())
