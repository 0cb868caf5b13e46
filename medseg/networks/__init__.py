"""NETWORKS: one row per architecture; a new one is a file (or a function) and a line here.

A row builds ``network(spatial_dims=, in_channels=, out_channels=, **options)`` with

- ``forward``: (B, C, *S) -> logits (B, K, *S) for any size S;
- ``forward_levels``: (B, C, *S) -> list of logits, finest first, each covering S or S padded at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from medseg.errors import ConfigError
from medseg.networks import monai_nets
from medseg.networks.classic import ClassicUNet
from medseg.networks.fcn import FCN
from medseg.networks.unet import UNet
from medseg.registry import Registry


class Network(Protocol):
    """What the training loop and the inference ask of a network, beside being a torch module."""

    def __call__(self, image: Tensor) -> Tensor:
        """Map (B, C, *S) to logits (B, K, *S)."""
        ...

    def forward_levels(self, image: Tensor) -> list[Tensor]:
        """Map (B, C, *S) to logits of decreasing resolution."""
        ...


Options = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One architecture.

    Attributes
    ----------
    build : makes the network.
    planned : turns what the planner decided (`features`, `strides` and `kernels` of a U-Net's stages, full resolution
        first) into the options of `build`.
    spatial_dims : in how many dimensions it exists.
    """

    build: Callable[..., nn.Module]
    planned: Callable[[Options], Options]
    spatial_dims: tuple[int, ...] = (2, 3)


def _stages(options: Options) -> Options:
    return options


def _without_kernels(options: Options) -> Options:
    return {key: options[key] for key in ("features", "strides")}


def _fused(options: Options, *, skips: int) -> Options:
    return {**_without_kernels(options), "skips": min(skips, len(options["strides"]) - 1)}


def _width(options: Options) -> Options:
    return {"width": options["features"][0]}


def _default(options: Options) -> Options:
    return {}


NETWORKS: Registry[Kind] = Registry(
    "networks",
    {
        "unet": Kind(UNet, _stages),
        "resunet": Kind(partial(UNet, residual=True), lambda options: {**options, "convolutions": 2}),
        "fcn32s": Kind(partial(FCN, skips=0), _without_kernels),
        "fcn16s": Kind(partial(FCN, skips=1), partial(_fused, skips=1)),
        "fcn8s": Kind(partial(FCN, skips=2), partial(_fused, skips=2)),
        "unet2015": Kind(ClassicUNet, lambda options: {"features": options["features"]}),
        "unet2015_valid": Kind(
            partial(ClassicUNet, convolutions="valid"), lambda options: {"features": options["features"]}
        ),
        "unet3d": Kind(
            partial(ClassicUNet, volumetric=True), lambda options: {"features": options["features"][:4]}, (3,)
        ),
        "dynunet": Kind(monai_nets.dynunet, _stages),
        "attention_unet": Kind(monai_nets.attention_unet, _without_kernels),
        "unet++": Kind(monai_nets.unet_plus_plus, _width),
        "vnet": Kind(monai_nets.vnet, _default),
        "segresnet": Kind(monai_nets.segresnet, _width),
        "mednext": Kind(monai_nets.mednext, _width),
        "swin_unetr": Kind(monai_nets.swin_unetr, lambda options: {"width": 12 * max(1, options["features"][0] // 12)}),
    },
)

"""What a planner can choose, and train."""

IMPORTED: dict[str, Kind] = {"monai": Kind(monai_nets.of_bundle, _default)}
"""What only a bundle made elsewhere can name: its options are that bundle's own, its windows have sizes it takes."""


def planned_options(name: str, options: Options) -> Options:
    """Return the options of the network `name` for the stages that the planner decided on; see Kind.planned."""
    return NETWORKS[name].planned(options)


def build_network(name: str, *, spatial_dims: int, in_channels: int, out_channels: int, options: Options) -> nn.Module:
    """Build the network called `name`; raise ConfigError for an unknown name or options that it does not take."""
    kind = IMPORTED.get(name) or NETWORKS[name]
    if spatial_dims not in kind.spatial_dims:
        known = " and ".join(f"{dims}D" for dims in kind.spatial_dims)
        raise ConfigError(f"network {name}: it exists in {known}, the plan is {spatial_dims}D; choose another network")
    try:
        return kind.build(spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"network {name}: its options {options} do not fit: {error}") from error
