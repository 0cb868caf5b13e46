"""Predict many studies: each on its own, resumable, with one broken study never stopping the others."""

from __future__ import annotations

import csv
import io
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medseg.batch.inputs import Choice, opened_inputs
from medseg.batch.ledger import Entry, Ledger
from medseg.batch.names import LINKAGE, read_linkage
from medseg.batch.placing import IMAGE_SUFFIX, Placed, place
from medseg.batch.study_input import StudyInput
from medseg.bundle import BundleInfo
from medseg.channels import read_chosen
from medseg.errors import BundleError, ExportError, GeometryError, MedsegError, ReadError, SpecError
from medseg.exporters import EXPORTERS, choose_formats
from medseg.exporters.nifti import write_nifti
from medseg.exporters.result import DICOM_ONLY, Result
from medseg.files import file_digest, legible, sweep, write_json, write_text
from medseg.inference.predict import Model, load_model, predict_soft, predict_volume
from medseg.readers.allowances import Allowance
from medseg.readers.dicom_regular import FIGURES
from medseg.readers.dicom_series import read_series
from medseg.spec import Spec
from medseg.studies import read_channels
from medseg.volume import Volume

PROVENANCE = "predictions.json"
REFUSALS = (ReadError, GeometryError, SpecError, BundleError)
"""Faults of the input; everything else is ours, and is tried again by the next run."""


@dataclass(frozen=True)
class BatchResult:
    """How a batch run ended.

    Attributes
    ----------
    out : the output folder.
    entries : one a study, ordered by id.
    origins : id -> where the study was found; for the terminal only.
    """

    out: Path
    entries: tuple[Entry, ...]
    origins: dict[str, Path]

    def select(self, state: str) -> tuple[Entry, ...]:
        """Return the entries in one state."""
        return tuple(entry for entry in self.entries if entry.state == state)

    @property
    def complete(self) -> bool:
        """Whether every study was done."""
        return all(entry.state == "done" for entry in self.entries)


