"""Coded concepts: what the labels of a spec are, and what the values of an image measure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from medseg.spec import Spec
from medseg.volume import Volume

if TYPE_CHECKING:
    from highdicom.color import CIELabColor

PRIVATE_SCHEME = "99MEDSEG"
ANATOMY = Code("91723000", "SCT", "Anatomical Structure")
ABNORMAL = Code("49755003", "SCT", "Morphologically Altered Structure")
UNKNOWN = Code("SEGMENT", PRIVATE_SCHEME, "Segment without a standard code")
_LESIONS = "cid7159"
"""Lesion segmentation types (PS3.16 CID 7159): what is no anatomy but a change of it."""


@dataclass(frozen=True)
class Segment:
    """One segment, structure or group of measurements of a DICOM object.

    Attributes
    ----------
    number : from 1, in the order of the spec.
    value : in the mask.
    color : #rrggbb or None.
    """

    number: int
    name: str
    value: int
    color: str | None
    category: Code
    type: Code

    @property
    def colour(self) -> CIELabColor | None:
        """The colour as DICOM's CIELab; None where the spec names none."""
        from highdicom.color import CIELabColor

        return None if self.color is None else CIELabColor.from_string(self.color)

    @property
    def uncoded(self) -> bool:
        """Whether the spec has no code for it."""
        return self.type.scheme_designator == PRIVATE_SCHEME


def label_segments(spec: Spec) -> tuple[Segment, ...]:
    """Return one segment a label of the spec, in its order; without a code in the spec, with a private one."""
    return tuple(_segment(spec, number, name, name) for number, name in enumerate(spec.foreground, start=1))


def soft_segments(spec: Spec) -> tuple[Segment, ...]:
    """Return what the network gives a probability each: the regions of the spec, or its labels where it has none.

    A region of one label is that label by code, one of several labels has a private code. Regions overlap, and
    their probabilities are no probabilities of the labels that are painted: so they are not turned into these.
    """
    rows = [(name, row.labels[0] if len(row.labels) == 1 else None) for name, row in spec.regions.items()]
    regions = [_segment(spec, number, name, label) for number, (name, label) in enumerate(rows, start=1)]
    return tuple(regions) or label_segments(spec)


def _segment(spec: Spec, number: int, name: str, label: str | None) -> Segment:
    """Return the segment `name`, which is by code the label `label`, or none of the labels."""
    painted = spec.labels[label or spec.regions[name].paint]
    return Segment(number, name, painted.value, painted.color, *_codes(spec, name, label))


def _codes(spec: Spec, name: str, label: str | None) -> tuple[Code, Code]:
    """Return category and type.

    A private code (scheme 99MEDSEG) depends on the names of the dataset and the segment; its meaning is the latter.
    """
    given = None if label is None else spec.labels[label].snomed
    if given is None:
        value = hashlib.sha256(f"{spec.name}/{name}".encode()).hexdigest()[:12].upper()
        return UNKNOWN, Code(value, PRIVATE_SCHEME, name[:64])
    code = Code(given.value[:16], given.scheme, given.meaning[:64])
    lesions = {(row.value, row.scheme_designator) for row in getattr(codes, _LESIONS).concepts.values()}
    return (ABNORMAL if (code.value, code.scheme_designator) in lesions else ANATOMY), code


MILLILITRE = Code("mL", "UCUM", "milliliter")
ARBITRARY = Code("[arb'U]", "UCUM", "arbitrary unit")
_ATTENUATION = Code("112031", "DCM", "Attenuation Coefficient")
_ACTIVITY = Code("110821", "DCM", "Nuclear Medicine Tomographic Activity")
_SUV = Code("126401", "DCM", "SUVbw")
_QUANTITIES = {
    ("CT", ""): (_ATTENUATION, Code("[hnsf'U]", "UCUM", "Hounsfield unit")),
    ("CT", "NO_RESCALE"): (_ATTENUATION, ARBITRARY),
    ("CT", "NOT_HU"): (_ATTENUATION, ARBITRARY),
    ("MR", ""): (Code("110852", "DCM", "MR signal intensity"), ARBITRARY),
    ("PT", "SUV_BW"): (_SUV, Code("{SUVbw}g/ml", "UCUM", "Standardized Uptake Value body weight")),
    ("PT", "BQML"): (_ACTIVITY, Code("Bq/ml", "UCUM", "Becquerels/milliliter")),
    ("PT", ""): (_ACTIVITY, ARBITRARY),
}
"""(modality, note of the reader or Units) -> what the values measure (PS3.16 CID 7469), and their UCUM unit."""
_TELLING_NOTES = ("NO_RESCALE", "NOT_HU", "SUV_BW")


def quantity(image: Volume) -> tuple[Code, Code] | None:
    """Return what the values of an image measure and their unit; None for a modality of which we do not know it."""
    modality = image.meta.get("Modality", "")
    words = (*(note for note in _TELLING_NOTES if note in image.notes), image.meta.get("Units", ""), "")
    return next((_QUANTITIES[modality, word] for word in words if (modality, word) in _QUANTITIES), None)
