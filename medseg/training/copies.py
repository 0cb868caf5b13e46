"""Images that stand in a dataset more than once: what a network learns from must not be what it is judged by.

Files are compared byte for byte; the same image in another format is found by ``medseg check`` alone. Constant images
are no copies of each other: blank tiles of several patients have nothing in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from medseg.cases import image_digest, image_files
from medseg.display import Display
from medseg.errors import TrainingError
from medseg.joined import as_alone
from medseg.spec import Case, Dataset, Spec
from medseg.studies import read_study


def one_patient(dataset: Dataset, cases: Sequence[Case], manifest: Mapping[str, Any]) -> tuple[Case, ...]:
    """Give cases with the same images one patient, so that no fold learns from one and validates on the other.

    Parameters
    ----------
    cases : training cases of the dataset.
    manifest : of the dataset (training.manifest), which holds the digests of their images.
    """
    name = {case.patient: case.patient for case in cases}
    for rows in _copies(dataset.spec, cases, manifest):
        merged = {name[case.patient] for case in rows}
        name = {patient: min(merged) if group in merged else group for patient, group in name.items()}
    return tuple(replace(case, patient=name[case.patient]) for case in cases)


def without_leaks(
    dataset: Dataset, cases: Sequence[Case], manifest: Mapping[str, Any], display: Display
) -> tuple[Case, ...]:
    """Return the cases as `one_patient` does and say which were put together.

    Raises
    ------
    TrainingError : PATIENT_IN_TWO_SPLITS, a test case has the very images of a training case.
    """
    refuse_learnt_test_cases(dataset, manifest)
    together = one_patient(dataset, cases, manifest)
    moved = [case.id for case, now in zip(cases, together, strict=True) if case.patient != now.patient]
    if moved:
        more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
        display.say(
            f"{', '.join(moved[:3])}{more}: the images, or others of the patient, are those of another case; they "
            "count as one patient. medseg check names all of them (DUPLICATE_IMAGE)"
        )
    return together


def refuse_learnt_test_cases(dataset: Dataset, manifest: Mapping[str, Any]) -> None:
    """Raise TrainingError (PATIENT_IN_TWO_SPLITS) where a test case has the very images of a training case.

    Only test images as large as those of a training case are read; those that are not there are passed over.
    """
    train = dataset.select("train")
    sizes = {_size(case) for case in train}
    digests = {row["image"]: row["id"] for row in manifest["train"]}
    same = []
    for case in dataset.select("test"):
        try:
            if all(path.exists() for path in case.images) and _size(case) in sizes:
                other = digests.get(image_digest(as_alone(case)))
                if other is not None and not _constant(dataset.spec, case):
                    same.append(f"{case.id} those of {other}")
        except OSError as error:
            raise TrainingError(
                f"test case {case.id}: an image cannot be read ({error.strerror}); medseg check lists all"
            ) from error
    if same:
        more = f" and {len(same) - 3} more" if len(same) > 3 else ""
        raise TrainingError(
            f"test cases have the very images of training cases: {', '.join(same[:3])}{more}; their score would be a "
            "lie. Remove one of each pair, or move both to one side (splits in the spec, or --splits)",
            code="PATIENT_IN_TWO_SPLITS",
        )


def _copies(spec: Spec, cases: Sequence[Case], manifest: Mapping[str, Any]) -> list[list[Case]]:
    """Return groups of cases of several patients with the same images, byte for byte."""
    digests = {row["id"]: row["image"] for row in manifest["train"]}
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(digests[case.id], []).append(case)
    several = [rows for rows in groups.values() if len({case.patient for case in rows}) > 1]
    return [rows for rows in several if not _constant(spec, rows[0])]


def _constant(spec: Spec, case: Case) -> bool:
    image = read_study(spec, case).image.array
    return all(channel.min() == channel.max() for channel in image)


def _size(case: Case) -> int:
    return sum(file.stat().st_size for file in image_files(case))
