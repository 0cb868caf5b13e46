"""Cases of several datasets that are learnt from together, and which labels the masks of each one know.

A dataset whose spec does not list a label says nothing about it: where its masks hold 0, that label may well be. Such
labels are unknown there, in training and in every score.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from medseg.files import digest
from medseg.spec import Case, Spec, spec_digest


@dataclass(frozen=True)
class JoinedCase(Case):
    """A case of one of several datasets, under names that are clear among all of them.

    Attributes
    ----------
    own : spec of its dataset, by which its files are read.
    own_id, own_patient : what it is called there.
    """

    own: Spec = field(kw_only=True, hash=False)
    own_id: str = field(kw_only=True)
    own_patient: str = field(kw_only=True)

    @property
    def alone(self) -> Case:
        """The case as it is in its dataset."""
        return Case(self.own_id, self.images, self.mask, self.own_patient, self.split)


def own_spec(spec: Spec, case: Case) -> Spec:
    """Return the spec by which the files of a case are read: its dataset's, else `spec`."""
    return case.own if isinstance(case, JoinedCase) else spec


def as_alone(case: Case) -> Case:
    """Return a case as it is in its dataset."""
    return case.alone if isinstance(case, JoinedCase) else case


def annotated(spec: Spec, case: Case) -> dict[str, int]:
    """Return label -> value, in the order of the spec, for the labels that the mask of a case knows."""
    known = own_spec(spec, case).foreground
    return {name: value for name, value in spec.foreground.items() if name in known}


def annotates_all(spec: Spec, case: Case, labels: Iterable[str]) -> bool:
    """Tell whether the mask of a case knows each of these labels."""
    return set(labels) <= set(annotated(spec, case))


def dataset_of(case: Case) -> str:
    """Return the name of the dataset that a case comes from; "" where there is only one."""
    return case.own.name if isinstance(case, JoinedCase) else ""


def source_among(case: Case, alone: str) -> str:
    """Return the digest of a case from that of its files: how they are read is part of it where datasets differ."""
    return digest([spec_digest(case.own), alone]) if isinstance(case, JoinedCase) else alone
