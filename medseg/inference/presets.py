"""QUALITY: how much of a prediction's care is given up for speed; a further preset is a row here.

A preset changes the bundle that a run works with (`at_quality`), and so its digest: results of another preset are made
again, and what is said about their origin names it. See docs/explanation/streaming.md for what each costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from medseg.bundle import Bundle, BundleInfo
from medseg.errors import ConfigError

LONGEST = 1.5
"""Axes up to this many patches long are predicted in one window, of medseg's own models."""


@dataclass(frozen=True)
class Preset:
    """What is done differently from the plan.

    Attributes
    ----------
    overlap : of neighbouring windows, at most; None: as planned.
    mirror : whether the plan may ask for mirrored inputs; options of a command come first.
    longest : an axis up to so many patches long is one window; None: LONGEST, and never for models of nnU-Net's.
    room : windows that grow for it have at most so many times the voxels of a patch, so that memory is bounded.
    air : windows of nothing but air are background, and no network is asked.
    """

    overlap: float | None = None
    mirror: bool = True
    longest: float | None = None
    room: float = float("inf")
    air: bool = False


EXACT = Preset()
QUALITY = {
    "exact": EXACT,
    "balanced": Preset(overlap=0.25, air=True),
    "fast": Preset(overlap=0.125, mirror=False, longest=2.0, room=4.0, air=True),
}


def at_quality(bundle: Bundle, name: str) -> Bundle:
    """Return a bundle that is used with a preset; "exact" is the bundle itself.

    Its quality estimate was fitted on masks that were made as planned, so that it goes with the plan.

    Raises
    ------
    ConfigError : there is no such preset.
    """
    if name not in QUALITY:
        raise ConfigError(f"quality {name!r}: allowed are {', '.join(QUALITY)}")
    return bundle if QUALITY[name] is EXACT else replace(bundle, info=_changed(bundle.info, name))


def in_parts(bundle: Bundle) -> Bundle:
    """Return a bundle whose first stage and members are used with its own preset, too."""
    name = bundle.info.preset
    previous = None if bundle.previous is None else at_quality(bundle.previous, name)
    return replace(bundle, previous=previous, members=tuple(at_quality(member, name) for member in bundle.members))


def _changed(info: BundleInfo, name: str) -> BundleInfo:
    row, plan = QUALITY[name], info.plan
    overlap = plan.overlap if row.overlap is None else min(plan.overlap, row.overlap)
    changes = {"overlap": overlap, "test_mirroring": plan.test_mirroring and row.mirror}
    return info.model_copy(update={"plan": plan.model_copy(update=changes), "preset": name, "quality": None})
