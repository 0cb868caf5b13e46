"""nnU-Net as an oracle: its networks with their names of weights, its folders, and how it predicts.

Written from the papers and the documentation in the plainest way (numpy, scipy, scikit-image), without the code under
test.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.transform import resize
from torch import Tensor, nn

Array = np.ndarray[Any, Any]
CONV: Any = {2: nn.Conv2d, 3: nn.Conv3d}
UP: Any = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM: Any = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOL: Any = {2: nn.AvgPool2d, 3: nn.AvgPool3d}


class Layer(nn.Module):
    """Convolution, norm, activation; nnU-Net registers the first two a second time in `all_modules`."""

    def __init__(
        self, dims: int, inputs: int, outputs: int, kernel: Any, stride: Any, *, bias: bool = True, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = CONV[dims](inputs, outputs, kernel, stride, [k // 2 for k in kernel], bias=bias)
        self.norm = NORM[dims](outputs, eps=1e-5, affine=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, *([nn.LeakyReLU()] if active else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.all_modules(x)


class Layers(nn.Module):
    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.convs = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class Block(nn.Module):
    def __init__(self, dims: int, inputs: int, outputs: int, kernel: Any, stride: Any) -> None:
        super().__init__()
        one = [1] * dims
        self.conv1 = Layer(dims, inputs, outputs, kernel, stride)
        self.conv2 = Layer(dims, outputs, outputs, kernel, one, active=False)
        short: list[nn.Module] = [POOL[dims](stride, stride)] if max(stride) > 1 else []
        if inputs != outputs:
            short.append(Layer(dims, inputs, outputs, one, one, bias=False, active=False))
        self.skip = nn.Sequential(*short)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.conv2(self.conv1(x)) + self.skip(x))


class Blocks(nn.Module):
    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Encoder(nn.Module):
    def __init__(self, dims: int, inputs: int, arguments: dict[str, Any], residual: bool) -> None:
        super().__init__()
        features, kernels, strides = (arguments[k] for k in ("features_per_stage", "kernel_sizes", "strides"))
        one = [1] * dims
        if residual:
            self.stem = Layers(Layer(dims, inputs, features[0], kernels[0], one))
            inputs = features[0]
        counts = arguments["n_blocks_per_stage" if residual else "n_conv_per_stage"]
        stages: list[nn.Module] = []
        for width, kernel, stride, count in zip(features, kernels, strides, counts, strict=True):
            kind: Any = Block if residual else Layer
            rows = [kind(dims, inputs, width, kernel, stride)]
            rows += [kind(dims, width, width, kernel, one) for _ in range(count - 1)]
            stages.append(Blocks(*rows) if residual else nn.Sequential(Layers(*rows)))
            inputs = width
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x) if hasattr(self, "stem") else x
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class Decoder(nn.Module):
    def __init__(self, dims: int, encoder: Encoder, classes: int, arguments: dict[str, Any]) -> None:
        super().__init__()
        features, kernels, strides = (arguments[k] for k in ("features_per_stage", "kernel_sizes", "strides"))
        one = [1] * dims
        self.encoder = encoder
        self.stages, self.transpconvs, self.seg_layers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, count in zip(range(len(features) - 1, 0, -1), arguments["n_conv_per_stage_decoder"], strict=True):
            below, skip, stride = features[level], features[level - 1], strides[level]
            self.transpconvs.append(UP[dims](below, skip, stride, stride))
            rows = [Layer(dims, 2 * skip, skip, kernels[level - 1], one)]
            rows += [Layer(dims, skip, skip, kernels[level - 1], one) for _ in range(count - 1)]
            self.stages.append(Layers(*rows))
            self.seg_layers.append(CONV[dims](skip, classes, 1))

    def forward(self, skips: list[Tensor]) -> Tensor:
        x = skips[-1]
        for stage, up, skip in zip(self.stages, self.transpconvs, skips[-2::-1], strict=True):
            x = stage(torch.cat([up(x), skip], 1))
        return self.seg_layers[-1](x)


class Peer(nn.Module):
    """PlainConvUNet or ResidualEncoderUNet with random weights, norms included."""

    def __init__(self, dims: int, inputs: int, classes: int, arguments: dict[str, Any], residual: bool) -> None:
        super().__init__()
        self.encoder = Encoder(dims, inputs, arguments, residual)
        self.decoder = Decoder(dims, self.encoder, classes, arguments)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.1 if parameter.ndim == 1 else 0.0, 0.3)
        # No class is likelier than the others, or masks would hold one.
        with torch.no_grad():
            mean = self(torch.randn(1, inputs, *[32] * dims)).transpose(0, 1).flatten(1).median(1).values
        self.decoder.seg_layers[-1].bias.data -= mean

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def arguments_of(dims: int, *, residual: bool = False, features: Sequence[int] = (4, 6, 8)) -> dict[str, Any]:
    count = len(features)
    return {
        "n_stages": count,
        "features_per_stage": list(features),
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [[1] * (dims - 2) + [3, 3], *([[3] * dims] * (count - 1))],
        "strides": [[1] * dims, [1] * (dims - 2) + [2, 2], *([[2] * dims] * (count - 2))],
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [1, 2, 2][:count],
        "n_conv_per_stage_decoder": [1, 2][: count - 1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def configuration_of(patch: Sequence[int], spacing: Sequence[float], **changes: Any) -> dict[str, Any]:
    """A configuration of plans.json; `residual`, `features`, `schemes`, `masked` and further keys as `changes`."""
    residual, features = changes.pop("residual", False), changes.pop("features", (4, 6, 8))
    kind = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    schemes = changes.pop("schemes", ["ZScoreNormalization"])
    rule = {"order_z": 0, "force_separate_z": None}
    resample = "resample_data_or_seg_to_shape"
    return {
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "spacing": list(spacing),
        "normalization_schemes": schemes,
        "use_mask_for_norm": changes.pop("masked", [False] * len(schemes)),
        "resampling_fn_data": resample,
        "resampling_fn_seg": resample,
        "resampling_fn_probabilities": resample,
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **rule},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **rule},
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **rule},
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
            "arch_kwargs": arguments_of(len(patch), residual=residual, features=features),
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        **changes,
    }


STATISTICS = {"max": 9.0, "mean": 1.5, "median": 1.4, "min": -4.0, "percentile_00_5": -1.0, "percentile_99_5": 3.5}


def write_model(
    root: Path,
    configurations: dict[str, dict[str, Any]],
    name: str,
    *,
    labels: dict[str, Any] | None = None,
    order: list[int] | None = None,
    transpose: Sequence[int] = (0, 1, 2),
    reader: str = "SimpleITKIO",
    folds: Sequence[str] = ("0",),
    mirror: tuple[int, ...] | None = None,
    file: str = "checkpoint_final.pth",
) -> tuple[Path, list[Peer]]:
    """Write nnUNetTrainer__nnUNetPlans__`name` below `root` as nnU-Net would; return it and the networks in it."""
    labels = labels or {"background": 0, "zebra": 2, "ant": 1}
    configuration = configurations[name]
    schemes = configuration["normalization_schemes"]
    plans = {
        "dataset_name": "Dataset001_Toy",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0, 1.0, 1.0],
        "original_median_shape_after_transp": [12, 20, 18],
        "image_reader_writer": reader,
        "transpose_forward": list(transpose),
        "transpose_backward": [list(transpose).index(axis) for axis in range(3)],
        "configurations": configurations,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(n): {**STATISTICS, "std": 0.7} for n in range(len(schemes))
        },
    }
    dataset = {
        "channel_names": {str(n): f"channel{n}" for n in range(len(schemes))},
        "labels": labels,
        "numTraining": 3,
        "file_ending": ".nii.gz",
        **({"regions_class_order": order} if order else {}),
    }
    folder = root / f"nnUNetTrainer__nnUNetPlans__{name}"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    kinds = [v for v in labels.values() if v != 0]
    values = {x for v in kinds for x in (v if isinstance(v, list) else [v])}
    inputs = len(schemes) + (len(values) if "previous_stage" in configuration else 0)
    row = configuration["architecture"]
    networks = []
    for number, fold in enumerate(folds):
        torch.manual_seed(number + 1)
        residual = "Residual" in row["network_class_name"]
        dims = len(configuration["patch_size"])
        network = Peer(dims, inputs, len(kinds) + (order is None), row["arch_kwargs"], residual).eval()
        networks.append(network)
        save_checkpoint(folder / f"fold_{fold}" / file, network.state_dict(), name, fold=fold, mirror=mirror)
    return folder, networks


def save_checkpoint(
    file: Path, weights: Any, name: str, *, fold: str = "0", mirror: Any = None, **further: Any
) -> None:
    """Write a checkpoint with what nnU-Net keeps in one, numpy's scalars in the log included."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "network_weights": weights,
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {"train_losses": [np.float32(0.5), np.float64(-0.25)], "epoch": [np.int64(3)]},
        "_best_ema": np.float64(0.7),
        "current_epoch": 1000,
        "init_args": {"configuration": name, "fold": fold, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": mirror,
        **further,
    }
    torch.save(content, file)


