"""The YAML of a receiver: pipelines/listen.example.yaml explains every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from medseg import config
from medseg.config import Config
from medseg.duration import seconds
from medseg.errors import ConfigError
from medseg.exporters import EXPORTERS, choose_formats
from medseg.pacs.address import is_loopback, parse_address
from medseg.readers.allowances import Allowance

TITLE = r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$"
"""An AE title: 1 to 16 printable characters, no backslash, no space at its ends (PS3.5 table 6.2-1)."""


class Tls(Config):
    """Certificates of the receiver: PEM files.

    Attributes
    ----------
    certificate, key : what it shows, to senders and to the nodes that it sends to.
    authorities : senders must show a certificate signed by one of these; unless given, any sender may connect.
    """

    certificate: Path
    key: Path
    authorities: Path | None = None


class Target(Config):
    """Where results go: a DICOMweb archive (`url`), or a node (`host`, `port`, `ae_title`).

    Attributes
    ----------
    authorities : for a node: talk TLS, and check its certificate with these (PEM).
    """

    url: str | None = None
    host: str | None = Field(default=None, pattern=r"^[A-Za-z0-9.:_-]+$")
    port: int | None = Field(default=None, ge=1, le=65535)
    ae_title: str | None = Field(default=None, pattern=TITLE)
    authorities: Path | None = None

    @field_validator("url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                parse_address(value, whole=True)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _one(self) -> Self:
        node = (self.host, self.port, self.ae_title)
        if self.url is None and None in node:
            raise ValueError("give url (dicomweb://...), or host, port and ae_title of a node")
        if self.url is not None and (any(part is not None for part in node) or self.authorities):
            raise ValueError("give either url or a node, not both")
        return self


class ListenConfig(Config):
    """A receiver that segments what comes.

    Attributes
    ----------
    ae_title, host, port : under which it is called; 127.0.0.1 is reached from this machine only.
    calling : AE titles that may send; empty: any.
    model, track, mirror, quality, formats, channels, allow : as for medseg predict.
    inbox, out : folders for what comes (private) and for results.
    quiet_seconds : a study that gets nothing for so long is segmented.
    keep : how long its images stay after its results were sent ("1h"; 0 deletes at once).
    send : where results go.
    retry_seconds : before a failed study or transmission is tried again; doubled each time, up to an hour.
    attempts : of one study.
    max_study_bytes, max_instance_bytes : more is not taken.
    max_pdu : largest piece of a transmission, 0 for no limit.
    """

    ae_title: str = Field(default="MEDSEG", pattern=TITLE)
    host: str = Field(default="127.0.0.1", pattern=r"^[A-Za-z0-9.:_-]+$")
    port: int = Field(default=11112, ge=1, le=65535)
    calling: tuple[str, ...] = ()
    model: str = Field(min_length=1)
    track: Path = Path()
    mirror: bool | None = None
    quality: Literal["exact", "balanced", "fast"] = "exact"
    formats: tuple[str, ...] = ("seg",)
    channels: Path | None = None
    allow: tuple[Allowance, ...] = ()
    inbox: Path
    out: Path
    quiet_seconds: float = Field(default=60, gt=0)
    keep: str = "1h"
    send: tuple[Target, ...] = ()
    retry_seconds: float = Field(default=30, gt=0)
    attempts: int = Field(default=3, ge=1)
    max_study_bytes: int = Field(default=32 * 1024**3, ge=1)
    max_instance_bytes: int = Field(default=2 * 1024**3, ge=1)
    max_pdu: int = Field(default=65536, ge=0, le=2**31)
    tls: Tls | None = None

    @field_validator("formats")
    @classmethod
    def _formats(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return choose_formats(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @field_validator("keep", mode="before")
    @classmethod
    def _seconds(cls, value: object) -> object:
        """Take `keep: 0`, which YAML reads as a number, like `keep: "0"`."""
        return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value

    @field_validator("keep")
    @classmethod
    def _duration(cls, value: str) -> str:
        try:
            if value != "0":
                seconds(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.send and not any(EXPORTERS[name].dicom for name in self.formats):
            raise ValueError("send: DICOM only can be sent; add seg, rtstruct or sr to formats")
        if any((target.host, target.port) == (self.host, self.port) for target in self.send):
            raise ValueError("send: results would come back to this receiver; name the archive")
        return self

    @property
    def keep_seconds(self) -> float:
        """Seconds for which images stay after success."""
        return 0.0 if self.keep == "0" else seconds(self.keep)

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the receiver."""
        return is_loopback(self.host)


def load_settings(path: Path) -> ListenConfig:
    """Read the YAML of a receiver; its relative paths start at its folder.

    Raises
    ------
    ConfigError : every problem with its line.
    """
    found = config.load(ListenConfig, path)

    def placed(value: Path) -> Path:
        return path.absolute().parent / value.expanduser()

    def placed_or_none(value: Path | None) -> Path | None:
        return None if value is None else placed(value)

    model = found.model if found.model.startswith("models:/") else str(placed(Path(found.model)))
    tls = found.tls and found.tls.model_copy(
        update={
            "certificate": placed(found.tls.certificate),
            "key": placed(found.tls.key),
            "authorities": placed_or_none(found.tls.authorities),
        }
    )
    send = tuple(target.model_copy(update={"authorities": placed_or_none(target.authorities)}) for target in found.send)
    places: dict[str, Any] = {name: placed(getattr(found, name)) for name in ("track", "inbox", "out")}
    places["channels"] = placed_or_none(found.channels)
    return found.model_copy(update={**places, "model": model, "tls": tls, "send": send})
