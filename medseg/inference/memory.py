"""How much memory a prediction takes, before it begins, and into which tiles it is cut to take less.

    libraries and weights + image + prepared image + mask + slab + planes + max(window, painting)

of which only image, prepared image and mask grow with the length of the volume. See docs/explanation/streaming.md.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medseg.bundle import make_network
from medseg.errors import BatchError
from medseg.inference.labels import BLOCK, PAIRS
from medseg.inference.presets import EXACT, Preset
from medseg.inference.way_back import Lines, ways_back
from medseg.inference.windows import Layout, layout
from medseg.planning.plan import Plan
from medseg.preparation.prepare import SLAB, target_size
from medseg.preparation.splines import AT_ONCE
from medseg.sizes import said
from medseg.spec import Spec
from medseg.targets import channel_names, label_type
from medseg.volume import Affine

LIBRARIES = 340 << 20
"""Bytes of a worker before it reads anything: Python, torch and the readers."""
FLOAT = 4
WATCHED = 5
"""Answers to a window that are held beside the usual ones where quality is estimated (medseg.quality.witness)."""
JUDGED = 8
"""Bytes a voxel of what is looked at in the finished mask for it (medseg.quality.shape)."""
Tile = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Need:
    """What a prediction takes at its peak, in bytes.

    Attributes
    ----------
    held : libraries, weights and what else the process holds already.
    image, prepared, mask : the arrays that go in and out; `prepared` is what the network is given.
    slab : logits that windows still add to, with the sum of their weights.
    planes : finished planes of logits between which the source is being painted, and what compares them.
    window : the network's layers and answers for one window (batch of slices).
    painting : a few slices of the source.
    preparing : one part of the image on its way to the network, and axes that are not resampled yet.
    judging : of the finished mask, where quality is estimated; what the network is given is no more there then.
    tiles : parts in a plane.
    """

    held: int
    image: int
    prepared: int
    mask: int
    slab: int
    planes: int
    window: int
    painting: int
    preparing: int
    judging: int = 0
    tiles: tuple[int, int] = (1, 1)

    @property
    def total(self) -> int:
        """Return the peak."""
        predicting = self.mask + self.slab + self.planes + max(self.window, self.painting)
        working = self.prepared + max(predicting, self.preparing)
        # While a file is read its voxels are there twice: as stored, and in our order.
        return self.held + self.image + max(working, self.mask + self.judging, self.image)

    @property
    def text(self) -> str:
        """One line for a person."""
        arrays, logits = self.image + self.prepared + self.mask, self.slab + self.planes
        parts = f"program and model {said(self.held)}, image and mask {said(arrays)}, logits {said(logits)}"
        cut = "" if self.tiles == (1, 1) else f", in {self.tiles[0]} × {self.tiles[1]} tiles"
        return f"{said(self.total)}: {parts}, network and painting {said(max(self.window, self.painting))}{cut}"


@dataclass(frozen=True)
class Case:
    """What the need of an image depends on: its grid, channels of how many bytes a voxel, plan, spec and preset.

    `quality` is whether it is estimated, too: the networks' answers are then looked at, and given once more.
    """

    shape: tuple[int, int, int]
    affine: Affine
    itemsize: int
    plan: Plan
    spec: Spec
    preset: Preset = EXACT
    quality: bool = False


def forecast(case: Case, *, networks: int = 1, held: int | None = None, limit: int | None = None) -> Need:
    """Return what a prediction will take: at most `limit`, cut into as few tiles as that takes.

    Parameters
    ----------
    held : bytes of the process without the image; an estimate, unless told.

    Raises
    ------
    BatchError : MAX_MEMORY: the smallest tiles take more than `limit`.
    """
    plan, size = case.plan, target_size(case.shape, case.affine, case.plan)
    where = layout(size.after, plan, case.preset)
    lines = ways_back((size.step,), where)
    network = network_bytes(case, where.deep)
    need = terms(case, where, lines, (1, 1), network)
    need = replace(need, held=held if held is not None else LIBRARIES + networks * weights_bytes(case))
    if limit is None or need.total <= limit:
        return need
    a, b = (line.before for line in lines[1:])
    best = need
    for tiles in cuts(a, b):
        cut = replace(terms(case, where, lines, tiles, network), held=need.held)
        best = min(best, cut, key=lambda each: each.total)
        if cut.total <= limit:
            return cut
    return require(best, case, limit)


def require(need: Need, case: Case, limit: int | None) -> Need:
    """Return what is needed; raise BatchError (MAX_MEMORY) if that is more than what is allowed."""
    if limit is None or need.total <= limit:
        return need
    there = "×".join(map(str, target_size(case.shape, case.affine, case.plan).after))
    raise BatchError(
        f"the prediction of an image of {'×'.join(map(str, case.shape))} voxels ({there} for the network) takes at "
        f"least {need.text}; --max-memory allows {said(limit)}: allow more, or correct the size of its voxels if it is "
        "wrong",
        code="MAX_MEMORY",
    )


def cuts(a: int, b: int) -> Iterator[tuple[int, int]]:
    """Yield numbers of tiles along A and B, more and more, as square as they may be, down to 4 cells."""
    rows, columns = 1, 1
    while max(a / rows, b / columns) > 4:
        if a / rows >= b / columns:
            rows += 1
        else:
            columns += 1
        yield rows, columns


def terms(case: Case, where: Layout, lines: Lines, tiles: tuple[int, int], network: int) -> Need:
    """Return the terms of the formula, without what is held already; `network` as `network_bytes` has it."""
    classes = len(channel_names(case.spec))
    channels = len(case.spec.channels)
    voxels = math.prod(case.shape)
    former = len(case.spec.foreground) if case.plan.nnunet is not None and case.plan.nnunet.previous is not None else 0
    a, b = (math.ceil(line.before / count) + 1 for line, count in zip(lines[1:], tiles, strict=True))
    a, b = min(a, lines[1].before), min(b, lines[2].before)
    fine = math.prod(math.ceil(line.after / count) + 1 for line, count in zip(lines[1:], tiles, strict=True))
    plane, deep = a * b, where.deep[where.axis]
    mask = voxels * label_type(case.spec)().itemsize
    channels += former > 0
    prepared = math.prod(where.shape) * FLOAT * channels
    copies = (where.padded != where.shape) + (former > 0)
    at_once = math.ceil(max(1, lines[0].after / lines[0].before))
    block = min(classes * plane, max(BLOCK, plane))
    chances = classes if case.plan.monai is not None and case.plan.monai.softmax else 0
    window, answers = math.prod(where.deep), 3 + WATCHED * case.quality
    mixing = min(PAIRS, fine * classes) * 160 if any(line.mixes for line in lines) else 0
    return Need(
        held=0,
        image=voxels * case.itemsize * len(case.spec.channels),
        prepared=prepared + copies * math.prod(where.padded) * FLOAT * channels,
        mask=mask * (1 + (former > 0)),
        slab=(classes + 1) * deep * plane * FLOAT,
        planes=(3 * classes + chances + 8) * plane * FLOAT + 3 * block * FLOAT,
        window=network + (answers * classes + former) * window * FLOAT + case.quality * 64 * window,
        painting=fine * (8 * FLOAT + 4 * at_once) + mixing,
        preparing=3 * min(SLAB, voxels * FLOAT)
        + _between(case, where)
        + (former > 0) * (2 * mask + voxels + 2 * math.prod(where.shape) * (mask // voxels) + 40 * AT_ONCE),
        judging=case.quality * JUDGED * voxels,
        tiles=tiles,
    )


def _between(case: Case, where: Layout) -> int:
    """Return the bytes of a channel of which one axis is not resampled yet, at most."""
    size = target_size(case.shape, case.affine, case.plan)
    if size.before == size.after:
        return 0
    largest = max(before / after for before, after in zip(size.before, size.after, strict=True))
    return int(math.prod(where.shape) * max(1.0, largest)) * FLOAT * 2


def tiles_of(lines: Lines, tiles: tuple[int, int]) -> Iterator[tuple[Tile, Lines, tuple[slice, slice]]]:
    """Yield for each tile: the part of a plane that is read, the lines from there, and the new voxels that it makes."""
    sides = [list(_sides(line, count)) for line, count in zip(lines[1:], tiles, strict=True)]
    for (first, last), (start, stop) in itertools.product(*sides):
        a, b = lines[1].part(first, last), lines[2].part(start, stop)
        low_a, low_b = int(lines[1].lower[first]), int(lines[2].lower[start])
        yield (
            ((low_a, low_a + a.before), (low_b, low_b + b.before)),
            (lines[0], a, b),
            (slice(first, last), slice(start, stop)),
        )


def _sides(line: Any, count: int) -> Iterator[tuple[int, int]]:
    """Cut the cells of an axis into parts; yield the new voxels [first, last) of each that has some."""
    edges = [round(line.before * n / count) for n in range(count + 1)]
    for first, last in itertools.pairwise(line.lower.searchsorted(edges).tolist()):
        if first < last:
            yield first, last


def weights_bytes(case: Case) -> int:
    """Return the bytes of the weights of one network."""
    return FLOAT * sum(int(weight.numel()) for weight in _meta_network(case).state_dict().values())


def network_bytes(case: Case, window: Sequence[int]) -> int:
    """Return the bytes of a network's layers at their peak, for one window (of a 2-D network: several slices).

    It is run on tensors that have a size and nothing else.
    """
    channels = len(case.spec.channels)
    if case.plan.nnunet is not None and case.plan.nnunet.previous is not None:
        channels += len(case.spec.foreground)
    shape = (window[2], channels, *window[:2]) if case.plan.dimensions == 2 else (1, channels, *window)
    live = _Live()
    with torch.no_grad(), live:
        _meta_network(case).eval()(torch.empty(shape, device="meta"))
    return int(live.peak)


def _meta_network(case: Case) -> nn.Module:
    """Return the network of a plan without memory: it knows the sizes of its layers, and nothing else."""
    with torch.device("meta"):
        return make_network(case.spec, case.plan)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that live at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._now = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and count what is new."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        self.peak = max(self.peak, self._now)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._now += 0 if key in self._holders else size
        self._holders[key] = self._holders.get(key, 0) + 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self._now -= size
