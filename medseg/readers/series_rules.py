"""Rules that find a series by its header: a modality, and conditions on a short list of attributes.

What is compared may identify a patient (descriptions are free text): it stays in memory, and no message holds it.
Nothing here needs pydicom, so that a spec can be checked without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from medseg.registry import did_you_mean

TEXTS = (
    *("SeriesDescription", "ProtocolName", "StudyDescription", "BodyPartExamined", "PatientPosition", "SeriesNumber"),
    *("Manufacturer", "ManufacturerModelName", "ContrastBolusAgent", "ImageType", "SeriesType", "Units"),
    *("SequenceName", "ScanningSequence", "SequenceVariant", "ScanOptions", "MRAcquisitionType"),
    *("PulseSequenceName", "AcquisitionContrast", "ComplexImageComponent"),
    *("ConvolutionKernel", "CorrectedImage", "ReconstructionMethod"),
)
"""Attributes that a regular expression is searched in; several values are joined by a backslash, as in the file."""
NUMBERS = (
    *("EchoTime", "RepetitionTime", "InversionTime", "FlipAngle", "EchoTrainLength", "EchoNumbers"),
    *("DiffusionBValue", "MagneticFieldStrength", "TemporalPositionIdentifier", "AcquisitionNumber"),
    *("KVP", "SliceThickness"),
)
"""Attributes that are compared as numbers (PS3.3 C.7.6.1, C.8.2, C.8.3; ms, degrees, s/mm², tesla, kV, mm)."""
WORDS = (*TEXTS, *NUMBERS)

MODALITIES = ("CT", "MR", "PT")
ALIASES = {"PET": "PT", "MRI": "MR"}
SAME_NUMBER = 1e-3
"""A number alone fits values this close to it, relative: stored decimals are rounded."""

Range = tuple[float | None, float | None]
Condition = str | float | Range
"""A regular expression; a number; or (lowest, highest), either of them None for no bound."""


def modality_name(word: str) -> str:
    """Return a modality by its DICOM name; "" for other words, which name sequences in models of nnU-Net's."""
    word = ALIASES.get(word.upper(), word.upper())
    return word if word in MODALITIES else ""


@dataclass(frozen=True)
class SeriesRule:
    """Which series is meant.

    Attributes
    ----------
    modality : "CT", "MR", "PT" (or "PET"), "" for any.
    match : attribute of WORDS -> condition; all must hold.
    """

    modality: str
    match: Mapping[str, Condition]

    def fits(self, modality: str, values: Mapping[str, str]) -> bool:
        """Tell whether a header fits; an absent attribute is "" for an expression and fits no number."""
        if self.modality and ALIASES.get(self.modality, self.modality) != modality:
            return False
        return all(_holds(condition, values.get(word, "")) for word, condition in self.match.items())

    def __str__(self) -> str:
        """Say what is asked without the expressions: "MR by SeriesDescription, EchoTime"."""
        return f"{self.modality or 'any modality'}{' by ' if self.match else ''}{', '.join(self.match)}"


def _holds(condition: Condition, value: str) -> bool:
    if isinstance(condition, str):
        return re.search(condition, value) is not None
    try:
        number = float(value)
    except ValueError:
        return False
    if isinstance(condition, (int, float)):
        return abs(number - condition) <= SAME_NUMBER * abs(condition)
    low, high = condition
    return (low is None or number >= low) and (high is None or number <= high)


def condition_problem(word: str, condition: object) -> str:
    """Return what is wrong with one line of a rule, "" where nothing is."""
    if word not in WORDS:
        return f"{word!r} is not one of {', '.join(WORDS)}{did_you_mean(word, WORDS)}"
    if word in TEXTS:
        if not isinstance(condition, str):
            return f"{word}: a regular expression is needed, found {condition!r}; put it in quotes"
        try:
            re.compile(condition)
        except re.error as error:
            return f"{word}: {condition!r} is not a regular expression ({error})"
        return ""
    if _is_number(condition):
        return ""
    bounds = condition if isinstance(condition, (list, tuple)) else ()
    known = [bound for bound in bounds if bound is not None]
    if len(bounds) != 2 or not known or not all(_is_number(bound) for bound in known) or known != sorted(known):
        return f"{word}: a number or [lowest, highest] (one of them may be null) is needed, found {condition!r}"
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
