"""What travels to a worker arrives as it was, and nothing but known kinds does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from medseg.batch.job import decode, encode
from medseg.batch.shards import Shard, parse_shard
from medseg.batch.study_input import StudyInput
from medseg.errors import ConfigError, GeometryError, ReadError
from medseg.phantom.dicom import write_series
from medseg.readers.dicom_scan import scan
from medseg.volume import Volume


def test_a_series_arrives_as_it_was(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(50, 200, (1, 12, 14, 6)).astype(np.float32)
    write_series(Volume(values, np.diag([-1.5, -1.5, 2.0, 1])), tmp_path / "s", modality="MR", patient_id="P")
    (series,) = scan([tmp_path / "s"]).series
    study = StudyInput("case", (tmp_path / "s",), series, tmp_path, (series,), frozenset({"tilt"}))
    line = encode(study)
    assert "\n" not in line
    assert decode(line) == study
    assert decode(line).digest() == study.digest()


def test_names_that_are_no_text_arrive(tmp_path: Path) -> None:
    image = tmp_path / os.fsdecode(b"a\xff b\n.nii.gz")
    study = StudyInput("a", (image,), None, image)
    assert decode(encode(study)) == study


@pytest.mark.parametrize("error", [ReadError("words", code="TRUNCATED"), GeometryError("more")])
def test_errors_arrive(error: ReadError, tmp_path: Path) -> None:
    study = StudyInput("a", (tmp_path,), None, tmp_path, refusal=error)
    found = decode(encode(study)).refusal
    assert (type(found), found.code, str(found)) == (type(error), error.code, str(error))


@pytest.mark.parametrize("kind", ["Popen", "error", "type"])
def test_nothing_else_arrives(kind: str) -> None:
    with pytest.raises((KeyError, ValueError, AttributeError)):
        decode(json.dumps({"is": kind, "of": ["annotations", "x", "y"] if kind == "error" else {}}))


def test_shards_part_the_studies() -> None:
    names = [f"case-{n}" for n in range(1000)]
    parts = [[name for name in names if Shard(number, 8).holds(name)] for number in range(1, 9)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert all(80 < len(part) < 170 for part in parts)
    assert parse_shard(" 2/8 ") == Shard(2, 8)
    assert Shard().holds("anything")
    for text in ("0/2", "3/2", "a/b", "1", "1/0", "-1/2"):
        with pytest.raises(ConfigError, match="--shard"):
            parse_shard(text)
