"""The deterministic part of the preparation: MONAI transforms from a Case to a normalised image, and their inverse.

Each step takes and returns a dictionary with "image" (and "mask" where there is one) as MetaTensors (C, I, J, K),
so that it composes with MONAI's own; each appends what it did to "steps", from which ``restore`` brings logits back
to the grid of the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nibabel.orientations as orientations
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from scipy import ndimage
from torch import Tensor

from medseg.errors import BundleError
from medseg.planning.plan import NnUNet, Normalise, Spacing
from medseg.preparation.splines import LABELS, coarse_axis, header_spacing, resize, resize_labels
from medseg.preparation.steps import Cropped, Oriented, Resampled, Step, flips_to, resampled_size, resize_linear
from medseg.spec import Case, Spec
from medseg.studies import read_study
from medseg.volume import Volume

Data = dict[str, Any]
Target = tuple[float, float, float | None]


def as_meta_tensor(volume: Volume) -> MetaTensor:
    """Return a MetaTensor of the volume's array and affine; the array is shared unless it is read-only."""
    array = np.require(volume.array, requirements=["C", "W"])
    return MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(volume.affine.copy()))


class LoadStudy(Transform):
    """Case -> {"case", "image" float32, "mask", "steps"}; raises MedsegError that names the case."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, case: Case) -> Data:
        """Read and check one case."""
        study = read_study(self.spec, case)
        data: Data = {"case": case, "image": as_meta_tensor(study.image).float(), "steps": ()}
        if study.mask is not None:
            data["mask"] = as_meta_tensor(study.mask)
        return data


class Orient(Transform):
    """Swap and flip axes so that they point to `axis_codes`; no value is changed.

    Codes of I, J and K name the axes as they are stored: they are swapped, never flipped.
    """

    def __init__(self, axis_codes: str) -> None:
        self.axis_codes = axis_codes

    def __call__(self, data: Mapping[str, Any]) -> Data:
        """Turn image and mask."""
        image = data["image"]
        flips = flips_to(np.asarray(image.affine), self.axis_codes)
        step = Oriented(tuple((float(a), float(b)) for a, b in flips))
        move = orientations.inv_ornt_aff(flips, tuple(image.shape[1:]))
        return _apply(data, step, lambda x, _: _flip(x, flips), torch.from_numpy(move))


class CropToContent(Transform):
    """Keep the bounding box of the voxels that are not 0 in every channel (skull-stripped, masked images)."""

    def __call__(self, data: Mapping[str, Any]) -> Data:
        """Crop image and mask to the same box."""
        image = data["image"]
        content = (image != 0).any(0).as_tensor()
        shape = tuple(int(n) for n in content.shape)
        start, stop = [], []
        for axis in range(3):
            others = [a for a in range(3) if a != axis]
            filled = content.any(dim=others[1]).any(dim=others[0]).nonzero()
            start.append(int(filled[0]) if len(filled) else 0)
            stop.append(int(filled[-1]) + 1 if len(filled) else shape[axis])
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        move = torch.eye(4, dtype=torch.float64)
        move[:3, 3] = torch.tensor(start, dtype=torch.float64)
        step = Cropped(tuple(start), tuple(stop), shape)  # type: ignore[arg-type]
        return _apply(data, step, lambda x, _: x[(slice(None), *box)], move)


class Resample(Transform):
    """Bring the spacing as near to `spacing` as whole voxels over the same extent allow.

    Trilinear, as scipy.ndimage.zoom(order=1, grid_mode=True, mode="nearest"); label values by the largest
    trilinear share, so that thin borders do not zigzag as with nearest neighbour.
    """

    def __init__(self, spacing: Spacing) -> None:
        self.spacing = spacing

    def __call__(self, data: Mapping[str, Any]) -> Data:
        """Resample image and mask."""
        image = data["image"]
        shape = tuple(int(n) for n in image.shape[1:])
        have = np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0)
        size = resampled_size(shape, tuple(have), self.spacing)  # type: ignore[arg-type]
        scale = np.array(shape) / np.array(size)
        move = np.diag([*scale, 1.0])
        move[:3, 3] = (scale - 1) / 2
        step = Resampled(shape)  # type: ignore[arg-type]
        return _apply(data, step, lambda x, labels: resize_linear(x, size, labels=labels), torch.from_numpy(move))


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


class NormaliseIntensity(Transform):
    """Bring each channel to mean 0 and deviation 1 (or another range) by its row of the plan.

    Raises BundleError where the plan says "bytes" and a value is not one of 0 to 255.
    """

    def __init__(self, rows: tuple[Normalise, ...]) -> None:
        self.rows = rows

    def __call__(self, data: Mapping[str, Any]) -> Data:
        """Normalise the image; the mask is left alone."""
        image = data["image"].as_tensor()
        content = _content(data) if any(row.scheme == "zscore_content" for row in self.rows) else None
        channels = [_normalised(c, row, content) for c, row in zip(image, self.rows, strict=True)]
        return {**data, "image": MetaTensor(torch.stack(channels), affine=data["image"].affine)}


def _content(data: Mapping[str, Any]) -> Tensor:
    """Return (I, J, K): not 0 in every channel, or in a hole of that; labels of a former stage are content, too."""
    content = torch.from_numpy(ndimage.binary_fill_holes((data["image"] != 0).any(0).numpy()))
    return content | (data["previous"].as_tensor()[0] > 0) if "previous" in data else content


def _normalised(channel: Tensor, row: Normalise, content: Tensor | None) -> Tensor:
    if row.scheme == "none":
        return channel
    if row.scheme == "ct":
        return (channel.clamp(row.low, row.high) - row.mean) / max(row.deviation, 1e-6)
    if row.scheme == "range":
        return (channel - channel.min()) / (channel.max() - channel.min()).clamp(min=1e-8)
    if row.scheme == "bytes":
        if channel.min() < 0 or channel.max() > 255:
            raise BundleError(
                f"the model learnt from values from 0 to 255, the image has {channel.min():g} to {channel.max():g}; "
                "convert it as its images were"
            )
        return channel / 255
    if row.scheme == "zscore_nonzero":
        content = channel != 0
    if content is None or not content.any():
        return (channel - channel.mean()) / channel.std(correction=0).clamp(min=1e-6)
    inside = channel[content]
    return torch.where(content, (channel - inside.mean()) / inside.std(correction=0).clamp(min=1e-6), channel)


def _apply(data: Mapping[str, Any], step: Step, change: Any, move: Tensor) -> Data:
    """Change image and masks alike; `move` (4, 4) maps the new index to the old one."""
    out: Data = dict(data)
    for key in ("image", "mask", "previous"):
        if key in data:
            old = data[key]
            out[key] = MetaTensor(change(old.as_tensor(), key != "image"), affine=old.affine @ move)
    out["steps"] = (*data.get("steps", ()), step)
    return out


def _flip(x: Tensor, flips: Any) -> Tensor:
    """Apply nibabel's orientation array to the last three axes of a (C, I, J, K) tensor."""
    order = [0] * 3
    for axis, (target, _) in enumerate(flips):
        order[int(target)] = axis + 1
    reversed_axes = [axis + 1 for axis, (_, direction) in enumerate(flips) if direction < 0]
    return (x.flip(reversed_axes) if reversed_axes else x).permute(0, *order).contiguous()
