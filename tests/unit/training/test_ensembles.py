"""The rule that chooses: tables of which the right answer is known, and how often chance alone would win."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from medseg.errors import ConfigError
from medseg.evaluation.table import Row, Target, make_evaluation
from medseg.training.ensembles import MARGIN, MIN_PATIENTS, Candidate, choose, repeat

LABELS = ("ball", "box")


def candidate(name: str, dice: Any, *, seconds: float = 1.0, patients: Sequence[str] = ()) -> Candidate:
    """`name` "a+b"; `dice` (cases,) or (cases, labels), NaN: a right empty mask."""
    table = np.asarray(dice, float)
    table = np.repeat(table[:, None], len(LABELS), 1) if table.ndim == 1 else table
    rows = []
    for number, values in enumerate(table):
        patient = patients[number] if patients else f"p{number}"
        for label, value in zip(LABELS, values, strict=True):
            empty = bool(np.isnan(value))
            told = (None, "excluded", "BOTH_EMPTY") if empty else (float(value), "used", "")
            rows.append(Row(f"c{number}", patient, label, "dice", "", *told))
    targets = [Target(label, (n + 1,), "#000000") for n, label in enumerate(LABELS)]
    names = tuple(name.split("+"))
    return Candidate(names, make_evaluation(targets, rows, {}), 5 * len(names), seconds)


def noisy(mean: float, spread: float = 0.03, cases: int = 20, seed: int = 0) -> Any:
    return (mean + spread * np.random.default_rng(seed).standard_normal(cases)).clip(0, 1)


def test_an_ensemble_that_raises_every_case_is_chosen() -> None:
    a, b = noisy(0.80), noisy(0.79, seed=1)
    found = choose([candidate("a", a), candidate("b", b), candidate("a+b", np.maximum(a, b) + 0.01)])
    assert (found.best.name, found.chosen.name) == ("a", "a + b")
    gain = found.gains["a + b"]
    assert gain.ci_low is not None
    assert gain.mean_difference == pytest.approx((np.maximum(a, b) + 0.01 - a).mean())
    assert gain.ci_low >= 0.01 - 1e-9
    assert found.level == 0.95
    assert set(found.gains) == {"b", "a + b"}


def test_a_gain_within_noise_leaves_the_best_single_one() -> None:
    a = noisy(0.8)
    luck = 0.03 * np.random.default_rng(2).standard_normal(20)
    lucky = a + 0.003 + luck - luck.mean()
    found = choose([candidate("a", a), candidate("b", a - 0.01), candidate("a+b", lucky)])
    assert found.gains["a + b"].mean_difference > MARGIN  # type: ignore[operator]
    assert found.gains["a + b"].ci_low < 0  # type: ignore[operator]
    assert found.chosen is found.best
    assert found.chosen.name == "a"


def test_a_certain_gain_below_the_margin_is_not_worth_a_second_model() -> None:
    a = noisy(0.8)
    for gain, expected in ((0.9 * MARGIN, "a"), (1.1 * MARGIN, "a + b")):
        found = choose([candidate("a", a), candidate("b", a - 0.01), candidate("a+b", a + gain)])
        assert found.gains["a + b"].ci_low > 0  # type: ignore[operator]
        assert found.chosen.name == expected


def test_a_larger_ensemble_has_to_beat_the_smaller_one() -> None:
    a = noisy(0.8)
    alone = [candidate("a", a), candidate("b", a - 0.01), candidate("c", a - 0.02)]
    pairs = [candidate("a+b", a + 0.02), candidate("a+c", a + 0.01), candidate("b+c", a)]
    assert choose([*alone, *pairs, candidate("a+b+c", a + 0.021)]).chosen.name == "a + b"
    assert choose([*alone, *pairs, candidate("a+b+c", a + 0.03)]).chosen.name == "a + b + c"
    assert choose([*alone, *pairs, candidate("a+b+c", a + 0.03)]).level == pytest.approx(1 - 0.05 / 4)


def test_three_may_win_where_no_pair_does() -> None:
    a = noisy(0.8)
    alone = [candidate("a", a), candidate("b", a - 0.01), candidate("c", a - 0.02)]
    pairs = [candidate(name, a - 0.005) for name in ("a+b", "a+c", "b+c")]
    assert choose([*alone, *pairs, candidate("a+b+c", a + 0.02)]).chosen.name == "a + b + c"


def test_cases_of_one_patient_are_not_many_patients() -> None:
    """Thirty cases that all gain, of five patients: nothing is proven."""
    a = noisy(0.8, cases=30)
    for count, expected in ((MIN_PATIENTS - 1, "a"), (MIN_PATIENTS, "a + b")):
        of = [f"p{n % count}" for n in range(30)]
        rows = [candidate("a", a, patients=of), candidate("b", a - 0.1, patients=of)]
        assert choose([*rows, candidate("a+b", a + 0.05, patients=of)]).chosen.name == expected


def test_the_faster_of_equals() -> None:
    a = noisy(0.8)
    assert choose([candidate("slow", a, seconds=3), candidate("fast", a, seconds=1)]).chosen.name == "fast"
    assert choose([candidate("slow", a + 0.001, seconds=3), candidate("fast", a, seconds=1)]).chosen.name == "slow"


def test_mean_dice_is_that_of_evaluate() -> None:
    """Mean over labels of the mean over the cases that have a value; not over all rows."""
    first = np.array([[0.9, 0.4], [0.8, np.nan], [0.7, np.nan]])
    second = np.array([[0.7, 0.5], [0.7, np.nan], [0.7, np.nan]])
    found = choose([candidate("a", first), candidate("b", second)])
    assert found.best.dice == pytest.approx((0.8 + 0.4) / 2)
    assert found.best.name == "a"  # (0.7 + 0.5) / 2 is as much, and over all rows b would have less: a stands first
    assert found.gains["b"].n_pairs == 3


def test_an_ensemble_that_ends_a_false_alarm_gains() -> None:
    """Where the reference is empty a right empty mask has no Dice, a false alarm has 0; paired, that is a gain."""
    a = np.repeat(noisy(0.8)[:, None], 2, 1)
    alarm, calm = a.copy(), a.copy()
    alarm[:, 1], calm[:, 1] = 0.0, np.nan
    found = choose([candidate("a", alarm), candidate("b", alarm - 1e-3), candidate("a+b", calm)])
    assert found.gains["a + b"].mean_difference == pytest.approx(0.5)
    assert found.chosen.name == "a + b"


def test_no_label_anywhere_chooses_the_first() -> None:
    nothing = np.full((8, 2), np.nan)
    rows = [candidate(name, nothing) for name in ("a", "b", "a+b")]
    assert choose(rows).chosen.name == "a"
    assert repeat(rows, {f"c{n}": n % 2 for n in range(8)}).dice is None  # type: ignore[union-attr]


def test_other_cases_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        choose([candidate("a", noisy(0.8, cases=8)), candidate("b", noisy(0.7, cases=9))]).gains  # noqa: B018
    assert caught.value.code == "DIFFERENT_CASES"


def test_chance_alone_rarely_makes_an_ensemble() -> None:
    """Four configurations and their eleven ensembles, equal but for noise: 5 % at most should be taken.

    The bootstrap of 20 patients is a little too sure of itself, and the draws are few: hence the room.
    """
    taken = 0
    names = [*"abcd"]
    groups = ["+".join(g) for n in range(1, 5) for g in itertools.combinations(names, n)]
    for seed in range(40):
        rng = np.random.default_rng(seed)
        easy = rng.uniform(0.6, 0.9, 20)
        rows = [candidate(name, (easy + 0.02 * rng.standard_normal(20)).clip(0, 1)) for name in groups]
        taken += len(choose(rows).chosen.names) > 1
    assert taken <= 4


def test_repeated_scores_each_fold_with_what_the_others_chose() -> None:
    """b is better in fold 0 only, by far: without it a is chosen, which there is bad."""
    folds = {f"c{n}": n // 10 for n in range(30)}
    a, b = np.full(30, 0.8), np.full(30, 0.7)
    a[:10], b[:10] = 0.3, 0.9
    rows = [candidate("a", a), candidate("b", b)]
    assert choose(rows).chosen.name == "b"
    found = repeat(rows, folds)
    assert found is not None
    assert found.counts == {"a": 1, "b": 2}
    assert found.dice == pytest.approx((0.3 + 0.7 + 0.7) / 3)
    assert repeat(rows, dict.fromkeys(folds, 0)) is None
