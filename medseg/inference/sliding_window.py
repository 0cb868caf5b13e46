"""Logits of an image from overlapping windows, one plane after the other.

Windows are visited in raster order, the axis of planes outermost; their weighted logits add up in a slab of planes, one
window deep. Planes that no further window reaches are divided by the sum of the weights and handed on. So memory grows
with classes × slab, never with classes × volume.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medseg.device import autocast, freed, is_out_of_memory, trim
from medseg.inference.windows import Layout, layout
from medseg.planning.plan import Plan
from medseg.quality.witness import Witness

Predictor = Callable[[Tensor], Tensor]
Range = tuple[int, int]
LARGE = 16 << 20
"""Bytes of a window's logits from which on memory is given back between rows of windows: it takes a moment."""
log = logging.getLogger("medseg.inference")
_halvings: ContextVar[list[int]] = ContextVar("halvings")


def mirrorings(plan: Plan, *, mirror: bool) -> list[tuple[int, ...]]:
    """Return the axes along which each pass of a network is mirrored; the first pass is not."""
    axes = plan.augmentation.mirror_axes if mirror else ()
    return [f for n in range(len(axes) + 1) for f in itertools.combinations(axes, n)]


def window_logits(
    networks: Sequence[nn.Module], plan: Plan, *, mirror: bool, witness: Witness | None = None
) -> Predictor:
    """Return windows (B, C, *patch) -> logits (B, K, *patch): the mean over networks and mirrorings.

    `witness` is shown the logits of every pass, and asks for one more.
    """
    flat = plan.dimensions == 2
    flips = mirrorings(plan, mirror=mirror)

    def one_pass(network: nn.Module, windows: Tensor, dims: list[int]) -> Tensor:
        with autocast(windows.device.type, plan.precision):
            logits: Tensor = network(windows.flip(dims) if dims else windows)
        return logits.float().flip(dims) if dims else logits.float()

    def predict(windows: Tensor) -> Tensor:
        if flat:
            windows = windows[..., 0]
        total: Tensor | None = None
        own = False
        watched = None if witness is None else witness.window(windows)
        for network, flip in itertools.product(networks, flips):
            logits = one_pass(network, windows, [axis + 2 for axis in flip])
            # The first one not in place: a network may hand back a tensor that is still in use.
            total, own = (logits, False) if total is None else (total.add_(logits) if own else total + logits, True)
            if watched is not None:
                watched.add(logits)
                closer = watched.closer()
                if closer is not None:
                    watched.compare(one_pass(network, closer, []))
        if witness is not None and watched is not None:
            witness.take(watched)
        assert total is not None
        if own:
            total /= len(networks) * len(flips)
        return total[..., None] if flat else total

    return predict


@contextmanager
def noting_halvings() -> Iterator[list[int]]:
    """Yield a list that gets how many windows are done at once from then on, each time `sparing` halves a batch."""
    found: list[int] = []
    token = _halvings.set(found)
    try:
        yield found
    finally:
        _halvings.reset(token)


