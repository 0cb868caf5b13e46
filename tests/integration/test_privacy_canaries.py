"""Words planted wherever a patient may be named never appear in what is written, but for the linkage table."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pydicom
import pytest
import yaml
from pydicom.datadict import dictionary_VR

from medseg import api
from medseg.cli import main
from medseg.errors import MedsegError
from medseg.phantom import damage
from medseg.phantom.dicom import write_series
from medseg.volume import Volume

CANARIES = {
    "PatientName": "Kanarienvogel^Nele",
    "PatientID": "KNR4711",
    "OtherPatientIDs": "KNR4712",
    "PatientBirthDate": "19330422",
    "PatientAddress": "Kanarienweg 1",
    "PatientTelephoneNumbers": "0555123987",
    "PatientComments": "KanarieComment",
    "PatientMotherBirthName": "KanarieMother",
    "EthnicGroup": "KanarieGroup",
    "Occupation": "KanarieJob",
    "AccessionNumber": "KNRACC99",
    "StudyID": "KNRSTUDY",
    "StudyDate": "19771123",
    "SeriesDate": "19771124",
    "AcquisitionDate": "19771125",
    "ContentDate": "19771126",
    "StudyTime": "235957.123",
    "StudyDescription": "KanarieStudyText",
    "SeriesDescription": "KanarieSeriesText",
    "ProtocolName": "KanarieProtocol",
    "ImageComments": "KanarieImageText",
    "InstitutionName": "KanarieHospital",
    "InstitutionAddress": "KanarieStreet",
    "InstitutionalDepartmentName": "KanarieWard",
    "ReferringPhysicianName": "KanarieReferrer",
    "PerformingPhysicianName": "KanariePerformer",
    "OperatorsName": "KanarieOperator",
    "RequestingPhysician": "KanarieRequester",
    "StationName": "KNRSTATION",
    "DeviceSerialNumber": "KNRSERIAL",
    "RequestedProcedureDescription": "KanarieProcedure",
    "PerformedProcedureStepID": "KNRSTEP",
    "IssuerOfPatientID": "KanarieIssuer",
    "AdditionalPatientHistory": "KanarieHistory",
    "PatientBirthName": "KanarieBirthName",
    "MilitaryRank": "KanarieRank",
    "PatientReligiousPreference": "KanarieReligion",
    "MedicalAlerts": "KanarieAlert",
    "CurrentPatientLocation": "KanarieRoom",
    "PhysiciansOfRecord": "KanariePhysician",
    "NameOfPhysiciansReadingStudy": "KanarieReader",
    "AcquisitionComments": "KanarieAcquisition",
    "DerivationDescription": "KanarieDerivation",
    "PerformedProcedureStepDescription": "KanarieStep",
    "ManufacturerModelName": "KanarieModel",
    "SoftwareVersions": "KanarieSoftware",
    "BodyPartExamined": "KANARIEPART",
}
NESTED = ["KNRNESTED1", "KanarieNested", "KNRNESTED2", "KNRNESTED3"]
PLACES = ["KanarieFolder", "kanarienvogel_nele", "KanarieFile"]
HEADER = ["KanarieDescrip", "KanarieAux", "KanarieDb", "KanarieIntent"]
Builder = Callable[..., Path]


def plant(file: Path) -> set[str]:
    """Plant every canary in a DICOM file; returns its UIDs, which identify too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(file)
        for keyword, word in CANARIES.items():
            setattr(
                dataset, keyword, [word] if dictionary_VR(keyword) == "LO" and keyword == "OtherPatientIDs" else word
            )
        dataset.private_block(0x0011, "KanariePrivate", create=True).add_new(1, "LO", "KanariePrivateValue")
        other, request = pydicom.Dataset(), pydicom.Dataset()
        other.PatientID, other.IssuerOfPatientID = "KNRNESTED1", "KanarieNested"
        request.RequestedProcedureID, request.AccessionNumber = "KNRNESTED2", "KNRNESTED3"
        dataset.OtherPatientIDsSequence, dataset.RequestAttributesSequence = [other], [request]
        dataset.save_as(file)
    return {dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID, dataset.FrameOfReferenceUID}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny: SimpleNamespace) -> tuple[Path, set[str]]:
    """A DICOM dataset of four patients, with canaries in tags, folders and file names; and the forbidden words."""
    root = tmp_path_factory.mktemp("privacy")
    words = {*CANARIES.values(), *PLACES, *HEADER, *NESTED, "KanariePrivate"}
    for number in range(4):
        image, mask = tiny.case(number)
        case = root / "data" / f"KanarieFolder{number}_kanarienvogel_nele"
        volume = Volume(np.rint(image)[None].clip(0), tiny.affine)
        for file in write_series(volume, case / "series", modality="MR", seed=number, patient_id=f"{number}"):
            words |= plant(file)
            file.rename(file.with_name(f"KanarieFile{file.name}"))
        made = nibabel.Nifti1Image(mask, tiny.affine)
        made.header["descrip"], made.header["aux_file"] = b"KanarieDescrip", b"KanarieAux"
        made.header["db_name"], made.header["intent_name"] = b"KanarieDb", b"KanarieIntent"
        (root / "labels").mkdir(exist_ok=True)
        made.to_filename(root / "labels" / f"{case.name}.nii.gz")
    spec = {
        "name": "secret",
        "root": "data",
        "images": "{case}/series",
        "masks": "../labels/{case}.nii.gz",
        "channels": {"mr": {"modality": "MR"}},
        "labels": {"ball": 1, "box": 2},
    }
    (root / "spec.yaml").write_text(yaml.safe_dump(spec))
    return root, words


