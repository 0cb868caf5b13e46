"""Folds: whole patients, every case validated once, the same split whenever the data are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.errors import TrainingError
from medseg.planning.fingerprint import CaseFacts
from medseg.spec import Case
from medseg.training.folds import Fold, make_folds, refuse_leaks, traits


def case(name: str, patient: str, split: str = "train") -> Case:
    return Case(name, (Path(name),), None, patient, split)  # type: ignore[arg-type]


def cohort(sizes: list[int]) -> list[Case]:
    """Patient p0 with sizes[0] cases, and so on."""
    return [case(f"p{p}_{n}", f"p{p}") for p, size in enumerate(sizes) for n in range(size)]


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=30),
    folds=st.one_of(st.none(), st.integers(2, 8)),
    seed=st.integers(0, 5),
)
def test_patients_are_never_divided_and_every_case_has_its_place(
    sizes: list[int], folds: int | None, seed: int
) -> None:
    cases = cohort(sizes)
    if folds is not None and folds > len(sizes):
        with pytest.raises(TrainingError, match=f"{len(sizes)} patient.*at least {folds} are needed"):
            make_folds(cases, folds=folds, seed=seed)
        return
    made = make_folds(cases, folds=folds, seed=seed)
    assert [fold.number for fold in made] == list(range(folds or 1))
    for fold in made:
        assert fold.train
        assert fold.validation
        assert {c.patient for c in fold.train}.isdisjoint(c.patient for c in fold.validation)
        assert sorted(c.id for c in (*fold.train, *fold.validation)) == sorted(c.id for c in cases)
    if folds is not None:
        validated = [c.id for fold in made for c in fold.validation]
        assert sorted(validated) == sorted(c.id for c in cases), "every case is validated exactly once"
        counts = [len({c.patient for c in fold.validation}) for fold in made]
        assert max(counts) - min(counts) <= 1


def facts_of(cases: list[Case], rows: dict[str, dict[str, float]], **origin: dict[str, str]) -> dict[str, CaseFacts]:
    """Facts of each case by its patient."""
    return {c.id: CaseFacts(label_ml=rows.get(c.patient, {}), origin=origin.get(c.patient, {})) for c in cases}


def share(folds: list[Fold], wanted: Callable[[str], bool]) -> list[int]:
    """In each fold, the validation patients that are wanted."""
    return [len({c.patient for c in fold.validation if wanted(c.patient)}) for fold in folds]


@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_a_rare_label_and_a_rare_scanner_are_in_every_fold(folds: int, seed: int) -> None:
    cases = cohort([1, 2] * 15)
    rare, foreign = {f"p{n}" for n in range(6)}, {f"p{n}" for n in range(4, 12)}
    rows = {c.patient: {"organ": 1.0, **({"tumour": 0.1} if c.patient in rare else {})} for c in cases}
    origin = {c.patient: {"Manufacturer": "B" if c.patient in foreign else "A"} for c in cases}
    made = make_folds(cases, folds=folds, seed=seed, facts=facts_of(cases, rows, **origin))
    for group in (rare, foreign):
        counts = share(made, group.__contains__)
        assert sum(counts) == len(group)
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_small_and_large_labels_are_spread(seed: int) -> None:
    cases = cohort([1] * 30)
    rows = {c.patient: {"organ": float(int(c.patient[1:]) ** 3)} for c in cases}
    made = make_folds(cases, folds=5, seed=seed, facts=facts_of(cases, rows))
    for third in range(3):
        assert share(made, lambda name, third=third: int(name[1:]) // 10 == third) == [2] * 5  # type: ignore[misc]


@given(
    held=st.lists(st.sets(st.sampled_from("abcd")), min_size=4, max_size=30),
    folds=st.integers(2, 4),
    seed=st.integers(0, 3),
)
def test_stratified_folds_are_folds(held: list[set[str]], folds: int, seed: int) -> None:
    cases = cohort([1 + n % 2 for n in range(len(held))])
    facts = facts_of(cases, {f"p{n}": dict.fromkeys(sorted(x), 1.0 + n) for n, x in enumerate(held)})
    made = make_folds(cases, folds=folds, seed=seed, facts=facts)
    again = make_folds(cases[::-1], folds=folds, seed=seed, facts=dict(reversed(facts.items())))
    for first, second in zip(made, again, strict=True):
        assert {c.id for c in first.validation} == {c.id for c in second.validation}, "the order does not matter"
        assert {c.patient for c in first.train}.isdisjoint(c.patient for c in first.validation)
    assert sorted(c.id for fold in made for c in fold.validation) == sorted(c.id for c in cases)
    counts = share(made, lambda name: True)
    assert max(counts) - min(counts) <= 1


def test_where_all_patients_are_alike_the_folds_are_those_without_facts() -> None:
    cases = cohort([1] * 17)
    facts = facts_of(cases, {c.patient: {"organ": 2.0} for c in cases})
    assert make_folds(cases, folds=4, seed=2, facts=facts) == make_folds(cases, folds=4, seed=2)
    assert traits(cases, facts) == {}


def test_a_single_split_is_that_of_the_names_alone() -> None:
    cases = cohort([1] * 17)
    facts = facts_of(cases, {c.patient: {"organ": float(c.patient[1:])} for c in cases})
    assert make_folds(cases, folds=None, seed=2, facts=facts) == make_folds(cases, folds=None, seed=2)


def test_the_order_of_the_cases_does_not_matter() -> None:
    cases = cohort([1] * 20)
    first, second = (make_folds(c, folds=4, seed=1) for c in (cases, cases[::-1]))
    for a, b in zip(first, second, strict=True):
        assert {c.id for c in a.validation} == {c.id for c in b.validation}


def test_the_seed_decides() -> None:
    cases = cohort([1] * 20)
    held = [{c.id for c in make_folds(cases, folds=None, seed=seed)[0].validation} for seed in range(4)]
    assert len({frozenset(names) for names in held}) > 1


@pytest.mark.parametrize(("patients", "held"), [(2, 1), (5, 1), (20, 2), (160, 16), (500, 20)])
def test_a_tenth_of_the_patients_validates(patients: int, held: int) -> None:
    fold = make_folds(cohort([1] * patients), folds=None, seed=0)[0]
    assert len(fold.validation) == held


def test_one_more_patient_moves_hardly_any_other() -> None:
    before = make_folds(cohort([1] * 100), folds=None, seed=0)[0]
    after = make_folds(cohort([1] * 101), folds=None, seed=0)[0]
    kept = {c.id for c in before.validation} & {c.id for c in after.validation}
    assert len(kept) >= len(before.validation) - 1


@pytest.mark.parametrize("folds", [-1, 0, 1])
def test_fewer_than_two_folds_are_refused(folds: int) -> None:
    with pytest.raises(TrainingError, match=f"folds {folds}: at least 2"):
        make_folds(cohort([1] * 5), folds=folds, seed=0)


def test_one_patient_is_too_few_however_many_cases() -> None:
    with pytest.raises(TrainingError, match=r"1 patient\(s\) to learn from; at least 2 are needed"):
        make_folds(cohort([5]), folds=None, seed=0)


def test_a_patient_on_both_sides_is_refused_and_named() -> None:
    with pytest.raises(TrainingError, match="p1") as caught:
        refuse_leaks([case("a", "p1"), case("b", "p1", "test"), case("c", "p2")])
    assert caught.value.code == "PATIENT_IN_TWO_SPLITS"
    refuse_leaks([case("a", "p1"), case("b", "p1"), case("c", "p2", "test")])
