"""From an image to what the network is given, in slabs: no second copy of the image is ever made.

The steps and their numbers are those of medseg.preparation.path (there for training, one transform after the other,
on whole images); sums are in double precision here, and matrices are multiplied for fewer slices at once, so the last
digit may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nibabel import orientations
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from medseg.errors import BundleError
from medseg.planning.plan import Interpolation, Normalise, Plan, Spacing
from medseg.preparation.interpolate import Line, along
from medseg.preparation.splines import coarse_axis, header_spacing, resize_labels, spline_along
from medseg.preparation.steps import (
    Cropped,
    Oriented,
    Resampled,
    Shape,
    Step,
    flips_to,
    lines_there,
    resampled_size,
    resize_linear,
)
from medseg.volume import Affine, Flips, Volume

SLAB = 1 << 24
"""Bytes in single precision of the part of a channel that is worked on at once."""
Array = NDArray[Any]
Statistics = tuple[float, float]
WHOLE = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Prepared:
    """What the network is given.

    Attributes
    ----------
    image : (C, I, J, K) float32.
    previous : (I, J, K) label values of the stage before, on the same grid.
    spacing : of this grid, in mm (or pixel).
    steps : what was done, in order.
    """

    image: Tensor
    previous: Tensor | None
    spacing: tuple[float, float, float]
    steps: tuple[Step, ...]


def prepare(image: Volume, plan: Plan, previous: Volume | None = None) -> Prepared:
    """Orient, crop, resample and normalise an image, and the mask of a first stage with it.

    Peak memory: the result, one slab (64 MiB), and where both in-plane sizes stay as they are, nothing more; content
    masks (schemes "zscore_content" and "zscore_nonzero") take a few bytes a voxel.

    Raises
    ------
    BundleError : the plan says "bytes" and a value is not one of 0 to 255.
    """
    flips = flips_to(image.affine, plan.orientation)
    affine = image.affine @ orientations.inv_ornt_aff(flips, image.shape)
    source = turned(image.array, flips)
    box = content_box(source) if plan.monai is None else WHOLE
    steps: tuple[Step, ...] = (Oriented(tuple((float(a), float(b)) for a, b in flips)), _cropped(box, source.shape[1:]))
    source = source[(slice(None), *box)]
    before = None if previous is None else turned(previous.array, flips)[(slice(None), *box)]
    rows = tuple(plan.normalisation.values())
    shape = _triple(source.shape[1:])
    have = _spacing(np.linalg.norm(affine[:3, :3], axis=0))
    size = target_size(image.shape, image.affine, plan, shape)
    steps = (*steps, size.step)
    if plan.nnunet is None:
        image_out = _trilinear(source, lines_there(size.step, size.after))
        labels = None if before is None else resize_linear(torch.from_numpy(before.copy()), size.after, labels=True)[0]
        content = _content(image_out.numpy(), None if labels is None else labels[None].numpy(), rows)
        for channel, row in zip(image_out, rows, strict=True):
            inside = _inside(channel.numpy(), row, content)
            _normalise(channel, row, _statistics(channel.numpy(), row, inside), inside)
        spacing = _scaled(have, shape, size.after) if size.apart is None else plan.spacing
        return Prepared(image_out, labels, spacing, steps)
    content = _content(source, before, rows)
    coarse = coarse_axis(plan.nnunet.image, size.have, size.want)
    channels = []
    for channel, row in zip(source, rows, strict=True):
        channels.append(_splines(_Normalised(channel, row, content), size.after, plan.nnunet.image, coarse))
    image_out = torch.stack(channels) if len(channels) > 1 else channels[0][None]
    labels = None
    if before is not None and plan.nnunet.previous is not None:
        rule = plan.nnunet.previous
        resized = resize_labels(before[0], size.after, rule, coarse_axis(rule, size.have, size.want))
        labels = torch.from_numpy(resized.copy())
    return Prepared(image_out, labels, _scaled(have, shape, size.after), steps)


@dataclass(frozen=True)
class Target:
    """How an image is resampled.

    Attributes
    ----------
    before, after : size before (oriented and cropped) and after.
    have, want : spacing before and after.
    nearest : the axis along which logits take the nearest slice on the way back.
    apart : old voxels between new ones, where the first ones share their centre.
    """

    before: Shape
    after: Shape
    have: list[float]
    want: list[float]
    nearest: int | None
    apart: tuple[float, float, float] | None = None

    @property
    def step(self) -> Resampled:
        """What is done, for the way back."""
        return Resampled(self.before, self.nearest, self.apart)


def target_size(whole: Shape, affine: Affine, plan: Plan, cropped: Shape | None = None) -> Target:
    """Return how a plan resamples an image of size `whole`; `cropped` is what is left of it once it is oriented."""
    flips = flips_to(affine, plan.orientation)
    turned_affine = affine @ orientations.inv_ornt_aff(flips, whole)
    order = np.argsort(flips[:, 0])
    before = cropped or _triple([whole[axis] for axis in order])
    if plan.nnunet is None:
        have = _spacing(np.linalg.norm(turned_affine[:3, :3], axis=0))
        if plan.monai is not None:
            return _from_first(before, have, plan.spacing if plan.monai.resample else have)
        return Target(before, resampled_size(before, have, plan.spacing), list(have), list(plan.spacing), None)
    told = header_spacing(turned_affine)
    target = (*plan.spacing[:2], None if plan.dimensions == 2 else plan.spacing[2])
    want = [h if t is None else t for h, t in zip(told, target, strict=True)]
    after = _triple([max(1, round(h / w * n)) for h, w, n in zip(told, want, before, strict=True)])
    back = coarse_axis(plan.nnunet.logits, want, told) if plan.nnunet.logits.order_z == 0 else None
    return Target(before, after, told, want, back)


def _from_first(before: Shape, have: Spacing, want: Spacing) -> Target:
    """Return the very spacing `want`, as MONAI's Spacingd does: the centre of the first voxel stays where it is."""
    apart = _spacing([new / old for new, old in zip(want, have, strict=True)])
    if np.allclose(apart, 1.0):
        return Target(before, before, list(have), list(have), None)
    after = _triple([round((n - 1) / a + 1) for n, a in zip(before, apart, strict=True)])
    return Target(before, after, list(have), list(want), None, apart)


