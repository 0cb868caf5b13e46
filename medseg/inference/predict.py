"""A model in memory and the way from an image to its mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from medseg.bundle import Bundle, BundleInfo, load_networks, open_bundle
from medseg.channels import with_rules
from medseg.device import best_device
from medseg.errors import BundleError
from medseg.inference.postprocess import postprocess, require_steps
from medseg.inference.sliding_window import slide
from medseg.preparation.path import prediction_path
from medseg.preparation.preprocess import as_meta_tensor, restore
from medseg.targets import background_logits, decode, mean_logits, probabilities
from medseg.volume import Volume


@dataclass(frozen=True)
class Model:
    """A verified bundle with its networks on a device.

    Attributes
    ----------
    previous : the first stage of a cascade.
    members : the models of an ensemble, which has no networks of its own.
    """

    bundle: Bundle
    networks: Sequence[nn.Module]
    device: torch.device
    previous: Model | None = None
    members: tuple[Model, ...] = ()


def load_model(model: Path | Bundle, *, device: torch.device | None = None, info: BundleInfo | None = None) -> Model:
    """Open a run folder, a model of nnU-Net v2 or a bundle (unless it is open); put its networks on the device.

    Parameters
    ----------
    device : the GPU if there is one, unless told.
    info : what the bundle is used as, where that is not what it says itself (see `ruled`).

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
    bundle = usable(bundle)
    previous = None if bundle.previous is None else _loaded(bundle.previous, device)
    members = tuple(_loaded(member, device) for member in bundle.members)
    return Model(bundle, [network.to(device) for network in load_networks(bundle)], device, previous, members)


def usable(model: Path | Bundle) -> Bundle:
    """Open a bundle (unless it is open) and check that all it asks for is known here; raises as `load_model`."""
    bundle = model if isinstance(model, Bundle) else open_bundle(model)
    require_steps(bundle.info.postprocess, bundle.info.spec)
    return bundle


def ruled(bundle: Bundle, file: Path) -> Bundle:
    """Return a bundle that finds its channels in DICOM studies by the rules of a YAML file; it has another digest.

    Raises
    ------
    SpecError : as `medseg.channels.with_rules`.
    """
    info = bundle.info.model_copy(update={"spec": with_rules(bundle.info.spec, file)})
    return replace(bundle, info=info)


def unprocessed(bundle: Bundle) -> Bundle:
    """Return a bundle that leaves its masks as the network made them; it has another digest if that differs."""
    return replace(bundle, info=bundle.info.model_copy(update={"postprocess": ()}))


@torch.inference_mode()
def predict_volume(model: Model, image: Volume, *, mirror: bool | None = None) -> Volume:
    """Segment one image.

    Parameters
    ----------
    image : (channels, I, J, K) with the channels of the model's spec.
    mirror : average over mirrored inputs; unless told, as the plan says.

    Returns
    -------
    Volume : (1, I, J, K) label values of the spec, on the grid of `image` with its very affine, post-processed as the
        bundle says.

    Raises
    ------
    BundleError : the image has another number of channels, or the network answers with NaN.
    """
    return _mask(model, image, predict_logits(model, image, mirror=mirror))


@torch.inference_mode()
def predict_soft(model: Model, image: Volume, *, mirror: bool | None = None) -> tuple[Volume, Volume]:
    """Segment one image like `predict_volume`, and keep what the network thinks of each voxel.

    Returns
    -------
    tuple of two Volumes
        The mask, and (segments, I, J, K) float32 from 0 to 1 on its grid: a channel a label of the spec (softmax,
        the background left out), or a region where it has regions (sigmoid). These take 4 bytes a voxel and segment
        beside the logits of the same size, on the grid of the image. They are the network's, with the temperature of
        the bundle: post-processing does not change them.
    """
    logits = predict_logits(model, image, mirror=mirror)
    info = model.bundle.info
    soft = probabilities(info.spec, logits, temperature=info.temperature)
    return _mask(model, image, logits), image.with_array(soft.numpy())


def _mask(model: Model, image: Volume, logits: Tensor) -> Volume:
    info = model.bundle.info
    return postprocess(image.with_array(decode(info.spec, logits).numpy()), info.postprocess, info.spec)


@torch.inference_mode()
def predict_logits(model: Model, image: Volume, *, mirror: bool | None = None) -> Tensor:
    """Return the logits (K, I, J, K') on the grid of the image; raises as `predict_volume`.

    Those of an ensemble stand for the mean of its members' probabilities (see `medseg.targets.mean_logits`).
    """
    if model.members:
        return ensemble_logits(model.members, image, mirror=mirror)
    plan, spec = model.bundle.info.plan, model.bundle.info.spec
    if image.array.shape[0] != len(spec.channels):
        raise BundleError(
            f"the image has {image.array.shape[0]} channel(s), the model needs {len(spec.channels)}: "
            f"{', '.join(spec.channels)}",
            code="CHANNEL_COUNT",
        )
    mirror = plan.test_mirroring if mirror is None else mirror
    data = {"image": as_meta_tensor(image).float()}
    if model.previous is not None:
        data["previous"] = as_meta_tensor(predict_volume(model.previous, image, mirror=mirror))
    data = prediction_path(plan)(data)
    prepared = data["image"].as_tensor()
    if model.previous is not None:
        labels = torch.tensor(list(spec.foreground.values())).reshape(-1, 1, 1, 1)
        prepared = torch.cat([prepared, (data["previous"].as_tensor() == labels).float()])
    prepared = prepared.to(model.device)
    logits = slide(prepared, model.networks, plan, mirror=mirror).cpu()
    if not torch.isfinite(logits).all():
        raise BundleError("the network answers with NaN or infinity for this image", code="NON_FINITE")
    return restore(logits, data["steps"], fill=background_logits(spec))


def ensemble_logits(members: Sequence[Model], image: Volume, *, mirror: bool | None = None) -> Tensor:
    """Return logits (K, I, J, K') whose probabilities are the mean of the members', each with its temperature.

    One member after the other, so that memory does not grow with their number; `mirror` unless told as each one's plan
    says.
    """
    spec = members[0].bundle.info.spec
    each = (predict_logits(m, image, mirror=mirror) / m.bundle.info.temperature for m in members)
    return mean_logits(spec, each)
