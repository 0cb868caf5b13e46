"""U-Net in 2D and 3D: two convolutions a stage, instance norm, strided convolutions down, transposed ones up.

Ronneberger et al. 2015 (arXiv 1505.04597); Çiçek et al. 2016 (arXiv 1606.06650); the plain form of nnU-Net
(Isensee et al. 2021, doi 10.1038/s41592-020-01008-z) with deep supervision. Any input size: the input is padded
with zeros (the mean after normalisation) to a multiple of the total stride and the logits are cropped back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def _block(dims: int, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int]) -> nn.Sequential:
    padding = tuple(k // 2 for k in kernel)
    convolution = _CONV[dims](inputs, outputs, tuple(kernel), tuple(stride), padding, bias=False)
    return nn.Sequential(convolution, _NORM[dims](outputs, affine=True), nn.LeakyReLU(0.01, inplace=True))


def _stage(
    dims: int, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int], convolutions: int
) -> nn.Sequential:
    one = (1,) * dims
    blocks = [_block(dims, inputs, outputs, kernel, stride)]
    blocks += [_block(dims, outputs, outputs, kernel, one) for _ in range(convolutions - 1)]
    return nn.Sequential(*blocks)


class UNet(nn.Module):
    """U-Net of any depth.

    Parameters
    ----------
    spatial_dims : 2 or 3.
    in_channels, out_channels : channels of the image; classes (or regions) of the logits.
    features : channels of each stage, from full resolution down.
    strides : for each stage after the first, its stride along each axis.
    kernels : for each stage, its kernel size along each axis.
    convolutions : convolutions in each stage, on both sides.

    Attributes
    ----------
    divisor : total stride along each axis.

    Raises
    ------
    ValueError : fewer than two stages, rows that do not fit each other, sizes below 1, even kernels.
    """

    def __init__(
        self,
        *,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernels: Sequence[Sequence[int]],
        convolutions: int = 2,
    ) -> None:
        super().__init__()
        if not len(features) == len(kernels) == len(strides) + 1:
            raise ValueError(
                f"{len(features)} stages need as many kernels and one stride less, got "
                f"{len(kernels)} and {len(strides)}"
            )
        if len(features) < 2 or any(len(row) != spatial_dims for row in (*strides, *kernels)):
            raise ValueError(
                f"at least two stages are needed, and {spatial_dims} numbers in each of {strides} and {kernels}"
            )
        sizes = [*features, convolutions, *(number for row in (*strides, *kernels) for number in row)]
        if min(sizes) < 1 or any(number % 2 == 0 for row in kernels for number in row):
            raise ValueError("features, strides, kernels and convolutions are 1 or more, and kernels are odd")
        self.divisor = tuple(math.prod(row[axis] for row in strides) for axis in range(spatial_dims))
        one = (1,) * spatial_dims
        steps = [one, *[tuple(s) for s in strides]]
        widths = [in_channels, *features]
        self.encoder = nn.ModuleList(
            _stage(spatial_dims, widths[i], widths[i + 1], kernels[i], steps[i], convolutions)
            for i in range(len(features))
        )
        levels = range(len(features) - 2, -1, -1)
        self.up = nn.ModuleList(
            _UP[spatial_dims](features[i + 1], features[i], steps[i + 1], steps[i + 1], bias=False) for i in levels
        )
        self.decoder = nn.ModuleList(
            _stage(spatial_dims, 2 * features[i], features[i], kernels[i], one, convolutions) for i in levels
        )
        self.heads = nn.ModuleList(_CONV[spatial_dims](features[i], out_channels, 1) for i in levels)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, *S) to logits (B, K, *S)."""
        size = image.shape[2:]
        logits: Tensor = self.heads[-1](self._decode(self._pad(image))[-1])
        for axis, length in enumerate(size, start=2):
            logits = logits.narrow(axis, 0, length)
        return logits

    def forward_levels(self, image: Tensor) -> list[Tensor]:
        """Map (B, C, *S) to the logits of every decoder stage, finest first, for deep supervision.

        Each covers the padded input (see the module); the finest has at least size S.
        """
        stages = self._decode(self._pad(image))
        return [head(x) for head, x in zip(self.heads, stages, strict=True)][::-1]

    def _pad(self, image: Tensor) -> Tensor:
        sizes = [-(-n // d) * d for n, d in zip(image.shape[2:], self.divisor, strict=True)]
        if sizes == list(self.divisor):
            sizes[-1] *= 2  # one voxel at the coarsest stage has no deviation to be normalised by
        padding: list[int] = []
        for have, want in zip(reversed(image.shape[2:]), reversed(sizes), strict=True):
            padding += [0, want - have]
        return F.pad(image, padding) if any(padding) else image

    def _decode(self, x: Tensor) -> list[Tensor]:
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        outputs = []
        for up, stage, skip in zip(self.up, self.decoder, skips[-2::-1], strict=True):
            x = stage(torch.cat([up(x), skip], dim=1))
            outputs.append(x)
        return outputs


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