def peer_predict(
    folder: Path,
    networks: Sequence[nn.Module],
    image: Array,
    spacing: Sequence[float],
    *,
    mirror: tuple[int, ...] = (),
    previous: Array | None = None,
) -> tuple[Array, Array]:
    """Predict as nnU-Net documents it, but in double and single precision.

    Parameters
    ----------
    image : (C, Z, Y, X), with its `spacing` along Z, Y, X.
    previous : (Z, Y, X) mask of the first stage.

    Returns
    -------
    tuple of arrays
        Label values (Z, Y, X), and how far the best logit is above the second (for regions: from 0), infinite outside.
    """
    plans = json.loads((folder / "plans.json").read_text())
    dataset = json.loads((folder / "dataset.json").read_text())
    name = folder.name.rpartition("__")[2]
    configuration = plans["configurations"][name]
    forward = plans["transpose_forward"]
    data = image.astype(np.float32).transpose(0, *(axis + 1 for axis in forward))
    seg = None if previous is None else previous.transpose(forward)
    # In single precision, as headers of NIfTI files say it.
    have = [float(np.float32(spacing[axis])) for axis in forward]
    want = configuration["spacing"]
    want = [have[0], *want] if len(want) == 2 else want

    inside = ndimage.binary_fill_holes((data != 0).any(0))
    whole = data.shape[1:]
    box = ndimage.find_objects(inside.astype(int))[0]
    data, inside = data[(slice(None), *box)], inside[box]
    if seg is not None:
        seg = seg[box]
        inside = inside | (seg > 0)
    cropped = data.shape[1:]
    size = [round(h / w * n) for h, w, n in zip(have, want, cropped, strict=True)]
    rows = zip(data, configuration["normalization_schemes"], configuration["use_mask_for_norm"], strict=True)
    data = np.stack([_normalised(x.copy(), scheme, inside if mask else None) for x, scheme, mask in rows])
    data = np.stack([_resampled(x, size, have, want, 3) for x in data])
    if seg is not None:
        hot = np.zeros(size)
        for label in np.unique(seg):
            hot[_resampled(seg == label, size, have, want, 1) >= 0.5] = label
        values = sorted({x for v in dataset["labels"].values() for x in (v if isinstance(v, list) else [v])} - {0})
        data = np.concatenate([data, [hot == value for value in values]])
    logits = _logits(data.astype(np.float32), networks, configuration["patch_size"], mirror)
    logits = np.stack([_resampled(x, cropped, want, have, 1) for x in logits])

    mask, gap = np.zeros(whole, int), np.full(whole, np.inf)
    if order := dataset.get("regions_class_order"):
        part = np.zeros(cropped, int)
        for x, value in zip(logits, order, strict=True):
            part[x > 0] = value
        gap[box] = np.abs(logits).min(0)
    else:
        part = logits.argmax(0)
        best = np.sort(logits, axis=0)
        gap[box] = best[-1] - best[-2]
    mask[box] = part
    return mask.transpose(plans["transpose_backward"]), gap.transpose(plans["transpose_backward"])


