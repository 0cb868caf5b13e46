"""What is finished stays: while it is written again, while its input is away, whatever ends the attempt."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.batch import study as batch
from medseg.batch.attempt import commit
from medseg.batch.ledger import Entry, Ledger
from medseg.batch.run import BatchResult, predict
from medseg.batch.study_input import UNREAD, StudyInput
from medseg.errors import BatchError, ExportError
from medseg.exporters import EXPORTERS
from medseg.files import file_digest
from medseg.inference.predict import Model, load_model
from medseg.phantom.dicom import write_series
from medseg.readers import dicom_workers
from medseg.volume import Volume


@pytest.fixture(scope="module")
def loaded(model: Path) -> Model:
    return load_model(model)


@pytest.fixture
def source(tmp_path: Path, model: Path) -> Path:
    """A folder with the NIfTI images a and b, and the series s."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, case in (("a", "c0"), ("b", "c1")):
        shutil.copyfile(model.parent / "data" / "images" / f"{case}.nii.gz", folder / f"{name}.nii.gz")
    values = np.random.default_rng(0).integers(50, 200, (1, 16, 18, 8)).astype(np.float32)
    write_series(Volume(values, np.diag([-1.5, -1.5, 2.0, 1])), folder / "s", modality="MR")
    return folder


def results(out: Path) -> dict[str, bytes]:
    """All that a reader of OUT sees, but for the linkage table."""
    parts = ("journal", "private")
    files = [p for p in out.rglob("*") if p.is_file() and p.relative_to(out).parts[0] not in parts]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}


def failing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fails(*_: object) -> None:
        raise ExportError("it cannot be written", code="READ_BACK")

    monkeypatch.setitem(EXPORTERS._rows, name, replace(EXPORTERS[name], write=fails))


def otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the network answer otherwise, as on another machine."""
    real = batch.predict_case

    def turned(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        return replace(found, mask=found.mask.with_array(np.ascontiguousarray(found.mask.array[:, ::-1])))

    monkeypatch.setattr(batch, "predict_case", turned)


# ---- written again --------------------------------------------------------------------------------------------------


def test_other_bytes_replace_the_old_ones_only_with_all_formats(
    loaded: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    predict([source / "s"], model=loaded, out=out)
    before = results(out)
    otherwise(monkeypatch)
    with monkeypatch.context() as patch:
        failing(patch, "sr")
        (failed,) = predict([source / "s"], model=loaded, out=out, formats=["nifti,seg,sr"]).entries
    assert (failed.state, failed.code) == ("failed", "READ_BACK")
    assert results(out) == before
    (done,) = predict([source / "s"], model=loaded, out=out, formats=["nifti,seg,sr"]).entries
    assert len(done.outputs) == 3
    assert results(out)[f"{done.id}.nii.gz"] != before[f"{done.id}.nii.gz"]
    assert all(file_digest(out / name) == digest for name, digest in done.outputs.items())
    assert not list(out.rglob(".partial-*"))


def test_what_is_intact_of_a_study_outlasts_a_failed_attempt(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for name in ("a.nii.gz", "a.seg.dcm"):
        (tmp_path / name).write_bytes(b"mask")
    outputs = {name: file_digest(tmp_path / name) for name in ("a.nii.gz", "a.seg.dcm")}
    done = Entry(id="a", state="done", input_digest="i", model_digest="m", outputs=outputs)
    ledger.write(done)
    (tmp_path / "a.seg.dcm").write_bytes(b"damaged")
    failed = Entry(id="a", state="failed", code="READ_BACK", input_digest="i", model_digest="m")
    commit(ledger, failed, {})
    assert [p.name for p in tmp_path.glob("a.*")] == ["a.nii.gz"]
    assert ledger.read("a") == done, "what was lost is not forgotten"
    assert ledger.settled("a", input_digest="i", model_digest="m") is None, "it is done again"
    (tmp_path / "a.nii.gz").write_bytes(b"damaged")
    commit(ledger, failed, {})
    assert ledger.read("a") == failed
    assert not list(tmp_path.glob("a.*"))


def test_a_lost_file_is_made_again_though_making_it_failed_and_it_is_not_asked_for(
    loaded: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    predict([source / "s"], model=loaded, out=out, formats=["nifti,seg"])
    before = results(out)
    for hinder, code in ((lambda patch: failing(patch, "seg"), "READ_BACK"), (unread, "INPUT_AWAY")):
        next(out.glob("*.seg.dcm")).unlink()
        with monkeypatch.context() as patch:
            hinder(patch)
            assert codes(predict([source / "s"], model=loaded, out=out)) == {"s": code}
        assert codes(predict([source / "s"], model=loaded, out=out)) == {"s": "done"}
        assert results(out).keys() == before.keys()


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StudyInput, "digest", lambda _: UNREAD)


def test_half_written_results_are_no_input_and_are_swept(loaded: Model, source: Path, tmp_path: Path) -> None:
    out = source / "out"
    for place in (out, tmp_path / "elsewhere"):
        (place / ".partial-01234567").mkdir(parents=True)
        shutil.copyfile(source / "a.nii.gz", place / ".partial-01234567" / "x.nii.gz")
    shutil.move(tmp_path / "elsewhere", source / "elsewhere")
    assert len(predict([source], model=loaded, out=out).entries) == 3
    assert not list(out.glob(".partial-*"))
    assert list((source / "elsewhere").iterdir()), "of another folder: not ours to remove"


# ---- what cost a worker ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["TIMEOUT", "MEMORY", "POISON"])
def test_a_done_study_that_cost_a_worker_is_suspected_until_it_ends(tmp_path: Path, code: str) -> None:
    ledger, mask = Ledger(tmp_path), tmp_path / "a.nii.gz"
    mask.write_bytes(b"mask")
    done = Entry(id="a", state="done", input_digest="i", model_digest="m", outputs={mask.name: file_digest(mask)})
    ledger.write(done)
    ledger.attempt("a")
    commit(ledger, Entry(id="a", state="failed", code=code, input_digest="i", model_digest="m"), {}, forgive=False)
    assert ledger.read("a") == done
    assert ledger.suspected("a")
    assert not ledger.in_flight("a")
    ledger.attempt("a")
    commit(ledger, done, {})
    assert not ledger.suspected("a")


def test_what_is_settled_is_no_longer_suspected(loaded: Model, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict([source / "a.nii.gz"], model=loaded, out=out)
    ledger = Ledger(out)
    done = ledger.read("a")
    assert done is not None
    commit(ledger, done.model_copy(update={"state": "failed", "code": "TIMEOUT"}), {}, forgive=False)
    assert ledger.suspected("a")
    assert predict([source / "a.nii.gz"], model=loaded, out=out).entries == (done,)
    assert not ledger.suspected("a")


# ---- the input is away ----------------------------------------------------------------------------------------------


def away(source: Path, monkeypatch: pytest.MonkeyPatch, number: int, *, after: int = 0) -> None:
    """Let files be listed but not opened, as on a drive that went away; the first `after` times they are."""
    real, count = open, iter(range(after))

    def refused(file: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(file, str | os.PathLike) and source in Path(file).parents and next(count, None) is None:
            raise OSError(number, os.strerror(number))
        return real(file, *rest, **options)

    monkeypatch.setattr("builtins.open", refused)


def codes(result: BatchResult) -> dict[str, str]:
    return {"s" if e.id.startswith("case") else e.id: e.code or e.state for e in result.entries}


@pytest.fixture
def told() -> list[str]:
    """What the run warns of."""
    return []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOENT, errno.EACCES])
def test_done_studies_stay_done_when_their_input_cannot_be_read(
    loaded: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str], number: int
) -> None:
    out = tmp_path / "out"
    predict([source], model=loaded, out=out)
    before = results(out)
    with monkeypatch.context() as patch:
        away(source, patch, number)
        again = predict([source / "a.nii.gz", source / "b.nii.gz"], model=loaded, out=out, warn=told.append)
    assert codes(again) == {"a": "done", "b": "done"}
    assert results(out) == before
    assert len(told) == 1
    assert told[0].startswith("2 studies could not be compared with their inputs")
    assert all("INPUT_AWAY" in entry.notes for entry in again.entries)
    assert predict([source], model=loaded, out=out, warn=told.append).complete
    assert len(told) == 1


def test_a_study_that_was_never_done_is_refused_when_its_input_cannot_be_read(
    loaded: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        away(source, patch, errno.EIO)
        assert codes(predict([source / "a.nii.gz"], model=loaded, out=out)) == {"a": "UNREADABLE"}
    assert codes(predict([source / "a.nii.gz"], model=loaded, out=out)) == {"a": "done"}


def test_what_would_have_to_be_done_again_fails_and_keeps_what_it_has(
    loaded: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    """Another model, or a format that is not there yet."""
    out = tmp_path / "out"
    predict([source / "a.nii.gz"], model=loaded, out=out)
    before = results(out)
    before.pop("predictions.json")
    with monkeypatch.context() as patch:
        away(source, patch, errno.EIO)
        for options in ({"mirror": True}, {"formats": ["nifti,seg"]}):
            again = predict([source / "a.nii.gz"], model=loaded, out=out, warn=told.append, **options)
            assert (again.entries[0].state, again.entries[0].code) == ("failed", "INPUT_AWAY")
            found = results(out)
            found.pop("predictions.json")
            assert found == before
    assert len(told) == 2


def test_an_input_that_goes_away_while_it_is_read_costs_no_mask(
    loaded: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    predict([source / "a.nii.gz"], model=loaded, out=out)
    (out / "a.nii.gz").rename(tmp_path / "kept")
    (out / "a.nii.gz").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        real = batch.read_study

        def gone(*args: Any) -> Any:
            away(source, patch, errno.ESTALE)
            return real(*args)

        patch.setattr(batch, "read_study", gone)
        assert codes(predict([source / "a.nii.gz"], model=loaded, out=out)) == {"a": "INPUT_AWAY"}
    assert codes(predict([source / "a.nii.gz"], model=loaded, out=out)) == {"a": "done"}
    assert (out / "a.nii.gz").read_bytes() == (tmp_path / "kept").read_bytes()


def test_a_link_to_a_drive_that_is_away_costs_no_mask(
    loaded: Model, source: Path, tmp_path: Path, told: list[str]
) -> None:
    out, drive = tmp_path / "out", tmp_path / "drive"
    drive.mkdir()
    shutil.move(source / "b.nii.gz", drive / "b.nii.gz")
    (source / "b.nii.gz").symlink_to(drive / "b.nii.gz")
    predict([source], model=loaded, out=out)
    before = results(out)
    drive.rename(tmp_path / "away")
    assert codes(predict([source], model=loaded, out=out, warn=told.append))["b"] == "done"
    assert results(out) == before
    assert len(told) == 1


def test_a_series_one_slice_of_which_the_system_does_not_give_stays_done(
    loaded: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    out, real = tmp_path / "out", dicom_workers.read_header
    predict([source], model=loaded, out=out)
    before = results(out)

    def locked(path: Path) -> object:
        if path.name == "IM0004.dcm":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(dicom_workers, "read_header", locked)
    assert codes(predict([source], model=loaded, out=out, warn=told.append)) == dict.fromkeys("abs", "done")
    assert results(out) == before
    assert len(told) == 1
    (refused,) = predict([source / "s"], model=loaded, out=tmp_path / "new").entries
    assert (refused.state, refused.code) == ("refused", "UNREADABLE")
    assert "right to read" in refused.message
    assert "copy or export it again" not in refused.message


def test_a_series_with_a_damaged_slice_is_refused_though_it_was_done(
    loaded: Model, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict([source / "s"], model=loaded, out=out)
    file = source / "s" / "IM0004.dcm"
    file.write_bytes(file.read_bytes()[:-90])
    assert codes(predict([source / "s"], model=loaded, out=out)) == {"s": "TRUNCATED"}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_input_that_does_not_answer_ends_the_run_in_words(
    loaded: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = tmp_path / "out"
    predict([source], model=loaded, out=out)
    before, real = results(out), os.stat

    def refused(path: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(path, str | os.PathLike) and Path(path) == source:
            raise OSError(number, os.strerror(number))
        return real(path, *rest, **options)

    monkeypatch.setattr("os.stat", refused)
    with pytest.raises(BatchError, match=os.strerror(number)) as caught:
        predict([source], model=loaded, out=out)
    assert caught.value.code == "INPUT_AWAY"
    monkeypatch.undo()
    assert results(out) == before


def test_studies_of_a_drive_that_shows_nothing_stay(loaded: Model, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict([source], model=loaded, out=out)
    before = results(out)
    source.rename(tmp_path / "away")
    source.mkdir()
    with pytest.raises(BatchError, match="no image was found"):
        predict([source], model=loaded, out=out)
    shutil.copyfile(tmp_path / "away" / "a.nii.gz", source / "a.nii.gz")
    assert codes(predict([source], model=loaded, out=out)) == {"a": "done"}
    assert results(out) == before


def unlisted(monkeypatch: pytest.MonkeyPatch, folder: str, number: int) -> None:
    real = os.scandir

    def locked(path: Any = ".") -> Any:
        if not isinstance(path, int) and Path(path).name == folder:
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr("os.scandir", locked)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_folder_that_may_not_be_listed_is_told_with_what_helps(
    loaded: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (source / "CANARY").mkdir()
    unlisted(monkeypatch, "CANARY", number)
    result = predict([source], model=loaded, out=tmp_path / "out")
    (refused,) = result.select("refused")
    assert "may not be listed" in refused.message
    assert "right to read" in refused.message
    assert "private/linkage.csv" in refused.message
    assert "copy or export it again" not in refused.message
    assert "CANARY" not in refused.message
    assert len(result.select("done")) == 3


def test_a_job_that_is_sent_to_a_worker_still_knows_that_a_file_was_not_given(tmp_path: Path) -> None:
    from medseg.batch.job import decode, encode
    from medseg.readers.dicom_refusals import Refusal

    refusal = Refusal("UNREADABLE", "words", passing=True)
    assert decode(encode(refusal)) == refusal
    study = StudyInput("a", (tmp_path,), None, tmp_path, refusal=refusal.error())
    assert decode(encode(study)).passing
