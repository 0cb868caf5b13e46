"""The inbox: what was confirmed stays, names come from no data, late instances are told from a whole study."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest

from medseg.errors import BatchError, ExportError
from medseg.pacs.inbox import Inbox
from medseg.readers.dicom_identity import identify

Study = Callable[..., list[Path]]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return Inbox(tmp_path / "inbox", clock=Clock())


def put(inbox: Inbox, *files: Path) -> str:
    for file in files:
        raw = file.read_bytes()
        study = inbox.receive(raw, identify(BytesIO(raw)))
    return study


def test_names_come_from_no_data(inbox: Inbox, make_study: Study, words: Any) -> None:
    files = make_study()
    study = put(inbox, *files)
    found = sorted(inbox.folder.rglob("*.dcm"))
    assert sorted(path.read_bytes() for path in found) == sorted(file.read_bytes() for file in files)
    assert [word for word in words(files) for path in found if word in path.as_posix()] == []
    assert {path.stat().st_mode & 0o077 for path in inbox.folder.rglob("*")} == {0}
    assert inbox.studies() == [study]
    assert sum(map(len, inbox.snapshot(study).series.values())) == len(files)


def test_a_traversing_uid_stays_inside(inbox: Inbox, make_study: Study, tmp_path: Path) -> None:
    file = make_study()[0]
    with pydicom.config.disable_value_validation():
        dataset = pydicom.dcmread(file)
        dataset.SOPInstanceUID = dataset.StudyInstanceUID = "../../../../evil"
        text = BytesIO()
        dataset.save_as(text)
    inbox.receive(text.getvalue(), identify(BytesIO(text.getvalue())))
    assert not list(tmp_path.rglob("*evil*"))
    assert len(list((inbox.folder / "studies").glob("*/*/*.dcm"))) == 1


def test_duplicates_change_nothing_and_others_replace(inbox: Inbox, make_study: Study) -> None:
    files = make_study()
    before = inbox.snapshot(put(inbox, *files))
    assert inbox.snapshot(put(inbox, *files)) == before
    dataset = pydicom.dcmread(files[0])
    dataset.PatientName = "Other"
    dataset.save_as(files[0])
    after = inbox.snapshot(put(inbox, files[0]))
    assert (after.series, after.content == before.content) == (before.series, False)


def test_quiet_counts_from_the_last_instance_and_again_after_a_restart(inbox: Inbox, make_study: Study) -> None:
    files = make_study()
    study = put(inbox, *files[:3])
    inbox.clock.now = 9  # type: ignore[attr-defined]
    assert not inbox.is_quiet(study, 10)
    put(inbox, files[3])
    inbox.clock.now = 18  # type: ignore[attr-defined]
    assert not inbox.is_quiet(study, 10)
    inbox.clock.now = 19  # type: ignore[attr-defined]
    assert inbox.is_quiet(study, 10)
    again = Inbox(inbox.folder, clock=inbox.clock)
    assert not again.is_quiet(study, 10)
    assert again.snapshot(study) == inbox.snapshot(study)


def test_late_instances_of_a_deleted_study(inbox: Inbox, make_study: Study) -> None:
    files = make_study()
    study = put(inbox, *files)
    found = inbox.snapshot(study)
    inbox.record(found, "done")
    assert inbox.missing(found) == 0
    assert inbox.delete(found)
    assert inbox.studies() == []
    put(inbox, files[0])
    assert inbox.missing(inbox.snapshot(study)) == len(files) - 1
    put(inbox, *files)
    assert inbox.missing(inbox.snapshot(study)) == 0


def test_what_has_just_come_is_not_deleted(inbox: Inbox, make_study: Study) -> None:
    files = make_study()
    found = inbox.snapshot(put(inbox, *files[:-1]))
    inbox.record(found, "done")
    put(inbox, files[-1])
    assert not inbox.delete(found)
    assert len(list(inbox.folder.rglob("*.dcm"))) == len(files)


def test_a_study_that_is_too_large(tmp_path: Path, make_study: Study) -> None:
    files = make_study()
    size = files[0].stat().st_size
    inbox = Inbox(tmp_path / "inbox", max_study_bytes=int(size * 2.5))
    study = put(inbox, *files[:2])
    with pytest.raises(BatchError) as error:
        put(inbox, files[2])
    assert error.value.code == "STUDY_TOO_LARGE"
    assert len(inbox.lacking[study]) == 1
    put(inbox, files[0])  # what is there already takes no more room


@pytest.mark.parametrize("fault", ["reserve", "write"])
def test_a_full_disk_confirms_nothing(
    fault: str, inbox: Inbox, make_study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_study()
    study = put(inbox, *files[:-1])
    with monkeypatch.context() as patch:
        if fault == "reserve":
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
        else:
            patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(ExportError) as error:
            put(inbox, files[-1])
        assert error.value.code == "DISK_FULL"
    assert len(inbox.lacking[study]) == 1
    assert len(list(inbox.folder.rglob("*"))) == 4 + 1 + 1 + len(files) - 1 - 1
    put(inbox, files[-1])
    assert not inbox.lacking[study]


def test_half_files_and_trash_of_a_killed_process_go(inbox: Inbox, make_study: Study) -> None:
    study = put(inbox, *make_study())
    before = inbox.snapshot(study)
    folder = next((inbox.folder / "studies" / study).iterdir())
    (folder / ".partial-1234-x.dcm").write_bytes(b"half")
    (inbox.folder / "trash" / "x").mkdir()
    again = Inbox(inbox.folder)
    assert again.snapshot(study) == before
    assert not list(inbox.folder.rglob(".partial*"))
    assert list((inbox.folder / "trash").iterdir()) == []
