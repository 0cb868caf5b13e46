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

from medseg.errors import ConfigError
from medseg.files import write_text


def key_file() -> Path:
    """Return where the key is kept: $MEDSEG_KEY_FILE, else medseg/key in the user's configuration folder."""
    if given := os.environ.get("MEDSEG_KEY_FILE"):
        return Path(given)
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "medseg" / "key"


@cache
def _key(path: Path) -> bytes:
    if not path.exists():
        write_text(path, secrets.token_hex(32) + "\n", mode=0o600)
    text = path.read_text(encoding="ascii").strip()
    if len(text) < 32:
        raise ConfigError(
            f"{path}: the key has {len(text)} characters, at least 32 are needed; delete it for a new one"
        )
    return text.encode("ascii")


def keyed_id(kind: str, *identifiers: str) -> str:
    """Return ``<kind>-<12 hex digits>``, the same for the same identifiers and key."""
    message = "\0".join(identifiers).encode("utf-8")
    return f"{kind}-{hmac.new(_key(key_file()), message, hashlib.sha256).hexdigest()[:12]}"
