"""Names for cases that tell nothing about the patient.

A DICOM study is named by a keyed hash (HMAC-SHA256) of its identifiers: stable for one user, meaningless to others.
The key stays with the user in a file that only they can read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from functools import cache
from pathlib import Path

from medseg.errors import ConfigError, MedsegError
from medseg.files import canonical_json, write_text


def key_file() -> Path:
    """Return where the key is kept: $MEDSEG_KEY_FILE, else medseg/key in the user's configuration folder."""
    if given := os.environ.get("MEDSEG_KEY_FILE"):
        return Path(given)
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "medseg" / "key"


@cache
def _key(path: Path) -> bytes:
    try:
        if not path.exists():
            _make_key(path)
        text = path.read_text(encoding="ascii").strip()
    except (MedsegError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: the key that hides patients' names cannot be made or read ({error}); "
            "set MEDSEG_KEY_FILE to a file that you may write"
        ) from error
    if len(text) < 32:
        raise ConfigError(
            f"{path}: the key has {len(text)} characters, at least 32 are needed; delete it for a new one"
        )
    return text.encode("ascii")


def _make_key(path: Path) -> None:
    """Write a new key unless another process does so at the same moment: then the first one counts for both."""
    candidate = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    write_text(candidate, secrets.token_hex(32) + "\n", mode=0o600)
    try:
        # Unlike a rename, a link never replaces what is there.
        os.link(candidate, path)
    except FileExistsError:
        pass
    finally:
        candidate.unlink()


def keyed_id(kind: str, *identifiers: str, digits: int = 12) -> str:
    """Return ``<kind>-<hex digits>`` (at most 64), the same for the same identifiers and key."""
    # JSON keeps the parts apart whatever they hold, and takes text that is no valid Unicode.
    message = canonical_json(identifiers)
    return f"{kind}-{hmac.new(_key(key_file()), message, hashlib.sha256).hexdigest()[:digits]}"
