"""Who we are to an archive: from the environment or a private file, never from a command line.

``MEDSEG_DICOMWEB_TOKEN`` (bearer), or ``MEDSEG_DICOMWEB_USER`` and ``MEDSEG_DICOMWEB_PASSWORD``: for the one archive of
the command. ``MEDSEG_DICOMWEB_NETRC``: a file in the form of .netrc, mode 0600, for any number of hosts; the login
``bearer`` says that its password is a token. ``MEDSEG_DICOMWEB_CA``: certificates (PEM) that HTTPS archives are
checked with, instead of those of the system.
"""

from __future__ import annotations

import base64
import netrc
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from medseg.errors import ConfigError
from medseg.pacs.address import Address

VARIABLES = ("MEDSEG_DICOMWEB_TOKEN", "MEDSEG_DICOMWEB_USER", "MEDSEG_DICOMWEB_PASSWORD")


@dataclass(frozen=True)
class Credentials:
    """What is sent with each request.

    Attributes
    ----------
    header : value of the header Authorization, "" for none; never printed.
    authorities : file of certificates that HTTPS is checked with; None for those of the system.
    """

    header: str = field(default="", repr=False)
    authorities: Path | None = None


def find_credentials(address: Address, others: Sequence[Address] = ()) -> Credentials:
    """Return the credentials for an archive; `others` are the further archives of the same command.

    Raises
    ------
    ConfigError : the file cannot be read or others may read it; the environment holds half of a pair, or secrets while
        several archives are meant; they would travel in clear text.
    """
    header = _from_environment(address, others) or _from_file(address)
    if header and not address.secure:
        raise ConfigError(
            f"{address.host}: credentials would travel in clear text; use dicomwebs://, or a tunnel on 127.0.0.1"
        )
    authorities = os.environ.get("MEDSEG_DICOMWEB_CA")
    if authorities and not Path(authorities).is_file():
        raise ConfigError(f"MEDSEG_DICOMWEB_CA names {authorities}, which is no file")
    return Credentials(header, Path(authorities) if authorities else None)


def _from_environment(address: Address, others: Sequence[Address]) -> str:
    token, user, password = (os.environ.get(name, "") for name in VARIABLES)
    if not (token or user or password):
        return ""
    if {other.host for other in others} - {address.host}:
        raise ConfigError(
            "MEDSEG_DICOMWEB_TOKEN, _USER and _PASSWORD are for one archive, and this command names several: put the "
            "secrets of each into a file and name it in MEDSEG_DICOMWEB_NETRC"
        )
    if token and (user or password):
        raise ConfigError("set either MEDSEG_DICOMWEB_TOKEN or MEDSEG_DICOMWEB_USER and _PASSWORD, not both")
    if not token and not (user and password):
        raise ConfigError("MEDSEG_DICOMWEB_USER and MEDSEG_DICOMWEB_PASSWORD go together: one of them is not set")
    return _header(user or "bearer", token or password)


def _from_file(address: Address) -> str:
    given = os.environ.get("MEDSEG_DICOMWEB_NETRC")
    if not given:
        return ""
    try:
        if os.stat(given).st_mode & 0o077:
            raise ConfigError(f"{given} holds secrets and others may read it: chmod 600 {given}")
        hosts = netrc.netrc(given).hosts
    except OSError as error:
        raise ConfigError(f"{given} (MEDSEG_DICOMWEB_NETRC) cannot be read: {error.strerror}") from error
    except netrc.NetrcParseError as error:
        # Its message quotes the word that it stumbled over, which may be the password.
        raise ConfigError(f"{given}:{error.lineno}: not in the form of a .netrc file") from None
    login = hosts.get(address.host) or hosts.get(urlsplit(address.base).hostname or "")
    return _header(login[0], login[2] or "") if login else ""


def _header(user: str, secret: str) -> str:
    if user == "bearer":
        return f"Bearer {secret}"
    return "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode("ascii")
