"""Fully convolutional networks (Long, Shelhamer and Darrell 2015, arXiv 1411.4038), in 2D and 3D.

A classifier that slides: stages of convolutions and pooling, a score of each class at the coarsest stage, and
upsampling back. FCN-32s upsamples the coarsest score alone; FCN-16s and FCN-8s add the scores of one and two finer
stages on the way. The paper starts from VGG-16 trained on photographs; here the encoder is small and learnt from
scratch, with instance norm, without which five poolings deep nothing is learnt. As in the paper the upsampling
between fused stages is learnt from a bilinear start, and the last one is fixed bilinear interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.networks.fitting import crop_to, pad_to_multiple

_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_POOL: dict[int, Any] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_MODE = {2: "bilinear", 3: "trilinear"}


class FCN(nn.Module):
    """FCN-32s, -16s or -8s.

    Parameters
    ----------
    spatial_dims : 2 or 3.
    in_channels, out_channels : channels of the image; classes (or regions) of the logits.
    skips : how many finer stages are fused: 0 (FCN-32s), 1 (FCN-16s), 2 (FCN-8s).
    features : channels of each stage; the last is that of the "fully connected" layers, which see the coarsest stage.
    strides : pooling after each stage but the last.
    convolutions : convolutions in each stage.

    Attributes
    ----------
    divisor : total stride along each axis.

    Raises
    ------
    ValueError : rows that do not fit each other, sizes below 1, more skips than stages between first and last.
    """

    def __init__(
        self,
        *,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        skips: int,
        features: Sequence[int] = (16, 32, 64, 128, 128, 256),
        strides: Sequence[Sequence[int]] | None = None,
        convolutions: int = 2,
    ) -> None:
        super().__init__()
        pools = [(2,) * spatial_dims] * (len(features) - 1) if strides is None else [tuple(row) for row in strides]
        if len(pools) != len(features) - 1 or any(len(row) != spatial_dims for row in pools):
            raise ValueError(f"{len(features)} stages need {len(features) - 1} strides of {spatial_dims} numbers")
        if min(*features, convolutions, *(number for row in pools for number in row)) < 1:
            raise ValueError("features, strides and convolutions are 1 or more")
        if not 0 <= skips < len(pools):
            raise ValueError(f"{len(features)} stages can fuse up to {len(pools) - 1} finer scores, not {skips}")
        self.divisor = tuple(math.prod(row[axis] for row in pools) for axis in range(spatial_dims))
        widths = [in_channels, *features]
        self.stages = nn.ModuleList(
            _stage(spatial_dims, widths[i], widths[i + 1], convolutions) for i in range(len(features))
        )
        self.pools = nn.ModuleList(_POOL[spatial_dims](row, row) for row in pools)
        # Scores of the pooled output of each fused stage: pool4 and pool3 in the paper.
        fused = [features[-2 - i] for i in range(1, skips + 1)]
        self.scores = nn.ModuleList(_CONV[spatial_dims](width, out_channels, 1) for width in [features[-1], *fused])
        self.ups = nn.ModuleList(bilinear_upsampling(spatial_dims, out_channels, pools[-1 - i]) for i in range(skips))
        # Before the first training step a coarse score counts alone: zero scores, as the paper starts its skips.
        for score in list(self.scores)[1:]:
            nn.init.zeros_(score.get_parameter("weight"))
        self.mode = _MODE[spatial_dims]

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, *S) to logits (B, K, *S)."""
        return crop_to(self.forward_levels(image)[0], image.shape[2:])

    def forward_levels(self, image: Tensor) -> list[Tensor]:
        """Map (B, C, *S) to one level of logits that covers the padded input."""
        x = image = pad_to_multiple(image, self.divisor)
        pooled = []
        for stage, pool in zip(self.stages, self.pools, strict=False):
            x = pool(stage(x))
            pooled.append(x)
        total = self.scores[0](self.stages[-1](x))
        for up, score, finer in zip(self.ups, list(self.scores)[1:], pooled[-2::-1], strict=False):
            total = up(total) + score(finer)
        return [F.interpolate(total, size=image.shape[2:], mode=self.mode, align_corners=False)]


def _stage(dims: int, inputs: int, outputs: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(convolutions):
        layers += [
            _CONV[dims](inputs if number == 0 else outputs, outputs, 3, padding=1, bias=False),
            _NORM[dims](outputs, affine=True),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def bilinear_upsampling(dims: int, channels: int, factors: Sequence[int]) -> nn.Module:
    """Return a transposed convolution that interpolates linearly by `factors` until it learns something better.

    One kernel a channel; sizes are multiplied exactly. Inside the image it gives what ``F.interpolate`` gives
    (align_corners False); beyond the border it takes zeros.
    """
    kernel = [1 if f == 1 else 2 * f - f % 2 for f in factors]
    padding = [(k - f) // 2 for k, f in zip(kernel, factors, strict=True)]
    layer: nn.Module = _UP[dims](channels, channels, kernel, tuple(factors), padding, groups=channels, bias=False)
    weight = torch.ones(())
    for size, factor in zip(kernel, factors, strict=True):
        centre = (size - 1) / 2
        line = 1 - (torch.arange(size) - centre).abs() / factor
        weight = weight[..., None] * line
    kernels = layer.get_parameter("weight")
    with torch.no_grad():
        kernels.copy_(weight.expand_as(kernels))
    return layer