def _normalised(x: Array, scheme: str, inside: Array | None) -> Array:
    if scheme == "CTNormalization":
        return (np.clip(x, STATISTICS["percentile_00_5"], STATISTICS["percentile_99_5"]) - STATISTICS["mean"]) / 0.7
    if scheme == "NoNormalization":
        return x
    if scheme == "RescaleTo01Normalization":
        return (x - x.min()) / (x.max() - x.min())
    if scheme == "RGBTo01Normalization":
        return x / 255
    chosen = np.ones(x.shape, bool) if inside is None else inside
    x[chosen] = (x[chosen] - x[chosen].mean()) / x[chosen].std()
    return x


def _resampled(x: Array, size: Sequence[int], have: Sequence[float], want: Sequence[float], order: int) -> Array:
    x = x.astype(np.float64)
    if x.shape == tuple(size):
        return x
    options: Any = {"order": order, "mode": "edge", "anti_aliasing": False}
    for spacing in (have, want):
        coarse = [axis for axis in range(3) if spacing[axis] == max(spacing)]
        if max(spacing) / min(spacing) > 3:
            break
    else:
        return resize(x, size, **options)
    if len(coarse) != 1:
        return resize(x, size, **options)
    axis = coarse[0]
    x = np.moveaxis(x, axis, 0)
    plane = [n for a, n in enumerate(size) if a != axis]
    x = np.stack([resize(part, plane, **options) for part in x])
    grid = np.mgrid[: size[axis], : plane[0], : plane[1]].astype(float)
    grid[0] = len(x) / size[axis] * (grid[0] + 0.5) - 0.5
    return np.moveaxis(ndimage.map_coordinates(x, grid, order=0, mode="nearest"), 0, axis)


