"""Folds and draws of several datasets: a tenth of each validates, small ones are drawn more often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from medseg.joined import JoinedCase, dataset_of
from medseg.planning.fingerprint import CaseFacts
from medseg.spec import Case, Spec
from medseg.training.folds import balanced, make_folds, repeats


@pytest.fixture
def cohort(make_spec: Callable[..., Spec]) -> Callable[..., list[JoinedCase]]:
    """``cohort(a=10, b=3)``: that many cases of each dataset, one a patient."""

    def make(**sizes: int) -> list[JoinedCase]:
        return [
            JoinedCase(
                f"{name}{n}", (), None, f"{name}.{n}", own=make_spec(name=name), own_id=f"{n}", own_patient=f"{n}"
            )
            for name, size in sizes.items()
            for n in range(size)
        ]

    return make


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"a": 40, "b": 10}, {"a": 4, "b": 1}),
        ({"a": 300, "b": 8}, {"a": 10, "b": 1}),
        ({"a": 10, "b": 1}, {"a": 1}),
        ({"a": 1, "b": 1}, {"a": 1}),
    ],
)
def test_a_single_split_takes_of_each_dataset(
    cohort: Callable[..., list[JoinedCase]], sizes: dict[str, int], expected: dict[str, int]
) -> None:
    fold = make_folds(cohort(**sizes), folds=None, seed=0)[0]
    held = Counter(map(dataset_of, fold.validation))
    assert sum(held.values()) == sum(expected.values())
    assert len(held) == len(expected)
    assert held == expected or sizes["a"] == 1
    assert len(fold.train) + len(fold.validation) == sum(sizes.values())


def test_folds_share_datasets(cohort: Callable[..., list[JoinedCase]]) -> None:
    cases = cohort(a=20, b=5)
    facts = {case.id: CaseFacts(label_ml={}, origin={"dataset": dataset_of(case)}) for case in cases}
    for fold in make_folds(cases, folds=5, seed=1, facts=facts):
        assert Counter(map(dataset_of, fold.validation)) == {"a": 4, "b": 1}


@pytest.mark.parametrize(("small", "times"), [(100, 1), (50, 1), (25, 2), (11, 3), (1, 10)])
def test_cases_of_a_small_dataset_stand_more_often(
    cohort: Callable[..., list[JoinedCase]], small: int, times: int
) -> None:
    cases = cohort(a=100, b=small)
    assert repeats(cases) == {"a": 1, "b": times}
    fold = balanced(make_folds(cases, folds=None, seed=0)[0])
    assert set(Counter(case.id for case in fold.train if dataset_of(case) == "a").values()) == {1}


def test_one_dataset_is_left_as_it_is() -> None:
    cases = [Case(f"c{n}", (), None, f"p{n}") for n in range(30)]
    fold = make_folds(cases, folds=None, seed=3)[0]
    assert repeats(cases) == {"": 1}
    assert balanced(fold) == fold
