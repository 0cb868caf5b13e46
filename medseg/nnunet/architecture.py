"""nnU-Net's networks as ours: the options of medseg.networks.unet.UNet, and the names of the weights.

Source: dynamic_network_architectures (architectures/unet.py, building_blocks/).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from medseg.errors import BundleError
from medseg.planning.plan import NetworkPlan

if TYPE_CHECKING:
    from torch import Tensor

KINDS = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
"""Class that is read -> where it says how much each stage of its encoder holds."""
_FIXED: dict[str, tuple[Any, ...]] = {
    "norm_op": ("torch.nn.modules.instancenorm.InstanceNorm2d", "torch.nn.modules.instancenorm.InstanceNorm3d"),
    "conv_op": ("torch.nn.modules.conv.Conv2d", "torch.nn.modules.conv.Conv3d"),
    "nonlin": ("torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU"),
    "nonlin_first": (False, None),
    "block": (None, "dynamic_network_architectures.building_blocks.residual.BasicBlockD"),
    "bottleneck_channels": (None,),
    "squeeze_excitation": (False, None),
    "pool": ("conv", None),
    "pool_type": ("conv", None),
}
"""Argument -> values that our network means. Dropout does nothing in prediction, and may be anything."""
_BLOCK = r"encoder\.stages\.(\d+)\.blocks\.(\d+)"
_LAYER = r"(conv|norm)\.(\w+)"
_KEYS = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (rf"encoder\.stem\.convs\.0\.{_LAYER}", "stem.{0}.{1}"),
        (rf"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.{_LAYER}", "encoder.{0}.{1}.{2}.{3}"),
        (rf"{_BLOCK}\.conv1\.{_LAYER}", "encoder.{0}.{1}.first.{2}.{3}"),
        (rf"{_BLOCK}\.conv2\.{_LAYER}", "encoder.{0}.{1}.second.{2}.{3}"),
        (rf"{_BLOCK}\.skip\.(\d+)\.{_LAYER}", "encoder.{0}.{1}.short.{2}.{3}.{4}"),
        (r"decoder\.transpconvs\.(\d+)\.(\w+)", "up.{0}.{1}"),
        (rf"decoder\.stages\.(\d+)\.convs\.(\d+)\.{_LAYER}", "decoder.{0}.{1}.{2}.{3}"),
        (r"decoder\.seg_layers\.(\d+)\.(\w+)", "heads.{0}.{1}"),
    )
)
"""Names of weights in nnU-Net -> in our network; parts are numbers in ours: convolution 0, norm 1."""
_PART = {"conv": "0", "norm": "1"}


def network_plan(configuration: dict[str, Any]) -> NetworkPlan:
    """Return our network for a configuration of plans.json (also of nnU-Net before 2.4).

    Raises
    ------
    BundleError : the class, or one of its arguments, is not among those that our network can be.
    """
    kind, arguments = _class_and_arguments(configuration)
    if kind not in KINDS:
        raise BundleError(f"architecture {kind}: not read; allowed are {' and '.join(KINDS)}")
    for name, allowed in _FIXED.items():
        if name in arguments and arguments[name] not in allowed:
            raise BundleError(f"architecture {kind} with {name}={arguments[name]}: not read; allowed: {allowed[0]}")
    if abs(float((arguments.get("nonlin_kwargs") or {}).get("negative_slope", 0.01)) - 0.01) > 1e-9:
        raise BundleError(f"architecture {kind} with nonlin_kwargs={arguments['nonlin_kwargs']}: not read")
    norm = arguments.get("norm_op_kwargs") or {}
    if norm.get("eps", 1e-5) != 1e-5 or norm.get("affine") is not True:
        raise BundleError(f"architecture {kind} with norm_op_kwargs={norm}: not read; allowed: eps 1e-5, affine")
    dims = len(configuration["patch_size"])
    strides = [_row(s, dims) for s in arguments["strides"]]
    features = [int(f) for f in arguments["features_per_stage"]]
    if max(strides[0]) > 1 or arguments.get("stem_channels") not in (None, features[0]):
        raise BundleError(f"architecture {kind}: a first stage with strides, or a stem of another width, is not read")
    options = {
        "features": features,
        "strides": strides[1:],
        "kernels": [_row(k, dims) for k in arguments["kernel_sizes"]],
        "convolutions": _counts(arguments[KINDS[kind]], len(features)),
        "decoder_convolutions": _counts(arguments["n_conv_per_stage_decoder"], len(features) - 1),
        "bias": bool(arguments["conv_bias"]),
    }
    return NetworkPlan(name="unet" if kind == "PlainConvUNet" else "resunet", options=options)


def _class_and_arguments(configuration: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if "architecture" in configuration:
        row = configuration["architecture"]
        return str(row["network_class_name"]).rpartition(".")[2], row["arch_kwargs"]
    kind = str(configuration["UNet_class_name"])
    count = len(configuration["n_conv_per_stage_encoder"])
    widest, base = configuration["unet_max_num_features"], configuration["UNet_base_num_features"]
    return kind, {
        "features_per_stage": [min(base * 2**stage, widest) for stage in range(count)],
        "kernel_sizes": configuration["conv_kernel_sizes"],
        "strides": configuration["pool_op_kernel_sizes"],
        "n_conv_per_stage": configuration["n_conv_per_stage_encoder"],
        "n_blocks_per_stage": configuration["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    }


def _row(value: Any, dims: int) -> list[int]:
    return [int(n) for n in value] if isinstance(value, list | tuple) else [int(value)] * dims


def _counts(value: Any, stages: int) -> list[int]:
    return [int(n) for n in value] if isinstance(value, list | tuple) else [int(value)] * stages


def our_weights(weights: dict[str, Tensor], *, fold: str) -> dict[str, Tensor]:
    """Return weights under the names of our network.

    nnU-Net's state dict names many tensors twice or more (`all_modules`, `decoder.encoder`); those are left out.

    Raises
    ------
    BundleError : a name that belongs to no layer of the networks that are read.
    """
    result = {}
    for name, tensor in weights.items():
        if name.startswith("decoder.encoder.") or ".all_modules." in name:
            continue
        # Some share their memory in the file, which a safetensors file cannot say.
        result[_renamed(name, fold)] = tensor.clone()
    return result


def _renamed(name: str, fold: str) -> str:
    for pattern, ours in _KEYS:
        match = pattern.fullmatch(name)
        if match:
            return ours.format(*(_PART.get(part, part) for part in match.groups()))
    raise BundleError(
        f"{fold}: the weights {name!r} belong to no {' or '.join(KINDS)}; the trainer changed the architecture, and "
        "such a model is not read"
    )
