"""A MONAI bundle on disk as a plan, a spec and weights of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medseg.errors import BundleError
from medseg.monai_bundles.config import Json, config_file, read_config, resolved
from medseg.monai_bundles.transforms import NOTHING, named, read_preparation, require_fractions
from medseg.nnunet.folder import Foreign
from medseg.planning.fingerprint import Fingerprint
from medseg.planning.plan import Augmentation, Monai, Plan
from medseg.spec import Spec


def is_monai(path: Path) -> bool:
    """Tell whether a folder looks like a MONAI bundle."""
    return config_file(path) is not None


def read_monai(folder: Path) -> Foreign:
    """Read a bundle; raise BundleError, naming the class or the key, where it is not complete or needs more."""
    try:
        return _read(folder)
    except BundleError as error:
        raise BundleError(f"{folder.name}: {error}", code=error.code) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BundleError(f"{folder.name}: no MONAI bundle that is read ({type(error).__name__}: {error})") from error


def _read(folder: Path) -> Foreign:
    from medseg.monai_bundles.network import network_plan, read_weights, require_fit  # torch

    file = config_file(folder)
    if file is None:
        raise BundleError("it has no configs/inference.json")
    config = read_config(file)
    definition = resolved(config, "network_def" if "network_def" in config else "network")
    network, dims, inputs, outputs = network_plan(definition)
    softmax = _check_way_back(_transforms(config, "postprocessing"))
    preparation = read_preparation(_transforms(config, "preprocessing"), channels=inputs)
    spec = _spec(folder, inputs, outputs)
    size, overlap, mode = _inferer(resolved(config, "inferer"), dims)
    weights = read_weights(folder)
    require_fit(network, (dims, inputs, outputs), weights, size)
    plan = Plan(
        dataset=spec.name,
        dimensions=3,
        orientation=preparation.orientation or "IJK",
        spacing=preparation.spacing or (1.0, 1.0, 1.0),
        normalisation=dict.fromkeys(spec.channels, preparation.rows),
        patch_size=size,
        batch_size=1,
        network=network,
        loss="dice_ce",
        foreground_share=0.33,
        augmentation=Augmentation(mirror_axes=()),
        learning_rate=0.01,
        weight_decay=0.0,
        warmup=0.0,
        averaging=0.0,
        precision="fp32",
        steps=1,
        validations=1,
        overlap=overlap,
        test_mirroring=False,
        seed=0,
        fingerprint=_fingerprint(size),
        monai=Monai(resample=preparation.spacing is not None, window=mode, softmax=softmax),
    )
    training = {"program": "MONAI", "trainer": "MONAI", "configuration": network.options["target"]}
    return Foreign(spec, plan, {"fold_0": weights}, training)


def _transforms(config: Json, key: str) -> list[Json]:
    value = resolved(config, key)
    rows = value.get("transforms") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise BundleError(f"{key}: a Compose with a list of transforms is expected")
    return rows


def _check_way_back(rows: list[Json]) -> bool:
    """Return whether the softmax is brought back; raise BundleError for what chooses labels in another way."""
    softmax = inverted = chosen = False
    for row in rows:
        name, options = named(row)
        if not chosen:
            require_fractions(name, options.get("dtype"))
        if name in (*NOTHING, "SaveImaged"):
            continue
        if name == "Activationsd" and options.get("softmax") is True and not options.get("sigmoid") and not inverted:
            softmax = True
        elif name == "Invertd" and options.get("nearest_interp", True) is False and not chosen:
            inverted = True
        elif name == "AsDiscreted" and options.get("argmax") is True and inverted and "threshold" not in options:
            chosen = True
        else:
            raise BundleError(
                f"postprocessing: {name} with {options} is not read; read are Activationsd (softmax), Invertd "
                "(nearest_interp false), AsDiscreted (argmax) and SaveImaged, in this order"
            )
    if not chosen:
        raise BundleError("postprocessing: Invertd (nearest_interp false) and then AsDiscreted (argmax) are needed")
    return softmax


def _inferer(row: Any, dims: int) -> tuple[tuple[int, int, int], float, Any]:
    name, options = named(row)
    if name != "SlidingWindowInferer" or dims != 3:
        raise BundleError(f"inferer: {name} in {dims}-D is not read; read is SlidingWindowInferer in 3-D")
    free = {"roi_size", "overlap", "mode", "sw_batch_size", "device", "sw_device", "progress", "cache_roi_weight_map"}
    defaults = {"padding_mode": "constant", "sigma_scale": 0.125, "cval": 0.0}
    for key, value in options.items():
        if key not in free and value != defaults.get(key):
            raise BundleError(f"inferer: {key}={value!r} is not read")
    size: Any = options.get("roi_size")
    overlap, mode = options.get("overlap", 0.25), options.get("mode", "constant")
    whole = isinstance(size, list) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)
    shared = type(overlap) in (int, float) and 0 <= overlap < 1
    if not whole or not shared or mode not in ("constant", "gaussian"):
        raise BundleError(f"inferer: roi_size {size}, overlap {overlap} (from 0, below 1), mode {mode}: not read")
    return (size[0], size[1], size[2]), float(overlap), mode


def _spec(folder: Path, inputs: int, outputs: int) -> Spec:
    file = folder / "configs" / "metadata.json"
    metadata = read_config(file) if file.is_file() else {}
    formats = metadata.get("network_data_format", {})
    if outputs < 2:
        raise BundleError("one output channel: argmax of one channel is always 0")
    labels = _names(formats.get("outputs", {}).get("pred", {}), outputs, "label")
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "_" for c in str(metadata.get("name", "")))
    return Spec.model_validate(
        {
            "name": name.lstrip("_.-") or "monai_bundle",
            "channels": {word: {} for word in _names(formats.get("inputs", {}).get("image", {}), inputs, "channel")},
            "labels": {word: number for number, word in enumerate(labels) if number},
        }
    )


def _names(described: Json, count: int, word: str) -> list[str]:
    """Return the names of channel_def; numbered ones where it does not name each channel once."""
    rows = described.get("channel_def", {})
    names = [str(rows.get(str(n), "")) for n in range(count)]
    if all(names) and len({*names}) == count and "background" not in names[1:]:
        return names
    return [f"{word}_{n}" for n in range(count)]


def _fingerprint(size: tuple[int, int, int]) -> Fingerprint:
    spacings = ((1.0, 1.0, 1.0),) * 5
    return Fingerprint(
        cases=0,
        patients=0,
        shapes=(size,) * 5,
        spacings=spacings,
        voxels=0,
        channels={},
        label_ml={},
        label_cases={},
    )
