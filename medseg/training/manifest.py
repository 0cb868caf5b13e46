"""What a model learns from, as a list that can be compared: case, patient, SHA-256 of the files."""

from __future__ import annotations

from typing import Any

from medseg.errors import TrainingError
from medseg.files import digest
from medseg.preparation.cache import source_digest
from medseg.spec import Case, Dataset, spec_digest


def make_manifest(dataset: Dataset) -> dict[str, Any]:
    """Return the manifest of a dataset: its training cases by their content, its held out cases by name.

    ``digest`` names the whole: it changes with a byte of a training case, with the spec and with the split, not with
    the place of the files.

    Raises
    ------
    TrainingError : a file of a training case cannot be read.
    """
    rows = [{"id": c.id, "patient": c.patient, "source": source_of(c)} for c in dataset.select("train")]
    held = [{"id": c.id, "patient": c.patient} for c in dataset.select("test")]
    content = {"spec": spec_digest(dataset.spec), "train": rows, "test": held}
    return {**content, "name": dataset.spec.name, "digest": digest(content)}


def source_of(case: Case) -> str:
    """Return the digest of a case's files, or raise TrainingError naming the case."""
    try:
        return source_digest(case)
    except OSError as error:
        raise TrainingError(
            f"case {case.id}: a file cannot be read ({error.strerror}); medseg check lists all"
        ) from error
