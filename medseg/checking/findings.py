"""What ``medseg check`` can find: one row per reason code, with its severity and the advice that goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know before training.

    Attributes
    ----------
    code : stable word, see CODES and docs/reference/reason-codes.md.
    severity : "error" (not fit to learn from), "warning" (look at it) or "note" (good to know).
    case : id of the case, None when it concerns the whole dataset.
    message : what was found, with the value and what is usual; names no file and no patient.
    value : the number or word that the finding is about, for programs.
    """

    code: str
    severity: Severity
    case: str | None
    message: str
    value: float | str | None = None


@dataclass(frozen=True)
class Kind:
    """What a reason code means: how bad it is unless told otherwise, and what to do about it."""

    severity: Severity
    advice: str


CODES: dict[str, Kind] = {
    # the dataset as a list of cases
    "CASE_ID_TWICE": Kind("error", "Give every case its own name: results are filed under it."),
    "PATIENT_IN_TWO_SPLITS": Kind("error", "Move all cases of this patient to one split, or correct `patient`."),
    "FEW_PATIENTS": Kind("warning", "Five-fold cross-validation needs five patients; add cases or train one fold."),
    "UNLABELLED": Kind("warning", "Add its mask, or leave the case out of the training split."),
    "DUPLICATE_IMAGE": Kind("error", "Keep one of the two, and find out whose image and which mask it is."),
    # image
    "CONSTANT_IMAGE": Kind("error", "Export the image again: it holds nothing."),
    "NOT_HOUNSFIELD": Kind("warning", "Apply the rescale slope and intercept, or correct `modality` in the spec."),
    "OUTLIER_SPACING": Kind("warning", "Look whether the header is right and the case belongs to this dataset."),
    "OUTLIER_SIZE": Kind("warning", "Look whether the case shows the same part of the body as the others."),
    "OUTLIER_INTENSITY": Kind("warning", "Look whether it is the same sequence, unit and export as the others."),
    "SEVERAL_SPACINGS": Kind("note", "The planner resamples all to one spacing; `spacing` in the spec overrides it."),
    "SEVERAL_SIZES": Kind("note", "Look whether two kinds of examination are mixed."),
    "MIXED_INTENSITY_RANGE": Kind(
        "warning", "Look whether all images are the same sequence and unit; zscore can cope."
    ),
    "MIXED_DTYPE": Kind("note", "Harmless by itself, but often a sign of two sources: compare the intensities."),
    "ANISOTROPIC": Kind("note", "Slices are thick: the planner may choose a 2D network or flat patches."),
    "NOT_ORTHOGONAL": Kind("note", "The grid is sheared (tilted gantry); resampling straightens it."),
    # labels
    "EMPTY_LABEL": Kind("warning", "Right for a case without findings; else its annotation was not saved."),
    "LABEL_NEVER_SEEN": Kind("error", "Remove the label from the spec, or add training cases that have it."),
    "LABEL_RARE": Kind("warning", "Add cases: with so few the label cannot be learned and judged in every fold."),
    "LABEL_ABSENT": Kind("warning", "Nearly every other case has this label: look whether it was forgotten."),
    "OUTLIER_LABEL_VOLUME": Kind("warning", "Look at the overlay: part of the label may be missing, or too much."),
    "MASK_TOUCHES_BORDER": Kind("note", "The structure may be cut off; its measured volume is then too small."),
}
"""Codes of ``medseg check`` itself. Cases that cannot be read carry the code of the reader or of the study."""


def finding(code: str, message: str, *, case: str | None = None, value: float | str | None = None) -> Finding:
    """Return a Finding with the severity of its code."""
    return Finding(code, CODES[code].severity, case, message, value)


def advice(code: str) -> str:
    """Return what to do about a code of CODES; empty for a reader's code, whose message says it."""
    return CODES[code].advice if code in CODES else ""


def short(value: float) -> str:
    """Return three digits, without the e+05 of %g, which few people read."""
    text = f"{value:.3g}"
    return f"{float(text):,.0f}" if "e+" in text else text
