"""The quality estimate of a training: fitted on the cases that each network has not seen, as their masks end up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg.bundle import PostStep
from medseg.inference.postprocess import postprocess
from medseg.joined import annotated
from medseg.quality.fit import MIN_CASES, Fitted, Observed, fit_quality
from medseg.quality.shape import Shapes
from medseg.quality.signs import Notes
from medseg.readers.nifti import read_nifti
from medseg.spec import Case, Spec
from medseg.studies import read_study
from medseg.volume import Volume


@dataclass(frozen=True)
class Seen:
    """One predicted validation case.

    Attributes
    ----------
    mask : file of the mask as the network made it.
    notes : taken while it was predicted.
    reference : what its true labels are like.
    """

    case: Case
    mask: Path
    notes: Notes
    reference: Shapes


def fit_seen(
    seen: Sequence[Seen],
    spec: Spec,
    steps: Sequence[PostStep],
    dice: Mapping[str, Mapping[str, float]],
    *,
    folds: int,
    mirror: bool,
) -> Fitted | None:
    """Fit the estimate; None where there are too few cases.

    Parameters
    ----------
    steps : the post-processing that the model will do; signs and Dice are of masks after it.
    dice : label -> case id -> Dice of the mask as the network made it; cases with neither mask nor truth left out.
    """
    if len(seen) < MIN_CASES:
        return None
    observed = [_observed(one, spec, steps, dice) for one in seen]
    return fit_quality(observed, list(spec.foreground), folds=folds, mirror=mirror)


def _observed(one: Seen, spec: Spec, steps: Sequence[PostStep], dice: Mapping[str, Mapping[str, float]]) -> Observed:
    made = read_nifti(one.mask)
    mask = postprocess(made.with_array(made.array.astype(np.int32)), steps, spec)
    case = one.case
    known = frozenset(annotated(spec, case))
    if steps:
        reference = read_study(spec, case).mask
        assert reference is not None, "cases without a mask do not learn"
        scores = {label: value for label, value in label_dice(mask, reference, spec).items() if label in known}
    else:
        scores = {label: rows[case.id] for label, rows in dice.items() if case.id in rows}
    return Observed(case.id, case.patient, one.notes.signs(mask), one.reference, scores, known)


def label_dice(found: Volume, truth: Volume, spec: Spec) -> dict[str, float]:
    """Return label -> Dice of two label maps on one grid, where "ignore" does not count; absent in both: left out."""
    known = np.ones(truth.shape, bool) if spec.ignore is None else truth.array[0] != spec.ignore
    scores: dict[str, float] = {}
    for label, value in spec.foreground.items():
        first, second = (found.array[0] == value) & known, truth.array[0] == value
        total = int(np.count_nonzero(first)) + int(np.count_nonzero(second))
        if total:
            scores[label] = 2 * int(np.count_nonzero(first & second)) / total
    return scores


def told(summary: Mapping[str, Any] | None, *, cases: int, known: int = 0) -> str:
    """Say in a line how good the estimate is; `known` cases were left out."""
    if summary is None:
        without = f" without the {known} that the model knew before" if known else ""
        return (
            f"quality estimate: none, {cases} cases{without} are too few ({MIN_CASES} are needed; --folds 5 gives more)"
        )
    whole, worst = summary["case_mean"], summary["worst"]
    if whole["spearman"] is None or worst is None:
        return f"quality estimate: {summary['cases']} cases, whose Dice it cannot tell apart"
    basis = "out-of-fold cases" if summary["folds"] > 1 else "validation cases of a single split"
    return (
        f"quality estimate: Spearman {whole['spearman']:.2f} of expected and real Dice ({whole['n']} {basis}); "
        f"{worst['found']} of the {worst['worst']} worst are in the {worst['looked_at']} lowest"
    )
