"""Damaged files never crash or hang a reader, and never give a wrong geometry; `make soak` runs thousands of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest

from medseg.phantom.dicom import write_series
from medseg.phantom.hazards import phantom
from medseg.phantom.mutations import OPERATIONS, mutate_bytes, mutate_dataset, rewrite

CAMPAIGN = Path(__file__).with_name("fuzz_campaign.py")
SUBJECTS = (
    *("classic", "implicit", "deflated", "compressed", "pet"),
    *("enhanced", "enhanced-rle", "seg", "fractional", "labelmap", "rtstruct"),
)
GROWN_MIB = 400
"""What the whole campaign may need beyond the imports: the files hold 20 kB of pixels each."""


def campaign(subject: str, seed: int, count: int, folder: Path) -> Any:
    """Run it in a process of its own; the limit is for a hang of that process's own guard against hangs."""
    done = subprocess.run(
        [sys.executable, str(CAMPAIGN), subject, str(seed), str(count), str(folder)],
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stderr[-3000:]}"
    return SimpleNamespace(**json.loads(done.stdout))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_damaged_files_are_read_right_or_refused(subject: str, tmp_path: Path) -> None:
    result = campaign(subject, 0, 60, tmp_path)
    assert result.findings == []
    assert result.grown_mib < GROWN_MIB
    # the damage is neither too slight nor too heavy to prove anything
    assert result.outcomes["read"] > 10
    assert len(set(result.outcomes) - {"read", "skipped"}) > 1


@pytest.mark.soak
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("subject", SUBJECTS)
def test_thousands_of_damaged_files(subject: str, part: int, tmp_path: Path) -> None:
    result = campaign(subject, 10_000 * (part + 1), 1000, tmp_path)
    assert result.findings == []
    assert result.grown_mib < GROWN_MIB


# ---- the mutator itself ---------------------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path: Path) -> bytes:
    return write_series(phantom(), tmp_path, modality="CT")[0].read_bytes()


def test_the_same_seed_gives_the_same_damage(raw: bytes) -> None:
    def both(seed: int) -> tuple[object, bytes]:
        rng = np.random.default_rng(seed)
        done = rewrite(raw, lambda dataset: mutate_dataset(dataset, rng))
        return done, mutate_bytes(raw, rng, header=1000, other=raw[::-1])

    assert [both(seed) for seed in range(20)] == [both(seed) for seed in range(20)]
    assert len({both(seed)[1] for seed in range(20)}) > 15


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_changes_something(name: str, raw: bytes) -> None:
    def change(dataset: pydicom.Dataset) -> frozenset[str]:
        dataset.ProcedureCodeSequence = [pydicom.Dataset(), pydicom.Dataset()]
        dataset.ProcedureCodeSequence[0].CodeValue = "1"
        tag = {"items": "ProcedureCodeSequence"}.get(name, "ImagePositionPatient")
        rng = np.random.default_rng(4)
        OPERATIONS[name](dataset, pydicom.tag.Tag(tag), rng)
        return frozenset()

    plain = rewrite(raw, lambda dataset: frozenset())
    done = rewrite(raw, change)
    assert done is not None
    assert plain is not None
    assert done[0] != plain[0]