def sparing(predict: Predictor) -> Predictor:
    """Return a predictor that halves its batch of windows, and each half again, while there is no memory for it.

    What fits once is not exceeded again by the same predictor. Each halving is said in the log "medseg.inference", and
    to `noting_halvings`.

    Raises
    ------
    torch.OutOfMemoryError, RuntimeError, MemoryError : there is none for a single window.
    """
    most = 0  # windows at once; 0 while nothing has failed

    def halved(windows: Tensor) -> Tensor:
        nonlocal most
        count = len(windows)
        if not most or count <= most:
            try:
                return predict(windows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or count == 1:
                    raise
            freed(windows.device)  # what the failed attempt took, now that nothing refers to it
            most = math.ceil(count / 2)
            _halvings.get([]).append(most)
            log.warning("no memory for %d windows at once on %s: batches of %d", count, windows.device, most)
        return torch.cat([halved(part) for part in windows.chunk(math.ceil(count / most))])

    return halved


@torch.inference_mode()
def slide(
    image: Tensor,
    networks: Sequence[nn.Module],
    plan: Plan,
    *,
    mirror: bool,
    witness: Witness | None = None,
    made: Callable[[Tensor], Tensor] = lambda plane: plane,
) -> Tensor:
    """Return what is made of each plane (K, A, B) of logits of a prepared image (C, I, J, K'), joined: (N, I, J, K').

    `made` gives (N, A, B); unless told the logits themselves, of which 4 K bytes a voxel are held.
    """
    where = layout(image.shape[1:], plan)
    found = planes(image, window_logits(networks, plan, mirror=mirror, witness=witness), where)
    return joined(map(made, found), where)


def joined(found: Iterable[Tensor], where: Layout) -> Tensor:
    """Return planes (K, A, B) as one tensor (K, I, J, K')."""
    whole: Tensor | None = None
    for number, plane in enumerate(found):
        if whole is None:
            whole = plane.new_empty((len(plane), *where.shape))
        whole.select(where.axis + 1, number).copy_(plane)
    assert whole is not None
    return whole


@dataclass(frozen=True)
class _Side:
    """One axis of a tile: which windows reach it, and what of them lies in it."""

    starts: tuple[int, ...]
    window: int
    low: int
    high: int

    def inside(self, start: int) -> slice:
        """Return what of a window at `start` lies in the tile."""
        return slice(max(start, self.low) - start, min(start + self.window, self.high) - start)

    def place(self, start: int) -> slice:
        """Return where in the tile that is."""
        return slice(max(start, self.low) - self.low, min(start + self.window, self.high) - self.low)


def _side(where: Layout, axis: int, part: Range) -> _Side:
    low, high = (where.before[axis] + edge for edge in part)
    window = where.deep[axis]
    starts = tuple(start for start in where.starts[axis] if start < high and start + window > low)
    return _Side(starts, window, low, high)


@torch.inference_mode()
def planes(
    image: Tensor,
    predict: Predictor,
    where: Layout,
    *,
    tile: tuple[Range, Range] | None = None,
    again: Predictor | None = None,
    visited: set[tuple[int, ...]] | None = None,
    backwards: bool = False,
) -> Iterator[Tensor]:
    """Yield the logits (K, A, B) of each plane across `where.axis`, in order; A and B are the other axes in theirs.

    Parameters
    ----------
    image : (C, I, J, K), prepared.
    predict : windows (B, C, *window) -> logits (B, K, *window).
    tile : the part [first, last) of A and of B that is wanted (all, unless told); only windows that reach it are
        predicted. The values are those of the whole plane, to the last bit.
    again : predicts windows that are in `visited`, to which each window is added; it answers like `predict`.
    backwards : from the last plane to the first. The windows are the same, their sums may differ in the last digit.
    """
    axis = where.axis
    if backwards:
        found = (_turned(each or predict, axis) for each in (predict, again))
        image, where, predict, again = image.flip(axis + 1), where.turned, *found
    rest = [other for other in range(3) if other != axis]
    parts = tile or tuple((0, where.shape[other]) for other in rest)
    sides = tuple(_side(where, other, part) for other, part in zip(rest, parts, strict=True))
    size = tuple(side.high - side.low for side in sides)
    padded, weights = where.pad(image), where.weights.to(image.device)
    first_time, later = sparing(predict), sparing(again or predict)
    visited = set() if visited is None else visited
    wanted = range(where.before[axis], where.before[axis] + where.shape[axis])
    # Planes from `start` on: sums of weighted logits and of weights. Each is made when a window first answers and given
    # away when it is done, so that the network never works beside planes that nothing was added to yet.
    slab: deque[tuple[Tensor, Tensor]] = deque()
    starts = where.starts[axis]
    for start, following in zip(starts, (*starts[1:], where.padded[axis]), strict=True):
        for corner in itertools.product(*(side.starts for side in sides)):
            at = _inserted(corner, axis, start)
            ask = later if at in visited else first_time
            visited.add(at)
            logits, weight = _window(padded, ask, where, weights, at)
            inside = tuple(side.inside(edge) for side, edge in zip(sides, corner, strict=True))
            place = tuple(side.place(edge) for side, edge in zip(sides, corner, strict=True))
            for _ in range(len(slab), logits.shape[1]):
                slab.append((logits.new_zeros((len(logits), *size)), torch.zeros(size, device=image.device)))
            for (total, seen), part, share in zip(slab, logits.unbind(1), weight, strict=False):
                total[(slice(None), *place)] += part[(slice(None), *inside)] * share[inside]
                seen[place] += share[inside]
            large = logits.device.type == "cpu" and logits.nbytes >= LARGE
            del logits, part  # not kept while the next window is predicted
        for plane in range(start, following):
            total, seen = slab.popleft()
            if plane in wanted:
                yield total.div_(seen)
        if large and following < where.padded[axis]:
            trim()  # what painting took would lie beside the network's layers


def _turned(predict: Predictor, axis: int) -> Predictor:
    """Return a predictor of windows that are turned around along an axis, but not for its network."""
    return lambda windows: predict(windows.flip(axis + 2)).flip(axis + 2)


def _window(
    padded: Tensor, predict: Predictor, where: Layout, weights: Tensor, corner: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Predict a window (or several slices); return its logits (K, depth, A, B) and weights (depth, A, B)."""
    box = tuple(slice(at, at + size) for at, size in zip(corner, where.deep, strict=True))
    part = padded[(slice(None), *box)]
    if where.flat:
        # Slices are the batch.
        logits = predict(part.permute(3, 0, 1, 2)[..., None])[..., 0].permute(1, 2, 3, 0)
        weights = weights.expand(-1, -1, logits.shape[3])
    else:
        logits = predict(part[None])[0]
    return _in_rows(logits.movedim(where.axis + 1, 1)), _in_rows(weights.movedim(where.axis, 0))


def _in_rows(x: Tensor) -> Tensor:
    """Return what it is, such that a plane of it is not gathered from everywhere in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _inserted(corner: Sequence[int], axis: int, start: int) -> tuple[int, ...]:
    return (*corner[:axis], start, *corner[axis:])
