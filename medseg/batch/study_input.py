"""One study that is to be segmented, before anything of it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from medseg.cases import source_digest
from medseg.errors import MedsegError
from medseg.files import digest
from medseg.readers.allowances import Allowance
from medseg.readers.dicom_index import SeriesFiles
from medseg.readers.dicom_refusals import REFUSALS, reason
from medseg.spec import Case

UNREAD = digest("unreadable")
"""Stands for the bytes of an input that cannot be read."""
INPUT_AWAY = "INPUT_AWAY"
"""Note of a study that is done and whose input cannot be read now; code of one that would have to be done again."""


@dataclass(frozen=True)
class StudyInput:
    """One image to be segmented.

    Attributes
    ----------
    id : names every file that is written for it.
    images : one path per channel, or one path for all; of a study whose channels were chosen, their folders.
    series : the DICOM series on whose grid the mask lies, if it is one.
    origin : where it was found, for the linkage table and the terminal only.
    channels : one series per channel, where rules chose them in a DICOM study.
    allow : what its dataset allows to be corrected.
    refusal : why it will not be read: its channels could not be chosen, its files are lost, its archive is bad.
    """

    id: str
    images: tuple[Path, ...]
    series: SeriesFiles | None
    origin: Path
    channels: tuple[SeriesFiles, ...] = field(default=(), repr=False)
    allow: frozenset[Allowance] = frozenset()
    refusal: MedsegError | None = field(default=None, compare=False)

    @property
    def passing(self) -> bool:
        """Whether it is refused for what may pass: the system did not give one of its files."""
        rows = self.channels or ((self.series,) if self.series else ())
        refusals = [row.refusal for row in rows if row.refusal is not None]
        if self.refusal is not None and self.refusal.code in REFUSALS:
            refusals.append(reason(self.refusal))
        return any(refusal.passing for refusal in refusals)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of its series, else its images."""
        rows = self.channels or ((self.series,) if self.series else ())
        return tuple(file for row in rows for file in row.files) or self.images

    def digest(self) -> str:
        """Return the SHA-256 of the input's bytes; UNREAD if they cannot be read."""
        try:
            if self.channels:
                return digest([_digest(self.id, row.files) for row in self.channels])
            return _digest(self.id, self.series.files if self.series else self.images)
        except OSError:
            return UNREAD


def _digest(name: str, files: tuple[Path, ...]) -> str:
    return source_digest(Case(name, tuple(sorted(files)), None, name))
