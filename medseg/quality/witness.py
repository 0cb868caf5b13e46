"""What the networks' passes say about each other and about themselves, summed up window by window.

No pass more than the prediction needs: the sums are taken from logits that are there anyway, on their device. They are
those of each network on its own, averaged over networks, because out of fold there is only one network that has not
seen the case; so the same signs mean the same in training and in prediction. The probabilities are the networks' own
(temperature 1): the temperature is fitted on the same cases only later, and the estimate is fitted to what it sees.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from medseg.quality.model import logit
from medseg.spec import Spec
from medseg.targets import exclusive

_FIELDS = ("count", "own", "mass", "entropy", "margin", "edge", "edge_entropy", "shared", "passed")
LabelSigns = dict[str, float]


class Witness:
    """Sums over all windows of one image.

    Parameters
    ----------
    networks, passes : how many networks answer, and how often each (once for each mirroring).
    """

    def __init__(self, spec: Spec, *, networks: int, passes: int) -> None:
        self.spec, self.networks, self.passes = spec, networks, passes
        size = len(spec.foreground) + 1
        self._sums = torch.zeros((networks, len(_FIELDS), size), dtype=torch.float64)
        self._between = torch.zeros((2, size), dtype=torch.float64)

    def window(self) -> Window:
        """Begin a batch of windows; it counts only when it is handed to `take` (a batch may be tried again)."""
        return Window(self.spec, self.passes)

    def take(self, window: Window) -> None:
        """Add a batch of windows of which all passes were seen."""
        self._sums += torch.stack(window.sums).cpu()
        self._between += window.between().cpu()

    def signs(self) -> dict[str, LabelSigns]:
        """Return label -> signs, for the labels that any network found.

        confidence, the logit of the Dice that the network's probabilities expect of its own mask; entropy (nats) and
        margin (first less second probability) in the object; edge_entropy on its border; mirrors, the logit of the
        Dice between mirrored passes and their mean (where there are several).
        """
        found = {}
        for index, label in enumerate(self.spec.foreground, start=1):
            rows = [dict(zip(_FIELDS, row, strict=True)) for row in self._sums[:, :, index].tolist()]
            seen = [self._signs(row) for row in rows if row["count"]]
            if seen:
                found[label] = {name: math.fsum(row[name] for row in seen) / len(seen) for name in seen[0]}
        return found

    def _signs(self, row: dict[str, float]) -> LabelSigns:
        signs = {
            "confidence": logit(2 * row["own"] / (row["count"] + row["mass"])),
            "entropy": row["entropy"] / row["count"],
            "margin": row["margin"] / row["count"],
            "edge_entropy": row["edge_entropy"] / max(1.0, row["edge"]),
        }
        if self.passes > 1:
            whole = row["passed"] + self.passes * row["count"]
            signs["mirrors"] = logit(2 * row["shared"] / whole)
        return signs

    def between_networks(self) -> dict[str, float]:
        """Return label -> Dice between the masks of two networks, the mean over pairs; nothing for one network."""
        shared, sizes = self._between[:, 1:].tolist()
        rows = zip(self.spec.foreground, shared, sizes, strict=True)
        return {label: 2 * both / total for label, both, total in rows if total}


class Window:
    """All passes over one batch of windows, in the order network by network."""

    def __init__(self, spec: Spec, passes: int) -> None:
        self.spec, self.passes = spec, passes
        self.sums: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._passed: list[Tensor] = []
        self._total: Tensor | None = None

    def add(self, logits: Tensor) -> None:
        """Look at one pass: logits (B, K, *S), float32."""
        self._total = logits if self._total is None else self._total + logits
        if self.passes > 1:
            self._passed.append(_winners(self.spec, logits))
        if max(1, len(self._passed)) < self.passes:
            return
        mean = self._total / self.passes if self.passes > 1 else self._total
        mask = _winners(self.spec, mean)
        self.sums.append(self._sum_up(mask, _chances(self.spec, mean)))
        self._masks.append(mask)
        self._passed, self._total = [], None

    def _sum_up(self, mask: Tensor, chances: Tensor) -> Tensor:
        size = chances.shape[1]
        index = mask.long()
        best = chances.topk(min(2, size), dim=1).values
        entropy = -(chances * chances.clamp(min=1e-12).log()).sum(1)
        edge = _edge(mask)
        shared = sum((_count(mask[mask == one], size) for one in self._passed), _count(mask[:0], size))
        passed = sum((_count(one, size) for one in self._passed), _count(mask[:0], size))
        rows = [
            _count(mask, size),
            _weigh(index, chances.gather(1, index[:, None])[:, 0], size),
            chances.transpose(0, 1).flatten(1).sum(1).double(),
            _weigh(index, entropy, size),
            _weigh(index, best[:, 0] - best[:, -1], size),
            _count(mask[edge], size),
            _weigh(index[edge], entropy[edge], size),
            shared,
            passed,
        ]
        return torch.stack(rows)

    def between(self) -> Tensor:
        """Return (2, categories): voxels that two networks share, and those of both, the sum over pairs."""
        size = len(self.spec.foreground) + 1
        total = torch.zeros((2, size), dtype=torch.float64, device=self._masks[0].device)
        for first, second in itertools.combinations(self._masks, 2):
            total[0] += _count(first[first == second], size)
            total[1] += _count(first, size) + _count(second, size)
        return total


def _winners(spec: Spec, logits: Tensor) -> Tensor:
    """Map logits (B, K, *S) to categories (B, *S): 0 background, then the labels in the order of the spec."""
    kind = torch.uint8 if len(spec.foreground) < 256 else torch.int16
    if exclusive(spec):
        return logits.argmax(1).to(kind)
    mask = torch.zeros((len(logits), *logits.shape[2:]), dtype=kind, device=logits.device)
    for channel, label in enumerate(_painted(spec)):
        mask[logits[:, channel] > 0] = label
    return mask


def _chances(spec: Spec, logits: Tensor) -> Tensor:
    """Map logits (B, K, *S) to the probability of each category (B, 1 + labels, *S).

    Regions are taken as independent: a label is seen where its region is and no later one paints over it.
    """
    if exclusive(spec):
        return logits.softmax(1)
    shape = (len(logits), len(spec.foreground) + 1, *logits.shape[2:])
    chances = torch.zeros(shape, device=logits.device)
    free = torch.ones_like(chances[:, 0])
    for channel, label in reversed(list(enumerate(_painted(spec)))):
        there = logits[:, channel].sigmoid()
        chances[:, label] += free * there
        free = free * (1 - there)
    chances[:, 0] = free
    return chances


def _painted(spec: Spec) -> list[int]:
    """Return which label each region paints, numbered from 1 in the order of the spec."""
    names = list(spec.foreground)
    return [1 + names.index(region.paint) for region in spec.regions.values()]


def _edge(mask: Tensor) -> Tensor:
    """Tell which voxels of (B, *S) have a neighbour by face of another category."""
    edge = torch.zeros_like(mask, dtype=torch.bool)
    for axis in range(1, mask.ndim):
        size = mask.shape[axis]
        if size > 1:
            differs = mask.narrow(axis, 0, size - 1) != mask.narrow(axis, 1, size - 1)
            edge.narrow(axis, 0, size - 1).logical_or_(differs)
            edge.narrow(axis, 1, size - 1).logical_or_(differs)
    return edge


def _count(mask: Tensor, size: int) -> Tensor:
    return torch.bincount(mask.flatten().long(), minlength=size).double()


def _weigh(index: Tensor, values: Tensor, size: int) -> Tensor:
    return torch.bincount(index.flatten(), weights=values.flatten().double(), minlength=size)
