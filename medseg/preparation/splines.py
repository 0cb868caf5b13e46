"""Resampling as nnU-Net v2 does it (nnunetv2.preprocessing.resampling.default_resampling), for its models.

Spline interpolation is linear in the voxels and separable, so along each axis it is a matrix: that of
scipy.ndimage.zoom(mode="nearest", grid_mode=True), which skimage.transform.resize uses. The matrices are multiplied in
single precision, the axis that shrinks most first, which takes a fraction of the time and memory of scipy's spline in
double precision, and agrees with it to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from medseg.planning.plan import Interpolation, NnUNet
from medseg.preparation.interpolate import nearest_slices
from medseg.preparation.preprocess import Data, Resampled

ANISOTROPIC = 3.0
"""A spacing over this many times another is resampled apart (nnU-Net's ANISO_THRESHOLD)."""
LABELS = Interpolation(order=1, order_z=0)
"""How the masks that are learnt from are resampled (nnU-Net's resampling_fn_seg)."""
Target = tuple[float, float, float | None]


class ResampleSplines(Transform):
    """Bring an image to `target` spacing (None: as it is along this axis), and the masks "previous" and "mask"."""

    def __init__(self, target: Target, how: NnUNet) -> None:
        self.target = target
        self.how = how

    def __call__(self, data: Mapping[str, Any]) -> Data:
        """Resample image and previous mask; a step is noted also where the size stays."""
        image = data["image"]
        have = header_spacing(np.asarray(image.affine))
        want = [h if t is None else t for h, t in zip(have, self.target, strict=True)]
        shape = tuple(int(n) for n in image.shape[1:])
        size = tuple(max(1, round(h / w * n)) for h, w, n in zip(have, want, shape, strict=True))
        scale = np.array(shape) / np.array(size)
        move = np.diag([*scale, 1.0])
        move[:3, 3] = (scale - 1) / 2
        affine = image.affine @ torch.from_numpy(move)
        coarse = coarse_axis(self.how.image, have, want)
        # On the way back the axis of order 0 is told; the spacing before is the network's, after it the image's.
        back = coarse_axis(self.how.logits, want, have) if self.how.logits.order_z == 0 else None
        out = {**data, "image": MetaTensor(resize(image.as_tensor(), size, self.how.image, coarse), affine=affine)}
        learnt = LABELS.model_copy(update={"separate": self.how.image.separate})
        for key, rule in (("previous", self.how.previous), ("mask", learnt)):
            if key in data and rule is not None:
                mask = data[key].as_tensor().numpy()[0]
                labels = resize_labels(mask, size, rule, coarse_axis(rule, have, want))
                out[key] = MetaTensor(torch.from_numpy(labels[None]), affine=affine)
        out["steps"] = (*data.get("steps", ()), Resampled(shape, back))  # type: ignore[arg-type]
        return out


def header_spacing(affine: NDArray[Any]) -> list[float]:
    """Return the spacing as its header most likely says it.

    nnU-Net reads it from the header, here it is the length of a column of an affine that was rounded: 0.9999999 for 1
    would decide a ratio of three, or a size that is half way between two, the other way. Seven digits, then single
    precision, are what NIfTI headers hold.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return [float(np.float32(f"{length:.7g}")) for length in lengths]


def coarse_axis(rule: Interpolation, before: Sequence[float], after: Sequence[float]) -> int | None:
    """Return the axis that is resampled apart from the other two: the one coarse axis of `before`, else of `after`."""
    if rule.separate is False:
        return None
    candidates = [before] if rule.separate else [s for s in (before, after) if max(s) / min(s) > ANISOTROPIC]
    if not candidates:
        return None
    spacing = candidates[0]
    axes = [axis for axis in range(3) if spacing[axis] == max(spacing)]
    return axes[0] if len(axes) == 1 else None


def spline_matrix(before: int, after: int, order: int) -> NDArray[np.float64]:
    """Return the matrix (after, before) of a resampling along one axis."""
    zoomed = ndimage.zoom(np.eye(before), (after / before, 1.0), order=order, mode="nearest", grid_mode=True)
    return np.asarray(zoomed)


def resize(x: Tensor, size: Sequence[int], rule: Interpolation, coarse: int | None) -> Tensor:
    """Resample (C, I, J, K) to `size`; like scikit-image, never beyond the range of a channel (of a slice).

    With a coarse axis each slice is resampled by itself, then the slices along that axis by `order_z`.
    """
    if tuple(x.shape[1:]) == tuple(size):
        return x
    first = [axis for axis in range(3) if axis != coarse and x.shape[axis + 1] != size[axis]]
    within = tuple(axis + 1 for axis in range(3) if axis != coarse)
    low, high = x.amin(within, keepdim=True), x.amax(within, keepdim=True)
    for axis in sorted(first, key=lambda a: size[a] / x.shape[a + 1]):
        x = _along(x, axis, size[axis], rule.order)
    x = torch.maximum(torch.minimum(x, high), low)
    if coarse is not None and x.shape[coarse + 1] != size[coarse]:
        if rule.order_z == 0:
            return x.index_select(coarse + 1, torch.from_numpy(nearest_slices(x.shape[coarse + 1], size[coarse])))
        x = _along(x, coarse, size[coarse], rule.order_z)
    return x.contiguous()


def _along(x: Tensor, axis: int, size: int, order: int) -> Tensor:
    matrix = torch.from_numpy(spline_matrix(x.shape[axis + 1], size, order)).to(x)
    result: Tensor = torch.tensordot(x, matrix, dims=([axis + 1], [1])).movedim(-1, axis + 1)
    return result


def resize_labels(mask: NDArray[Any], size: Sequence[int], rule: Interpolation, coarse: int | None) -> NDArray[Any]:
    """Resample a label map (I, J, K): a voxel gets the last label with at least half of it, background else.

    Along a coarse axis the nearest slice is taken, whatever the order there. Shares of exactly one half are common, and
    the last digit decides: so they are scipy's own, not those of `spline_matrix`.
    """
    if mask.shape == tuple(size):
        return mask
    if coarse is None:
        return _most(mask, size, rule.order)
    plane = [n for axis, n in enumerate(size) if axis != coarse]
    slices = [_most(part, plane, rule.order) for part in np.moveaxis(mask, coarse, 0)]
    places = nearest_slices(mask.shape[coarse], size[coarse])
    return np.ascontiguousarray(np.moveaxis(np.stack(slices)[places], 0, coarse))


def _most(mask: NDArray[Any], size: Sequence[int], order: int) -> NDArray[Any]:
    zoom = [after / before for before, after in zip(mask.shape, size, strict=True)]
    result = np.zeros(size, mask.dtype)
    for label in np.unique(mask):
        share = ndimage.zoom((mask == label).astype(np.float64), zoom, order=order, mode="nearest", grid_mode=True)
        result[share >= 0.5] = label
    return result
