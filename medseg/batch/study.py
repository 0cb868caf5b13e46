"""One study with a model in memory: read, segment, write in every format, and say how it ended."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.batch.attempt import ALONE, Course
from medseg.batch.ledger import Entry, Ledger
from medseg.batch.placing import IMAGE_SUFFIX, Placed, place
from medseg.batch.room import on_disk
from medseg.batch.study_input import StudyInput
from medseg.channels import read_chosen
from medseg.device import freed, is_out_of_memory
from medseg.errors import BundleError, ExportError, GeometryError, MedsegError, ReadError, SpecError
from medseg.exporters import EXPORTERS
from medseg.exporters.nifti import write_nifti
from medseg.exporters.result import DICOM_ONLY, PICTURES_ONLY, Result
from medseg.files import file_digest, staged
from medseg.inference.predict import Model, Prediction, predict_case
from medseg.quality.apply import Quality
from medseg.readers.dicom_regular import FIGURES
from medseg.readers.dicom_series import read_series
from medseg.readers.picture import is_picture
from medseg.spec import Spec
from medseg.studies import read_channels
from medseg.volume import Volume

NO_MEMORY = (
    ("MEMORY", "there is too little memory for it; use a machine with more (or are its voxels far too large?)"),
    ("GPU_MEMORY", "the GPU has too little memory for one window of this model; use a larger one, or none"),
)
SMALLER_BATCHES = "SMALLER_BATCHES"
"""Note of a study for whose windows there was too little memory at once; the journal says how many there were then."""
REFUSALS = (ReadError, GeometryError, SpecError, BundleError)
"""Faults of the input; everything else is ours, and is tried again by the next run."""


def segment(
    study: StudyInput,
    model: Model,
    ledger: Ledger,
    entry: Entry,
    *,
    mirror: bool | None,
    formats: Sequence[str],
    max_memory: int | None = None,
    course: Course = ALONE,
) -> Entry:
    """Segment one study into OUT and return `entry` with how it ended; nothing is committed.

    Parameters
    ----------
    entry : of the study, with state "failed" and the digests that it is made from.
    max_memory : bytes that the process may take for the prediction; None: as many as it needs.
    course : is told when predicting and writing begin, and lets the network work.

    Raises
    ------
    Exception : any, if MEDSEG_DEBUG is set; nothing else.
    """
    try:

        def predict(image: Volume, **options: Any) -> Prediction:
            return course.call(partial(predict_case, model, image, mirror=mirror, max_memory=max_memory, **options))

        return _segment(study, model, ledger, entry, predict=predict, formats=formats, course=course)
    except MedsegError as error:
        state = "refused" if isinstance(error, REFUSALS) else "failed"
        return _ended(entry, error.code, without_paths(str(error), study), state)
    except Exception as error:  # one study must never stop the others
        if is_out_of_memory(error):
            freed(model.device)
            gpu = isinstance(error, RuntimeError) and model.device.type != "cpu"
            return _ended(entry, *NO_MEMORY[gpu])
        if os.environ.get("MEDSEG_DEBUG"):
            raise
        # Without its text: what a library says about a file may hold what stands in its header.
        return _ended(entry, "INTERNAL", f"{type(error).__name__}; medseg --debug predict shows where it comes from")


def _ended(entry: Entry, code: str, message: str, state: str = "failed") -> Entry:
    return entry.model_copy(update={"state": state, "code": code, "message": message})


def _segment(
    study: StudyInput,
    model: Model,
    ledger: Ledger,
    entry: Entry,
    *,
    predict: Callable[..., Prediction],
    formats: Sequence[str],
    course: Course,
) -> Entry:
    spec = model.bundle.info.spec
    formats = _with_earlier(formats, study, ledger)
    if study.refusal is not None:
        raise study.refusal
    if study.series is None and any(EXPORTERS[name].dicom for name in formats):
        raise ExportError(DICOM_ONLY, code="NEEDS_DICOM")
    if not is_picture(study.images[0]) and any(EXPORTERS[name].picture for name in formats):
        raise ExportError(PICTURES_ONLY, code="NEEDS_PICTURE")
    image = read_study(study, spec)
    refuse_constant(image, spec)
    course.enter("predicting")
    soft = any(EXPORTERS[name].soft for name in formats)
    found = predict(image, soft=soft, room=partial(on_disk, ledger.out))
    course.enter("writing")
    placed = place(Result(found.mask, spec, entry.model_digest, image, study.series, found.soft), study.allow)
    outputs, notes = _write(placed, formats, ledger.out, study.id)
    if found.windows:
        notes = (*notes, SMALLER_BATCHES)
        ledger.journal(study.id, {"windows_at_once": found.windows})
    return entry.model_copy(
        update={
            "state": "done",
            "outputs": outputs,
            "volumes_ml": volumes(spec, placed.nifti.on_image),
            "notes": (*image.notes, *notes),
            **_judged(found.quality),
            "correction": {key: image.meta[key] for key in FIGURES if key in image.meta},
        }
    )


def _judged(quality: Quality | None) -> dict[str, object]:
    """Return what an entry says of the quality; nothing where the model says nothing."""
    if quality is None:
        return {}
    return {"expected_dice": quality.dice, "review": quality.review, "review_reasons": quality.reasons}


def _with_earlier(formats: Sequence[str], study: StudyInput, ledger: Ledger) -> tuple[str, ...]:
    """Return `formats` and those in which the study already stands in OUT, in the order of EXPORTERS."""
    before = ledger.read(study.id)
    known = {} if before is None else before.outputs
    return tuple(n for n, row in EXPORTERS.items() if n in formats or f"{study.id}{row.suffix}" in known)


def _write(placed: Placed, formats: Sequence[str], out: Path, study: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Write a result in every format; return file name -> SHA-256, and the notes of the exporters, each once.

    Files of an earlier run are replaced when all are written: if one cannot be, they stay, and so does their entry.
    """
    outputs: dict[str, str] = {}
    notes: dict[str, None] = {}
    with staged(out) as folder:
        for name in formats:
            file = folder / f"{study}{EXPORTERS[name].suffix}"
            result = placed.dicom if EXPORTERS[name].dicom else placed.nifti
            notes |= dict.fromkeys(EXPORTERS[name].write(file, result))
            outputs[file.name] = file_digest(file)
        image = folder / f"{study}{IMAGE_SUFFIX}"
        if placed.image is not None and "nifti" in formats:
            write_nifti(image, placed.image)
            outputs[image.name] = file_digest(image)
    if image.name not in outputs:
        (out / image.name).unlink(missing_ok=True)
    return outputs, tuple(notes)


def read_study(study: StudyInput, spec: Spec) -> Volume:
    """Return the image (channels, I, J, K) of a study."""
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
    counts: Counter[int] = Counter()
    for part in mask.array[0]:  # the labels of a slice are few, those of the spec may be many
        values, found = np.unique(part, return_counts=True) if part.dtype != np.uint8 else _bytes(part)
        counts.update(dict(zip(values.tolist(), found.tolist(), strict=True)))
    return {name: round(counts[value] * unit, 4) for name, value in spec.foreground.items()}


def _bytes(part: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what np.unique does, without sorting."""
    found = np.bincount(part.ravel(), minlength=256)
    return np.flatnonzero(found), found[found > 0]


def without_paths(text: str, study: StudyInput) -> str:
    """Return a message without the names of files and folders that may identify a patient."""
    places = {study.origin, *study.images, *(study.series.files if study.series else ())}
    places |= {file for row in study.channels for file in row.files}
    # A NIfTI file is its own case id; the name of any other may tell who the patient is.
    words = {str(p) for p in places} | {p.name for p in places if study.id not in p.name}
    for word in sorted(words, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", f"<{study.id}>", text)
    return text
