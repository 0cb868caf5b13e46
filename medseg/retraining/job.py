"""What a tick would work on: the data with their digests, what is new in them, and whether the gate is sound."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.bundle import BundleInfo
from medseg.cases import content_digests
from medseg.checking.facts import image_hash
from medseg.errors import RetrainingError
from medseg.evaluation.evaluate import targets_of
from medseg.files import digest, write_json
from medseg.retraining.decisions import Decision
from medseg.retraining.rule import margin_of_each
from medseg.retraining.settings import RetrainConfig
from medseg.spec import Case, Dataset, Spec, load_dataset
from medseg.studies import read_study
from medseg.training.manifest import learning_cases, make_manifest, source_of
from medseg.training.start import DIGITS


@dataclass(frozen=True)
class TickJob:
    """One tick: the same data, gate and settings are the same tick.

    Attributes
    ----------
    dataset : what to learn from (its training cases).
    gate : the labelled gate cases, with their spec.
    manifest : of the training data, see medseg.training.manifest.
    gate_digest : SHA-256 of the gate's spec and of the bytes of its cases.
    """

    settings: RetrainConfig
    dataset: Dataset
    gate: Dataset
    manifest: Mapping[str, Any]
    gate_digest: str

    @property
    def sources(self) -> set[str]:
        """Digests of the files of the cases that teach something: those with labels."""
        labelled = {case.id for case in learning_cases(self.dataset)}
        return {row["source"] for row in self.manifest["train"] if row["id"] in labelled}

    @property
    def key(self) -> str:
        """SHA-256 that names the tick."""
        return digest([self.manifest["digest"], self.gate_digest, self.settings.digest])

    @property
    def run(self) -> Path:
        """The run folder: a changed rule or gate does not train again."""
        recipe = [self.manifest["digest"], self.settings.training.model_dump(mode="json"), self.settings.seed]
        return self.settings.work / "runs" / digest(recipe)[:16]


def open_job(settings: RetrainConfig) -> TickJob:
    """Read the specs, take the digests, and refuse a gate that cannot decide.

    Raises
    ------
    RetrainingError : GATE_CHANGED, GATE_DIFFERS, GATE_TOO_SMALL.
    SpecError, TrainingError, ConfigError : the data cannot be read; the rule names a label that is not there.
    """
    dataset = load_dataset(settings.dataset, splits=settings.splits)
    gate = _load_gate(settings)
    if (gate.spec.name, gate.spec.foreground) != (dataset.spec.name, dataset.spec.foreground):
        raise RetrainingError(
            f"the gate ({gate.spec.name}: {gate.spec.foreground}) and the training data ({dataset.spec.name}: "
            f"{dataset.spec.foreground}) must have the same name and labels in their specs: patients are recognised "
            "by the one, scores compared by the other",
            code="GATE_DIFFERS",
        )
    if len({case.patient for case in gate.cases}) < 2:
        raise RetrainingError(
            f"the gate has {len(gate.cases)} labelled case(s) of fewer than two patients; one patient tells nothing "
            "about others",
            code="GATE_TOO_SMALL",
        )
    margin_of_each(settings.rule, [target.name for target in targets_of(gate.spec)])
    told = gate.spec.model_dump(mode="json", exclude={"root", "splits"})
    found = digest([told, [[c.id, c.patient, source_of(c)] for c in gate.cases]])
    if settings.gate.digest not in (None, found):
        raise RetrainingError(
            f"the gate is not the one that was declared: its digest is {found}, the settings say "
            f"{settings.gate.digest}. Restore its files; or, if the change is meant, write the new digest",
            code="GATE_CHANGED",
        )
    return TickJob(settings, dataset, gate, make_manifest(dataset), found)


def _load_gate(settings: RetrainConfig) -> Dataset:
    found = load_dataset(settings.gate.dataset, splits=settings.gate.splits)
    chosen = found.cases if settings.gate.cases == "all" else found.select("test")
    return Dataset(found.spec, tuple(case for case in chosen if case.mask is not None))


def count_new(job: TickJob, last: Decision | None) -> int:
    """Return how many labelled training cases (by content) were not there at the last decision."""
    if last is None:
        return len(job.sources)
    file = _manifest_file(job, last.content["digests"]["dataset"])
    # Without it (another work folder) nothing is known of what was there: all counts as new.
    known = set(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else set()
    return len(job.sources - known)


def keep_manifest(job: TickJob) -> None:
    """Keep the contents of this tick for the next one to compare with; digests only."""
    write_json(_manifest_file(job, job.manifest["digest"]), sorted(job.sources))


def _manifest_file(job: TickJob, name: str) -> Path:
    return job.settings.work / "manifests" / f"{name}.json"


def refuse_leaks(job: TickJob) -> None:
    """Refuse training data that share a patient or an image with the gate: the comparison would be a lie.

    Images are compared by their voxels, so that a copy under another name, format or axis order is found. A case is
    read once; what was read before is known by the digest of its files (WORK/image_hashes.json).

    Raises
    ------
    RetrainingError : GATE_LEAK, naming cases.
    """
    train = job.dataset.select("train")
    owners = {case.patient: case.id for case in job.gate.cases}
    pairs = [(case.id, owners[case.patient], "patient") for case in train if case.patient in owners]
    if not pairs:
        file = job.settings.work / "image_hashes.json"
        known: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        gate = _image_hashes(job.gate.spec, job.gate.cases, known)
        own = _image_hashes(job.dataset.spec, train, known)
        write_json(file, known)
        twins = {value: case for case, value in gate.items()}
        pairs = [(case, twins[value], "image") for case, value in own.items() if value in twins]
    if pairs:
        case, twin, what = pairs[0]
        raise RetrainingError(
            f"{len(pairs)} training case(s) share a patient or an image with the gate, for example {case} has the same "
            f"{what} as gate case {twin}; take them out of the training data (splits), never out of the gate",
            code="GATE_LEAK",
        )


def refuse_known_gate(job: TickJob, info: BundleInfo) -> None:
    """Refuse to fine-tune a model that has learnt from a gate image, by the files' bytes, as far as it tells.

    Raises
    ------
    RetrainingError : GATE_LEAK, naming a case.
    """
    seen = {image for images in info.seen.values() for image in images}
    for case in job.gate.cases:
        if content_digests(case)[1][:DIGITS] in seen:
            raise RetrainingError(
                f"the champion has learnt from gate case {case.id}: what comes of it would be judged by what it knows; "
                "leave `start: champion` out, or take a gate that the champion does not know",
                code="GATE_LEAK",
            )


def _image_hashes(spec: Spec, cases: Sequence[Case], known: dict[str, str]) -> dict[str, str]:
    """Return case id -> digest of its voxels; adds to `known` (digest of the files -> digest of the voxels)."""
    found = {}
    for case in cases:
        source = source_of(case)
        if source not in known:
            known[source] = image_hash(read_study(spec, case).image)
        found[case.id] = known[source]
    return found
