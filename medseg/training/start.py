"""Fine-tuning: a training begins with the weights of a model instead of random ones.

What the weights fix stays (network, number of dimensions, grid, normalisation: see training.plan_from). Labels are
found by their names: the rows of the output layers are moved to where the new labels stand, those of new labels begin
with random weights. The model is copied into the run folder (0_start), so that a run can be resumed, repeated and
joined by other processes whatever becomes of the original.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from medseg.bundle import MODEL_FILE, Bundle, open_bundle, read_weights, save_bundle
from medseg.errors import BundleError, ConfigError, PlanError, TrainingError
from medseg.files import write_text
from medseg.networks import build_network
from medseg.networks.transplant import axes_of, transplant
from medseg.planning.plan import Plan, Start
from medseg.readers.series_rules import modality_name
from medseg.spec import Spec
from medseg.targets import channel_names, exclusive
from medseg.training.request import Request, read_json

FOLDER = "0_start"
DIGITS = 16
"""Of the digests by which a model remembers images (BundleInfo.seen)."""


@dataclass(frozen=True)
class StartWeights:
    """One weights file of the model that a network begins with.

    Attributes
    ----------
    bundle : the model.
    file : the name of the file in it.
    """

    bundle: Bundle
    file: str

    @property
    def seen(self) -> frozenset[str]:
        """First digits of the digests of the images that the network has learnt from; empty where not known."""
        return frozenset(self.bundle.info.seen.get(self.file, ()))


def open_start(request: Request, spec: Spec) -> Bundle | None:
    """Open the model whose weights a request begins with; None where it begins with random ones.

    Raises
    ------
    BundleError : there is no such model, or it is damaged.
    TrainingError : START_DIFFERS: its weights do not fit these data.
    """
    if request.replay is not None:
        return kept_start(request.replay)
    if request.from_model is None:
        return None
    bundle = open_bundle(request.from_model)
    if problems := misfits(bundle, spec):
        raise TrainingError(
            f"--from: the model {bundle.info.name} cannot learn on from these data: {'; '.join(problems)}",
            code="START_DIFFERS",
        )
    return bundle


def single(bundle: Bundle) -> Bundle:
    """Return the model itself; of an ensemble of configurations the member with the highest mean validation Dice.

    The mean is over labels, and among equals the first member counts. Its members were compared on the same cases.
    """

    def dice(member: Bundle) -> float:
        found = member.info.training.get("dice") or {}
        return sum(found.values()) / len(found) if found else -1.0

    return max(bundle.members, key=dice, default=bundle)


def misfits(bundle: Bundle, spec: Spec) -> list[str]:
    """Return why the weights of a model are of no use for a dataset, in words; nothing where they fit."""
    old = bundle.info.spec
    problems = []
    if bundle.previous is not None:
        problems.append("it is the second stage of a cascade, which needs the masks of its first as further channels")
    if not bundle.info.weights:
        problems.append("it is an ensemble of several configurations; give the folder of one of its members")
    if bundle.info.plan.monai is not None:
        problems.append("it was a MONAI bundle, whose preparation is known for prediction only")
    if old.unit != spec.unit:
        problems.append(f"it learnt from images in {old.unit}, these are in {spec.unit}")
    if exclusive(old) != exclusive(spec):
        kinds = ["overlapping regions", "exclusive labels"]
        problems.append(f"it learnt {kinds[exclusive(old)]}, these data have {kinds[exclusive(spec)]}")
    return [*problems, *_channel_misfits(old, spec)]


def _channel_misfits(old: Spec, spec: Spec) -> list[str]:
    try:
        places = channel_places(old, spec)
    except TrainingError as error:
        return [str(error)]
    problems = []
    names = list(old.channels)
    for (name, channel), place in zip(spec.channels.items(), places, strict=True):
        before, now = modality_name(old.channels[names[place]].modality), modality_name(channel.modality)
        if before and now and before != now:
            problems.append(f"channel {name}: it learnt from {before}, here it is {now}")
    return problems


def channel_places(old: Spec, spec: Spec) -> tuple[int, ...]:
    """Return for each channel of a dataset its number in a model: by name; a single one whatever it is called.

    Raises
    ------
    TrainingError : they do not have the same channels.
    """
    names = list(old.channels)
    if len(names) == 1 == len(spec.channels):
        return (0,)
    if sorted(names) != sorted(spec.channels):
        raise TrainingError(
            f"its channels are {', '.join(names)}, the dataset has {', '.join(spec.channels)}; name the channels of "
            "the dataset as the model does, each of them once",
            code="START_DIFFERS",
        )
    return tuple(names.index(name) for name in spec.channels)


def class_places(old: Spec, spec: Spec) -> tuple[int | None, ...]:
    """Return for each output of a network for a dataset its number in a model, by name; None: it is new."""
    names = channel_names(old)
    return tuple(names.index(name) if name in names else None for name in channel_names(spec))


def as_started(plan: Plan, spec: Spec, bundle: Bundle | None) -> Plan:
    """Return a plan that names the model it begins with and what it keeps of it.

    Raises
    ------
    PlanError : the plan asks for a model that is not given, for another one, or for another network than the model's.
    """
    given = plan.start.model if plan.start is not None else None
    if bundle is None:
        if given is not None:
            raise PlanError(f"the plan begins with the weights of the model {given[:12]}; give it with --from")
        return plan
    info = bundle.info
    if given not in (None, info.digest):
        raise PlanError(
            f"the plan begins with the weights of the model {str(given)[:12]}, --from is {info.digest[:12]}; make a "
            "plan for it by medseg plan --from"
        )
    for name, asked, fixed in (
        ("network", plan.network, info.plan.network),
        ("dimensions", plan.dimensions, info.plan.dimensions),
        ("nnunet", plan.nnunet, info.plan.nnunet),
    ):
        if asked != fixed:
            raise PlanError(
                f"the plan's {name} is not that of the model given by --from ({fixed}), whose weights allow no other; "
                "leave it out, or make the plan by medseg plan --from"
            )
    old, new = ([n for n in channel_names(s) if n != "background"] for s in (info.spec, spec))
    start = Start(
        model=info.digest,
        kept=tuple(name for name in new if name in old),
        new=tuple(name for name in new if name not in old),
        left_out=tuple(name for name in old if name not in new),
    )
    return plan.model_copy(update={"start": start})


def keep_start(out: Path, bundle: Bundle | None) -> None:
    """Copy a model into the run folder, unless it lies there; a model of an earlier request is removed."""
    folder = out / FOLDER
    kept = kept_start(out) if (folder / MODEL_FILE).exists() else None
    if kept is not None and bundle is not None and kept.info.digest == bundle.info.digest:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if bundle is None:
        return
    weights = {name: dict(read_weights(bundle, name)) for name in bundle.info.weights}
    if bundle.states is not None:
        save_bundle(folder, bundle.info, weights)
        return
    folder.mkdir(parents=True)
    for name in bundle.info.weights:
        shutil.copyfile(bundle.folder / name, folder / name)
    # Last: without it the folder holds no model.
    write_text(folder / MODEL_FILE, (bundle.folder / MODEL_FILE).read_text(encoding="utf-8"))


def kept_start(run: Path) -> Bundle | None:
    """Return the model that a run began with; None where it began with random weights."""
    return open_bundle(run / FOLDER) if (run / FOLDER / MODEL_FILE).exists() else None


def choose_weights(bundle: Bundle, fold: int, validation: Sequence[str]) -> StartWeights:
    """Return the network of a model that a fold begins with: the one that knows fewest of its validation cases.

    Among equals (or where the model does not tell) it is the one with the number of the fold, counted round.

    Parameters
    ----------
    validation : digests of the images of the validation cases, as in BundleInfo.seen.
    """
    files = sorted(bundle.info.weights, key=lambda name: (len(name), name))
    own = [StartWeights(bundle, name) for name in files]
    order = sorted(range(len(own)), key=lambda n: (len(own[n].seen & set(validation)), (n - fold) % len(own)))
    return own[order[0]]


def begin(network: nn.Module, spec: Spec, plan: Plan, start: StartWeights) -> None:
    """Put the weights of a model into a freshly initialised network.

    Raises
    ------
    BundleError : they do not fit the network of their own plan.
    TrainingError : START_DIFFERS: the channels are in another order and this kind of network cannot move them.
    """
    old = start.bundle.info.spec
    channels, classes = channel_places(old, spec), class_places(old, spec)
    same = channels == tuple(range(len(channels)))
    try:
        weights = read_weights(start.bundle, start.file)
        if not same or channel_names(old) != channel_names(spec):
            axes = axes_of(partial(_build, plan), len(channels), len(classes), reordered=not same)
            weights = transplant(weights, network.state_dict(), axes, classes=classes, channels=channels)
        network.load_state_dict(weights)
    except ConfigError as error:
        raise TrainingError(
            f"--from: channels cannot be moved in a network {plan.network.name} ({error}); name them in the order of "
            f"the model: {', '.join(old.channels)}",
            code="START_DIFFERS",
        ) from error
    except (RuntimeError, ValueError, safetensors.SafetensorError) as error:
        what = str(error).splitlines()[0]
        raise BundleError(f"{start.file}: does not fit the network of {MODEL_FILE} ({what})") from error


def _build(plan: Plan, channels: int, classes: int) -> nn.Module:
    return build_network(
        plan.network.name,
        spatial_dims=plan.dimensions,
        in_channels=channels,
        out_channels=classes,
        options=plan.network.options,
    )


def image_digests(run: Path) -> dict[str, str]:
    """Return training case -> first digits of the digest of its images, as far as the run folder tells."""
    rows: Sequence[Mapping[str, Any]] = read_json(run / "1_dataset.json").get("train", ())
    return {row["id"]: row["image"][:DIGITS] for row in rows if "image" in row}
