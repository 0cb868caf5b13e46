"""The matrix of hazards (field notes 2.1 and 2.2): each row of HAZARDS is read exactly, split, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medseg.errors import GeometryError, MedsegError, ReadError
from medseg.phantom.dicom import write_series
from medseg.phantom.hazards import HAZARDS, READ, REFUSE, SPLIT, axes, phantom
from medseg.phantom.verdicts import distance_to, verdict
from medseg.readers.dicom_refusals import REFUSALS
from medseg.readers.dicom_scan import find_series
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume


@pytest.mark.parametrize("name", READ)
def test_read_exactly(name: str, tmp_path: Path) -> None:
    hazard = READ[name]
    hazard.write(tmp_path)
    volume = read_series(tmp_path)
    (truth,) = hazard.truth()
    values, place = distance_to(volume, truth)
    assert values == 0
    assert place < (5e-4 if "jitter" in name else 1e-6)
    assert volume.notes == hazard.notes
    assert volume.orthogonal
    assert volume.array.dtype == np.float32


@pytest.mark.parametrize("codes", ["LPI", "RPS", "LAS", "AIL", "LSA", "SRP", "IPL"])
def test_other_directions_are_read_exactly(codes: str, tmp_path: Path) -> None:
    truth = phantom(axes(codes))
    write_series(truth, tmp_path, modality="CT", shuffle=True)
    values, place = distance_to(read_series(tmp_path), truth)
    assert values == 0
    assert place < 1e-6


@pytest.mark.parametrize("name", SPLIT)
def test_split_and_each_part_read_exactly(name: str, tmp_path: Path) -> None:
    hazard = SPLIT[name]
    hazard.write(tmp_path)
    series = find_series(tmp_path)
    parts = [read_series(entry) for entry in series if entry.refusal is None]
    assert verdict(hazard, parts) == "exact"
    assert len(parts) == len(hazard.truth())
    assert len(series) == len(parts) + hazard.asides
    assert {entry.refusal.code for entry in series if entry.refusal} <= {"LOCALIZER"}
    if hazard.asides:
        volume = read_series(tmp_path)
        assert (verdict(hazard, [volume]), volume.notes) == ("exact", hazard.notes)
    else:
        with pytest.raises(GeometryError) as caught:
            read_series(tmp_path)
        assert caught.value.code == ("MIXED_MATRIX" if "matrix" in name else "MIXED_SERIES")
        assert "2 parts" in str(caught.value)


@pytest.mark.parametrize("name", REFUSE)
def test_refused_with_the_code(name: str, tmp_path: Path) -> None:
    hazard = REFUSE[name]
    files = hazard.write(tmp_path)
    with pytest.raises(MedsegError) as caught:
        read_series(tmp_path)
    assert caught.value.code == hazard.outcome, caught.value
    assert type(caught.value) in (ReadError, GeometryError)
    assert REFUSALS[hazard.outcome].advice in str(caught.value)
    assert not any(file.name in str(caught.value) for file in files)


def test_the_matrix_is_whole() -> None:
    assert len(HAZARDS) == len(READ) + len(SPLIT) + len(REFUSE) >= 28


def test_the_judge_sees_every_fault() -> None:
    """A judge that lets a flip pass proves nothing."""
    truth = phantom()
    hazard = READ["shuffled names"]
    shifted, wider = truth.affine.copy(), truth.affine.copy()
    shifted[2, 3] += 0.05
    wider[:3, 2] *= 1.01
    wrong = {
        "mirrored": truth.with_array(truth.array[:, ::-1]),
        "another order": truth.with_array(truth.array[..., ::-1]),
        "shifted": Volume(truth.array, shifted),
        "stretched": Volume(truth.array, wider),
        "a slice short": Volume(truth.array[..., 1:], truth.affine),
        "one voxel": truth.with_array(truth.array + (truth.array == 5)),
    }
    assert {name: verdict(hazard, [volume]).split(":")[0] for name, volume in wrong.items()} == dict.fromkeys(
        wrong, "wrong"
    )
    turned = Volume(truth.array[:, ::-1], truth.affine @ np.array([[-1, 0, 0, 32], *np.eye(4)[1:]]))
    assert verdict(hazard, [turned]) == "exact"
    assert verdict(hazard, [truth, truth]) != "exact"
    assert verdict(SPLIT["two time points"], [truth, truth]) != "exact"
    assert verdict(REFUSE["missing slice"], [truth]) != "exact"
