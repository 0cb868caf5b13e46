"""What of a plan that was edited by hand cannot be meant."""

from __future__ import annotations

import math

from medseg.errors import PlanError
from medseg.planning.fingerprint import Fingerprint
from medseg.planning.plan import Plan

ROUND = 32
"""Voxels to whose multiple the largest image is rounded up: no planned network halves an axis more than five times."""


MOST_VOXELS = 2**34
"""Of a prepared image: 64 GiB a channel. The largest CT of a whole body at 0.5 mm has a quarter of that."""


def refuse_large_patch(plan: Plan, fingerprint: Fingerprint | None = None) -> None:
    """Raise PlanError (PATCH_TOO_LARGE) where a patch is more than twice as long as the largest image along an axis.

    A patch may be larger than an image (what lies outside is zero); far larger ones cost time and memory for nothing.
    Also (PLAN) where the spacing is so fine that the largest image would have more than MOST_VOXELS voxels.

    `fingerprint` : of the images that the plan is for; those that it was made from unless told.
    """
    largest = _largest(plan, fingerprint or plan.fingerprint)
    if not plan.stored_axes and math.prod(largest) > MOST_VOXELS:
        raise PlanError(
            f"spacing {list(plan.spacing)} is far finer than the images': the largest would have "
            f"{'×'.join(map(str, largest))} voxels; it is in mm (of pictures in pixels), along the axes of "
            f"{plan.orientation}"
        )
    allowed = [ROUND * math.ceil(size / ROUND) for size in largest]
    if any(have > 2 * most for have, most in zip(plan.patch_size[: plan.dimensions], allowed, strict=False)):
        whole = [*allowed[: plan.dimensions], *[1] * (3 - plan.dimensions)]
        raise PlanError(
            f"patch_size {list(plan.patch_size)} is far larger than any image of the dataset: the largest have "
            f"{'×'.join(map(str, largest))} voxels at the planned spacing; {whole} covers them all",
            code="PATCH_TOO_LARGE",
        )


def _largest(plan: Plan, fingerprint: Fingerprint) -> list[int]:
    """Return the voxels of the largest images along each axis of the plan, at its spacing.

    Which way an image is stored is not known: along stored axes it is the longest side everywhere.
    """
    letters = {letter: axis for axis, pair in enumerate(("RL", "AP", "SI")) for letter in pair}
    sides = [count * step for count, step in zip(fingerprint.shapes[-1], fingerprint.spacings[-1], strict=True)]
    wanted = [max(sides) if plan.stored_axes else sides[letters[letter]] for letter in plan.orientation]
    return [max(1, math.ceil(side / step - 1e-6)) for side, step in zip(wanted, plan.spacing, strict=True)]
