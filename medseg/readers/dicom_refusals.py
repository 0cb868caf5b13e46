"""REFUSALS: every reason why a DICOM series is not read, with the error it raises and what a person can do.

Messages never name a file, a UID or any text of the header: file names and descriptions may identify a patient.
A slice is named by its instance number.
"""

from __future__ import annotations

from dataclasses import dataclass

from medseg.errors import GeometryError, MedsegError, ReadError


@dataclass(frozen=True)
class Kind:
    """One row: the class of the error and the advice that ends its message."""

    error: type[MedsegError]
    advice: str


_SPLIT = "export its parts as series of their own (in Python, find_series() lists the parts that can be read)"
_EXPORT = "export the series again from the PACS or scanner"
PASSING = (
    "give the user who runs this the right to read files and to list folders there, and look whether their drive "
    "answers; then run the same command again"
)
"""Advice where the system did not give a file or folder: nothing is known to be damaged."""
_ALLOW = "allow uneven gaps to be corrected by resampling (--allow irregular)"

REFUSALS: dict[str, Kind] = {
    "BAD_ORIENTATION": Kind(GeometryError, "the directions of rows and columns are damaged: " + _EXPORT),
    "BAD_RESCALE": Kind(ReadError, "the values cannot be brought to their unit: " + _EXPORT),
    "CODESTREAM_MISMATCH": Kind(ReadError, "the compressed pixels do not fit their header: " + _EXPORT),
    "COLOUR": Kind(ReadError, "only 8-bit RGB and YBR pictures are read: give the original series"),
    "DUPLICATE_POSITION": Kind(GeometryError, "keep the right one of the slices that share a position"),
    "ENHANCED_MULTIFRAME": Kind(
        ReadError, "where its frames lie is not said for each of them: export it as enhanced or single-frame images"
    ),
    "GANTRY_TILT": Kind(GeometryError, "allow it to be corrected by resampling (--allow tilt)"),
    "GAP_TOO_WIDE": Kind(GeometryError, "what lies in it is unknown: fetch the missing slices, " + _EXPORT),
    "IRREGULAR_SPACING": Kind(GeometryError, "reconstruct with even spacing, or " + _ALLOW),
    "LENGTH_MISMATCH": Kind(ReadError, "the pixels do not fit the declared size: " + _EXPORT),
    "LOCALIZER": Kind(ReadError, "a planning image is no volume: give the series itself"),
    "MISSING_SLICES": Kind(GeometryError, f"fetch the missing slices ({_EXPORT}), or {_ALLOW}"),
    "MIXED_FRAME_OF_REFERENCE": Kind(GeometryError, "the slices belong to different coordinate systems: separate them"),
    "MIXED_MATRIX": Kind(GeometryError, _SPLIT),
    "MIXED_ORIENTATION": Kind(GeometryError, _SPLIT),
    "MIXED_PATIENT": Kind(ReadError, "a series cannot belong to several patients: correct their ids, or separate them"),
    "MIXED_SERIES": Kind(GeometryError, _SPLIT),
    "MIXED_SPACING": Kind(GeometryError, _SPLIT),
    "MODALITY_LUT": Kind(
        ReadError, "lookup tables are read for MR without rescale only: export with rescale slope and intercept"
    ),
    "MOSAIC": Kind(ReadError, "export it with its private elements, or convert it with dcm2niix"),
    "MULTIPLE_SERIES": Kind(ReadError, "read them one by one: find_series() lists them"),
    "NOT_AN_IMAGE": Kind(ReadError, "give a CT, MR or PET series"),
    "NO_DECODER": Kind(
        ReadError, "install medseg again with its decoders (python-gdcm among them), or export uncompressed"
    ),
    "NO_PIXEL_SPACING": Kind(
        GeometryError, "the size of a pixel in the patient is unknown and is never guessed: " + _EXPORT
    ),
    "NO_POSITION": Kind(GeometryError, "where the slice lies is unknown and is never guessed: " + _EXPORT),
    "NO_SERIES": Kind(ReadError, "give a folder or files of one CT, MR or PET series"),
    "OVERSIZED": Kind(ReadError, "raise max_bytes if the size is real"),
    "PART_INCOMPLETE": Kind(GeometryError, "what others show there is not shown at its time or setting: " + _EXPORT),
    "SINGLE_SLICE": Kind(GeometryError, "a slice that others of its series do not fit is no series: give the whole"),
    "SLICES_ASIDE": Kind(GeometryError, "they do not show the same part of the body: separate them"),
    "SUV_INCOMPLETE": Kind(
        ReadError, "complete the header, or read what is stored (`values: stored` in the channel of the spec)"
    ),
    "TILT_TOO_STEEP": Kind(GeometryError, "no gantry tilts so far, the positions may be damaged: " + _EXPORT),
    "TRUNCATED": Kind(ReadError, "the file is cut short: copy or export it again"),
    "UNREADABLE": Kind(ReadError, "the file is damaged: copy or export it again"),
    "UNSUPPORTED_CLASS": Kind(ReadError, "give a CT, MR or PET series"),
}


@dataclass(frozen=True)
class Refusal:
    """Why a series is not read: a code of REFUSALS and the facts in words.

    Attributes
    ----------
    passing : the system did not give a file or folder, which may pass.
    """

    code: str
    text: str
    passing: bool = False

    @property
    def advice(self) -> str:
        """What a person can do."""
        return PASSING if self.passing else REFUSALS[self.code].advice

    def error(self) -> MedsegError:
        """Return the error to raise."""
        text = f"DICOM series refused, {self.code}: {self.text}; {self.advice}"
        return REFUSALS[self.code].error(text, code=self.code)


def refuse(code: str, text: str) -> MedsegError:
    """Return (not raise) the error of `code` with the facts of this case and the advice."""
    return Refusal(code, text).error()


def reason(error: MedsegError) -> Refusal:
    """Turn an error made by `refuse` back into its code and facts."""
    text = str(error).removeprefix(f"DICOM series refused, {error.code}: ")
    passing = text.endswith("; " + PASSING)
    return Refusal(error.code, text.removesuffix("; " + (PASSING if passing else REFUSALS[error.code].advice)), passing)
