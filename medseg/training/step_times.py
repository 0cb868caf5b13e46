"""Step times that were measured before on this kind of machine, kept in the user's cache folder.

A time depends on processor, cores, device, threads, versions and on what a step computes, and on nothing else; the
name of its file is a digest of all that. So machines that share a home folder share no time unless they are alike, and
nothing of data, paths or people is kept.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medseg.device import device_name, processor_name
from medseg.errors import MedsegError
from medseg.files import digest, write_json

KEPT_SECONDS = 30 * 86400.0
"""Older times are measured again: drivers, cooling and power settings change."""


def cache_folder() -> Path:
    """Return the cache folder: $MEDSEG_CACHE, else medseg in the platform's folder for caches."""
    if given := os.environ.get("MEDSEG_CACHE"):
        return Path(given)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "medseg"
    home = Path.home()
    base = {"darwin": home / "Library" / "Caches", "win32": home / "AppData" / "Local"}
    return base.get(sys.platform, home / ".cache") / "medseg"


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a step time depends on, beside the step: words and counts of hardware and software, no name."""
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def recall(device: torch.device, step: Mapping[str, Any]) -> float | None:
    """Return the seconds kept for a step; None where there are none, or they are old, damaged or not to be read."""
    try:
        told = json.loads(_place(device, step).read_text(encoding="utf-8"))
        seconds, age = float(told["seconds"]), time.time() - float(told["measured"])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 and abs(age) < KEPT_SECONDS else None


def keep(device: torch.device, step: Mapping[str, Any], seconds: float) -> None:
    """Keep the seconds of a step; where the folder cannot be written, nothing is kept and nothing is lost."""
    try:
        write_json(_place(device, step), {"seconds": seconds, "measured": round(time.time())})
    except (MedsegError, OSError, RuntimeError):
        return  # a cache that cannot be written costs a few seconds the next time


def _place(device: torch.device, step: Mapping[str, Any]) -> Path:
    return cache_folder() / "step_times" / f"{digest({**machine(device), **step})[:32]}.json"