def turned(array: Array, flips: Flips) -> Array:
    """Return a view (C, I, J, K) with the spatial axes swapped and flipped by nibabel's orientation array (3, 2)."""
    order = [0] * 3
    for axis, (target, _) in enumerate(flips):
        order[int(target)] = axis + 1
    backwards = tuple(slice(None, None, -1 if direction < 0 else None) for _, direction in flips)
    return array[(slice(None), *backwards)].transpose(0, *order)


def content_box(array: Array) -> tuple[slice, slice, slice]:
    """Return the box around the voxels of (C, I, J, K) that are not 0 in every channel; all where there are none."""
    axis = slowest(array)
    filled = [np.zeros(n, bool) for n in array.shape[1:]]
    for part in parts(array.shape[1:], axis):
        content = (array[(slice(None), *part)] != 0).any(0)
        for other in range(3):
            filled[other][part[other]] |= content.any(tuple(a for a in range(3) if a != other))
    edges = [np.flatnonzero(line) for line in filled]
    i, j, k = (
        slice(int(e[0]), int(e[-1]) + 1) if len(e) else slice(0, n) for e, n in zip(edges, array.shape[1:], strict=True)
    )
    return i, j, k


def slowest(array: Array) -> int:
    """Return the spatial axis of (C, I, J, K) whose neighbours are furthest apart in memory."""
    return int(
        np.argmax([abs(stride) if n > 1 else -1 for n, stride in zip(array.shape[1:], array.strides[1:], strict=True)])
    )


