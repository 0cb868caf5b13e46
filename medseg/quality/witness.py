"""What the networks' passes say of their own masks, summed up window by window.

The sums are taken from logits that are there anyway, on their device, and from one pass more: the first network looks
once more, from closer by, at windows in which it found something (medseg.quality.closer). Other signs are those of each
network on its own, averaged over networks, because out of fold there is only one network that has not seen the case;
so the same signs mean the same in training and in prediction. The probabilities are the networks' own (temperature 1):
the temperature is fitted on the same cases only later, and the estimate is fitted to what it sees.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medseg.quality.closer import agreement, enlarge
from medseg.quality.model import logit
from medseg.spec import Spec
from medseg.targets import exclusive

_FIELDS = ("count", "own", "mass", "border", "border_steps", "inside", "inside_steps")
LEAST_STEP = 1e-6
"""Grey values of a normalised image differ by this at least, so that a flat image has numbers, too."""
LabelSigns = dict[str, float]


class Witness:
    """Sums over all windows of one image.

    Parameters
    ----------
    networks, passes : how many networks answer, and how often each (once for each mirroring).
    zoom : by how much to enlarge along each axis of a window for the second look (medseg.quality.closer.zooms).
    """

    def __init__(self, spec: Spec, *, networks: int, passes: int, zoom: Sequence[float]) -> None:
        self.spec, self.networks, self.passes, self.zoom = spec, networks, passes, tuple(zoom)
        size = len(spec.foreground) + 1
        self._sums = torch.zeros((networks, len(_FIELDS), size), dtype=torch.float64)
        self._between = torch.zeros((2, size), dtype=torch.float64)
        self._closer = torch.zeros((2, size), dtype=torch.float64)

    def window(self, windows: Tensor) -> Window:
        """Begin a batch of windows (B, C, *S); it counts only when handed to `take` (a batch may be tried again)."""
        return Window(self.spec, self.passes, self.zoom, windows)

    def take(self, window: Window) -> None:
        """Add a batch of windows of which all passes were seen."""
        self._sums += torch.stack(window.sums).cpu()
        self._between += window.between().cpu()
        self._closer += window.agreed.cpu()

    def signs(self) -> dict[str, LabelSigns]:
        """Return label -> signs, for the labels that any network found.

        confidence, the logit of the Dice that the network's probabilities expect of its own mask; closer, the logit of
        the Dice between its probabilities and those of the second look; edge, how much larger grey values differ
        between neighbours across the label's border than inside it (natural logarithm).
        """
        found = {}
        for index, label in enumerate(self.spec.foreground, start=1):
            rows = [dict(zip(_FIELDS, row, strict=True)) for row in self._sums[:, :, index].tolist()]
            seen = [_signs(row) for row in rows if row["count"]]
            if seen:
                shared, both = self._closer[:, index].tolist()
                found[label] = {name: math.fsum(row[name] for row in seen) / len(seen) for name in seen[0]}
                found[label]["closer"] = logit(shared / both if both else 0.0)
        return found

    def between_networks(self) -> dict[str, float]:
        """Return label -> Dice between the masks of two networks, the mean over pairs; nothing for one network."""
        shared, sizes = self._between[:, 1:].tolist()
        rows = zip(self.spec.foreground, shared, sizes, strict=True)
        return {label: 2 * both / total for label, both, total in rows if total}


def _signs(row: dict[str, float]) -> LabelSigns:
    across, within = (row[f"{part}_steps"] / max(1.0, row[part]) for part in ("border", "inside"))
    return {
        "confidence": logit(2 * row["own"] / (row["count"] + row["mass"])),
        "edge": math.log(max(across, LEAST_STEP) / max(within, LEAST_STEP)),
    }


class Window:
    """All passes over one batch of windows, in the order network by network."""

    def __init__(self, spec: Spec, passes: int, zoom: Sequence[float], windows: Tensor) -> None:
        self.spec, self.passes, self.zoom, self.windows = spec, passes, zoom, windows
        self.sums: list[Tensor] = []
        self.agreed = torch.zeros((2, len(spec.foreground) + 1), dtype=torch.float64)
        self._masks: list[Tensor] = []
        self._seen = 0
        self._total: Tensor | None = None
        self._first: Tensor | None = None

    def add(self, logits: Tensor) -> None:
        """Look at one pass: logits (B, K, *S), float32."""
        self._total = logits if self._total is None else self._total + logits
        self._seen += 1
        if self._seen % self.passes:
            return
        mean = self._total / self.passes if self.passes > 1 else self._total
        mask = _winners(self.spec, mean)
        self.sums.append(self._sum_up(mask, _chances(self.spec, mean)))
        self._masks.append(mask)
        self._first = mean if len(self.sums) == 1 and bool(mask.any()) else None
        self._total = None

    def closer(self) -> Tensor | None:
        """Return the windows, enlarged, when the first network is to look at them once more."""
        return None if self._first is None else enlarge(self.windows, self.zoom)

    def compare(self, logits: Tensor) -> None:
        """Hold what the first network says of the enlarged windows (B, K, *S) against its first answer, enlarged."""
        assert self._first is not None, "nothing was asked"
        answers = (_chances(self.spec, one) for one in (enlarge(self._first, self.zoom), logits))
        self.agreed, self._first = agreement(*answers), None

    def _sum_up(self, mask: Tensor, chances: Tensor) -> Tensor:
        size = chances.shape[1]
        rows = [
            _count(mask, size),
            _weigh(mask, chances.gather(1, mask.long()[:, None])[:, 0], size),
            chances.transpose(0, 1).flatten(1).sum(1).double(),
            *_steps(mask, self.windows[:, : len(self.spec.channels)], size),
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


def _steps(mask: Tensor, image: Tensor, size: int) -> list[Tensor]:
    """Look at all pairs of neighbours by face of (B, *S), in images (B, C, *S).

    Returns four (size,): pairs of which one is of a category and the other is not, how much their grey values differ
    in all (mean over channels), and the same for pairs of which both are of it.
    """
    sums = [torch.zeros(size, dtype=torch.float64, device=mask.device) for _ in range(4)]
    for axis in range(1, mask.ndim):
        length = mask.shape[axis] - 1
        one, other = (mask.narrow(axis, start, length) for start in (0, 1))
        left, right = (image.narrow(axis + 1, start, length) for start in (0, 1))
        step = (left - right).abs().mean(1)
        differs = one != other
        for side in (one[differs], other[differs]):
            sums[0] += _count(side, size)
            sums[1] += _weigh(side, step[differs], size)
        sums[2] += _count(one[~differs], size)
        sums[3] += _weigh(one[~differs], step[~differs], size)
    return sums


def _count(mask: Tensor, size: int) -> Tensor:
    return torch.bincount(mask.flatten().long(), minlength=size).double()


def _weigh(mask: Tensor, values: Tensor, size: int) -> Tensor:
    return torch.bincount(mask.flatten().long(), weights=values.flatten().double(), minlength=size)
