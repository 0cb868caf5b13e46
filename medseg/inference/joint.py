"""Probabilities of one model or the mean of several, on the grid of the source, slice by slice.

Models of an ensemble have grids and windows of their own. Each is brought back along the same axis of the source, in
the same direction, so that their slices meet: logits become probabilities, these are added up, and what is wanted of a
slice (labels, or probabilities, too) is written before the next one begins. Classes × slab is held, never classes ×
volume. Where the corners of a voxel's cell agree in every model, the mean agrees with them, and nothing is computed.

Every value is computed by itself, by operations whose rounding does not depend on the part that is computed at once
(so not by torch's softmax, sigmoid or sum): results do not depend on tiles, nor on what is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.inference.labels import Key
from medseg.inference.way import MARGIN, Between, Box, Way, largest

VALUES = 1 << 21
"""Logits of a model that are interpolated at once."""
FULL = 255
"""What stands for a probability of 1 where these are written as bytes."""
BITS = 62
"""Regions of which it can be said at once on which side of 0 they are."""
Slice = tuple[Between, np.float32]


@dataclass(frozen=True)
class Member:
    """One model.

    Attributes
    ----------
    planes : (tile) -> its planes of logits (K, A, B), or of probabilities if `chances`, in order.
    way : (part of a slice) -> from there to the source.
    temperature : by which its logits are divided.
    """

    planes: Callable[[Box], Iterator[Tensor]]
    way: Callable[[Box], Way | None]
    temperature: float = 1.0
    chances: bool = False


@dataclass(frozen=True)
class Wanted:
    """What is made.

    Attributes
    ----------
    mask : (I, J, K) label values.
    soft : (N, I, J, K) probabilities of the N labels or regions, float32, or uint8 in steps of 1/255; None: not asked.
    key : of the channels.
    background : (K,) logits where a model has seen nothing.
    temperature : of the mean, by which its logits are divided for `soft`.
    """

    mask: NDArray[Any]
    soft: NDArray[Any] | None
    key: Key
    background: Tensor
    temperature: float = 1.0


def bring_back(members: Sequence[Member], wanted: Wanted, axis: int, parts: Sequence[Box], *, falling: bool) -> None:
    """Write what is wanted, slice by slice across an axis of the source, for one part of each slice after the other.

    Parameters
    ----------
    parts : of a slice; those that follow predict windows at their edges again.
    falling : slices come from the last to the first.
    """
    count = wanted.mask.shape[axis]
    for part in parts:
        ways = [member.way(part) for member in members]
        streams = [
            iter(()) if way is None else way.slices(member.planes(way.tile))
            for member, way in zip(members, ways, strict=True)
        ]
        places = [None if way is None else way.place.to(wanted.background.device) for way in ways]
        brush = _Brush(members, places, wanted, math.prod(last - first for first, last in part))
        box = tuple(slice(*edges) for edges in part)
        heads = [next(stream, None) for stream in streams]
        for number in range(count - 1, -1, -1) if falling else range(count):
            here = [None if head is None or head[0] != number else head[1:] for head in heads]
            if any(here) or wanted.soft is not None:
                labels, soft = brush.paint(here)
                np.moveaxis(wanted.mask, axis, 0)[number][box] = _cut(labels, part)
                if wanted.soft is not None and soft is not None:
                    np.moveaxis(wanted.soft, axis + 1, 1)[:, number][(slice(None), *box)] = _cut(soft, part)
            pairs = zip(heads, here, streams, strict=True)
            heads = [head if found is None else next(stream, None) for head, found, stream in pairs]


def _cut(values: Tensor, part: Box) -> NDArray[Any]:
    size = [last - first for first, last in part]
    return values.reshape(*values.shape[:-1], *size).cpu().numpy()


class _Brush:
    """Paints a part of a slice after the other."""

    def __init__(self, members: Sequence[Member], places: Sequence[Tensor | None], wanted: Wanted, count: int) -> None:
        self.members, self.places, self.wanted, self.count = members, places, wanted, count
        kind = torch.from_numpy(np.empty(0, wanted.mask.dtype)).dtype
        self.values = torch.tensor(wanted.key.values, dtype=kind, device=wanted.background.device)
        self.known = len(self.values) <= BITS or not wanted.key.regions
        self._last: tuple[list[Between | None], tuple[Tensor, Tensor]] | None = None

    def paint(self, here: Sequence[Slice | None]) -> tuple[Tensor, Tensor | None]:
        """Return label values (M,) of all voxels of a slice, and their probabilities (N, M) where asked for."""
        labels, unsure = self._sure([None if found is None else found[0] for found in here])
        labels = labels.clone()
        if self.wanted.soft is None:
            soft, voxels = None, unsure
        else:
            kind = torch.uint8 if self.wanted.soft.dtype == np.uint8 else torch.float32
            soft = torch.empty((len(self.wanted.soft), self.count), dtype=kind, device=labels.device)
            voxels = torch.arange(self.count, device=labels.device)
        for chunk in voxels.split(max(1, VALUES // len(self.wanted.background))):  # type: ignore[no-untyped-call]
            found, chances = self._mean(here, chunk)
            labels[chunk] = found
            if soft is not None:
                soft[:, chunk] = chances if soft.dtype == torch.float32 else (chances * FULL).round_().byte()
        return labels, soft

    def _sure(self, here: list[Between | None]) -> tuple[Tensor, Tensor]:
        """Return the labels (M,) of a slice as far as all models agree on them, and which voxels are left over."""
        if self._last is not None and all(one is two for one, two in zip(self._last[0], here, strict=True)):
            return self._last[1]
        regions = self.wanted.key.regions
        code: Tensor | None = None
        sure = torch.full((self.count,), self.known, device=self.values.device)
        for member, place, between in zip(self.members, self.places, here, strict=True):
            mine = torch.zeros(self.count, dtype=torch.int64, device=sure.device)
            if between is not None and place is not None and self.known:
                found, least = between.sides if regions else between.winners
                inside = place >= 0
                apart = least > between.error + MARGIN * member.temperature
                mine[inside], sure[inside] = found[place[inside]], sure[inside] & apart[place[inside]]
            sure &= True if code is None else code == mine
            code = mine
        assert code is not None
        result = self._labels(code), (~sure).nonzero()[:, 0]
        self._last = (here, result)
        return result

    def _labels(self, code: Tensor) -> Tensor:
        """Return the label values of classes, or of regions that are a bit each."""
        if not self.wanted.key.regions:
            return self.values[code]
        labels = torch.zeros_like(code, dtype=self.values.dtype)
        for number, value in enumerate(self.values[:BITS]):
            labels = torch.where((code >> number) & 1 == 1, value, labels)
        return labels

    def _mean(self, here: Sequence[Slice | None], voxels: Tensor) -> tuple[Tensor, Tensor]:
        """Return label values (M,) and probabilities (N, M) of some voxels of a slice."""
        total: Tensor | None = None
        for member, place, found in zip(self.members, self.places, here, strict=True):
            values = self._values(member, place, found, voxels)
            alone = len(self.members) == 1
            labels = self._decided(values, 0.0) if alone else None
            logits = values.clamp_(min=torch.finfo(values.dtype).tiny).log_() if member.chances else values
            chances = _chances(logits / member.temperature, regions=self.wanted.key.regions)
            if labels is not None:
                return labels, self._named(chances)
            total = chances if total is None else total.add_(chances)
        assert total is not None
        mean = total.div_(len(self.members))
        return self._decided(mean, 0.5), self._named(self._tempered(mean))

    def _values(self, member: Member, place: Tensor | None, found: Slice | None, voxels: Tensor) -> Tensor:
        inside = None if place is None or found is None else place[voxels]
        if inside is not None and found is not None and bool((inside >= 0).all()):
            values = found[0].values(found[1], inside)
        else:
            values = self.wanted.background[:, None].repeat(1, len(voxels))
            if member.chances:
                values = _chances(values, regions=False)
            if inside is not None and found is not None:
                there = inside >= 0
                values[:, there] = found[0].values(found[1], inside[there])
        return values

    def _decided(self, values: Tensor, threshold: float) -> Tensor:
        """Return label values (M,): of the largest, or of regions above the threshold."""
        if not self.wanted.key.regions:
            return self.values[largest(values)]
        labels = torch.zeros(values.shape[1:], dtype=self.values.dtype, device=values.device)
        for value, row in zip(self.values, values, strict=True):
            labels = torch.where(row > threshold, value, labels)
        return labels

    def _tempered(self, mean: Tensor) -> Tensor:
        temperature, regions = self.wanted.temperature, self.wanted.key.regions
        if temperature == 1:
            return mean
        logits = torch.logit(mean, eps=1e-7) if regions else mean.clamp(min=1e-20).log_()
        return _chances(logits / temperature, regions=regions)

    def _named(self, chances: Tensor) -> Tensor:
        return chances if self.wanted.key.regions else chances[1:]


def _chances(logits: Tensor, *, regions: bool) -> Tensor:
    """Map logits (K, M) to probabilities: of each region, or of classes that exclude each other.

    Each by itself: torch's own softmax and sigmoid round the last few of a row otherwise than the others.
    """
    if regions:
        return logits.neg().exp_().add_(1).reciprocal_()
    chances = (logits - logits.amax(0)).exp_()
    total = chances[0].clone()
    for row in chances[1:]:
        total.add_(row)
    return chances.div_(total)
