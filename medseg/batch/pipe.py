"""Waiting for a pipe, whatever its number is."""

from __future__ import annotations

import select


def readable(handle: int, seconds: float) -> bool:
    """Wait up to `seconds` until a file handle can be read, or has come to its end; say whether it has.

    Not `select.select`, which refuses the handles from 1024 on: a command that has many files open has those.
    """
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
