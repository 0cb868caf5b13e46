"""The ledger: what is done stays done exactly as long as input, model and outputs are what they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medseg.batch.ledger import Entry, Ledger
from medseg.files import file_digest


def done(out: Path, study: str = "a") -> Entry:
    mask = out / f"{study}.nii.gz"
    mask.write_bytes(b"mask")
    return Entry(id=study, state="done", input_digest="i", model_digest="m", outputs={mask.name: file_digest(mask)})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    ledger, entry = Ledger(tmp_path), done(tmp_path)
    ledger.write(entry)
    assert ledger.read("a") == entry
    assert ledger.settled("a", input_digest="i", model_digest="m") == entry
    assert ledger.read("b") is None


@pytest.mark.parametrize(("given", "model"), [("x", "m"), ("i", "x")])
def test_another_input_or_model_is_not_settled(tmp_path: Path, given: str, model: str) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(done(tmp_path))
    assert ledger.settled("a", input_digest=given, model_digest=model) is None


@pytest.mark.parametrize("damage", ["remove", "change", "truncate"])
def test_a_damaged_output_is_not_settled(tmp_path: Path, damage: str) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(done(tmp_path))
    mask = tmp_path / "a.nii.gz"
    if damage == "remove":
        mask.unlink()
    else:
        mask.write_bytes(b"masj" if damage == "change" else b"mas")
    assert ledger.settled("a", input_digest="i", model_digest="m") is None


@pytest.mark.parametrize(("state", "settled"), [("refused", True), ("failed", False)])
def test_refusals_stay_and_failures_are_tried_again(tmp_path: Path, state: str, settled: bool) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(Entry.model_validate({"id": "a", "state": state, "input_digest": "i", "model_digest": "m"}))
    assert (ledger.settled("a", input_digest="i", model_digest="m") is not None) == settled


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "a"}', '{"id": "a", "state": "perhaps"}', "\x00"])
def test_a_damaged_entry_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "a.json").write_text(text)
    assert Ledger(tmp_path).read("a") is None


def test_attempts_are_counted_whatever_the_journal_holds(tmp_path: Path) -> None:
    ledger, file = Ledger(tmp_path), tmp_path / "journal" / "a.json"
    assert [ledger.attempt("a"), ledger.attempt("a")] == [1, 2]
    ledger.journal("a", {"seconds": 1.5})
    assert ledger.attempt("a") == 3
    assert json.loads(file.read_text())["attempts"] == 3
    for broken in ("", "{", "[]", '{"attempts": null}', '{"attempts": "x"}'):
        file.write_text(broken)
        assert ledger.attempt("a") == 1
    ledger.journal("new", {"seconds": 1})
    assert json.loads((tmp_path / "journal" / "new.json").read_text()) == {"seconds": 1}


def test_an_entry_is_the_same_bytes_whenever_it_is_written(tmp_path: Path) -> None:
    ledger, entry = Ledger(tmp_path), done(tmp_path)
    ledger.write(entry)
    first = (tmp_path / "ledger" / "a.json").read_bytes()
    ledger.write(entry)
    assert (tmp_path / "ledger" / "a.json").read_bytes() == first
