"""Weights of a network for other classes, or for channels in another order: rows of its layers are moved by number.

Which axes of which weights belong to classes and to input channels is not written down for each architecture: a
network with one class more, and one with one channel more, show it by their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

Shapes = Mapping[str, Sequence[int]]
Axes = tuple[str, ...]
"""What each axis of a weight stands for: "class", "channel", or "" for neither."""


def axes_of(
    build: Callable[[int, int], nn.Module], channels: int, classes: int, *, reordered: bool = True
) -> dict[str, Axes]:
    """Return name of a weight -> what its axes stand for.

    Parameters
    ----------
    build : (input channels, classes) -> network; its random numbers do not count.
    reordered : whether channels are to be moved; if not, their axes are not looked for.

    Raises
    ------
    ConfigError : the network does not exist with one class more, or with one channel more (V-Net).
    """
    sizes = ((0, 0), (1 if reordered else 0, 0), (0, 1))
    with torch.random.fork_rng(devices=[]):
        one, wider, more = (_shapes(build(channels + c, classes + k)) for c, k in sizes)
    return {
        name: tuple(
            "class" if k > size else "channel" if c > size else ""
            for size, c, k in zip(shape, wider[name], more[name], strict=True)
        )
        for name, shape in one.items()
    }


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def transplant(
    old: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    axes: Mapping[str, Axes],
    *,
    classes: Sequence[int | None],
    channels: Sequence[int],
) -> dict[str, Tensor]:
    """Return weights for a network: those of `old`, their rows moved; where they have none, those of `fresh`.

    Layers from classes to classes (FCN's upsampling) begin with 0 between an old class and a new one, so that new
    classes leave the logits of the others as they were.

    Parameters
    ----------
    old, fresh : state dicts of the same architecture, for the old and for the new classes.
    axes : see `axes_of`, for the new numbers.
    classes, channels : for each new class and channel its number in the old network; None: it is new.

    Raises
    ------
    ValueError : the two are not of one architecture.
    """
    if old.keys() != fresh.keys():
        odd = sorted(old.keys() ^ fresh.keys())
        raise ValueError(f"they do not have the same layers: {', '.join(odd[:3])}")
    places: dict[str, list[int | None]] = {"class": list(classes), "channel": list(channels)}
    return {name: _moved(name, old[name], fresh[name], axes[name], places) for name in fresh}


def _moved(name: str, old: Tensor, fresh: Tensor, axes: Axes, places: Mapping[str, list[int | None]]) -> Tensor:
    rows: list[list[int | None]] = [
        places[what] if what else list(range(n)) for what, n in zip(axes, fresh.shape, strict=True)
    ]
    fixed = [(a, b) for what, a, b in zip(axes, old.shape, fresh.shape, strict=False) if not what]
    if old.ndim != fresh.ndim or any(a != b for a, b in fixed) or [len(r) for r in rows] != list(fresh.shape):
        raise ValueError(f"{name}: {tuple(old.shape)} there, {tuple(fresh.shape)} here")
    if not any(axes):
        return old.clone()
    result = fresh.clone()
    moved = [axis for axis, what in enumerate(axes) if what]
    # Only the few axes of classes and channels are looped over: a row of an other axis is copied as a whole.
    for target in product(*(range(len(rows[axis])) for axis in moved)):
        source = [rows[axis][n] for axis, n in zip(moved, target, strict=True)]
        if None not in source:
            result[_at(fresh.ndim, moved, target)] = old[_at(fresh.ndim, moved, source)].to(fresh.dtype)
        elif any(number is not None for number in source):
            result[_at(fresh.ndim, moved, target)] = 0
    return result


def _at(ndim: int, axes: Sequence[int], numbers: Sequence[int | None]) -> tuple[int | slice | None, ...]:
    at: list[int | slice | None] = [slice(None)] * ndim
    for axis, number in zip(axes, numbers, strict=True):
        at[axis] = number
    return tuple(at)
