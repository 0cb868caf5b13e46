"""Networks that MONAI has, behind the two methods that the training loop and the inference ask for.

Each row says how MONAI's class is built, what divides its input, and how the levels of its decoder are taken out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from medseg.networks.fitting import crop_to, pad_to_multiple

Levels = Callable[[nn.Module, Tensor], list[Tensor]]


class Adapted(nn.Module):
    """A network of MONAI for inputs of any size.

    Parameters
    ----------
    network : maps (B, C, *P) to logits where P is a multiple of `divisor`.
    divisor : along each axis.
    levels : runs `network` and returns its logits, finest first.
    made : the arguments that make `network` of its class, plain values.
    """

    def __init__(self, network: nn.Module, divisor: Sequence[int], levels: Levels, made: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.divisor, self._levels, self.made = network, tuple(divisor), levels, made

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, *S) to logits (B, K, *S)."""
        return crop_to(self.forward_levels(image)[0], image.shape[2:])

    def forward_levels(self, image: Tensor) -> list[Tensor]:
        """Map (B, C, *S) to logits of the padded input, finest first."""
        return self._levels(self.network, pad_to_multiple(image, self.divisor))


def _adapted(name: str, divisor: Sequence[int], levels: Levels, **arguments: Any) -> Adapted:
    from monai.networks import nets  # takes seconds, which a plan with our own network need not wait for

    return Adapted(getattr(nets, name)(**arguments), divisor, levels, arguments)


def _one(network: nn.Module, image: Tensor) -> list[Tensor]:
    """Take the logits of a network without deep supervision, or of one that drops it in evaluation mode."""
    found = network(image)
    return list(found) if isinstance(found, tuple | list) else [found]


def _strides(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(math.prod(column) for column in zip(*rows, strict=True))


def dynunet(
    *,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    features: Sequence[int],
    strides: Sequence[Sequence[int]],
    kernels: Sequence[Sequence[int]],
    residual: bool = False,
) -> nn.Module:
    """MONAI's DynUNet, its form of nnU-Net (Isensee et al. 2021), with deep supervision."""
    if len(features) < 3:
        raise ValueError(f"MONAI's DynUNet needs three stages or more, not {len(features)}")

    def levels(module: Any, image: Tensor) -> list[Tensor]:
        found = module(image)
        # In training it stacks the levels enlarged to full size; their own sizes lie in `heads`.
        return [found[:, 0] if module.training else found, *module.heads]

    return _adapted(
        "DynUNet",
        _strides(strides),
        levels,
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernels,
        strides=[(1,) * spatial_dims, *strides],
        upsample_kernel_size=strides,
        filters=features,
        deep_supervision=len(features) > 2,
        deep_supr_num=max(1, len(features) - 2),
        res_block=residual,
    )


def attention_unet(
    *,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    features: Sequence[int] = (16, 32, 64, 128, 256),
    strides: Sequence[Sequence[int]] | None = None,
) -> nn.Module:
    """U-Net with gates on its skips (Oktay et al. 2018, arXiv 1804.03999)."""
    rows = [(2,) * spatial_dims] * (len(features) - 1) if strides is None else [tuple(row) for row in strides]
    sizes = {"spatial_dims": spatial_dims, "in_channels": in_channels, "out_channels": out_channels}
    return _adapted("AttentionUnet", _strides(rows), _one, **sizes, channels=features, strides=rows)


def unet_plus_plus(*, spatial_dims: int, in_channels: int, out_channels: int, width: int = 16) -> nn.Module:
    """UNet++ (Zhou et al. 2018, arXiv 1807.10165), five stages; its four outputs are all at full resolution."""
    features = (width, width, 2 * width, 4 * width, 8 * width, width)
    sizes = {"spatial_dims": spatial_dims, "in_channels": in_channels, "out_channels": out_channels}

    def levels(module: nn.Module, image: Tensor) -> list[Tensor]:
        return list(module(image))[::-1]  # the deepest, which is the one that predicts, stands last

    divisor = (16,) * spatial_dims
    return _adapted("BasicUNetPlusPlus", divisor, levels, **sizes, features=features, deep_supervision=True)


def vnet(*, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """V-Net (Milletari et al. 2016, arXiv 1606.04797), without dropout; takes 1, 2, 4, 8 or 16 channels."""
    sizes = {"spatial_dims": spatial_dims, "in_channels": in_channels, "out_channels": out_channels}
    dropout = {"dropout_prob_down": 0.0, "dropout_prob_up": (0.0, 0.0)}
    return _adapted("VNet", (16,) * spatial_dims, _one, **sizes, **dropout)


def segresnet(*, spatial_dims: int, in_channels: int, out_channels: int, width: int = 16) -> nn.Module:
    """SegResNet (Myronenko 2018, arXiv 1810.11654) as in Auto3DSeg: no autoencoder branch, deep supervision."""
    return _adapted(
        "SegResNetDS",
        (8,) * spatial_dims,
        _one,
        spatial_dims=spatial_dims,
        init_filters=width,
        in_channels=in_channels,
        out_channels=out_channels,
        norm=("instance", {"affine": True}),
        dsdepth=3,
    )


def mednext(
    *, spatial_dims: int, in_channels: int, out_channels: int, width: int = 16, kernel_size: int = 3
) -> nn.Module:
    """MedNeXt (Roy et al. 2023, arXiv 2303.09975), the small form, with deep supervision."""
    return _adapted(
        "MedNeXt",
        (16,) * spatial_dims,
        _one,
        spatial_dims=spatial_dims,
        init_filters=width,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernel_size,
        deep_supervision=True,
        use_residual_connection=True,
    )


def swin_unetr(*, spatial_dims: int, in_channels: int, out_channels: int, width: int = 12) -> nn.Module:
    """SwinUNETR (Hatamizadeh et al. 2022, arXiv 2201.01266); `width` is a multiple of 12."""
    sizes = {"spatial_dims": spatial_dims, "in_channels": in_channels, "out_channels": out_channels}
    return _adapted("SwinUNETR", (32,) * spatial_dims, _one, **sizes, feature_size=width)


READ = (
    "UNet",
    "BasicUNet",
    "DynUNet",
    "SegResNet",
    "SegResNetDS",
    "AttentionUnet",
    "VNet",
    "UNETR",
    "SwinUNETR",
    "MedNeXt",
)
"""Classes that a MONAI bundle may name: they answer with one tensor in evaluation mode, and fetch nothing."""


def of_bundle(
    *, spatial_dims: int, in_channels: int, out_channels: int, target: str, arguments: dict[str, Any]
) -> nn.Module:
    """One of MONAI's networks as a bundle of MONAI's names it; its windows have sizes that it takes."""
    if target not in READ:
        raise ValueError(f"{target} is none of {', '.join(READ)}")
    sizes = {"spatial_dims": spatial_dims, "in_channels": in_channels, "out_channels": out_channels}
    return _adapted(target, (1,) * spatial_dims, _one, **sizes, **arguments)
