"""The fingerprint: numbers of a dataset, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medseg.errors import SpecError
from medseg.planning.fingerprint import (
    SAMPLES_PER_CASE,
    CaseFacts,
    Fingerprint,
    survey,
    take_fingerprint,
    thickness,
    tidy,
)
from medseg.planning.fingerprint import _sample as sample
from medseg.spec import Case, Spec

Make = Callable[..., Any]


def write(folder: Path, name: str, mask: Any, *, affine: Any, value: float = 10.0) -> Case:
    """A case whose image holds `value` times the label."""
    files = [folder / f"{name}_{part}.nii.gz" for part in ("image", "mask")]
    nibabel.Nifti1Image((mask * value).astype(np.float32), affine).to_filename(files[0])
    nibabel.Nifti1Image(mask.astype(np.uint8), affine).to_filename(files[1])
    return Case(id=name, images=(files[0],), mask=files[1], patient=name[0])


@pytest.fixture
def cases(tmp_path: Path) -> tuple[Case, ...]:
    mask = np.zeros((10, 20, 30), np.uint8)
    mask[:2, :5, :10] = 1  # 100 voxels
    mask[5:, :2, :2] = 2  # 20 voxels
    # The second case is stored with its axes as S, R, A and another spacing.
    turned = np.array([[0, 2.0, 0, 0], [0, 0, 1.0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
    second = np.zeros((30, 10, 20), np.uint8)
    second[0, 0, :4] = 1
    return (
        write(tmp_path, "a1", mask, affine=np.diag([1.0, 1, 2, 1])),
        write(tmp_path, "a2", second, affine=turned),
        write(tmp_path, "b1", mask, affine=np.diag([-1.0, -1, 2, 1])),
    )


@pytest.fixture
def spec(make_spec: Make) -> Spec:
    return make_spec(labels={"one": 1, "two": 2, "never": 5})


def test_by_hand(spec: Spec, cases: tuple[Case, ...]) -> None:
    told: list[tuple[int, int]] = []
    found = take_fingerprint(spec, cases, progress=lambda *row: told.append(row))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert (found.cases, found.patients) == (3, 2)
    assert found.median_shape == (10, 20, 30), "sizes are those along R, A, S"
    assert found.median_spacing == (1, 1, 2)
    assert found.spacings[4] == (2, 1, 3)
    assert found.voxels == 3 * 6000
    assert found.label_cases == {"one": 3, "two": 2, "never": 0}
    assert found.label_ml == {"one": 0.2, "two": 0.04, "never": 0.0}
    # Foreground of all cases: 204 voxels of 10, 40 of 20.
    statistics = found.channels["t1"]
    values = np.array([10.0] * 204 + [20.0] * 40)
    assert (statistics.low, statistics.median, statistics.high) == (10, 10, 20)
    assert statistics.mean == pytest.approx(values.mean(), rel=1e-5)
    assert statistics.deviation == pytest.approx(values.std(), rel=1e-5)
    assert found.annotated_share == 1


def test_each_case_by_itself(spec: Spec, cases: tuple[Case, ...]) -> None:
    found, facts = survey(spec, cases)
    assert found == take_fingerprint(spec, cases)
    assert list(facts) == ["a1", "a2", "b1"]
    assert facts["a1"].label_ml == {"one": 0.2, "two": 0.04}
    assert facts["a2"] == CaseFacts(label_ml={"one": 0.024})


def test_json_round_trip(spec: Spec, cases: tuple[Case, ...]) -> None:
    found = take_fingerprint(spec, cases)
    assert Fingerprint.model_validate(json.loads(json.dumps(found.model_dump(mode="json"), sort_keys=True))) == found


def test_unannotated_voxels_do_not_count(tmp_path: Path, make_spec: Make) -> None:
    mask = np.zeros((4, 4, 4), np.uint8)
    mask[0], mask[1] = 1, 9
    case = write(tmp_path, "x", mask, affine=np.eye(4))
    found = take_fingerprint(make_spec(labels={"one": 1}, ignore=9), (case,))
    assert found.annotated_share == 0.75
    assert (found.channels["t1"].low, found.channels["t1"].high) == (10, 10)


def test_every_case_that_cannot_be_used_is_named(spec: Spec, cases: tuple[Case, ...]) -> None:
    cases[0].images[0].write_bytes(b"broken")
    unlabelled = Case("z9", cases[2].images, None, "z")
    with pytest.raises(SpecError) as caught:
        take_fingerprint(spec, (*cases, unlabelled))
    message = str(caught.value)
    assert message.startswith("2 of 4 cases cannot be used")
    assert "case a1: " in message
    assert "case z9: it has no mask (LABEL_MISSING)" in message
    assert str(cases[0].images[0].parent) not in message


def test_no_case_at_all(spec: Spec) -> None:
    with pytest.raises(SpecError, match="dataset toy: there is no case to learn from"):
        take_fingerprint(spec, ())


@pytest.mark.parametrize("count", [1, 4999, 5000, 5001, 9999, 20001])
def test_samples_are_spread_over_all_of_the_foreground(count: int) -> None:
    values = np.arange(count, dtype=np.float64)
    found = sample(values, np.ones(count, bool))
    assert len(found) == min(count, SAMPLES_PER_CASE)
    assert found[0] == 0
    assert found[-1] == count - 1
    assert abs(np.mean(found) - values.mean()) < 0.01 * count
    assert np.diff(found).max(initial=0) <= -(-count // SAMPLES_PER_CASE) + 1


def test_without_foreground_all_voxels_are_sampled() -> None:
    assert sample(np.array([3.0, 4.0]), np.zeros(2, bool)) == [3, 4]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_thickness_of_a_sheet_is_its_own(axis: int) -> None:
    mask = np.zeros((60, 60, 60), np.uint8)
    np.moveaxis(mask, axis, 0)[20:24] = 3
    spacing = (0.5, 1.0, 2.0)
    found = thickness(mask, spacing, {"sheet": 3, "absent": 5}, {"sheet": int((mask == 3).sum()), "absent": 0})
    assert list(found) == ["sheet"]
    assert found["sheet"] == pytest.approx(4 * spacing[axis], rel=0.35), "less by the sheet's own edges only"
    assert found["sheet"] <= 4 * spacing[axis]


def test_the_thickness_of_blocks_by_hand() -> None:
    mask = np.zeros((9, 9, 9), np.uint8)
    mask[2:5, 2:5, 2:5], mask[5:7, 2:4, 2:4] = 1, 2  # they touch each other
    mask[8, 8, 8] = 7  # in the corner of the image
    labels = {"a": 1, "b": 2, "c": 7}
    found = thickness(mask, (1, 1, 1), labels, {"a": 27, "b": 8, "c": 1})
    assert found == {"a": 1.0, "b": pytest.approx(2 * 8 / 24, rel=1e-5), "c": pytest.approx(2 / 6, rel=1e-5)}
    flat = thickness(mask[:, :, 2:3], (1, 1, 1), labels, {"a": 9, "b": 4, "c": 0})
    assert flat == {"a": pytest.approx(18 / 12), "b": pytest.approx(8 / 8)}, "a single slice has no faces in front"


def test_a_fingerprint_from_before_keeps_its_content(spec: Spec, cases: tuple[Case, ...]) -> None:
    whole = take_fingerprint(spec, cases).model_dump(mode="json")
    assert set(whole["label_thickness"]) == {"one", "two"}
    old = {key: value for key, value in whole.items() if key != "label_thickness"}
    assert Fingerprint.model_validate(old).model_dump(mode="json") == old


def test_tidy_numbers() -> None:
    assert [tidy(x) for x in (0.1 + 0.2, 1 / 3, 4.0000001e-6, 123456.789, 0.0)] == [0.3, 0.333333, 4e-6, 123457, 0]