@torch.inference_mode()
def _logits(data: Array, networks: Sequence[nn.Module], patch: Sequence[int], mirror: tuple[int, ...]) -> Array:
    """One window after the other; a 2-D network sees one slice after the other along the first axis."""
    if data.ndim == len(patch) + 2:
        return np.stack([_logits(data[:, n], networks, patch, mirror) for n in range(data.shape[1])], 1)
    size = data.shape[1:]
    missing = [max(0, p - n) for p, n in zip(patch, size, strict=True)]
    image = torch.from_numpy(np.pad(data, [(0, 0), *((m // 2, m - m // 2) for m in missing)]))
    impulse = np.zeros(patch)
    impulse[tuple(p // 2 for p in patch)] = 1
    weights = ndimage.gaussian_filter(impulse, [p / 8 for p in patch], mode="constant")
    weights = (weights / weights.max() * 10).astype(np.float16).astype(np.float32)
    weights[weights == 0] = weights[weights > 0].min()
    starts = []
    for n, p in zip(image.shape[1:], patch, strict=True):
        count = int(np.ceil((n - p) / (p / 2))) + 1
        starts.append([int(np.round((n - p) / max(count - 1, 1) * i)) for i in range(count)])
    flips = [f for count in range(len(mirror) + 1) for f in itertools.combinations(mirror, count)]
    total: Any = None
    seen = np.zeros(image.shape[1:])
    for corner in itertools.product(*starts):
        place = (..., *(slice(c, c + p) for c, p in zip(corner, patch, strict=True)))
        part = image[place][None]
        answers = [
            network(part.flip([axis + 2 for axis in flip])).flip([axis + 2 for axis in flip])
            for network in networks
            for flip in flips
        ]
        answer = torch.stack(answers).mean(0)[0].numpy() * weights
        total = np.zeros((len(answer), *seen.shape)) if total is None else total
        total[place] += answer
        seen[place] += weights
    return (total / seen)[(..., *(slice(m // 2, m // 2 + n) for m, n in zip(missing, size, strict=True)))]


@pytest.fixture(scope="session")
def peer() -> SimpleNamespace:
    """nnU-Net in a few functions; see their docstrings."""
    return SimpleNamespace(
        configuration=configuration_of,
        write=write_model,
        checkpoint=save_checkpoint,
        predict=peer_predict,
        network=Peer,
        arguments=arguments_of,
    )
