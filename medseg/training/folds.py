"""Who learns and who validates: always whole patients, and the same ones whenever the data are the same.

Folds are alike as far as the patients allow: labels, their volumes, the makers of the scanners and (where there are
several) the datasets are spread over them by the iterative stratification of Sechidis et al. (ECML PKDD 2011), which
gives the rarest trait its place first.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medseg.errors import TrainingError
from medseg.joined import dataset_of
from medseg.planning.fingerprint import CaseFacts
from medseg.spec import Case

VALIDATION_SHARE = 0.1
MAX_VALIDATION_PATIENTS = 20


@dataclass(frozen=True)
class Fold:
    """One training: cases to learn from (some several times, see `balanced`) and cases to validate on."""

    number: int
    train: tuple[Case, ...]
    validation: tuple[Case, ...]


def make_folds(
    cases: Sequence[Case], *, folds: int | None, seed: int, facts: Mapping[str, CaseFacts] | None = None
) -> list[Fold]:
    """Split cases by patient into `folds` folds, or (None) into one with a tenth of the patients for validation.

    Of several datasets that is a tenth of each, as far as it has two patients.

    Patients are ordered by a hash of seed and name, so that adding patients moves few others out of a single split.

    Parameters
    ----------
    facts : case id -> what it holds; with it, each of several folds gets its share of every trait (see `traits`). The
        folds have the same number of patients, up to one, with it or without.

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
            f"({'one for each fold' if folds else 'one to learn from and one to validate on'}): add cases"
            " of other patients",
            code="TOO_FEW_PATIENTS",
        )
    if folds is None:
        groups = [_held(cases, patients)]
    elif found := traits(cases, facts or {}):
        groups = _stratified(patients, found, folds)
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


def _held(cases: Sequence[Case], patients: Sequence[str]) -> set[str]:
    """Return the patients of a single split that validate; `patients` in the order in which they are taken."""
    owners = {case.patient: dataset_of(case) for case in reversed(cases)}
    names = dict.fromkeys(owners[patient] for patient in patients)
    most = max(1, MAX_VALIDATION_PATIENTS // len(names))
    held: set[str] = set()
    for name in names:
        own = [patient for patient in patients if owners[patient] == name]
        if len(own) > 1 or len(names) == 1:
            held |= set(own[: max(1, min(most, round(VALIDATION_SHARE * len(own))))])
    return held or set(patients[:1])


def repeats(cases: Sequence[Case]) -> dict[str, int]:
    """Return dataset -> how often its cases stand in one pass over all: the root of how much smaller it is.

    Between drawing cases alike, which lets a small dataset drown, and datasets alike, which learns its few cases by
    heart. Nothing but {"": 1} for a single dataset.
    """
    sizes = Counter(dataset_of(case) for case in cases)
    return {name: round(math.sqrt(max(sizes.values()) / size)) for name, size in sizes.items()}


def balanced(fold: Fold) -> Fold:
    """Return a fold whose training cases stand as often as `repeats` says."""
    times = repeats(fold.train)
    return replace(fold, train=tuple(case for case in fold.train for _ in range(times[dataset_of(case)])))


def the_fold(folds: Sequence[Fold], number: int) -> Fold:
    """Return one of the folds; raise TrainingError if there is none of this number."""
    if not 0 <= number < len(folds):
        raise TrainingError(f"--fold {number}: there are folds 0 to {len(folds) - 1}; give --folds for another number")
    return folds[number]


def traits(cases: Sequence[Case], facts: Mapping[str, CaseFacts]) -> dict[str, frozenset[str]]:
    """Return patient -> what folds should share evenly; traits that all patients have, or none, are left out.

    These are: a label that is there, its volume being in the lower, middle or upper third of the patients that have
    it (from six such patients), and the words of `CaseFacts.origin`.
    """
    own: dict[str, list[CaseFacts]] = {}
    for case in cases:
        if case.id in facts:
            own.setdefault(case.patient, []).append(facts[case.id])
    found: dict[str, set[str]] = {patient: set() for patient in own}
    volumes: dict[str, dict[str, float]] = {}
    for patient, rows in own.items():
        for row in rows:
            found[patient] |= {f"{word}={value}" for word, value in row.origin.items()}
            for label, volume in row.label_ml.items():
                found[patient].add(f"has {label}")
                known = volumes.setdefault(label, {})
                known[patient] = max(volume, known.get(patient, 0.0))
    for label, known in volumes.items():
        if len(known) >= 6 and len(set(known.values())) > 1:
            thirds = np.quantile(list(known.values()), (1 / 3, 2 / 3))
            for patient, volume in known.items():
                found[patient].add(f"{label} in third {int(np.searchsorted(thirds, volume))}")
    counts = Counter(trait for each in found.values() for trait in each)
    telling = {trait for trait, count in counts.items() if count < len(found)}
    return {patient: frozenset(each & telling) for patient, each in found.items()} if telling else {}


def _stratified(patients: Sequence[str], found: Mapping[str, frozenset[str]], folds: int) -> list[set[str]]:
    """Give each fold its share of every trait, the rarest first; folds differ by one patient at most."""
    places = [len(patients) // folds + (number < len(patients) % folds) for number in range(folds)]
    counts = Counter(trait for patient in patients for trait in found.get(patient, ()))
    wanted = {trait: [count / folds] * folds for trait, count in counts.items()}
    groups: list[set[str]] = [set() for _ in range(folds)]
    left = list(patients)
    while left:
        rarest = min((trait for trait in counts if counts[trait]), key=lambda t: (counts[t], t), default=None)
        patient = next(p for p in left if rarest is None or rarest in found.get(p, ()))
        need = [0.0] * folds if rarest is None else wanted[rarest]
        number = max((n for n in range(folds) if places[n]), key=lambda n: (round(need[n], 9), places[n], -n))
        groups[number].add(patient)
        left.remove(patient)
        places[number] -= 1
        for trait in found.get(patient, ()):
            counts[trait] -= 1
            wanted[trait][number] -= 1
    return groups


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
