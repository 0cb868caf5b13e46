"""A model in memory and the way from an image to its mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medseg.bundle import Bundle, BundleInfo, load_networks, open_bundle
from medseg.device import best_device
from medseg.errors import BundleError
from medseg.inference.air import air_limits, skipping_air
from medseg.inference.chosen import usable
from medseg.inference.labels import Key, paint
from medseg.inference.memory import Case, Tile, forecast, tiles_of
from medseg.inference.postprocess import postprocess
from medseg.inference.presets import EXACT, QUALITY, Preset, in_parts
from medseg.inference.sliding_window import joined, mirrorings, planes, window_logits
from medseg.inference.way_back import seen, ways_back
from medseg.inference.windows import Layout, layout
from medseg.planning.plan import Plan
from medseg.preparation.prepare import prepare
from medseg.preparation.steps import Step, restore
from medseg.quality.apply import Quality, estimate
from medseg.quality.signs import Notes, make_notes
from medseg.targets import background_logits, decode, label_type, mean_logits, probabilities
from medseg.volume import Volume


@dataclass(frozen=True)
class Model:
    """A verified bundle with its networks on a device.

    Attributes
    ----------
    previous : the first stage of a cascade.
    members : the models of an ensemble, which has no networks of its own.
    preset : what is given up for speed.
    """

    bundle: Bundle
    networks: Sequence[nn.Module]
    device: torch.device
    previous: Model | None = None
    members: tuple[Model, ...] = ()
    preset: Preset = EXACT


def load_model(model: Path | Bundle, *, device: torch.device | None = None, info: BundleInfo | None = None) -> Model:
    """Open a run folder, a foreign model or a bundle (unless it is open); put its networks on the device.

    Parameters
    ----------
    device : the GPU if there is one, unless told.
    info : what the bundle is used as, where that is not what it says itself (see medseg.inference.chosen).

    Raises
    ------
    BundleError : there is no model, it is damaged, its post-processing is of a kind that is not known here, or its
        weights are not those of `info`.
    """
    device = device or best_device()
    bundle = model if isinstance(model, Bundle) else open_bundle(model)
    if info is not None:
        if (info.weights, info.members) != (bundle.info.weights, bundle.info.members):
            raise BundleError(f"{bundle.folder}: the model was replaced while it was in use; run the command again")
        bundle = replace(bundle, info=info)
    return _loaded(bundle, device)


def _loaded(bundle: Bundle, device: torch.device) -> Model:
    bundle = in_parts(usable(bundle))
    previous = None if bundle.previous is None else _loaded(bundle.previous, device)
    members = tuple(_loaded(member, device) for member in bundle.members)
    networks = [network.to(device) for network in load_networks(bundle)]
    return Model(bundle, networks, device, previous, members, QUALITY[bundle.info.preset])


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes
    ----------
    mask : as `predict_volume` returns it.
    soft : as `predict_soft` returns it, where asked for.
    quality : what Dice to expect, and whether a person should look; None where the bundle has no estimate, or none
        for this way of mirroring.
    """

    mask: Volume
    soft: Volume | None = None
    quality: Quality | None = None


def predict_case(
    model: Model, image: Volume, *, mirror: bool | None = None, soft: bool = False, max_memory: int | None = None
) -> Prediction:
    """Segment one image; parameters and errors as for `predict_volume`.

    The estimate of quality asks the networks nothing more than the mask does.
    """
    notes = _wanted_notes(model, mirror)
    if soft:
        mask, chances = predict_soft(model, image, mirror=mirror, notes=notes)
    else:
        mask = predict_volume(model, image, mirror=mirror, notes=notes, max_memory=max_memory)
        chances = None
    fitted = model.bundle.info.quality
    quality = None if notes is None or fitted is None else estimate(fitted, notes.signs(mask))
    return Prediction(mask, chances, quality)


