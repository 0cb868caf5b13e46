"""The U-Net as it was published, with padded convolutions or, as in the papers, without padding.

2D: Ronneberger et al. 2015 (arXiv 1505.04597); 3D: Çiçek et al. 2016 (arXiv 1606.06650).
Without padding every output voxel has seen only real (here: mirrored) surroundings. The input is extended by mirroring,
the papers' overlap-tile strategy, so that the logits cover the whole image, whatever its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medseg.networks.fitting import crop_to, pad_to_multiple

_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOL: dict[int, Any] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


class ClassicUNet(nn.Module):
    """U-Net of 3-voxel convolutions, max pooling by 2 and transposed convolutions of 2.

    Parameters
    ----------
    spatial_dims : 2 or 3.
    in_channels, out_channels : channels of the image; classes (or regions) of the logits.
    features : channels of each stage. The 2D paper has 64 to 1024 in five stages, the 3D paper 64 to 512 in four.
    convolutions : "same" (padded by zeros) or "valid" (overlap-tile).
    volumetric : the 3D paper's form: batch norm, and channels double in the second convolution of a stage, before the
        pooling, instead of in the first one after it.

    Attributes
    ----------
    divisor : total stride along each axis.

    Raises
    ------
    ValueError : fewer than two stages, channels below 2.
    """

    def __init__(
        self,
        *,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (64, 128, 256, 512, 1024),
        convolutions: Literal["same", "valid"] = "same",
        volumetric: bool = False,
    ) -> None:
        super().__init__()
        if len(features) < 2 or min(features) < 2:
            raise ValueError(f"at least two stages of two or more channels are needed, not {list(features)}")
        if convolutions not in ("same", "valid"):
            raise ValueError(f"convolutions is 'same' or 'valid', not {convolutions!r}")
        self.depth = len(features) - 1
        self.valid = convolutions == "valid"
        self.divisor = (2**self.depth,) * spatial_dims
        padding = 0 if self.valid else 1

        def stage(inputs: int, middle: int, outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for a, b in ((inputs, middle), (middle, outputs)):
                layers.append(_CONV[spatial_dims](a, b, 3, padding=padding))
                layers += [_BATCH[spatial_dims](b)] if volumetric else []
                layers.append(nn.ReLU(inplace=True))
            return nn.Sequential(*layers)

        inner = [width // 2 if volumetric else width for width in features]
        widths = [in_channels, *features]
        self.encoder = nn.ModuleList(stage(widths[i], inner[i], features[i]) for i in range(len(features)))
        self.pool = _POOL[spatial_dims](2)
        levels = range(self.depth - 1, -1, -1)
        # The 3D paper keeps the channels when it goes up, the 2D paper halves them.
        kept = [features[i + 1] if volumetric else features[i] for i in range(self.depth)]
        self.up = nn.ModuleList(_UP[spatial_dims](features[i + 1], kept[i], 2, 2) for i in levels)
        self.decoder = nn.ModuleList(stage(kept[i] + features[i], features[i], features[i]) for i in levels)
        self.head = _CONV[spatial_dims](features[0], out_channels, 1)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, *S) to logits (B, K, *S)."""
        return crop_to(self.forward_levels(image)[0], image.shape[2:])

    def forward_levels(self, image: Tensor) -> list[Tensor]:
        """Map (B, C, *S) to one level of logits that covers S and what its end was padded by."""
        x = self._extend(image) if self.valid else pad_to_multiple(image, self.divisor)
        skips: list[Tensor] = []
        for stage in self.encoder:
            x = stage(self.pool(x) if skips else x)
            skips.append(x)
        for up, stage, skip in zip(self.up, self.decoder, skips[-2::-1], strict=True):
            x = up(x)
            x = stage(torch.cat([_centre(skip, x.shape[2:]), x], dim=1))
        return [self.head(x)]

    def _extend(self, image: Tensor) -> Tensor:
        """Mirror the image beyond its borders so that the unpadded convolutions leave at least its own size."""
        for axis, size in enumerate(image.shape[2:], start=2):
            given, wanted = self.tile(size)
            before = (given - wanted) // 2
            index = torch.arange(given, device=image.device) - before
            # A triangle wave: 0 1 2 3 2 1 0 1 2 ... for 4 voxels, so that small images can be mirrored repeatedly.
            period = max(1, 2 * (size - 1))
            index = index.remainder(period)
            image = image.index_select(axis, torch.where(index < size, index, period - index))
        return image

    def tile(self, size: int) -> tuple[int, int]:
        """Return the input and output size (voxels along one axis) of the smallest tile that gives `size` or more.

        Five stages: 388 voxels come out of 572, the tile of the paper's figure 1.
        """
        bottom = 4 + max(0, -(-(size - 4) // 2**self.depth))
        out = 4 + (bottom - 4) * 2**self.depth
        given = bottom + 4
        for _ in range(self.depth):
            given = 2 * given + 4
        return given, out


def _centre(skip: Tensor, size: Sequence[int]) -> Tensor:
    for axis, length in enumerate(size, start=2):
        skip = skip.narrow(axis, (skip.shape[axis] - length) // 2, length)
    return skip


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight)  # the papers' deviation: sqrt(2 / inputs)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