FORMATS = ["nifti", "seg", "rtstruct", "sr", "sc"]


def without_objects(found: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Leave out what is inside DICOM objects, which belong to a patient by design; their names stay."""
    return ((name, raw) for name, raw in found if not name.endswith(".dcm") or name.startswith("name of "))


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder with its name and bytes, compressed ones also unpacked."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        yield f"name of {name}", name.encode()
        if path.is_file():
            raw = path.read_bytes()
            yield name, raw
            if raw[:2] == b"\x1f\x8b":
                yield f"{name} unpacked", gzip.decompress(raw)


def leaks(words: set[str], found: Iterator[tuple[str, bytes]]) -> list[str]:
    told = []
    for name, raw in found:
        if name.endswith("private/linkage.csv"):
            continue
        low = raw.lower()
        told += [
            f"{word} in {name}"
            for word in words
            if word.lower().encode() in low or word.lower().encode("utf-16-le") in low
        ]
    return told


def test_the_canaries_are_planted(world: tuple[Path, set[str]]) -> None:
    root, words = world
    found = set()
    for _, raw in contents(root):
        found |= {word for word in words if word.encode() in raw}
    assert found == words


def test_no_canary_leaves_the_data(
    world: tuple[Path, set[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture, tiny_plan: Builder
) -> None:
    root, words = world
    spec = root / "spec.yaml"
    cut = root / "more" / "KanarieFolder9"
    cut.mkdir(parents=True, exist_ok=True)
    (cut / "KanarieFile.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"Kanarienvogel^Nele" * 20)
    (root / "more" / "KanarieFile.txt").write_text("Kanarienvogel")
    out = tmp_path
    plan = tiny_plan(spec, out / "plan.yaml", steps=2)
    with caplog.at_level(logging.DEBUG, logger="medseg"):
        checked = api.check(spec, out=out / "check")
        api.train(spec, out=out / "run", steps=2, plan=plan, track=out / "store")
        predicted = api.predict(
            root / "data", root / "more", root / "more" / "KanarieFile.txt", model=out / "run", out=out / "masks"
        )
        api.predict(spec, model=out / "run", out=out / "by-spec", cases="all")
        scores = api.evaluate(out / "by-spec", spec, out=out / "scores", track=out / "store")
        api.report(out / "scores", out=out / "report")
    told = [entry.model_dump_json().encode() for entry in predicted.entries]
    assert len(scores.cases) == 4
    assert sorted(entry.state for entry in predicted.entries) == ["done"] * 4 + ["refused"] * 2
    assert (out / "store" / "mlflow.db").exists()
    assert leaks(words, contents(out)) == []
    assert leaks(words, iter([("log", caplog.text.encode()), ("check", checked.to_json().encode())])) == []
    assert leaks(words, iter([("entry", raw) for raw in told])) == []


def test_only_the_objects_themselves_name_the_patient(
    world: tuple[Path, set[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture, tiny_plan: Builder
) -> None:
    """Results as DICOM carry the patient's name, or a PACS could not file them; nothing else does."""
    root, words = world
    spec = root / "spec.yaml"
    plan = tiny_plan(spec, tmp_path / "plan.yaml", steps=1)
    api.train(spec, out=tmp_path / "run", steps=1, plan=plan)
    with caplog.at_level(logging.DEBUG):
        predicted = api.predict(root / "data", model=tmp_path / "run", out=tmp_path / "masks", formats=FORMATS)
    assert predicted.complete, [entry.message for entry in predicted.entries]
    objects = sorted((tmp_path / "masks").glob("*.dcm"))
    assert len(objects) == 4 * (len(FORMATS) - 1)
    assert all(b"Kanarienvogel^Nele" in path.read_bytes() for path in objects)
    # no more than the modules of patient and study hold: no devices, no staff, no private tags
    spoken = {"KanarieWard", "KNRSERIAL", "KanariePrivate", "KanarieImageText", "KanarieOperator"}
    assert leaks(spoken, contents(tmp_path / "masks")) == []
    assert leaks(words, without_objects(contents(tmp_path))) == []
    assert leaks(words, iter([("log", caplog.text.encode())])) == []


DAMAGES: dict[str, Callable[[list[Path]], object]] = {
    "missing": damage.removed(3),
    "mixed": damage.second_time(EchoNumbers=2),
    "nothing-tells": damage.second_time(),
    "no-position": damage.one(damage.drop("ImagePositionPatient")),
    "cut": damage.cut(0.9),
    "cut-header": damage.cut(0.3),
    "bad-number": damage.one(damage.put(PixelSpacing=[0, 1])),
    "tilted": damage.tilted(10, 2.0),
    "two-sizes": damage.taller,
    "two-frames": damage.one(damage.put(FrameOfReferenceUID="1.2.3")),
    "many": damage.of_class("1.2.840.10008.5.1.4.1.1.7"),
}
"""Refusals quote what they found; none may quote what identifies."""


def test_refusals_tell_nothing(
    world: tuple[Path, set[str]],
    tiny: SimpleNamespace,
    tmp_path: Path,
    tiny_plan: Builder,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Damaged studies with canaries: ledger, summary, log and terminal of predict, and check of the same tree."""
    root, words = world
    words = set(words)
    plan = tiny_plan(root / "spec.yaml", tmp_path / "plan.yaml", steps=1)
    api.train(root / "spec.yaml", out=tmp_path / "run", steps=1, plan=plan)
    for number, change in enumerate(DAMAGES.values()):
        volume = Volume(np.rint(tiny.case(number)[0])[None].clip(0), tiny.affine)
        folder = tmp_path / "in" / f"KanarieFolder{number}"
        files = write_series(volume, folder, modality="MR", seed=50 + number, patient_id=f"{number}")
        for file in files:
            words |= plant(file)
        change(files)
    capfd.readouterr()
    with caplog.at_level(logging.DEBUG):
        predicted = api.predict(tmp_path / "in", model=tmp_path / "run", out=tmp_path / "out", formats=FORMATS)
    told = capfd.readouterr()
    assert len(predicted.entries) >= len(DAMAGES)
    assert {entry.state for entry in predicted.entries} >= {"refused"}
    assert leaks(words, without_objects(contents(tmp_path / "out"))) == []
    assert leaks(words, iter([("log", caplog.text.encode()), ("terminal", (told.out + told.err).encode())])) == []
    assert leaks(words, ((entry.id, entry.model_dump_json().encode()) for entry in predicted.entries)) == []


def test_a_tree_of_studies_tells_nothing(world: tuple[Path, set[str]], tmp_path: Path, tiny_plan: Builder) -> None:
    """Studies, channels and labels found by rules; a study without its labels and one without its channel are told."""
    root, words = world
    tree = tmp_path / "tree"
    shutil.copytree(root / "data", tree)
    labels = {"ball": {"value": 1, "dicom": ".*ball.*"}, "box": {"value": 2, "dicom": ".*box.*"}}
    spec = {
        "name": "tree",
        "studies": ".",
        "channels": {"mr": {"modality": "MR", "match": {"SeriesDescription": ".*"}}},
        "labels": labels,
    }
    predicting = tiny_plan(root / "spec.yaml", tmp_path / "plan.yaml", steps=1)
    api.train(root / "spec.yaml", out=tmp_path / "first", steps=1, plan=predicting)
    api.predict(root / "data", model=tmp_path / "first", out=tmp_path / "objects", formats=["seg"])
    # the masks as objects, so that the tree holds labels; one study lacks them
    for number, file in enumerate(sorted((tmp_path / "objects").glob("*.dcm"))[:-1]):
        shutil.copy(file, tree / f"KanarieFile{number}.dcm")
    (tree / "dataset.yaml").write_text(yaml.safe_dump(spec))
    checked = api.check(tree, out=tmp_path / "check")
    assert len(checked.cases) == 4, checked.to_json()
    assert leaks(words, contents(tmp_path / "check")) == []
    assert leaks(words, iter([("check", checked.to_json().encode())])) == []
    spec["channels"] = {"mr": {"modality": "CT", "match": {"SeriesDescription": "other"}}}
    (tree / "dataset.yaml").write_text(yaml.safe_dump(spec))
    try:
        told = api.check(tree, out=tmp_path / "check2").to_json()
    except MedsegError as error:
        told = str(error)
    assert told
    assert leaks(words, iter([("told", told.encode())])) == []


def test_no_canary_in_what_a_machine_reads(
    world: tuple[Path, set[str]],
    tmp_path: Path,
    tiny_plan: Builder,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, words = world
    spec = root / "spec.yaml"
    plan = tiny_plan(spec, tmp_path / "plan.yaml", steps=1)
    api.train(spec, out=tmp_path / "run", steps=1, plan=plan)
    for line in (f"predict {spec} --model run --out o --json", f"check {spec} --json"):
        monkeypatch.setattr(sys, "argv", ["medseg", *line.split()])
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        told = capfd.readouterr()
        assert end.value.code == 0, told.err
        assert json.loads(told.out)
        assert leaks(words, iter([("stdout", told.out.encode()), ("stderr", told.err.encode())])) == []