def _wanted_notes(model: Model, mirror: bool | None) -> Notes | None:
    """Return empty notes where the bundle can estimate the quality of what is to be predicted."""
    plan, quality = model.bundle.info.plan, model.bundle.info.quality
    mirrored = plan.test_mirroring if mirror is None else mirror
    if quality is None or quality.mirror != mirrored or model.members:
        return None
    return notes_for(model, mirror=mirrored)


def notes_for(model: Model, *, mirror: bool) -> Notes:
    """Return empty notes for one image."""
    info = model.bundle.info
    passes = len(mirrorings(info.plan, mirror=mirror))
    return make_notes(info.spec, networks=len(model.networks), passes=passes)


@torch.inference_mode()
def predict_volume(
    model: Model,
    image: Volume,
    *,
    mirror: bool | None = None,
    notes: Notes | None = None,
    max_memory: int | None = None,
) -> Volume:
    """Segment one image, plane by plane: the logits of the whole are never in memory (docs/explanation/streaming.md).

    Parameters
    ----------
    image : (channels, I, J, K) with the channels of the model's spec.
    mirror : average over mirrored inputs; unless told, as the plan says.
    notes : are filled with what the prepared image is like, and what each pass says; not for ensembles of
        configurations.
    max_memory : bytes that the process may take: planes are then predicted in as many tiles as that needs, with the
        very same answer. It does not bound ensembles of configurations.

    Returns
    -------
    Volume : (1, I, J, K) label values of the spec, on the grid of `image` with its very affine, post-processed as the
        bundle says.

    Raises
    ------
    BundleError : the image has another number of channels, or the network answers with NaN.
    BatchError : MAX_MEMORY: `max_memory` is too little.
    """
    info = model.bundle.info
    if model.members:
        mask = decode(info.spec, predict_logits(model, image, mirror=mirror)).numpy()
        return postprocess(image.with_array(mask), info.postprocess, info.spec)
    tiles = (1, 1)
    if max_memory is not None:
        held = resident() - image.array.nbytes
        tiles = forecast(case_of(model, image), held=max(0, held), limit=max_memory).tiles
    prepared, steps = _prepared(model, image, mirror, notes, max_memory)
    mask = np.zeros((1, *image.shape), label_type(info.spec))
    where = layout(prepared.shape[1:], info.plan, model.preset)
    view = seen(mask[0], steps, where)
    visited: set[tuple[int, ...]] = set()
    for tile, lines, (rows, columns) in tiles_of(ways_back(steps, where), tiles):
        found = _planes(model, prepared, where, mirror, notes, tile=tile, visited=visited)
        paint(found, lines, Key.of(info.spec), view[:, rows, columns])
    return postprocess(image.with_array(mask), info.postprocess, info.spec)


@torch.inference_mode()
def predict_soft(
    model: Model, image: Volume, *, mirror: bool | None = None, notes: Notes | None = None
) -> tuple[Volume, Volume]:
    """Segment one image like `predict_volume`, and keep what the network thinks of each voxel.

    Returns
    -------
    tuple of two Volumes
        The mask, and (segments, I, J, K) float32 from 0 to 1 on its grid: a channel a label of the spec (softmax,
        the background left out), or a region where it has regions (sigmoid). These take 4 bytes a voxel and segment
        beside the logits of the same size, on the grid of the image. They are the network's, with the temperature of
        the bundle: post-processing does not change them.
    """
    info = model.bundle.info
    found = _restored(model, image, mirror, notes)
    mask = image.with_array(decode(info.spec, found).numpy())
    soft = probabilities(info.spec, _as_logits(model, found), temperature=info.temperature)
    return postprocess(mask, info.postprocess, info.spec), image.with_array(soft.numpy())


@torch.inference_mode()
def predict_logits(model: Model, image: Volume, *, mirror: bool | None = None, notes: Notes | None = None) -> Tensor:
    """Return the logits (K, I, J, K') on the grid of the image, all at once; raises as `predict_volume`.

    Those of an ensemble stand for the mean of its members' probabilities (see `medseg.targets.mean_logits`).
    """
    return _as_logits(model, _restored(model, image, mirror, notes))


