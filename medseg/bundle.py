"""The bundle: everything needed to predict, in one folder that is verified before it is used.

model.json               plan, spec, versions, and the SHA-256 of each weights file
fold_<k>.safetensors     weights of one network (safetensors: no code can hide in it)
previous/                of a cascade: the bundle of its first stage
member_<n>/              of an ensemble of configurations: the bundle of one of them

A folder of a model that nnU-Net v2 trained, or a MONAI bundle, is opened like a bundle; `import_bundle` makes it one.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from medseg.config import Config
from medseg.errors import BundleError, ConfigError
from medseg.files import digest, file_digest, write_atomically, write_text
from medseg.monai_bundles import is_monai, read_monai
from medseg.nnunet import Foreign, is_nnunet, read_nnunet
from medseg.planning.plan import Plan
from medseg.quality.model import QualityModel
from medseg.spec import Spec, spec_digest

if TYPE_CHECKING:
    from torch import Tensor, nn

BUNDLE_FORMAT = 1
MODEL_FILE = "model.json"
PREVIOUS = "previous"
UNKNOWN = "unknown"
"""Digest of the data of a model that somebody else has trained."""


class PostStep(Config):
    """One step of post-processing, a row of medseg.inference.postprocess.POSTPROCESS.

    Attributes
    ----------
    kind : name of the row.
    labels : what it is done to; several labels are taken together as one object.
    size : in mm³ or mm (pixels for pictures), as the row says.
    over : labels whose voxels these may take where they grow (those of lower priority); background always.
    """

    kind: str
    labels: tuple[str, ...] = Field(min_length=1)
    size: float = Field(default=0.0, ge=0)
    over: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return "min_volume 12 of left, right", as people read it."""
        size = f" {self.size:g}" if self.size else ""
        over = f", over {', '.join(self.over)}" if self.over else ""
        return f"{self.kind}{size} of {', '.join(self.labels)}{over}"


class Calibration(Config):
    """By what logits are divided before they become probabilities, and what that changed (see training.temperature).

    Attributes
    ----------
    ece_before, ece_after : expected calibration error, with a temperature of 1 and with this one.
    nll_before, nll_after : mean negative log-likelihood, in nats.
    voxels, cases : that it was fitted on, the same that the errors are of.
    """

    temperature: float = Field(gt=0)
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    voxels: int
    cases: int


class Member(Config):
    """One model of an ensemble, in a folder member_<n> of its bundle.

    Attributes
    ----------
    name : as people tell it from the others.
    digest : of its bundle, which predicts also on its own.
    networks : how many it has, one a fold.
    """

    name: str
    digest: str
    networks: int = Field(gt=0)


class BundleInfo(Config):
    """Content of model.json.

    Attributes
    ----------
    plan : of an ensemble that of its first member.
    weights : file name -> SHA-256, one file a fold; none of an ensemble, whose members have them.
    dataset_digest : SHA-256 of the manifest of the cases it learnt from.
    training : what the training recorded (steps, seconds, validation Dice); for people.
    tracking_run : id of the MLflow run that made it, if it was tracked.
    postprocess : what is done to its masks, in this order; nothing in bundles of before.
    calibration : of its probabilities; None where they are the network's own.
    previous : digest of the first stage of a cascade, whose mask the networks are given beside the image.
    members : of an ensemble of configurations: their probabilities, each with its own temperature, are averaged.
    quality : what tells how good its masks are; None where there were too few cases, and in bundles of before.
    preset : with which row of medseg.inference.presets it is used; only in memory it is anything but "exact".
    seen : file of weights -> the first digits of the SHA-256 of the images that it has learnt from, also before it was
        fine-tuned; empty where that is not known.
    """

    format: int
    name: str
    plan: Plan
    spec: Spec
    weights: dict[str, str]
    dataset_digest: str
    training: dict[str, Any]
    versions: dict[str, str]
    tracking_run: str | None = None
    postprocess: tuple[PostStep, ...] = ()
    calibration: Calibration | None = None
    previous: str | None = None
    members: tuple[Member, ...] = ()
    quality: QualityModel | None = None
    seen: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    preset: str = "exact"

    @property
    def temperature(self) -> float:
        """By what logits are divided before they become probabilities; masks do not depend on it."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    @property
    def digest(self) -> str:
        """SHA-256 that names the model: weights, plan, spec; of what else may be here what it has."""
        parts: list[Any] = [self.weights, self.plan.digest, spec_digest(self.spec)]
        if self.postprocess:
            parts.append([step.model_dump(mode="json") for step in self.postprocess])
        if self.temperature != 1:
            parts.append({"temperature": self.temperature})
        if self.previous is not None:
            parts.append({"previous": self.previous})
        if self.members:
            parts.append({"members": [member.digest for member in self.members]})
        if self.quality is not None:
            parts.append({"quality": self.quality.model_dump(mode="json")})
        if self.preset != "exact":
            parts.append({"preset": self.preset})
        return digest(parts)

    def _mirrored(self, mirror: bool | None) -> bool | str:
        if mirror is not None:
            return mirror
        return "as planned for each member" if self.members else self.plan.test_mirroring

    def provenance(self, mirror: bool | None) -> dict[str, Any]:
        """Return what is said about the origin of this model's predictions; no path, no date.

        `mirror` is whether they were averaged over mirrored inputs; None: as planned.
        """
        return {
            "model_hash": self.digest,
            "plan_hash": self.plan.digest,
            "spec_hash": spec_digest(self.spec),
            "labels": self.spec.foreground,
            "dataset_hash": self.dataset_digest,
            "software": f"medseg {self.versions['medseg']}",
            "tta": self._mirrored(mirror),
            "quality": self.preset,
            "folds": len(self.weights) or sum(member.networks for member in self.members),
            "postprocess": "; ".join(map(str, self.postprocess)),
            "temperature": self.temperature,
            "tracking_run": self.tracking_run,
        }


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose hashes have been verified.

    Attributes
    ----------
    previous : the first stage of a cascade.
    members : the models of an ensemble.
    states : weights by name of file, where the folder holds them in another program's form.
    """

    folder: Path
    info: BundleInfo
    previous: Bundle | None = None
    states: Mapping[str, dict[str, Tensor]] | None = field(default=None, repr=False, compare=False)
    members: tuple[Bundle, ...] = ()


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    import torch  # its metadata say 2.11.0 where it says 2.11.0+cu130, which names the build

    found = {name: version(name) for name in ("medseg", "torch", "monai", "numpy", "nibabel", "pydicom")}
    return {"python": platform.python_version(), **found, "torch": str(torch.__version__)}


