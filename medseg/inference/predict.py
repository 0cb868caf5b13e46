"""A model in memory and the way from an image to its mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.bundle import Bundle, BundleInfo, load_networks, open_bundle
from medseg.device import best_device, resident
from medseg.errors import BundleError
from medseg.inference.air import air_limits, skipping_air
from medseg.inference.answer import Answer, averaged, painted
from medseg.inference.chosen import judged, usable
from medseg.inference.joint_memory import forecast_joint, image_key
from medseg.inference.labels import Key
from medseg.inference.memory import Case, Tile, forecast
from medseg.inference.postprocess import postprocess
from medseg.inference.presets import EXACT, QUALITY, Preset, in_parts
from medseg.inference.sliding_window import Predictor, joined, mirrorings, noting_halvings, planes, window_logits
from medseg.inference.windows import Layout, layout
from medseg.planning.plan import Plan
from medseg.preparation.prepare import prepare
from medseg.preparation.steps import Step, restore
from medseg.quality.apply import Quality, estimate
from medseg.quality.signs import Notes, make_notes
from medseg.targets import background_logits, exclusive
from medseg.volume import Volume

Room = Callable[[tuple[int, ...]], NDArray[Any]]


def in_memory(shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an array of zeros in single precision."""
    return np.zeros(shape, np.float32)


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
    windows : how many windows of the network there was memory for at once; 0: for as many as were asked for.
    """

    mask: Volume
    soft: Volume | None = None
    quality: Quality | None = None
    windows: int = 0


def predict_case(
    model: Model,
    image: Volume,
    *,
    mirror: bool | None = None,
    soft: bool = False,
    room: Room = in_memory,
    max_memory: int | None = None,
) -> Prediction:
    """Segment one image; parameters and errors as for `predict_volume`, with `soft` and `room` as for `predict_soft`.

    The estimate of quality asks the first network once more (medseg.quality.closer), where it found a label.
    """
    notes = _wanted_notes(model, mirror)
    chances: Volume | None = None
    with noting_halvings() as halvings:
        if soft:
            mask, chances = predict_soft(model, image, mirror=mirror, notes=notes, max_memory=max_memory, room=room)
        else:
            mask = predict_volume(model, image, mirror=mirror, notes=notes, max_memory=max_memory)
    fitted = model.bundle.info.quality
    quality = None if notes is None or fitted is None else estimate(fitted, notes.signs(mask))
    return Prediction(mask, chances, quality, min(halvings, default=0))


def _wanted_notes(model: Model, mirror: bool | None) -> Notes | None:
    """Return empty notes where the bundle can estimate the quality of what is to be predicted."""
    info = model.bundle.info
    if not judged(info, mirror):
        return None
    return notes_for(model, mirror=info.plan.test_mirroring if mirror is None else mirror)


def notes_for(model: Model, *, mirror: bool) -> Notes:
    """Return empty notes for one image."""
    info = model.bundle.info
    passes = len(mirrorings(info.plan, mirror=mirror))
    return make_notes(info.spec, info.plan, networks=len(model.networks), passes=passes)


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
        very same answer.

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
        mean = image.with_array(_joint(model, image, mirror, max_memory=max_memory))
        return postprocess(mean, info.postprocess, info.spec)
    tiles = (1, 1)
    if max_memory is not None:
        held = resident() - image.array.nbytes
        case = case_of(model, image, quality=notes is not None)
        tiles = forecast(case, held=max(0, held), limit=max_memory).tiles
    found = painted(answer_of(model, image, mirror=mirror, notes=notes, max_memory=max_memory), tiles)
    return postprocess(image.with_array(found), info.postprocess, info.spec)


@torch.inference_mode()
def predict_soft(
    model: Model,
    image: Volume,
    *,
    mirror: bool | None = None,
    notes: Notes | None = None,
    max_memory: int | None = None,
    room: Room = in_memory,
) -> tuple[Volume, Volume]:
    """Segment one image like `predict_volume`, and keep what the network thinks of each voxel.

    Parameters
    ----------
    room : makes the array of probabilities (segments, I, J, K), float32 or uint8 (in steps of 1/255), filled with
        zeros; in memory and float32 unless told, which is the one thing here that grows with classes × volume.

    Returns
    -------
    tuple of two Volumes
        The mask, and (segments, I, J, K) from 0 to 1 on its grid: a channel a label of the spec (softmax, the
        background left out), or a region where it has regions (sigmoid). They are the network's, with the temperature
        of the bundle: post-processing does not change them.
    """
    info = model.bundle.info
    soft = room((len(Key.of(info.spec).values) - exclusive(info.spec), *image.shape))
    mask = image.with_array(_joint(model, image, mirror, notes, soft=soft, max_memory=max_memory))
    return postprocess(mask, info.postprocess, info.spec), image.with_array(soft)


def _joint(
    model: Model,
    image: Volume,
    mirror: bool | None,
    notes: Notes | None = None,
    *,
    soft: NDArray[Any] | None = None,
    max_memory: int | None = None,
) -> NDArray[Any]:
    """Return the label values (1, I, J, K) of the mean of an ensemble, or of a model; write probabilities to `soft`."""
    info = model.bundle.info
    models = model.members or (model,)
    tiles = (1, 1)
    if max_memory is not None:
        cases = [case_of(each, image, quality=notes is not None) for each in models]
        item = 0 if soft is None else soft.itemsize
        in_file, held = isinstance(soft, np.memmap), max(0, resident() - image.array.nbytes)
        tiles = forecast_joint(cases, soft=item, in_file=in_file, held=held, limit=max_memory).tiles
    shared: dict[str, tuple[Tensor, tuple[Step, ...]]] = {}
    answers = []
    for each in models:
        key = image_key(each.bundle.info.plan) if each.previous is None else str(id(each))
        shared[key] = shared.get(key) or _prepared(each, image, mirror, notes, max_memory)
        answers.append(_answer(each, image, shared[key], mirror, notes))
    return averaged(answers, soft=soft, temperature=info.temperature, tiles=tiles)


def answer_of(
    model: Model,
    image: Volume,
    *,
    mirror: bool | None = None,
    notes: Notes | None = None,
    max_memory: int | None = None,
) -> Answer:
    """Return what a model (not an ensemble) says of an image, once it is read; parameters as for `predict_volume`."""
    return _answer(model, image, _prepared(model, image, mirror, notes, max_memory), mirror, notes)


def _answer(
    model: Model,
    image: Volume,
    grid: tuple[Tensor, tuple[Step, ...]],
    mirror: bool | None,
    notes: Notes | None,
) -> Answer:
    (prepared, steps), info = grid, model.bundle.info
    visited: set[tuple[int, ...]] = set()

    def planes_of(where: Layout, tile: Tile | None, backwards: bool) -> Iterator[Tensor]:
        return _planes(model, prepared, where, mirror, notes, tile=tile, visited=visited, backwards=backwards)

    where = layout(prepared.shape[1:], info.plan, model.preset)
    return Answer(info, image.shape, steps, where, model.device, planes_of, _soft_planes(info.plan))


@torch.inference_mode()
def predict_logits(model: Model, image: Volume, *, mirror: bool | None = None, notes: Notes | None = None) -> Tensor:
    """Return the logits (K, I, J, K') on the grid of the image, all at once; raises as `predict_volume`.

    Not of an ensemble of configurations: what it says is the mean of its members' probabilities.
    """
    info = model.bundle.info
    answer = answer_of(model, image, mirror=mirror, notes=notes)
    where = answer.where
    logits = joined((plane.cpu() for plane in answer.planes(where, None, False)), where)
    found = restore(logits, answer.steps, fill=background_logits(info.spec), axis=where.axis)
    return found.clamp(min=torch.finfo(found.dtype).tiny).log() if answer.chances else found


def _soft_planes(plan: Plan) -> bool:
    """Tell whether probabilities are brought back to the grid of the image, not logits."""
    return plan.monai is not None and plan.monai.softmax


def case_of(model: Model, image: Volume, *, quality: bool = False) -> Case:
    """Return what the memory of a prediction depends on; `quality`: whether that is estimated, too."""
    info = model.bundle.info
    return Case(image.shape, image.affine, image.array.itemsize, info.plan, info.spec, model.preset, quality)


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
        prepared = torch.cat([prepared, found.previous[None].float()])  # one channel: see `_told`
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
    backwards: bool = False,
) -> Iterator[Tensor]:
    """Yield the planes of logits, or of probabilities where the plan says so; raises as `predict_volume`.

    `visited` are windows that were predicted already, for another tile: they are noted once.
    """
    plan = model.bundle.info.plan
    mirror = plan.test_mirroring if mirror is None else mirror
    quiet = _told(model, window_logits(model.networks, plan, mirror=mirror))
    noting = quiet
    if notes is not None:
        noting = _told(model, window_logits(model.networks, plan, mirror=mirror, witness=notes.witness))
    if model.preset.air:
        limits, background = air_limits(prepared), background_logits(model.bundle.info.spec).to(prepared.device)
        if model.previous is not None:
            limits[-1] = 0.0  # what the first stage has found is no air
        quiet, noting = (skipping_air(each, limits, background) for each in (quiet, noting))
    for plane in planes(prepared, noting, where, tile=tile, again=quiet, visited=visited, backwards=backwards):
        if not torch.isfinite(plane).all():
            raise BundleError("the network answers with NaN or infinity for this image", code="NON_FINITE")
        yield plane.softmax(0) if _soft_planes(plan) else plane


def _told(model: Model, predict: Predictor) -> Predictor:
    """Return a predictor of windows whose last channel is the mask of the first stage: a channel a label for networks.

    Window by window, so that one label more is no image more in memory. Nothing changes where there is no first stage.
    """
    if model.previous is None:
        return predict
    values = list(model.bundle.info.spec.foreground.values())

    def told(windows: Tensor) -> Tensor:
        labels = torch.tensor(values, device=windows.device).reshape(-1, *[1] * (windows.ndim - 2))
        return predict(torch.cat([windows[:, :-1], (windows[:, -1:] == labels).float()], 1))

    return told
