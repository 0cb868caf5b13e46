"""Labels that some of the cases do not annotate: what a step may ask of each patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medseg.parallel import world
from medseg.planning.plan import Plan
from medseg.preparation.sampling import drawn_cases
from medseg.spec import Case, Spec
from medseg.targets import known_channels, merge_unknown


def known_in_batch(spec: Spec, plan: Plan, train: Sequence[Case], step: int) -> Tensor | None:
    """Return which channels each patch of a step's whole batch knows, (batch, K) bool; None where all know all."""
    drawn = drawn_cases(seed=plan.seed, step=step, batch_size=plan.batch_size, cases=len(train))
    rows = {number: known_channels(spec, train[number]) for number in set(drawn)}
    if all(all(row) for row in rows.values()):
        return None
    return torch.tensor([rows[number] for number in drawn])


def only_known(levels: list[Tensor], target: Tensor, known: Tensor, alone: bool) -> tuple[list[Tensor], Tensor]:
    """Return logits and target in which every loss asks only what the masks know.

    Unknown channels of a patch are merged (medseg.targets.merge_unknown); a channel that no patch of the batch knows is
    left out, for an overlap loss would count it as found to perfection and the mean over channels with it.

    Parameters
    ----------
    levels : logits (b, K, *S) of this process's patches, finest first.
    target : (b, K, *S).
    known : (batch, K) of all processes' patches: the same channels must be left out everywhere.
    alone : whether labels exclude each other.
    """
    kept, own = known.any(0), known[world().share].to(target.device)
    merged = [merge_unknown(logits, own, alone) for logits in levels]
    # Labels that are known may lie in a region of which others are not.
    target = target * own.reshape(*own.shape, *[1] * (target.ndim - 2))
    if kept.all():
        return merged, target
    chosen = kept.nonzero()[:, 0].to(target.device)
    return [logits[:, chosen] for logits in merged], target[:, chosen]