def save_bundle(folder: Path, info: BundleInfo, weights: dict[str, dict[str, Tensor]]) -> Bundle:
    """Write a bundle; `weights` maps file names to state dicts, and replaces ``info.weights``."""
    hashes = {}
    for name, state in weights.items():
        write_atomically(folder / name, _weights_writer(_contiguous(state)))
        hashes[name] = file_digest(folder / name)
    info = info.model_copy(update={"weights": hashes})
    # Not by write_json, which sorts keys: the order of labels, regions and channels is that of the network's.
    write_text(folder / MODEL_FILE, json.dumps(info.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")
    return Bundle(folder, info)


def import_bundle(source: Path, out: Path, *, folds: Sequence[str] = (), precision: str = "fp32") -> Bundle:
    """Make a bundle in `out` of a model of nnU-Net v2 or a MONAI bundle; in fp32 its digest is that of the source.

    Raises
    ------
    ConfigError : `out` holds a bundle already, or the precision is not "fp32" or "bf16".
    BundleError : `source` is no such model, or cannot be read.
    """
    if (out / MODEL_FILE).exists():
        raise ConfigError(f"{out} holds a bundle already; choose another --out")
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision {precision}: allowed are fp32 and bf16")
    if not is_foreign(source):
        raise BundleError(
            f"{source}: no model of nnU-Net v2 (plans.json, dataset.json and a folder fold_* are expected) and no "
            "MONAI bundle (configs/inference.json)"
        )
    return _save_opened(out, open_bundle(source, folds=folds), precision)


def _save_opened(folder: Path, bundle: Bundle, precision: str) -> Bundle:
    plan = bundle.info.plan.model_copy(update={"precision": precision})
    info = bundle.info.model_copy(update={"plan": plan})
    previous = None if bundle.previous is None else _save_opened(folder / PREVIOUS, bundle.previous, precision)
    if previous is not None:
        info = info.model_copy(update={"previous": previous.info.digest})
    return replace(save_bundle(folder, info, dict(bundle.states or {})), previous=previous)


def _weights_writer(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    import safetensors.torch

    # Not save_file: where the disk is full it raises no OSError.
    content = safetensors.torch.save(tensors)

    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def find_bundle(path: Path) -> Path:
    """Return the bundle folder of a run folder or of itself; raise BundleError naming what was expected."""
    for folder in (path, path / "6_model"):
        if (folder / MODEL_FILE).is_file():
            return folder
    what = "does not exist" if not path.exists() else "holds no model"
    unfinished = " (its training has not finished: run the same medseg train command again)"
    hint = unfinished if (path / "3_plan.yaml").exists() else ""
    raise BundleError(
        f"{path}: {what}{hint}; give a run folder of medseg train or its 6_model folder, a folder "
        "TRAINER__PLANS__CONFIGURATION of nnU-Net v2, or a MONAI bundle"
    )


def is_foreign(path: Path) -> bool:
    """Tell whether a folder looks like a model of nnU-Net v2 or a MONAI bundle."""
    return is_nnunet(path) or is_monai(path)


def open_bundle(path: Path, *, folds: Sequence[str] = ()) -> Bundle:
    """Read a bundle, every hash compared before any weight is parsed; or a model of nnU-Net v2; or a MONAI bundle.

    Parameters
    ----------
    folds : of a model of nnU-Net's, see `medseg.nnunet.read_nnunet`.

    Raises
    ------
    BundleError : no bundle, unknown format, or a file that is missing or damaged.
    """
    if is_nnunet(path):
        return _of_foreign(path, read_nnunet(path, folds=folds))
    if is_monai(path) and not folds:
        return _of_foreign(path, read_monai(path))
    if folds:
        raise BundleError(f"{path}: folds are chosen from a model folder of nnU-Net v2, and this is none")
    folder = find_bundle(path)
    try:
        info = BundleInfo.model_validate(json.loads((folder / MODEL_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise BundleError(f"{folder / MODEL_FILE}: damaged or of another version of medseg ({error})") from error
    if info.format != BUNDLE_FORMAT:
        raise BundleError(f"{folder}: bundle format {info.format}; this medseg reads format {BUNDLE_FORMAT}")
    if not info.weights and not info.members:
        raise BundleError(f"{folder}: {MODEL_FILE} names no weights; restore the bundle")
    for name, expected in info.weights.items():
        file = folder / name
        if Path(name).name != name:
            raise BundleError(f"{folder}: weights {name!r} lie outside of the bundle; it is damaged or a trap")
        if not file.is_file() or file_digest(file) != expected:
            state = "damaged" if file.is_file() else "missing"
            raise BundleError(f"{file}: {state}: its SHA-256 is not the one in {MODEL_FILE}; restore the bundle")
    previous = None if info.previous is None else _open_part(folder / PREVIOUS, info.previous, "first stage")
    members = [_open_part(folder / member_folder(n), member.digest, "member") for n, member in enumerate(info.members)]
    return Bundle(folder, info, previous, members=tuple(members))


def member_folder(number: int) -> str:
    """Return the name of the folder in which the bundle of an ensemble's member lies."""
    return f"member_{number}"


def _open_part(folder: Path, expected: str, what: str) -> Bundle:
    part = open_bundle(folder)
    if part.info.digest != expected:
        raise BundleError(f"{folder}: not the {what} that {MODEL_FILE} names; restore the bundle")
    return part


def _of_foreign(folder: Path, model: Foreign) -> Bundle:
    import safetensors.torch

    previous = None if model.previous is None else _of_foreign(folder, model.previous)
    states = {f"{name}.safetensors": _contiguous(state) for name, state in model.weights.items()}
    info = BundleInfo(
        format=BUNDLE_FORMAT,
        name=model.spec.name,
        plan=model.plan,
        spec=model.spec,
        weights={name: hashlib.sha256(safetensors.torch.save(state)).hexdigest() for name, state in states.items()},
        dataset_digest=UNKNOWN,
        training=model.training,
        versions=versions(),
        previous=None if previous is None else previous.info.digest,
    )
    return Bundle(folder, info, previous, states)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def load_networks(bundle: Bundle) -> list[nn.Module]:
    """Build the network of each fold with its weights, in evaluation mode on the CPU; none for an ensemble's own.

    Raises
    ------
    BundleError : the weights are not those of the network that the plan describes.
    """
    import safetensors

    networks = []
    for name in sorted(bundle.info.weights):
        network = make_network(bundle.info.spec, bundle.info.plan)
        try:
            network.load_state_dict(read_weights(bundle, name))
        except (RuntimeError, safetensors.SafetensorError) as error:
            what = str(error).splitlines()[0]
            raise BundleError(f"{bundle.folder / name}: does not fit the network of {MODEL_FILE} ({what})") from error
        networks.append(network.eval())
    return networks


def read_weights(bundle: Bundle, name: str) -> Mapping[str, Tensor]:
    """Return one of the weights files of an opened bundle; raise safetensors.SafetensorError if it is none."""
    import safetensors.torch

    if bundle.states is not None:
        return bundle.states[name]
    found: dict[str, Tensor] = safetensors.torch.load_file(bundle.folder / name)
    return found


def make_network(spec: Spec, plan: Plan) -> nn.Module:
    """Return the network of a plan, freshly initialised."""
    from medseg.networks import build_network
    from medseg.targets import channel_names

    former = spec.foreground if plan.nnunet is not None and plan.nnunet.previous is not None else ()
    return build_network(
        plan.network.name,
        spatial_dims=plan.dimensions,
        in_channels=len(spec.channels) + len(former),
        out_channels=len(channel_names(spec)),
        options=plan.network.options,
    )
