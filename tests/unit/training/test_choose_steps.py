"""Choice of post-processing: the Dice of every candidate is that of the steps as predict applies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from medseg.bundle import PostStep
from medseg.inference.postprocess import postprocess
from medseg.spec import Spec
from medseg.training.choose_steps import MARGIN, MIN_CASES, StepTrial, evidence_csv, told
from medseg.volume import Volume

Make = Callable[..., Any]
AFFINE = np.diag([0.7, 1.1, 3.0, 1.0])


@pytest.fixture
def trial(make_spec: Make, make_fingerprint: Make) -> Callable[..., StepTrial]:
    def make(**options: Any) -> StepTrial:
        spec = make_spec(labels={"a": 1, "b": 7}, **options)
        # 0.1 mL: the sizes tried are 1, 5 and 20 mm³, and a voxel has 2.31
        found = make_fingerprint(labels=("a", "b")).model_copy(update={"label_ml": {"a": 0.1, "b": 0.1}})
        return StepTrial(spec, found)

    return make


def noise(seed: int, share: float, shape: tuple[int, int, int] = (13, 11, 9)) -> Any:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(3, *shape)), (0, 1, 1, 1))
    smooth[0] = np.quantile(smooth[1:].max(0), 1 - share)
    return np.array([0, 1, 7], np.uint8)[smooth.argmax(0)]


def volume(array: Any) -> Volume:
    return Volume(np.asarray(array)[None], AFFINE)


@pytest.mark.parametrize("ignore", [None, 9])
@pytest.mark.parametrize("seed", range(12))
def test_each_candidate_is_scored_as_predict_would_apply_it(
    trial: Callable[..., StepTrial], seed: int, ignore: int | None
) -> None:
    made = trial(**({} if ignore is None else {"ignore": ignore}))
    found, truth = volume(noise(seed, 0.3 + 0.05 * seed)), noise(seed + 100, 0.5)
    if ignore is not None:
        truth[:, :3] = ignore
    made.add(found, volume(truth))
    counted = truth != ignore
    for label, value in made.spec.foreground.items():
        fill = PostStep(kind="fill_holes", labels=(label,))
        removals: list[list[PostStep]] = [[], *([step] for step in made.removals[label])]
        for number, steps in enumerate(way for removal in removals for way in (removal, [*removal, fill])):
            after = (postprocess(found, steps, made.spec).array[0] == value) & counted
            wanted = truth == value
            dice = 2 * (after & wanted).sum() / (after.sum() + wanted.sum())
            assert made.dice[label][0][number] == pytest.approx(dice, abs=1e-12), (label, steps)
    assert [str(step) for step in made.removals["a"]] == [
        "largest_component of a",
        "min_volume 1 of a",
        "min_volume 5 of a",
        "min_volume 20 of a",
    ]


def scene(specks: int, hole: bool, *, label: int = 1, two: bool = False) -> tuple[Volume, Volume]:
    """A block with false alarms beside it and perhaps a hole; with `two`, a second true block as large."""
    truth = np.zeros((20, 14, 14), np.uint8)
    truth[1:7, 1:7, 1:7] = label
    if two:
        truth[10:16, 1:7, 1:7] = label
    found = truth.copy()
    found[2 : 2 + specks, 10, 10] = label
    if hole:
        found[3:5, 3:5, 3:5] = 0
    return volume(found), volume(truth)


def run(made: StepTrial, scenes: list[tuple[Volume, Volume]]) -> list[str]:
    for found, truth in scenes:
        made.add(found, truth)
    return [str(step) for step in made.choose()[0]]


def test_what_helps_is_kept_and_what_harms_is_not(trial: Callable[..., StepTrial]) -> None:
    assert run(trial(), [scene(5, False)] * 6) == ["largest_component of a"]
    assert run(trial(), [scene(0, True)] * 6) == ["fill_holes of a"]
    assert run(trial(), [scene(5, True)] * 6) == ["largest_component of a", "fill_holes of a"]
    assert run(trial(), [scene(5, False, two=True)] * 6) == ["min_volume 20 of a"], "both blocks are true"
    assert run(trial(), [scene(0, False)] * 6) == []
    assert run(trial(), [scene(5, True, label=7)] * 6) == ["largest_component of b", "fill_holes of b"]


def test_a_gain_below_the_margin_is_not_worth_a_step(trial: Callable[..., StepTrial]) -> None:
    made = trial()
    assert run(made, [scene(1, False), *[scene(0, False)] * 9]) == []
    _, evidence = made.choose()
    assert 0 < evidence[0].after - evidence[0].before < MARGIN


def test_one_large_gain_does_not_outweigh_many_losses(trial: Callable[..., StepTrial]) -> None:
    truth = np.zeros((20, 14, 14), np.uint8)
    truth[1, 1, 1] = 1
    found = truth.copy()
    found[8:11, 8:11, 8:11] = 1  # one case with a false block: without the small one nothing true is left
    made = trial()
    assert run(made, [scene(5, False), *[(volume(found), volume(truth))] * 5]) == []


def test_false_alarms_of_an_absent_label_count(trial: Callable[..., StepTrial]) -> None:
    empty = volume(np.zeros((20, 14, 14), np.uint8))
    found, truth = scene(0, False)
    speck = np.zeros((20, 14, 14), np.uint8)
    speck[3, 3, 3:5] = 1
    made = trial()
    assert run(made, [(found, truth)] * 4 + [(volume(speck), empty)] * 3 + [(empty, empty)] * 9) == [
        "min_volume 5 of a"
    ]
    row = next(row for row in made.choose()[1] if row.kept)
    assert (row.n, row.before, row.after) == (7, pytest.approx(4 / 7), 1.0), "cases with nothing at all do not count"


def test_a_label_that_is_missed_stays_missed(trial: Callable[..., StepTrial]) -> None:
    empty = volume(np.zeros((20, 14, 14), np.uint8))
    made = trial()
    assert run(made, [(empty, scene(0, False)[1])] * 6) == []
    assert {row.before for row in made.choose()[1]} == {0.0}


def test_few_cases_choose_nothing_and_say_so(trial: Callable[..., StepTrial]) -> None:
    made = trial()
    assert run(made, [scene(5, True)] * (MIN_CASES - 1)) == []
    assert "none chosen, 4 validation cases of a single split are too few (5 are needed)" in told((), made, folds=1)


def test_a_single_split_is_called_weak_and_folds_are_not(trial: Callable[..., StepTrial]) -> None:
    made = trial()
    run(made, [scene(5, True)] * 6)
    steps, evidence = made.choose()
    alone = (
        "post-processing: largest_component of a; fill_holes of a (6 validation cases of a single split; that is weak"
    )
    assert told(steps, made, folds=1).startswith(alone)
    assert "(6 out-of-fold cases)" in told(steps, made, folds=5)
    table = evidence_csv(evidence).splitlines()
    assert table[0] == "label,step,n,before,after,better,worse,kept"
    assert len(table) == 6
    assert table[1].startswith("a,largest_component of a,6,0.9")
    assert table[1].endswith(",6,0,True")


def test_nothing_is_chosen_from_a_part_of_the_cases(trial: Callable[..., StepTrial]) -> None:
    made = trial()
    run(made, [scene(5, True)] * 6)
    made.complete = False
    assert made.choose() == ((), [])
    assert told((), made, folds=5) == "post-processing: none chosen, the budget left no time to try it"


def test_a_spec_without_volumes_tries_no_size(make_spec: Make, make_fingerprint: Make) -> None:
    spec: Spec = make_spec(labels={"rare": 3})
    found = make_fingerprint(labels=("rare",)).model_copy(update={"label_ml": {"rare": 0.0}})
    assert [str(step) for step in StepTrial(spec, found).removals["rare"]] == ["largest_component of rare"]


def test_labels_that_the_reference_does_not_tell_of_are_not_tried(make_spec: Any, make_fingerprint: Any) -> None:
    spec = make_spec({"a": 1, "b": 2})
    trial = StepTrial(spec, make_fingerprint(labels=("a", "b")))
    found = Volume(np.array([[[[1, 2]]]], np.uint8), np.eye(4))
    trial.add(found, found, {"a"})
    assert {label: len(rows) for label, rows in trial.dice.items()} == {"a": 1, "b": 0}
