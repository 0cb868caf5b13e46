"""The order of studies, and what follows from each way in which a worker ends, with an engine that only pretends."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from medseg.batch import dispatch, study
from medseg.batch.attempt import Outcome
from medseg.batch.dispatch import Dispatch
from medseg.batch.job import Settings
from medseg.batch.ledger import Entry, Ledger
from medseg.batch.placing import IMAGE_SUFFIX
from medseg.batch.study_input import StudyInput
from medseg.errors import ExportError
from medseg.files import file_digest

DIED, DONE, BUSY = Outcome(death="died", input_digest="i"), Outcome(fresh=True), Outcome()


class Pretended:
    """Ends the n-th try of a study as `fates` says; done after that."""

    def __init__(self, ledger: Ledger, fates: dict[str, list[Outcome | Exception]], width: int = 2) -> None:
        self.ledger, self.fates, self.asked, self._width = ledger, fates, [], width  # type: ignore[var-annotated]

    def width(self) -> int:
        return self._width

    def submit(self, settings: Settings, study: StudyInput, *, alone: bool = False) -> Future[Outcome]:
        self.asked.append((study.id, alone))
        fate = self.fates.get(study.id, [])
        outcome = fate.pop(0) if fate else DONE
        future: Future[Outcome] = Future()
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
            return future
        if outcome is DONE:
            entry = Entry(id=study.id, state="done", input_digest="i", model_digest="r")
            self.ledger.attempt(study.id)
            self.ledger.end(study.id, {})
            self.ledger.write(entry)
            outcome = Outcome(entry, fresh=True)
        elif outcome.death:
            self.ledger.attempt(study.id)
        future.set_result(outcome)
        return future


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, str], Pretended]]:
    monkeypatch.setattr(dispatch, "BUSY_SECONDS", 0.001)
    settings = Settings(tmp_path, tmp_path, "", "r", None, ("nifti",))

    def go(ids: str, **fates: list[Outcome | Exception]) -> tuple[dict[str, str], Pretended]:
        engine = Pretended(Ledger(tmp_path), fates)
        told: list[str] = []
        studies = [StudyInput(name, (tmp_path / name,), None, tmp_path / name) for name in ids]
        entries = Dispatch(engine, settings, lambda o: told.append(o.entry.id)).run(studies)  # type: ignore[union-attr]
        assert sorted(told) == sorted(ids), "each is told of once"
        return {name: entry.code or entry.state for name, entry in entries.items()}, engine

    return go


Run = Callable[..., tuple[dict[str, str], Pretended]]


def test_a_study_whose_worker_died_is_done_last_and_alone(run: Run) -> None:
    found, engine = run("abcd", b=[DIED])
    assert found == dict.fromkeys("abcd", "done")
    assert engine.asked == [("a", False), ("b", False), ("c", False), ("d", False), ("b", True)]


def test_only_deaths_alone_make_it_poison(run: Run, tmp_path: Path) -> None:
    found, engine = run("abc", b=[DIED, DIED, DONE], c=[DIED] * 3)
    assert found == {"a": "done", "b": "done", "c": "POISON"}
    assert engine.asked[3:] == [("b", True), ("b", True), ("c", True), ("c", True)]
    entry = Ledger(tmp_path).read("c")
    assert entry is not None
    assert (entry.state, entry.input_digest, entry.model_digest) == ("failed", "i", "r")
    assert not Ledger(tmp_path).in_flight("c")
    again, engine = run("abc", c=[DIED] * 3)
    assert again["c"] == "POISON"
    assert engine.asked == [("a", False), ("b", False), ("c", True)], "last, alone, and once"
    assert run("c")[0] == {"c": "done"}, "what was somebody's kill heals"
    assert run("c", c=[DIED, DIED])[0]["c"] == "done", "and is forgiven"


@pytest.mark.parametrize(("death", "code"), [("timeout", "TIMEOUT"), ("memory", "MEMORY")])
def test_what_takes_too_much_fails_at_once_and_goes_last_in_the_next_run(
    run: Run, tmp_path: Path, death: str, code: str
) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"of an earlier input")
    found, engine = run("ab", a=[Outcome(death=death, input_digest="i")])
    assert found == {"a": code, "b": "done"}
    assert len(engine.asked) == 2
    assert not (tmp_path / "a.nii.gz").exists()
    found, engine = run("ab")
    assert found == {"a": "done", "b": "done"}
    assert engine.asked == [("b", False), ("a", True)]


def test_a_study_that_another_process_does_is_waited_for(run: Run) -> None:
    found, engine = run("abc", a=[BUSY, BUSY], c=[DIED, BUSY])
    assert found == dict.fromkeys("abc", "done")
    assert [name for name, _ in engine.asked] == ["a", "b", "c", "a", "a", "c", "c"]


def test_what_was_in_flight_when_the_command_died_goes_last_and_costs_nothing(run: Run, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.attempt("a")
    found, engine = run("ab", a=[DIED])
    assert found == {"a": "done", "b": "done"}
    assert engine.asked == [("b", False), ("a", True), ("a", True)]
    assert not ledger.suspected("a")


def test_deaths_with_another_input_do_not_count(run: Run, tmp_path: Path) -> None:
    run("a", a=[DIED] * 3)
    other = Outcome(death="died", input_digest="other")
    found, engine = run("a", a=[other])
    assert found == {"a": "done"}
    assert engine.asked == [("a", True), ("a", True)]


def test_what_was_committed_just_before_the_worker_was_ended_counts(run: Run, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    (tmp_path / "a.nii.gz").write_bytes(b"mask")
    from medseg.files import file_digest

    outputs = {"a.nii.gz": file_digest(tmp_path / "a.nii.gz")}
    ledger.write(Entry(id="a", state="done", input_digest="i", model_digest="r", outputs=outputs))
    assert run("a", a=[Outcome(death="timeout", input_digest="i")])[0] == {"a": "done"}


def test_an_error_of_the_run_ends_it(run: Run) -> None:
    with pytest.raises(ExportError, match="full"):
        run("abc", b=[ExportError("full", code="DISK_FULL")])


FULL = Outcome(Entry(id="x", state="failed", code="DISK_FULL", input_digest="i", model_digest="r"), fresh=True)


def full(name: str) -> list[Outcome | Exception]:
    assert FULL.entry is not None
    return [Outcome(FULL.entry.model_copy(update={"id": name}), fresh=True)]


def test_a_full_disk_costs_the_study_that_met_it(run: Run) -> None:
    found, _ = run("abcd", a=full("a"), c=full("c"))
    assert found == {"a": "DISK_FULL", "b": "done", "c": "DISK_FULL", "d": "done"}


def test_two_in_a_row_that_find_the_disk_full_end_the_run(run: Run) -> None:
    with pytest.raises(ExportError, match="case c") as caught:
        run("abcdefgh", b=full("b"), c=full("c"))
    assert caught.value.code == "DISK_FULL"


def test_a_run_of_which_nothing_fitted_is_an_error(run: Run) -> None:
    with pytest.raises(ExportError, match="case a"):
        run("a", a=full("a"))


def test_nothing_to_do(run: Run) -> None:
    assert run("")[0] == {}


@pytest.mark.parametrize(("death", "code"), [("timeout", "TIMEOUT"), ("memory", "MEMORY"), ("died", "POISON")])
def test_a_mask_outlasts_a_worker_that_ended_before_it_had_read_the_input(
    run: Run, tmp_path: Path, death: str, code: str
) -> None:
    mask = tmp_path / "a.nii.gz"
    mask.write_bytes(b"mask")
    done = Entry(id="a", state="done", input_digest="i", model_digest="r", outputs={mask.name: file_digest(mask)})
    Ledger(tmp_path).write(done)
    found, _ = run("a", a=[Outcome(death=death)] * 3)
    assert found == {"a": code}, "what is told of this run"
    assert mask.read_bytes() == b"mask"
    assert Ledger(tmp_path).read("a") == done


def test_the_image_of_a_corrected_series_stays_when_it_cannot_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / f"s{IMAGE_SUFFIX}"
    image.write_bytes(b"image")

    def full(*_: object) -> None:
        raise ExportError("no space", code="DISK_FULL")

    monkeypatch.setattr(study, "write_nifti", full)
    monkeypatch.setattr(study, "EXPORTERS", {"nifti": SimpleNamespace(suffix=".nii.gz", dicom=False, write=touch)})
    with pytest.raises(ExportError, match="no space"):
        study._write(SimpleNamespace(nifti=None, image=object()), ("nifti",), tmp_path, "s")  # type: ignore[arg-type]
    assert image.read_bytes() == b"image"
    study._write(SimpleNamespace(nifti=None, image=None), ("nifti",), tmp_path, "s")  # type: ignore[arg-type]
    assert not image.exists(), "of an earlier run, in which the series was corrected"


def touch(file: Path, _: object) -> tuple[str, ...]:
    file.touch()
    return ()
