"""What a model learns from, as a list that can be compared: case, patient, SHA-256 of the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medseg.cases import content_digests
from medseg.errors import ReadError, TrainingError
from medseg.files import digest
from medseg.joined import JoinedCase, as_alone, own_spec, source_among
from medseg.spec import Case, Dataset, Spec, spec_digest


def make_manifest(dataset: Dataset) -> dict[str, Any]:
    """Return the manifest of a dataset: its training cases by their content, its held out cases by name.

    ``digest`` names the whole: it changes with a byte of a training case, with the spec and with the split, not with
    the place of the files. ``image`` of a case names its images alone, also where they get other labels. Of several
    datasets ``datasets`` lists the digest that each would have alone.

    Raises
    ------
    ReadError : CHANNEL_MISSING.
    TrainingError : a file of a training case cannot be read.
    """
    for case in dataset.select("train"):
        _refuse_missing_channels(own_spec(dataset.spec, case), case)
    digests = {case.id: _digests(as_alone(case)) for case in dataset.select("train")}
    content = _content(dataset, {case: source for case, (source, _) in digests.items()})
    told = [{**row, "image": digests[row["id"]][1]} for row in content["train"]]
    manifest = {**content, "train": told, "name": dataset.spec.name, "digest": digest(content)}
    parts = _parts(dataset, digests)
    return {**manifest, "datasets": parts} if parts else manifest


def _parts(dataset: Dataset, digests: Mapping[str, tuple[str, str]]) -> list[dict[str, str]]:
    """Return name and digest of each of several datasets as it would be alone; nothing for one dataset."""
    cases = [case for case in dataset.cases if isinstance(case, JoinedCase)]
    rows = []
    for name, own in {case.own.name: case.own for case in cases}.items():
        mine = [case for case in cases if case.own.name == name]
        sources = {case.own_id: digests[case.id][0] for case in mine if case.split == "train"}
        part = Dataset(own, tuple(case.alone for case in mine))
        rows.append({"name": name, "digest": digest(_content(part, sources))})
    return rows


def _content(dataset: Dataset, sources: Mapping[str, str]) -> dict[str, Any]:
    """Return what the digest of a dataset is taken of; `sources` are case -> digest of its files."""
    rows = [
        {"id": case.id, "patient": case.patient, "source": source_among(case, sources[case.id])}
        for case in dataset.select("train")
    ]
    held = [{"id": c.id, "patient": c.patient} for c in dataset.select("test")]
    return {"spec": spec_digest(dataset.spec), "train": rows, "test": held}


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
