"""Coded concepts of the labels of a spec."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from medseg.exporters.dicom_source import PRIVATE_SCHEME
from medseg.spec import Label, Spec

if TYPE_CHECKING:
    from highdicom.color import CIELabColor

ANATOMY = Code("91723000", "SCT", "Anatomical Structure")
ABNORMAL = Code("49755003", "SCT", "Morphologically Altered Structure")
UNKNOWN = Code("SEGMENT", PRIVATE_SCHEME, "Segment without a standard code")
_LESIONS = "cid7159"
"""Lesion segmentation types (PS3.16 CID 7159): what is no anatomy but a change of it."""


def property_codes(spec: Spec, name: str) -> tuple[Code, Code]:
    """Return category and type of a label; without a code in the spec, private ones (scheme 99MEDSEG).

    The private code depends on the names of the dataset and the label, the meaning is the label's name.
    """
    given = spec.labels[name].snomed
    if given is None:
        value = hashlib.sha256(f"{spec.name}/{name}".encode()).hexdigest()[:12].upper()
        return UNKNOWN, Code(value, PRIVATE_SCHEME, name[:64])
    code = Code(given.value[:16], given.scheme, given.meaning[:64])
    lesions = {(row.value, row.scheme_designator) for row in getattr(codes, _LESIONS).concepts.values()}
    return (ABNORMAL if (code.value, code.scheme_designator) in lesions else ANATOMY), code


def uncoded(spec: Spec) -> bool:
    """Tell whether any label has no code of its own."""
    return any(spec.labels[name].snomed is None for name in spec.foreground)


def display_colour(label: Label) -> CIELabColor | None:
    """Return the colour of a label as DICOM's CIELab; None where the spec names none."""
    from highdicom.color import CIELabColor

    return None if label.color is None else CIELabColor.from_string(label.color)
