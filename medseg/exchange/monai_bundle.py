"""A model as a MONAI bundle, which ``python -m monai.bundle run`` runs without medseg.

The network is one of monai.networks.nets with a plain state dict; preparation, windows and the way back are MONAI's
own transforms. Source: the MONAI bundle specification (docs.monai.io, "MONAI Bundle Specification").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg.bundle import Bundle
from medseg.errors import ExportError
from medseg.exchange.program import Agreement, compared
from medseg.files import write_atomically, write_text
from medseg.networks.monai_nets import Adapted
from medseg.networks.unet import UNet
from medseg.planning.plan import Normalise, Plan
from medseg.targets import channel_names, exclusive

Json = dict[str, Any]
WEIGHTS = "models/model.pt"
_LAYER = {"0": "conv{}.conv", "1": "norm{}"}


def unsupported(what: str) -> ExportError:
    """Return the error for a model that no MONAI bundle can express."""
    return ExportError(f"a MONAI bundle cannot say this: {what}; --to torch and onnx can", code="EXPORT_UNSUPPORTED")


def as_monai(network: nn.Module, plan: Plan) -> tuple[Json, nn.Module]:
    """Return a network of MONAI's with the same weights, and how a config makes it.

    Raises
    ------
    ExportError : no class of MONAI's is this network.
    """
    if isinstance(network, Adapted):
        inner = network.network
        return {"_target_": f"monai.networks.nets.{type(inner).__name__}", **network.made}, inner
    if not isinstance(network, UNet):
        raise unsupported(f"the network {plan.network.name}, which MONAI does not have")
    made = _dynunet_arguments(network, plan)
    from monai.networks.nets import DynUNet

    twin = DynUNet(**made)
    missing, unknown = twin.load_state_dict(_renamed(network), strict=False)
    # `skip_layers` are other names of the same tensors.
    if unknown or any(not name.startswith("skip_layers.") for name in missing):
        raise unsupported("a U-Net whose layers are not those of MONAI's DynUNet")
    return {"_target_": "monai.networks.nets.DynUNet", **made}, twin.eval()


def _dynunet_arguments(network: UNet, plan: Plan) -> Json:
    options, dims = plan.network.options, plan.dimensions
    features, kernels = list(options["features"]), [list(row) for row in options["kernels"]]
    plain = network.state_dict().keys() == _named(len(features)).keys()
    # DynUNet's decoder has the kernel of the stage below, ours that of its own.
    if plan.network.name != "unet" or len(features) < 3 or not plain or any(row != kernels[0] for row in kernels):
        raise unsupported(
            "a U-Net with two stages, another number of convolutions than two a stage, biases, residual blocks, or "
            "kernels that differ between stages"
        )
    strides = [list(row) for row in options["strides"]]
    return {
        "spatial_dims": dims,
        "in_channels": next(network.parameters()).shape[1],
        "out_channels": network.heads[-1].get_parameter("weight").shape[0],
        "kernel_size": kernels,
        "strides": [[1] * dims, *strides],
        "upsample_kernel_size": strides,
        "filters": features,
        "norm_name": ["INSTANCE", {"affine": True}],
        "act_name": ["leakyrelu", {"inplace": True, "negative_slope": 0.01}],
    }


def _named(stages: int) -> dict[str, str]:
    """Return names of weights of a U-Net with two convolutions a stage -> in DynUNet ("" for deep supervision)."""
    names: dict[str, str] = {}
    last = stages - 2
    for part, count in (("encoder", stages), ("decoder", stages - 1)):
        for stage in range(count):
            if part == "decoder":
                place = f"upsamples.{stage}.conv_block"
            else:
                place = {0: "input_block", stages - 1: "bottleneck"}.get(stage, f"downsamples.{stage - 1}")
            for number, layer, kind in (
                (n, layer, kind) for n in (0, 1) for layer, kind in (("0", "weight"), ("1", "weight"), ("1", "bias"))
            ):
                theirs = f"{place}.{_LAYER[layer].format(number + 1)}.{kind}"
                names[f"{part}.{stage}.{number}.{layer}.{kind}"] = theirs
    for level in range(last + 1):
        names[f"up.{level}.weight"] = f"upsamples.{level}.transp_conv.conv.weight"
        for kind in ("weight", "bias"):
            names[f"heads.{level}.{kind}"] = f"output_block.conv.conv.{kind}" if level == last else ""
    return names


def _renamed(network: UNet) -> dict[str, Tensor]:
    names = _named(len(network.encoder))
    return {names[ours]: tensor for ours, tensor in network.state_dict().items() if names[ours]}


def write_bundle(bundle: Bundle, network: nn.Module, *, out: Path, patch: Tensor) -> tuple[Agreement, tuple[str, ...]]:
    """Write one network as a MONAI bundle into the folder `out`.

    Parameters
    ----------
    patch : (1, C, *patch_size) on which MONAI's network is compared with ours before anything is written.

    Returns
    -------
    tuple
        How they compare, and in what the bundle's masks may differ from those of `medseg predict`, in words.

    Raises
    ------
    ExportError : MONAI has no such network, normalisation or resampling; the networks do not agree.
    """
    plan = bundle.info.plan
    config = inference_config(bundle)
    made, twin = as_monai(network, plan)
    config = {**config, "network_def": made}
    differences = told(bundle)

    def run(windows: Tensor) -> Tensor:
        with torch.inference_mode():
            answer = twin(windows)
        if not isinstance(answer, Tensor):
            raise unsupported(f"{made['_target_']} answers with several levels")
        return answer

    agreement = compared(network, run, torch.cat([patch, patch.flip(2)]), not exclusive(bundle.info.spec))
    write_atomically(out / WEIGHTS, lambda path: torch.save(twin.state_dict(), path))
    write_text(out / "configs" / "inference.json", json.dumps(config, indent=2) + "\n")
    write_text(out / "docs" / "README.md", _readme(bundle, differences))
    if bundle.info.spec.licence:
        write_text(out / "LICENSE", f"Licence of the data that the model learnt from: {bundle.info.spec.licence}\n")
    write_text(out / "configs" / "metadata.json", json.dumps(_metadata(bundle), indent=2) + "\n")
    return agreement, differences


def inference_config(bundle: Bundle) -> Json:
    """Return configs/inference.json without the network."""
    plan, channels = bundle.info.plan, len(bundle.info.spec.channels)
    pattern = "'/*.nii.gz'" if channels == 1 else "'/*_0000.nii.gz'"
    files = "i" if channels == 1 else f"[i[:-12] + '_%04d.nii.gz' % c for c in range({channels})]"
    return {
        "imports": ["$import glob", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": f"$[{files} for i in sorted(glob.glob(@dataset_dir + {pattern}))]",
        "network_def": {},
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preparation(plan)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": _inferer(plan),
        "postprocessing": {"_target_": "Compose", "transforms": _way_back(bundle)},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": f"$@bundle_root + '/{WEIGHTS}'",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }


def _preparation(plan: Plan) -> list[Json]:
    if plan.nnunet is not None:
        raise unsupported("how nnU-Net resamples (splines, coarse slices apart)")
    if plan.monai is not None:
        raise unsupported("what was imported from a MONAI bundle: use that one")
    return [
        {"_target_": "LoadImaged", "keys": "image", "image_only": True},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": plan.orientation},
        {
            "_target_": "CropForegroundd",
            "keys": "image",
            "source_key": "image",
            "select_fn": "$lambda x: x != 0",
            "allow_smaller": True,
        },
        {
            "_target_": "Spacingd",
            "keys": "image",
            "pixdim": list(plan.spacing),
            "mode": "bilinear",
            "padding_mode": "border",
            "align_corners": False,
            "scale_extent": True,
        },
        *_normalisation(list(plan.normalisation.values())),
    ]


def _zscore(row: Normalise) -> list[Json]:
    return [{"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True}]


def _ct(row: Normalise) -> list[Json]:
    low, high = row.low, row.high
    return [
        {"_target_": "ScaleIntensityRanged", "keys": "image", **_ends(low, high, low, high), "clip": True},
        {"_target_": "NormalizeIntensityd", "keys": "image", "subtrahend": row.mean, "divisor": row.deviation},
    ]


def _range(row: Normalise) -> list[Json]:
    return [{"_target_": "ScaleIntensityd", "keys": "image", "minv": 0.0, "maxv": 1.0, "channel_wise": True}]


def _bytes(row: Normalise) -> list[Json]:
    return [{"_target_": "ScaleIntensityRanged", "keys": "image", **_ends(0.0, 255.0, 0.0, 1.0)}]


def _ends(low: float, high: float, new_low: float, new_high: float) -> Json:
    return {"a_min": low, "a_max": high, "b_min": new_low, "b_max": new_high}


_SCHEMES: dict[str, Callable[[Normalise], list[Json]]] = {
    "zscore": _zscore,
    "ct": _ct,
    "range": _range,
    "bytes": _bytes,
    "none": lambda row: [],
}


def _normalisation(rows: Sequence[Normalise]) -> list[Json]:
    if any(row != rows[0] for row in rows) or rows[0].scheme not in _SCHEMES:
        raise unsupported("channels that are normalised each in its own way, or by the content of the image")
    return _SCHEMES[rows[0].scheme](rows[0])


def _inferer(plan: Plan) -> Json:
    shared = {"overlap": plan.overlap, "mode": "gaussian"}
    if plan.dimensions == 2:
        return {
            "_target_": "SliceInferer",
            "roi_size": list(plan.patch_size[:2]),
            "spatial_dim": 2,
            "sw_batch_size": 8,
            **shared,
        }
    return {"_target_": "SlidingWindowInferer", "roi_size": list(plan.patch_size), "sw_batch_size": 1, **shared}


def _way_back(bundle: Bundle) -> list[Json]:
    spec = bundle.info.spec
    invert = {
        "_target_": "Invertd",
        "keys": "pred",
        "transform": "@preprocessing",
        "orig_keys": "image",
        "nearest_interp": False,
        "to_tensor": True,
    }
    if exclusive(spec):
        choose: Json = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
        values = [0, *spec.foreground.values()]
    else:
        values = [0, *(spec.foreground[region.paint] for region in spec.regions.values())]
        numbers = f"torch.arange(1, {len(values)}, device=x.device).reshape(-1, 1, 1, 1)"
        # Regions are painted in order: the last one found counts.
        painted = f"$lambda x: ((x > 0) * {numbers}).amax(0, keepdim=True)"
        choose = {"_target_": "Lambdad", "keys": "pred", "func": painted}
    kind = "uint8" if max(values) < 256 else "int32"
    named = {"orig_labels": list(range(len(values))), "target_labels": values, "dtype": f"$torch.{kind}"}
    save = {
        "_target_": "SaveImaged",
        "keys": "pred",
        "output_dir": "@output_dir",
        "output_postfix": "",
        "separate_folder": False,
        "resample": False,
        "output_dtype": f"$torch.{kind}",
    }
    return [invert, choose, {"_target_": "MapLabelValued", "keys": "pred", **named}, save]


def told(bundle: Bundle) -> tuple[str, ...]:
    """Return in what masks of the bundle may differ from those of `medseg predict`."""
    info, plan = bundle.info, bundle.info.plan
    rows = [
        "MONAI resamples to the very spacing of the plan, medseg to whole voxels over the same extent: where the one "
        "does not divide the other, voxels at borders may differ.",
        "MONAI 1.6 shifts its samples by part of a voxel along an axis where the outer face of the image lies within a "
        "voxel of the origin of space.",
        "An axis up to 1.5 patches long is one window in medseg, and two here.",
        "An image that is 0 everywhere is not read.",
    ]
    if plan.test_mirroring:
        rows.append("Inputs are not mirrored here: compare with `medseg predict --no-mirror`.")
    if info.postprocess:
        steps = "; ".join(map(str, info.postprocess))
        rows.append(f"Post-processing is left out: {steps} (compare with `medseg predict --no-postprocess`).")
    if plan.precision != "fp32":
        rows.append("The network computes in fp32 here, in bf16 in medseg.")
    return tuple(rows)


def _readme(bundle: Bundle, differences: Sequence[str]) -> str:
    info = bundle.info
    labels = "\n".join(f"- {value}: {name}" for name, value in info.spec.foreground.items())
    several = "" if len(info.spec.channels) == 1 else " (CASE_0000.nii.gz, CASE_0001.nii.gz, ... in the order below)"
    return (
        f"# {info.name}\n\nMade of a model of medseg ({info.digest[:12]}).\n\n"
        "    pip install 'monai[nibabel,ignite,fire]'\n"
        "    python -m monai.bundle run --config_file configs/inference.json --bundle_root . "
        "--dataset_dir IMAGES --output_dir MASKS\n\n"
        f"IMAGES holds .nii.gz files{several}. Channels: {', '.join(info.spec.channels)}.\n\n"
        f"Values of the masks:\n\n{labels}\n\n"
        "What may differ from `medseg predict`:\n\n" + "".join(f"- {row}\n" for row in differences)
    )


def _metadata(bundle: Bundle) -> Json:
    import monai
    import numpy as np

    info, plan = bundle.info, bundle.info.plan
    dims = plan.dimensions
    shape = list(plan.patch_size[:dims])
    channels, outputs = list(info.spec.channels), channel_names(info.spec)
    modality = next(iter(info.spec.channels.values())).modality or "n/a"
    common = {"type": "image", "dtype": "float32", "is_patch_data": True, "spatial_shape": shape}
    return {
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported by medseg"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"nibabel": "5.3.0", "pytorch-ignite": "0.4.11", "fire": "0.5.0"},
        "name": info.name,
        "task": f"segmentation of {', '.join(info.spec.foreground)}",
        "description": info.spec.description or f"{info.name}, trained with medseg",
        "authors": "",
        "copyright": "",
        "data_type": "nibabel",
        "intended_use": "research; not a medical device",
        "medseg_digest": info.digest,
        "network_data_format": {
            "inputs": {
                "image": {
                    **common,
                    "format": "magnitude",
                    "modality": modality,
                    "num_channels": len(channels),
                    "value_range": [],
                    "channel_def": {str(n): name for n, name in enumerate(channels)},
                }
            },
            "outputs": {
                "pred": {
                    **common,
                    "format": "segmentation",
                    "num_channels": len(outputs),
                    "value_range": [],
                    "channel_def": {str(n): name for n, name in enumerate(outputs)},
                }
            },
        },
    }