def parts(shape: tuple[int, ...], axis: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield boxes that together are everything, cut across one axis, of no more than about SLAB in single precision."""
    step = max(1, SLAB * shape[axis] // (4 * int(np.prod(shape))))
    for start in range(0, shape[axis], step):
        i, j, k = (slice(start, min(start + step, n)) if a == axis else slice(0, n) for a, n in enumerate(shape))
        yield i, j, k


def _cropped(box: tuple[slice, ...], shape: tuple[int, ...]) -> Cropped:
    edges = [s.indices(n) for s, n in zip(box, shape, strict=True)]
    return Cropped(_triple([e[0] for e in edges]), _triple([e[1] for e in edges]), _triple(shape))


def _content(array: Array, previous: Array | None, rows: tuple[Normalise, ...]) -> NDArray[np.bool_] | None:
    """Return (I, J, K): not 0 in every channel, or in a hole of that; labels of a former stage are content, too."""
    if not any(row.scheme == "zscore_content" for row in rows):
        return None
    content = np.zeros(array.shape[1:], bool)
    for channel in array:
        content |= channel != 0
    content = np.asarray(ndimage.binary_fill_holes(content))
    return content if previous is None else content | (previous[0] > 0)


def _inside(channel: Array, row: Normalise, content: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """Return the voxels (I, J, K) that alone are counted and changed; None: all of them."""
    if row.scheme == "zscore_nonzero":
        content = channel != 0
    elif row.scheme != "zscore_content":
        return None
    return content if content is not None and content.any() else None


def _statistics(channel: Array, row: Normalise, inside: NDArray[np.bool_] | None) -> Statistics:
    """Return what is subtracted from a channel (I, J, K), and what it is then divided by; see `_inside`."""
    if row.scheme == "none":
        return 0.0, 1.0
    if row.scheme == "ct":
        return row.mean, max(row.deviation, 1e-6)
    pieces = list(parts(channel.shape, slowest(channel[None])))
    if row.scheme in ("range", "bytes"):
        low = min(float(channel[part].min()) for part in pieces)
        high = max(float(channel[part].max()) for part in pieces)
        if row.scheme == "range":
            return low, max(high - low, 1e-8)
        if low < 0 or high > 255:
            raise BundleError(
                f"the model learnt from values from 0 to 255, the image has {low:g} to {high:g}; "
                "convert it as its images were"
            )
        return 0.0, 255.0

    def values(part: tuple[slice, slice, slice]) -> Array:
        piece = channel[part].astype(np.float64)
        return piece if inside is None else piece[inside[part]]

    count = channel.size if inside is None else int(inside.sum())
    mean = sum(float(values(part).sum()) for part in pieces) / count
    variance = sum(float(((values(part) - mean) ** 2).sum()) for part in pieces) / count
    return mean, max(variance**0.5, 1e-6)


def _normalise(x: Tensor, row: Normalise, by: Statistics, inside: NDArray[np.bool_] | None) -> Tensor:
    """Normalise in place; what is not `inside` does not change."""
    if row.scheme == "none":
        return x
    if inside is not None:
        return x.copy_(torch.where(torch.from_numpy(inside), (x - by[0]) / by[1], x))
    if row.scheme == "ct":
        x.clamp_(row.low, row.high)
    return x.sub_(by[0]).div_(by[1])


class _Normalised:
    """A channel (I, J, K) that is normalised part by part, as it is read."""

    def __init__(self, channel: Array, row: Normalise, content: NDArray[np.bool_] | None) -> None:
        self.channel, self.row, self.inside = channel, row, _inside(channel, row, content)
        self.shape = _triple(channel.shape)
        self.by = _statistics(channel, row, self.inside)

    def read(self, part: tuple[slice, slice, slice]) -> Tensor:
        x = torch.from_numpy(np.array(self.channel[part], np.float32, order="C"))
        return _normalise(x, self.row, self.by, None if self.inside is None else self.inside[part])


def _trilinear(source: Array, lines: tuple[Line, Line, Line]) -> Tensor:
    """Resample (C, I, J, K) of any type, slab by slab."""
    axis = slowest(source)
    others = [other for other in range(3) if other != axis]
    channels = []
    for channel in source:
        between = torch.empty([n if a == axis else lines[a].after for a, n in enumerate(channel.shape)])
        for part in parts(channel.shape, axis):
            x = torch.from_numpy(np.array(channel[part], np.float32, order="C"))
            for other in others:
                x = along(x, other, lines[other])
            between.narrow(axis, part[axis].start, x.shape[axis]).copy_(x)
        channels.append(along(between, axis, lines[axis]))
    return torch.stack(channels) if len(channels) > 1 else channels[0][None]


def _splines(source: _Normalised, size: Shape, rule: Interpolation, coarse: int | None) -> Tensor:
    """Resample a channel to `size` as `medseg.preparation.splines.resize` does, slab by slab."""
    shape, axis = source.shape, slowest(source.channel[None])
    if shape == size:
        whole = torch.empty(size)
        for part in parts(shape, axis):
            whole[part] = source.read(part)
        return whole
    first = sorted((a for a in range(3) if a not in (axis, coarse)), key=lambda a: size[a] / shape[a])
    within = tuple(a for a in range(3) if a != coarse)
    between = torch.empty([size[a] if a in first else shape[a] for a in range(3)])
    edges = [1 if a in within else shape[a] for a in range(3)]
    low, high = torch.full(edges, torch.inf), torch.full(edges, -torch.inf)
    for part in parts(shape, axis):
        x = source.read(part)
        here = tuple(slice(None) if a in within else part[a] for a in range(3))
        low[here] = torch.minimum(low[here], x.amin(within, keepdim=True))
        high[here] = torch.maximum(high[here], x.amax(within, keepdim=True))
        for other in first:
            x = spline_along(x, other, size[other], rule.order)
        between.narrow(axis, part[axis].start, x.shape[axis]).copy_(x)
    if axis != coarse:
        between = spline_along(between, axis, size[axis], rule.order)
    torch.minimum(between, high, out=between)
    torch.maximum(between, low, out=between)
    return between if coarse is None else spline_along(between, coarse, size[coarse], rule.order_z).contiguous()


def _triple(numbers: Any) -> Shape:
    i, j, k = (int(n) for n in numbers)
    return i, j, k


def _scaled(have: tuple[float, float, float], shape: Shape, size: Shape) -> tuple[float, float, float]:
    return _spacing([h * n / m for h, n, m in zip(have, shape, size, strict=True)])


def _spacing(numbers: Any) -> tuple[float, float, float]:
    i, j, k = (float(n) for n in numbers)
    return i, j, k
