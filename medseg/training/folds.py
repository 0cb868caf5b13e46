"""Who learns and who validates: always whole patients, and the same ones whenever the data are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from medseg.errors import TrainingError
from medseg.spec import Case

VALIDATION_SHARE = 0.1
MAX_VALIDATION_PATIENTS = 20


@dataclass(frozen=True)
class Fold:
    """One training: cases to learn from and cases to validate on."""

    number: int
    train: tuple[Case, ...]
    validation: tuple[Case, ...]


def make_folds(cases: Sequence[Case], *, folds: int | None, seed: int) -> list[Fold]:
    """Split cases by patient into `folds` folds, or (None) into one with a tenth of the patients for validation.

    Patients are ordered by a hash of seed and name, so that adding patients moves few others.

    Raises
    ------
    TrainingError : fewer patients than folds, or than two; fewer than two folds.
    """
    if folds is not None and folds < 2:
        raise TrainingError(f"folds {folds}: at least 2 are needed; leave the option out for a single training")
    patients = sorted({case.patient for case in cases}, key=lambda name: _rank(seed, name))
    needed = folds or 2
    if len(patients) < needed:
        raise TrainingError(
            f"{len(patients)} patient(s) to learn from; at least {needed} are needed "
            f"({'one for each fold' if folds else 'one to learn from and one to validate on'})"
        )
    if folds is None:
        held = max(1, min(MAX_VALIDATION_PATIENTS, round(VALIDATION_SHARE * len(patients))))
        groups = [set(patients[:held])]
    else:
        groups = [set(patients[number::folds]) for number in range(folds)]
    return [
        Fold(
            number,
            tuple(case for case in cases if case.patient not in group),
            tuple(case for case in cases if case.patient in group),
        )
        for number, group in enumerate(groups)
    ]


def refuse_leaks(cases: Sequence[Case]) -> None:
    """Raise TrainingError when a patient stands in train and in test: the score would be a lie."""
    splits: dict[str, set[str]] = {}
    for case in cases:
        splits.setdefault(case.patient, set()).add(case.split)
    if leaks := sorted(patient for patient, found in splits.items() if len(found) > 1):
        raise TrainingError(
            f"patient(s) {', '.join(leaks[:5])} have cases for training and for testing; "
            "move all cases of a patient to one side (splits in the spec, or --splits)",
            code="PATIENT_IN_TWO_SPLITS",
        )


def _rank(seed: int, patient: str) -> str:
    return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()
