"""What a model learns from, as a list that can be compared: case, patient, SHA-256 of the files."""

from __future__ import annotations

from typing import Any

from medseg.cases import content_digests
from medseg.errors import ReadError, TrainingError
from medseg.files import digest
from medseg.spec import Case, Dataset, Spec, spec_digest


def make_manifest(dataset: Dataset) -> dict[str, Any]:
    """Return the manifest of a dataset: its training cases by their content, its held out cases by name.

    ``digest`` names the whole: it changes with a byte of a training case, with the spec and with the split, not with
    the place of the files. ``image`` of a case names its images alone, also where they get other labels.

    Raises
    ------
    ReadError : CHANNEL_MISSING.
    TrainingError : a file of a training case cannot be read.
    """
    for case in dataset.select("train"):
        _refuse_missing_channels(dataset.spec, case)
    rows, images = [], []
    for case in dataset.select("train"):
        source, image = _digests(case)
        rows.append({"id": case.id, "patient": case.patient, "source": source})
        images.append(image)
    held = [{"id": c.id, "patient": c.patient} for c in dataset.select("test")]
    content = {"spec": spec_digest(dataset.spec), "train": rows, "test": held}
    told = [{**row, "image": image} for row, image in zip(rows, images, strict=True)]
    return {**content, "train": told, "name": dataset.spec.name, "digest": digest(content)}


def learning_cases(dataset: Dataset) -> tuple[Case, ...]:
    """Return the training cases that have a mask; the others teach nothing (``medseg check``: UNLABELLED)."""
    return tuple(case for case in dataset.select("train") if case.mask is not None)


def _refuse_missing_channels(spec: Spec, case: Case) -> None:
    # One path for all channels is a file that was found; of several, only the first was looked for.
    for name, path in zip(spec.channels, case.images, strict=False):
        if not path.exists():
            raise ReadError(
                f"case {case.id}: the file of channel {name!r} is missing; medseg check lists all",
                code="CHANNEL_MISSING",
            )


def source_of(case: Case) -> str:
    """Return the digest of a case's files, or raise TrainingError naming the case."""
    return _digests(case)[0]


def _digests(case: Case) -> tuple[str, str]:
    try:
        return content_digests(case)
    except OSError as error:
        raise TrainingError(
            f"case {case.id}: a file cannot be read ({error.strerror}); medseg check lists all"
        ) from error