def _as_logits(model: Model, found: Tensor) -> Tensor:
    """Return logits whose softmax is `found` where these are probabilities; they are brought back as the plan says."""
    return found.clamp(min=torch.finfo(found.dtype).tiny).log() if _soft_planes(model.bundle.info.plan) else found


def _soft_planes(plan: Plan) -> bool:
    return plan.monai is not None and plan.monai.softmax


def _restored(model: Model, image: Volume, mirror: bool | None, notes: Notes | None) -> Tensor:
    if model.members:
        return ensemble_logits(model.members, image, mirror=mirror)
    info = model.bundle.info
    prepared, steps = _prepared(model, image, mirror, notes)
    where = layout(prepared.shape[1:], info.plan, model.preset)
    logits = joined((plane.cpu() for plane in _planes(model, prepared, where, mirror, notes)), where)
    return restore(logits, steps, fill=background_logits(info.spec), axis=where.axis)


def case_of(model: Model, image: Volume) -> Case:
    """Return what the memory of a prediction depends on."""
    info = model.bundle.info
    return Case(image.shape, image.affine, image.array.itemsize, info.plan, info.spec, model.preset)


def resident() -> int:
    """Return the bytes that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _prepared(
    model: Model, image: Volume, mirror: bool | None, notes: Notes | None, max_memory: int | None = None
) -> tuple[Tensor, tuple[Step, ...]]:
    """Return what the network is given (channels, I, J, K), on the device, and the steps that lead back."""
    plan, spec = model.bundle.info.plan, model.bundle.info.spec
    if image.array.shape[0] != len(spec.channels):
        raise BundleError(
            f"the image has {image.array.shape[0]} channel(s), the model needs {len(spec.channels)}: "
            f"{', '.join(spec.channels)}",
            code="CHANNEL_COUNT",
        )
    before = None
    if model.previous is not None:
        mirror = plan.test_mirroring if mirror is None else mirror
        before = predict_volume(model.previous, image, mirror=mirror, max_memory=max_memory)
    found = prepare(image, plan, before)
    prepared = found.image
    if notes is not None:
        notes.look(prepared, list(found.spacing), image)
    if found.previous is not None:
        labels = torch.tensor(list(spec.foreground.values())).reshape(-1, 1, 1, 1)
        prepared = torch.cat([prepared, (found.previous == labels).float()])
    return prepared.to(model.device), found.steps


def _planes(
    model: Model,
    prepared: Tensor,
    where: Layout,
    mirror: bool | None,
    notes: Notes | None,
    *,
    tile: Tile | None = None,
    visited: set[tuple[int, ...]] | None = None,
) -> Iterator[Tensor]:
    """Yield the planes of logits, or of probabilities where the plan says so; raises as `predict_volume`.

    `visited` are windows that were predicted already, for another tile: they are noted once.
    """
    plan = model.bundle.info.plan
    mirror = plan.test_mirroring if mirror is None else mirror
    quiet = window_logits(model.networks, plan, mirror=mirror)
    noting = quiet
    if notes is not None:
        noting = window_logits(model.networks, plan, mirror=mirror, witness=notes.witness)
    if model.preset.air:
        limits, background = air_limits(prepared), background_logits(model.bundle.info.spec).to(prepared.device)
        quiet, noting = (skipping_air(each, limits, background) for each in (quiet, noting))
    for plane in planes(prepared, noting, where, tile=tile, again=quiet, visited=visited):
        if not torch.isfinite(plane).all():
            raise BundleError("the network answers with NaN or infinity for this image", code="NON_FINITE")
        yield plane.softmax(0) if _soft_planes(plan) else plane


def ensemble_logits(members: Sequence[Model], image: Volume, *, mirror: bool | None = None) -> Tensor:
    """Return logits (K, I, J, K') whose probabilities are the mean of the members', each with its temperature.

    One member after the other, so that memory does not grow with their number; `mirror` unless told as each one's plan
    says.
    """
    spec = members[0].bundle.info.spec
    each = (predict_logits(m, image, mirror=mirror) / m.bundle.info.temperature for m in members)
    return mean_logits(spec, each)
