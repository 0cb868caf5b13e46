"""``medseg models export``: a bundle for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.bundle import Bundle, load_networks, open_bundle
from medseg.errors import ConfigError, ExportError
from medseg.exchange.monai_bundle import unsupported, write_bundle
from medseg.exchange.program import Agreement, Window, export_network, window_of
from medseg.preparation.prepare import prepare
from medseg.studies import read_channels
from medseg.targets import channel_names, exclusive

KINDS = {"torch": ".pt2", "onnx": ".onnx", "monai": ""}
"""What a model is exported to -> how the file's name ends ("" for a folder)."""
SEED = 5


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes
    ----------
    out : the file, or the folder.
    networks : folds; a file averages their logits, MONAI bundles hold one each.
    real : whether it was compared on an image, and not on noise.
    differences : in what its masks may differ from those of `medseg predict`, in words.
    """

    out: Path
    networks: int
    window: Window
    agreement: Agreement
    real: bool
    differences: tuple[str, ...] = ()


def export_model(model: Path, *, to: str, out: Path, check: tuple[Path, ...] = ()) -> Exported:
    """Write the networks of a model for other programs and compare what was written with them.

    A file holds the mean of the folds' logits; as MONAI bundles, several folds become folders fold_0, ... of `out`.

    Parameters
    ----------
    model : run folder, bundle, or model of nnU-Net v2.
    to : "torch", "onnx" or "monai".
    check : files (or DICOM series) of one image on a patch of which they are compared; noise, unless told.

    Raises
    ------
    ConfigError : another `to`, a name that does not end as it should, something is there already, or an extra is
        missing.
    BundleError : there is no model, or it is damaged.
    ExportError : cascades and ensembles of configurations; what cannot be exported, does not agree or be written.
    ReadError, GeometryError : `check` cannot be read.
    """
    _check_target(to, out)
    bundle = open_bundle(model)
    require_single(bundle)
    networks = load_networks(bundle)
    plan = bundle.info.plan
    window = window_of(networks, plan.patch_size[: plan.dimensions])
    patch = _patch(bundle, window, check)
    if to == "monai":
        return _export_bundles(bundle, networks, window, patch, out, real=bool(check))
    facts = describe(bundle, window)
    agreement = export_network(networks, window, kind=to, out=out, patch=patch, facts=facts)
    return Exported(out, len(networks), window, agreement, bool(check))


def _export_bundles(
    bundle: Bundle, networks: Sequence[nn.Module], window: Window, patch: Tensor, out: Path, *, real: bool
) -> Exported:
    if window.size != bundle.info.plan.patch_size[: len(window.size)]:
        raise unsupported(f"patches of {bundle.info.plan.patch_size}, no multiple of the total stride")
    names = sorted(bundle.info.weights)
    folders = [out] if len(names) == 1 else [out / Path(name).stem for name in names]
    made = [write_bundle(bundle, n, out=folder, patch=patch) for n, folder in zip(networks, folders, strict=True)]
    worst = max((agreement for agreement, _ in made), key=lambda row: row.difference / row.allowed)
    return Exported(out, len(networks), window, worst, real, made[0][1])


def _check_target(to: str, out: Path) -> None:
    if to not in KINDS:
        raise ConfigError(f"--to {to}: allowed are {', '.join(KINDS)}")
    if KINDS[to] and out.suffix != KINDS[to]:
        raise ConfigError(f"--out {out.name}: for --to {to} the name ends in {KINDS[to]}")
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another --out")


def require_single(bundle: Bundle) -> None:
    """Raise ExportError for models whose networks cannot stand alone."""
    if bundle.members:
        raise ExportError(
            f"{bundle.folder}: an ensemble of {len(bundle.members)} configurations, each with its own windows and "
            "spacing; export its folders member_0, member_1, ... one by one",
            code="EXPORT_UNSUPPORTED",
        )
    if bundle.previous is not None:
        raise ExportError(
            f"{bundle.folder}: the second stage of a cascade is given the mask of the first one, which other programs "
            "do not prepare; export its first stage alone (the folder previous of the imported bundle)",
            code="EXPORT_UNSUPPORTED",
        )


def describe(bundle: Bundle, window: Window) -> dict[str, Any]:
    """Return what a program must know to use the network: how an image is prepared, what the logits stand for."""
    info = bundle.info
    plan = info.plan
    return {
        "model": info.digest,
        "channels": list(info.spec.channels),
        "outputs": channel_names(info.spec),
        "labels": info.spec.foreground,
        "regions": not exclusive(info.spec),
        "temperature": info.temperature,
        "dimensions": plan.dimensions,
        "orientation": plan.orientation,
        "spacing": list(plan.spacing),
        "normalisation": {name: row.model_dump(mode="json") for name, row in plan.normalisation.items()},
        "overlap": plan.overlap,
        "mirror_axes": list(plan.augmentation.mirror_axes) if plan.test_mirroring else [],
        "monai": None if plan.monai is None else plan.monai.model_dump(mode="json"),
        "nnunet": None if plan.nnunet is None else plan.nnunet.model_dump(mode="json"),
        "window": list(window.size),
        "multiple_of": list(window.steps),
    }


def _patch(bundle: Bundle, window: Window, check: tuple[Path, ...]) -> Tensor:
    """Return (1, C, *window.size): the middle of a prepared image, or noise of deviation 1 as prepared images have."""
    info = bundle.info
    if not check:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn((1, len(info.spec.channels), *window.size), generator=generator)
    image = read_channels(info.spec, check)
    prepared = prepare(image, info.plan).image
    if info.plan.dimensions == 2:
        prepared = prepared[..., prepared.shape[-1] // 2]
    for axis, size in enumerate(window.size, start=1):
        start = max(0, (prepared.shape[axis] - size) // 2)
        prepared = prepared.narrow(axis, start, min(size, prepared.shape[axis]))
    pads = [n for axis in range(len(window.size), 0, -1) for n in (0, window.size[axis - 1] - prepared.shape[axis])]
    return F.pad(prepared, pads)[None].contiguous()
