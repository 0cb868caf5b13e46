"""network_def and models/model.pt: a class of an allow-list, its arguments as plain values, tensors as weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg.errors import BundleError
from medseg.monai_bundles.config import Json, plain
from medseg.networks import build_network
from medseg.networks.monai_nets import READ
from medseg.planning.plan import NetworkPlan, Triple

MODULE = "monai.networks.nets"
WEIGHTS = ("models/model.pt", "models/model.pth", "models/model.safetensors")
_INSIDE = ("model", "state_dict", "network", "net")
"""Keys under which checkpoints keep the state dict."""


def network_plan(definition: Any) -> tuple[NetworkPlan, int, int, int]:
    """Return the network of a bundle and its spatial dimensions, input and output channels.

    Raises
    ------
    BundleError : another class than those of `medseg.networks.monai_nets.READ`, or arguments that are not plain.
    """
    if not isinstance(definition, dict) or not isinstance(definition.get("_target_"), str):
        raise BundleError(f"network_def: a class of {MODULE} with its arguments is expected")
    module, _, name = definition["_target_"].rpartition(".")
    if name not in READ or not (module == "" or f"{module}.".startswith(f"{MODULE}.")):
        raise BundleError(f"network_def: {definition['_target_']} is not read; allowed are {', '.join(READ)}")
    arguments: Json = {key: value for key, value in definition.items() if not key.startswith("_")}
    arguments = plain(arguments, "network_def")
    from monai.networks import nets

    known = inspect.signature(getattr(nets, name)).parameters
    if unknown := sorted(set(arguments) - set(known)):
        raise BundleError(f"network_def: {name} of this MONAI has no {', '.join(unknown)}")
    values = {key: arguments.get(key, known[key].default) for key in ("spatial_dims", "in_channels", "out_channels")}
    if not all(type(value) is int for value in values.values()):
        raise BundleError(f"network_def: numbers are needed for {', '.join(values)}, found {values}")
    dims, inputs, outputs = values.values()
    rest = {key: value for key, value in arguments.items() if key not in values}
    return NetworkPlan(name="monai", options={"target": name, "arguments": rest}), dims, inputs, outputs


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights under the names of our network.

    Raises
    ------
    BundleError : there are none, they are a program (TorchScript), damaged, or hold more than tensors and plain values.
    """
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        text = (
            "models/model.ts is TorchScript, a program, which is not run; "
            if (folder / "models/model.ts").is_file()
            else ""
        )
        raise BundleError(f"{text}a state dict is needed: {' or '.join(WEIGHTS)}")
    content = _load(file)
    for key in _INSIDE:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise BundleError(f"{file.name}: no state dict (names and tensors)")
    # Some share their memory in the file, which a safetensors file cannot say.
    return {f"network.{str(name).removeprefix('module.')}": tensor.clone() for name, tensor in content.items()}


def require_fit(network: NetworkPlan, sizes: tuple[int, int, int], weights: dict[str, Tensor], window: Triple) -> None:
    """Make the network, give it the weights and a window that has a size and nothing else, and look at the shapes.

    Parameters
    ----------
    sizes : spatial dimensions, input and output channels.
    window : size of what the inferer gives it.

    Raises
    ------
    BundleError : the class does not take the arguments, the weights are not its, or the window does not go through.
    """
    dims, inputs, outputs = sizes
    name = network.options["target"]
    try:
        made: Any = build_network(
            network.name, spatial_dims=dims, in_channels=inputs, out_channels=outputs, options=network.options
        ).eval()
        made.load_state_dict(weights, assign=True)
        with torch.inference_mode():
            # Not made(...), which cuts what is too large.
            shape = tuple(made.to("meta").forward_levels(torch.empty((1, inputs, *window), device="meta"))[0].shape)
    # Classes of MONAI's check their arguments by assertions, lookups and whatever torch then raises.
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise BundleError(f"{name} with these arguments, weights and windows of {window}: {words}") from error
    if shape != (1, outputs, *window):
        raise BundleError(f"{name} answers a window of {window} with {shape}; logits of its size are needed")


def _load(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            import safetensors.torch

            return safetensors.torch.load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no errors: pickle's, zip's, its own and what damaged numbers lead to
        raise BundleError(
            f"{file.name}: refused ({type(error).__name__}): it is damaged, a program, or holds more than tensors and "
            "plain values; save the state dict alone"
        ) from error