def predict(  # noqa: PLR0913 - the options of the command are the parameters of the function
    inputs: Sequence[Path],
    *,
    model: Path | Model,
    out: Path,
    mirror: bool | None = None,
    choice: Choice | None = None,
    splits: Path | None = None,
    formats: Sequence[str] = ("nifti",),
    allow: Collection[Allowance] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BatchResult:
    """Segment every study below `inputs` into ``OUT/<id>.nii.gz`` (other `formats`: other endings).

    Also written: OUT/ledger (how each study stands), OUT/summary.csv (states, reasons, volumes), OUT/predictions.json
    (what made them), OUT/private/linkage.csv (id -> path, for the user only). Running it again does only what is not
    done, from the same input and model, with intact outputs.

    Parameters
    ----------
    model : run folder or bundle, or a model in memory; it is loaded once.
    mirror : average over mirrored inputs; unless told, as the plan says.
    choice, splits : which cases of a dataset.
    allow : what is corrected by resampling instead of refused: "tilt", "irregular"; a dataset may allow more. Studies
        that were refused for it are tried again.
    formats : names of EXPORTERS; formats that an earlier run wrote for a study into OUT are kept up to date.

    Raises
    ------
    ConfigError : a format does not exist.
    BatchError : there is nothing to do, or two inputs share a name.
    BundleError : the model cannot be used.
    ExportError : OUT itself cannot be written (full disk); what is done stays done.
    """
    formats = choose_formats(formats)
    loaded = model if isinstance(model, Model) else load_model(model)
    info = loaded.bundle.info
    with opened_inputs(inputs, info.spec, choice=choice, splits=splits, out=out) as studies:
        studies = [replace(study, allow=study.allow | set(allow)) for study in studies]
        return _predict_all(studies, loaded, out, mirror=mirror, formats=formats, progress=progress)


def _predict_all(
    studies: Sequence[StudyInput],
    loaded: Model,
    out: Path,
    *,
    mirror: bool | None,
    formats: Sequence[str],
    progress: Callable[[int, int], None],
) -> BatchResult:
    """Do what is not done yet, and write the tables."""
    info = loaded.bundle.info
    for folder in (out, out / "ledger", out / "journal", out / "private"):
        sweep(folder, deep=False)
    write_json(out / PROVENANCE, info.provenance(mirror))
    _write_linkage(out, studies)
    ledger = Ledger(out)
    entries = []
    for number, study in enumerate(studies):
        source = study.digest()
        names = tuple(f"{study.id}{EXPORTERS[name].suffix}" for name in formats)
        entry = ledger.settled(
            study.id, input_digest=source, model_digest=recipe(info, mirror), outputs=names, allow=study.allow
        )
        entries.append(entry or _do(study, source, loaded, ledger, mirror, formats=formats))
        progress(number + 1, len(studies))
    write_text(out / "summary.csv", summary_csv(info.spec, entries))
    return BatchResult(out, tuple(entries), {study.id: study.origin for study in studies})


def recipe(info: BundleInfo, mirror: bool | None) -> str:
    """Return what results are made by: the digest of the model and the options that change its answer."""
    tta = info.plan.test_mirroring if mirror is None else mirror
    return f"{info.digest}{'+mirror' if tta else ''}"


def _do(
    study: StudyInput, source: str, model: Model, ledger: Ledger, mirror: bool | None, *, formats: Sequence[str]
) -> Entry:
    """Predict one study and commit the outcome, whatever it is."""
    formats = _with_earlier(formats, study, ledger)
    ledger.attempt(study.id)
    began = time.monotonic()
    entry = Entry(id=study.id, state="failed", input_digest=source, model_digest=recipe(model.bundle.info, mirror))
    try:
        if study.refusal is not None:
            raise study.refusal
        if study.series is None and any(EXPORTERS[name].dicom for name in formats):
            raise ExportError(DICOM_ONLY, code="NEEDS_DICOM")
        image = _read(study, model.bundle.info.spec)
        refuse_constant(image, model.bundle.info.spec)
        soft = None
        if any(EXPORTERS[name].soft for name in formats):
            mask, soft = predict_soft(model, image, mirror=mirror)
        else:
            mask = predict_volume(model, image, mirror=mirror)
        result = Result(mask, model.bundle.info.spec, entry.model_digest, image, study.series, soft)
        placed = place(result, study.allow)
        outputs, notes = _write(placed, formats, ledger.out, study.id)
        entry = entry.model_copy(
            update={
                "state": "done",
                "outputs": outputs,
                "volumes_ml": volumes(model.bundle.info.spec, placed.nifti.on_image),
                "notes": (*image.notes, *notes),
                "correction": {key: image.meta[key] for key in FIGURES if key in image.meta},
            }
        )
    except MedsegError as error:
        state = "refused" if isinstance(error, REFUSALS) else "failed"
        message = without_paths(str(error), study)
        entry = entry.model_copy(update={"state": state, "code": error.code, "message": message})
        if isinstance(error, ExportError) and error.code == "DISK_FULL":
            raise ExportError(f"case {study.id}: {error}", code=error.code) from error
    except Exception as error:  # one study must never stop the others
        if os.environ.get("MEDSEG_DEBUG"):
            raise
        # Without its text: what a library says about a file may hold what stands in its header.
        message = f"{type(error).__name__}; medseg --debug predict shows where it comes from"
        entry = entry.model_copy(update={"code": "INTERNAL", "message": message})
    if entry.state != "done":
        # A mask of an earlier input or model must not pass for the result of this one.
        for suffix in (*(exporter.suffix for _, exporter in EXPORTERS.items()), IMAGE_SUFFIX):
            (ledger.out / f"{study.id}{suffix}").unlink(missing_ok=True)
    ledger.journal(study.id, {"seconds": round(time.monotonic() - began, 3)})
    ledger.write(entry)
    return entry


def _with_earlier(formats: Sequence[str], study: StudyInput, ledger: Ledger) -> tuple[str, ...]:
    """Return `formats` and those in which the study already stands in OUT, in the order of EXPORTERS."""
    before = ledger.read(study.id)
    known = {} if before is None else before.outputs
    return tuple(n for n, row in EXPORTERS.items() if n in formats or f"{study.id}{row.suffix}" in known)


def _write(placed: Placed, formats: Sequence[str], out: Path, study: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Write a result in every format; return file name -> SHA-256, and the notes of the exporters, each once."""
    outputs: dict[str, str] = {}
    notes: dict[str, None] = {}
    for name in formats:
        file = out / f"{study}{EXPORTERS[name].suffix}"
        result = placed.dicom if EXPORTERS[name].dicom else placed.nifti
        notes |= dict.fromkeys(EXPORTERS[name].write(file, result))
        outputs[file.name] = file_digest(file)
    image = out / f"{study}{IMAGE_SUFFIX}"
    image.unlink(missing_ok=True)
    if placed.image is not None and "nifti" in formats:
        write_nifti(image, placed.image)
        outputs[image.name] = file_digest(image)
    return outputs, tuple(notes)


def _read(study: StudyInput, spec: Spec) -> Volume:
    if study.channels:
        return read_chosen(spec, dict(zip(spec.channels, study.channels, strict=True)), allow=study.allow)
    if study.series is not None:
        suv = next(iter(spec.channels.values())).suv
        return read_series(study.series, suv=suv, allow=study.allow)
    return read_channels(spec, study.images, allow=study.allow)


def refuse_constant(image: Volume, spec: Spec) -> None:
    """Raise ReadError(CONSTANT_IMAGE) for a channel with one value everywhere: a network sees organs even there."""
    for name, channel in zip(spec.channels, image.array, strict=False):
        if channel.min() == channel.max():
            raise ReadError(
                f"channel {name!r} holds {channel.flat[0]:g} everywhere: there is nothing to segment; "
                "export the study again",
                code="CONSTANT_IMAGE",
            )


def volumes(spec: Spec, mask: Volume) -> dict[str, float]:
    """Return label -> volume in mL (pixels for pictures)."""
    unit = mask.voxel_volume / 1000 if mask.unit == "mm" else mask.voxel_volume
    return {
        name: round(float(np.count_nonzero(mask.array == value)) * unit, 4) for name, value in spec.foreground.items()
    }


def without_paths(text: str, study: StudyInput) -> str:
    """Return a message without the names of files and folders that may identify a patient."""
    places = {study.origin, *study.images, *(study.series.files if study.series else ())}
    places |= {file for row in study.channels for file in row.files}
    # A NIfTI file is its own case id; the name of any other may tell who the patient is.
    words = {str(p) for p in places} | {p.name for p in places if study.id not in p.name}
    for word in sorted(words, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", f"<{study.id}>", text)
    return text


def summary_csv(spec: Spec, entries: Sequence[Entry]) -> str:
    """Return the table of a run: id, state, code, message, notes and the volume of each label."""
    unit = "ml" if spec.unit == "mm" else "pixels"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "state", "code", "message", "notes", *(f"{name}_{unit}" for name in spec.foreground)])
    for entry in entries:
        row = [entry.volumes_ml.get(name, "") for name in spec.foreground]
        writer.writerow([entry.id, entry.state, entry.code, entry.message, " ".join(entry.notes), *row])
    return text.getvalue()


def _write_linkage(out: Path, studies: Sequence[StudyInput]) -> None:
    """Write id -> path of these studies and of those of earlier runs into the same folder."""
    file = out / LINKAGE
    known = read_linkage(out)
    known |= {study.id: legible(study.origin.resolve()) for study in studies}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "path"])
    writer.writerows(sorted(known.items()))
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_text(file, text.getvalue(), mode=0o600)
