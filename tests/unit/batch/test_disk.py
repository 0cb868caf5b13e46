"""Room for the results is asked for before a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from medseg.batch.disk import estimate, require_room
from medseg.batch.ledger import Entry, Ledger
from medseg.batch.study_input import StudyInput
from medseg.errors import ExportError


@pytest.fixture
def studies(tmp_path: Path) -> list[StudyInput]:
    rows = []
    for name in "abc":
        image = tmp_path / f"{name}.nii.gz"
        image.write_bytes(bytes(1_000_000))
        rows.append(StudyInput(name, (image,), None, image))
    return rows


@pytest.mark.parametrize(("free", "told"), [(10**9, ""), (100_000, "about 246 KiB are needed, 98 KiB")])
def test_a_disk_that_may_become_full_is_told(
    studies: list[StudyInput], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, told: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    warning = require_room(studies, ["nifti"], tmp_path)
    assert (told in warning) if told else not warning


def test_a_disk_that_is_full_stops_the_run(
    studies: list[StudyInput], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2000))
    with pytest.raises(ExportError, match="results of 3 studies cannot be written") as caught:
        require_room(studies, ["nifti"], tmp_path)
    assert caught.value.code == "DISK_FULL"
    for study in studies[:2]:
        Ledger(tmp_path).write(Entry(id=study.id, state="done", input_digest="i", model_digest="m"))
    assert "may become full" in require_room(studies, ["nifti"], tmp_path)


def test_what_is_done_and_what_is_gone_needs_nothing(studies: list[StudyInput], tmp_path: Path) -> None:
    assert estimate([], ["nifti"], tmp_path) == 0
    assert estimate(studies, ["nifti", "seg-fractional"], tmp_path) > 6_000_000
    studies[0].images[0].unlink()
    assert estimate(studies[:1], ["nifti"], tmp_path) == 4096
