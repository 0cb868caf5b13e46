"""U-Net in 2D and 3D: two convolutions a stage, instance norm, strided convolutions down, transposed ones up.

Ronneberger et al. 2015 (arXiv 1505.04597); Çiçek et al. 2016 (arXiv 1606.06650); the plain form of nnU-Net
(Isensee et al. 2021, doi 10.1038/s41592-020-01008-z) with deep supervision, or its residual-encoder form (Isensee et
al. 2024, arXiv 2404.09556). Any input size: the input is padded with zeros (the mean after normalisation) to a multiple
of the total stride and the logits are cropped back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medseg.networks.fitting import crop_to, pad_to_multiple

_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_MEAN: dict[int, Any] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}


def _block(
    dims: int,
    inputs: int,
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    *,
    bias: bool,
    active: bool = True,
) -> nn.Sequential:
    padding = tuple(k // 2 for k in kernel)
    convolution = _CONV[dims](inputs, outputs, tuple(kernel), tuple(stride), padding, bias=bias)
    layers = [convolution, _NORM[dims](outputs, affine=True), nn.LeakyReLU(0.01, inplace=True)]
    return nn.Sequential(*layers[: 3 if active else 2])


def _stage(
    dims: int, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int], *, convolutions: int, bias: bool
) -> nn.Sequential:
    one = (1,) * dims
    blocks = [_block(dims, inputs, outputs, kernel, stride, bias=bias)]
    blocks += [_block(dims, outputs, outputs, kernel, one, bias=bias) for _ in range(convolutions - 1)]
    return nn.Sequential(*blocks)


class _Residual(nn.Module):
    """Two convolutions and a short cut, which is averaged and projected where stride and channels ask for it."""

    def __init__(
        self, dims: int, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int], *, bias: bool
    ) -> None:
        super().__init__()
        one = (1,) * dims
        self.first = _block(dims, inputs, outputs, kernel, stride, bias=bias)
        self.second = _block(dims, outputs, outputs, kernel, one, bias=bias, active=False)
        short: list[nn.Module] = [_MEAN[dims](tuple(stride), tuple(stride))] if max(stride) > 1 else []
        if inputs != outputs:
            short.append(_block(dims, inputs, outputs, one, one, bias=False, active=False))
        self.short = nn.Sequential(*short)
        self.last = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.second(self.first(x)) + self.short(x))
        return result


def _residual_stage(
    dims: int, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int], *, blocks: int, bias: bool
) -> nn.Sequential:
    one = (1,) * dims
    rows = [_Residual(dims, inputs, outputs, kernel, stride, bias=bias)]
    rows += [_Residual(dims, outputs, outputs, kernel, one, bias=bias) for _ in range(blocks - 1)]
    return nn.Sequential(*rows)


class UNet(nn.Module):
    """U-Net of any depth.

    Parameters
    ----------
    spatial_dims : 2 or 3.
    in_channels, out_channels : channels of the image; classes (or regions) of the logits.
    features : channels of each stage, from full resolution down.
    strides : for each stage after the first, its stride along each axis.
    kernels : for each stage, its kernel size along each axis.
    convolutions : convolutions in each stage; of the decoder too unless told. With `residual` it is the number of
        residual blocks, of two convolutions each, in each stage of the encoder.
    decoder_convolutions : convolutions in each stage of the decoder, from its coarsest to its finest.
    residual : whether the encoder is residual; it then begins with one more convolution at full resolution.
    bias : whether convolutions have one. Before an instance norm it has no effect, but foreign weights may hold it.

    Attributes
    ----------
    divisor : total stride along each axis.

    Raises
    ------
    ValueError : fewer than two stages, rows that do not fit each other, sizes below 1, even kernels.
    """

    def __init__(  # noqa: PLR0913 - each is an option of the plan
        self,
        *,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernels: Sequence[Sequence[int]],
        convolutions: int | Sequence[int] = 2,
        decoder_convolutions: int | Sequence[int] | None = None,
        residual: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        down = _per_stage(convolutions, len(features), "convolutions")
        up = [1 if residual else n for n in down[-2::-1]]
        if decoder_convolutions is not None:
            up = _per_stage(decoder_convolutions, len(features) - 1, "decoder_convolutions")
        if not len(features) == len(kernels) == len(strides) + 1:
            raise ValueError(
                f"{len(features)} stages need as many kernels and one stride less, got "
                f"{len(kernels)} and {len(strides)}"
            )
        if len(features) < 2 or any(len(row) != spatial_dims for row in (*strides, *kernels)):
            raise ValueError(
                f"at least two stages are needed, and {spatial_dims} numbers in each of {strides} and {kernels}"
            )
        sizes = [*features, *down, *up, *(number for row in (*strides, *kernels) for number in row)]
        if min(sizes) < 1 or any(number % 2 == 0 for row in kernels for number in row):
            raise ValueError("features, strides, kernels and convolutions are 1 or more, and kernels are odd")
        self.divisor = tuple(math.prod(row[axis] for row in strides) for axis in range(spatial_dims))
        one = (1,) * spatial_dims
        steps = [one, *[tuple(s) for s in strides]]
        self.stem: nn.Module = nn.Identity()
        if residual:
            self.stem = _block(spatial_dims, in_channels, features[0], kernels[0], one, bias=bias)
        widths = [features[0] if residual else in_channels, *features]
        self.encoder = nn.ModuleList(
            _residual_stage(spatial_dims, widths[i], widths[i + 1], kernels[i], steps[i], blocks=n, bias=bias)
            if residual
            else _stage(spatial_dims, widths[i], widths[i + 1], kernels[i], steps[i], convolutions=n, bias=bias)
            for i, n in enumerate(down)
        )
        levels = range(len(features) - 2, -1, -1)
        self.up = nn.ModuleList(
            _UP[spatial_dims](features[i + 1], features[i], steps[i + 1], steps[i + 1], bias=bias) for i in levels
        )
        self.decoder = nn.ModuleList(
            _stage(spatial_dims, 2 * features[i], features[i], kernels[i], one, convolutions=n, bias=bias)
            for i, n in zip(levels, up, strict=True)
        )
        self.heads = nn.ModuleList(_CONV[spatial_dims](features[i], out_channels, 1) for i in levels)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, *S) to logits (B, K, *S)."""
        return crop_to(self.heads[-1](self._decode(image)[-1]), image.shape[2:])

    def forward_levels(self, image: Tensor) -> list[Tensor]:
        """Map (B, C, *S) to the logits of every decoder stage, finest first, for deep supervision.

        Each covers the padded input (see the module); the finest has at least size S.
        """
        return [head(x) for head, x in zip(self.heads, self._decode(image), strict=True)][::-1]

    def _decode(self, image: Tensor) -> list[Tensor]:
        x = self.stem(pad_to_multiple(image, self.divisor))
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        outputs = []
        for up, stage, skip in zip(self.up, self.decoder, skips[-2::-1], strict=True):
            x = stage(torch.cat([up(x), skip], dim=1))
            outputs.append(x)
        return outputs


def _per_stage(value: int | Sequence[int], stages: int, name: str) -> list[int]:
    rows = [value] * stages if isinstance(value, int) else list(value)
    if len(rows) != stages:
        raise ValueError(f"{name}: one number, or one for each of {stages} stages, not {len(rows)}")
    return rows


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
