"""Addresses of DICOMweb archives as a person types them: ``dicomweb://HOST:PORT/PATH/studies/UID/series/UID?FILTER``.

Source: PS3.18 sections 10.4 (resources) and 10.6 (search); the schemes dicomweb (HTTP) and dicomwebs (HTTPS) are ours.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from medseg.errors import ConfigError
from medseg.registry import did_you_mean

SCHEMES = {"dicomweb": "http", "dicomwebs": "https"}
STUDY_FILTERS = (
    *("StudyDate", "StudyTime", "AccessionNumber", "ModalitiesInStudy", "ReferringPhysicianName", "PatientName"),
    *("PatientID", "StudyInstanceUID", "StudyID", "StudyDescription", "PatientBirthDate", "PatientSex"),
)
SERIES_FILTERS = (
    *("Modality", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "BodyPartExamined", "ProtocolName"),
    *("PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime", "StationName", "Manufacturer"),
)
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_RESOURCE = re.compile(r"(?P<base>.*?)(/studies(/(?P<study>[^/]+)(/series(/(?P<series>[^/]+))?)?)?)?/?")


@dataclass(frozen=True)
class Address:
    """An archive, and which of its studies are meant.

    Attributes
    ----------
    base : ``http://host:port/path`` without a slash at the end; holds nothing secret.
    study, series : UIDs, "" for all; they identify a patient: never print them.
    study_filters, series_filters : keyword and value of each search key, for the two levels of the search.
    """

    base: str
    study: str = ""
    series: str = ""
    study_filters: tuple[tuple[str, str], ...] = ()
    series_filters: tuple[tuple[str, str], ...] = ()

    @property
    def host(self) -> str:
        """Host and port as they stand in the address."""
        return urlsplit(self.base).netloc

    @property
    def secure(self) -> bool:
        """Whether what is sent stays secret: over HTTPS, or within this machine."""
        return self.base.startswith("https:") or is_loopback(urlsplit(self.base).hostname or "")

    def __str__(self) -> str:
        return self.base

    def __repr__(self) -> str:
        return f"Address({self.base!r})"


def is_address(text: str | Path) -> bool:
    """Tell addresses of archives from paths."""
    return isinstance(text, str) and text.partition("://")[0].lower() in SCHEMES and "://" in text


def is_uid(text: str) -> bool:
    """Tell whether a text is a UID (PS3.5 section 9.1), so that it may stand in a path of the archive."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine, by its address or the name localhost; other names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_address(text: str, *, whole: bool = False) -> Address:
    """Return what an address means.

    Parameters
    ----------
    whole : only an archive as a whole makes sense, as the place that results are sent to.

    Raises
    ------
    ConfigError : it is no address, names a user or password, a UID is none, or a filter is unknown. The message does
        not repeat what may identify a patient.
    """
    scheme, _, rest = text.partition("://")
    if scheme.lower() not in SCHEMES or not rest:
        raise ConfigError("an address of an archive is dicomweb://HOST:PORT/PATH, or dicomwebs:// for HTTPS")
    parts = urlsplit(f"{SCHEMES[scheme.lower()]}://{rest}")
    if "@" in parts.netloc:
        raise ConfigError(
            "an address with a user or password would stand in the history of the shell: leave them out, and set "
            "MEDSEG_DICOMWEB_USER and MEDSEG_DICOMWEB_PASSWORD, or MEDSEG_DICOMWEB_NETRC"
        )
    try:
        port = parts.port
    except ValueError:
        port = -1
    if not parts.hostname or port == -1 or parts.fragment or not parts.netloc.isprintable() or " " in parts.netloc:
        raise ConfigError(
            "the address has no usable host and port; write for example dicomweb://127.0.0.1:8042/dicom-web"
        )
    found = _RESOURCE.fullmatch(unquote(parts.path))
    base, study, series = (found["base"], found["study"] or "", found["series"] or "") if found else ("", "-", "-")
    if any(uid and not is_uid(uid) for uid in (study, series)):
        raise ConfigError(f"{parts.netloc}: after /studies/ and /series/ stands a UID (digits and dots, at most 64)")
    filters = parse_qsl(parts.query, keep_blank_values=True)
    if whole and (study or filters):
        raise ConfigError(f"{parts.netloc}: results are sent to an archive as a whole; leave out /studies and ?filters")
    for name, _ in filters:
        _check_filter(name)
    return Address(
        f"{parts.scheme}://{parts.netloc}{base}".rstrip("/"),
        study,
        series,
        tuple(pair for pair in filters if pair[0] not in SERIES_FILTERS),
        tuple(pair for pair in filters if pair[0] in SERIES_FILTERS),
    )


def _check_filter(name: str) -> None:
    known = (*STUDY_FILTERS, *SERIES_FILTERS, "fuzzymatching")
    if name not in known and not re.fullmatch(r"[0-9A-Fa-f]{8}", name):
        raise ConfigError(
            f"?{name}= is no search key{did_you_mean(name, known)}; give a DICOM keyword ({', '.join(known)}) or a tag "
            "of eight hex digits"
        )


def split_addresses(inputs: Sequence[str | Path]) -> tuple[list[Path], list[Address]]:
    """Return the paths and the addresses among `inputs`."""
    addresses = [parse_address(str(text)) for text in inputs if is_address(text)]
    return [Path(text) for text in inputs if not is_address(text)], addresses
