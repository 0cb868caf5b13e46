"""NETWORKS: one row per architecture; a new one is a file (or a function) and a line here.

A row builds ``network(spatial_dims=, in_channels=, out_channels=, **options)`` with

- ``forward``: (B, C, *S) -> logits (B, K, *S) for any size S;
- ``forward_levels``: (B, C, *S) -> list of logits, finest first, each covering S or S padded at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from medseg.errors import ConfigError
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


NETWORKS: Registry[Callable[..., nn.Module]] = Registry("networks", {"unet": UNet})


def build_network(
    name: str, *, spatial_dims: int, in_channels: int, out_channels: int, options: dict[str, Any]
) -> nn.Module:
    """Build the network called `name`; raise ConfigError for an unknown name or options that it does not take."""
    build = NETWORKS[name]
    try:
        return build(spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"network {name}: its options {options} do not fit: {error}") from error
