"""What was done to an image on its way to the network, and the way back; nothing here takes long to import."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.planning.plan import Spacing
from medseg.preparation.interpolate import Line, interpolate, linear_line, nearest_line, placed_line
from medseg.volume import Affine, Flips, orientation_to

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Oriented:
    """Axes were swapped and flipped by nibabel's orientation array (3, 2)."""

    flips: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Cropped:
    """The box [start, stop) was kept of an image of size `shape`."""

    start: Shape
    stop: Shape
    shape: Shape

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """What was kept."""
        i, j, k = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return i, j, k


@dataclass(frozen=True)
class Resampled:
    """An image of size `shape` was brought to another size over the same extent.

    The way back is trilinear; along `nearest` (an axis) it takes the nearest slice. With `step`, the extent changed:
    along each axis the first voxels share their centre, and the new ones are `step` old ones apart.
    """

    shape: Shape
    nearest: int | None = None
    step: Spacing | None = None


Step = Oriented | Cropped | Resampled


def flips_to(affine: Affine, axis_codes: str) -> Flips:
    """Return the swaps and flips that turn axes to `axis_codes`; codes of I, J and K name them as they are stored."""
    if sorted(axis_codes) == ["I", "J", "K"]:
        return np.array([[axis_codes.index(axis), 1] for axis in "IJK"], dtype=np.float64)
    return orientation_to(affine, axis_codes)


def resampled_size(shape: Shape, have: Spacing, want: Spacing) -> Shape:
    """Return the size (at least 1 voxel an axis) whose spacing over the same extent is nearest to `want`."""
    i, j, k = (max(1, round(n * h / w)) for n, h, w in zip(shape, have, want, strict=True))
    return i, j, k


def resize_linear(x: Tensor, size: Shape, *, labels: bool = False) -> Tensor:
    """Resample (C, I, J, K) trilinearly; `labels` by the largest share."""
    if tuple(x.shape[1:]) == size:
        return x
    if not labels:
        return F.interpolate(x[None].float(), size, mode="trilinear")[0]
    best = torch.zeros((1, *size))
    result = torch.zeros((1, *size), dtype=x.dtype)
    for value in torch.unique(x).tolist():
        share = F.interpolate((x == value)[None].float(), size, mode="trilinear")[0]
        result.masked_fill_(share > best, value)
        torch.maximum(best, share, out=best)
    return result


def restore(logits: Tensor, steps: tuple[Step, ...], *, fill: float | Tensor, axis: int = 0) -> Tensor:
    """Bring (K, I, J, K') values on the prepared grid back to the grid of the source, undoing `steps` in reverse.

    Voxels outside a crop get `fill`: a number, or one number per channel (K,). `axis` is interpolated first; the last
    digit depends on it (see medseg.preparation.interpolate).
    """
    for step in reversed(steps):
        if isinstance(step, Resampled):
            logits = interpolate(logits, lines_back(step, tuple(logits.shape[1:])), axis=axis)  # type: ignore[arg-type]
        elif isinstance(step, Cropped):
            whole = torch.as_tensor(fill, dtype=logits.dtype).reshape(-1, 1, 1, 1)
            whole = whole.expand(logits.shape[0], *step.shape).clone()
            whole[(slice(None), *step.box)] = logits
            logits = whole
        else:
            logits = _unflip(logits, step.flips)
    return logits


def lines_there(step: Resampled, size: Shape) -> tuple[Line, Line, Line]:
    """Return how each axis of the grid before the step leads to the prepared one of `size`."""
    if step.step is None:
        i, j, k = (linear_line(n, m) for n, m in zip(step.shape, size, strict=True))
    else:
        i, j, k = (placed_line(n, np.arange(m) * a) for n, m, a in zip(step.shape, size, step.step, strict=True))
    return i, j, k


def lines_back(step: Resampled, shape: Shape) -> tuple[Line, Line, Line]:
    """Return how each axis of a prepared grid of `shape` leads back to that before the step."""
    if step.step is not None:
        i, j, k = (placed_line(n, np.arange(m) / a) for n, m, a in zip(shape, step.shape, step.step, strict=True))
        return i, j, k
    i, j, k = (
        (nearest_line if axis == step.nearest else linear_line)(shape[axis], step.shape[axis]) for axis in range(3)
    )
    return i, j, k


def _unflip(x: Tensor, flips: tuple[tuple[float, float], ...]) -> Tensor:
    x = x.permute(0, *(int(target) + 1 for target, _ in flips))
    reversed_axes = [axis + 1 for axis, (_, direction) in enumerate(flips) if direction < 0]
    return x.flip(reversed_axes).contiguous() if reversed_axes else x.contiguous()
