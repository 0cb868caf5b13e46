"""The plan: every decision that training and prediction follow, in a YAML file that a person can read and edit.

On disk each value has its reason beside it as a comment; reasons are written for people and not read back.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medseg import config
from medseg.config import Config
from medseg.errors import ConfigError, PlanError
from medseg.files import digest, write_text
from medseg.planning.fingerprint import Fingerprint

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]
WIDTH = 110
"""Of the lines of a plan on disk."""
SCALES = (0.1, 10.0)
"""Beyond these a patch is a voxel, or reads a region that no memory holds; 0 or less is no scale at all."""
MOST_ELASTIC = 20.0
"""Voxels: ten times the usual. A patch would be folded over itself long before (preparation.space cuts it there)."""
MOST_SEED = 2**63 - 1
"""The largest number that torch takes for a seed."""


class Normalise(Config):
    """How one channel's intensities are brought to mean 0 and standard deviation 1, or into another range.

    scheme "zscore": by the image's own mean and deviation; "zscore_content": by those of its content (what is not 0 in
    every channel, holes filled), and nothing else is changed; "zscore_nonzero": the same with what is not 0 in the
    channel itself; "ct": clipped to [low, high] HU, then by `mean` and
    `deviation` of the dataset's foreground; "range": from 0 at the image's smallest value to 1 at its largest; "bytes":
    divided by 255; "none": left as they are.
    """

    scheme: Literal["zscore", "zscore_content", "zscore_nonzero", "ct", "range", "bytes", "none"]
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0


class NetworkPlan(Config):
    """Name in the NETWORKS table and its options (see the network's own docstring)."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Augmentation(Config):
    """Ranges of the random changes; a probability of 0 switches one off."""

    rotation: float = Field(default=30.0, ge=0, le=180)  # degrees about each axis
    scale: tuple[float, float] = (0.7, 1.4)
    spatial_probability: float = Field(default=0.5, ge=0, le=1)
    elastic: float = Field(default=2.0, ge=0, le=MOST_ELASTIC)  # standard deviation of control points, voxels
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    noise: float = Field(default=0.15, ge=0, le=1)
    blur: float = Field(default=0.15, ge=0, le=1)
    brightness: float = Field(default=0.2, ge=0, le=1)
    contrast: float = Field(default=0.2, ge=0, le=1)
    gamma: float = Field(default=0.3, ge=0, le=1)
    low_resolution: float = Field(default=0.15, ge=0, le=1)


class Measured(Config):
    """What was measured on the machine that made the plan.

    Attributes
    ----------
    device : "cpu" or the name of the GPU.
    threads : processor threads used.
    step_seconds : "<features> <precision>" -> median seconds of one training step at the planned patch and batch.
    """

    device: str
    threads: int
    step_seconds: dict[str, float]


class Interpolation(Config):
    """How nnU-Net resamples: splines of one order, along a coarse axis of another.

    Attributes
    ----------
    order : of the splines.
    order_z : along the coarse axis, where it is resampled apart from the other two.
    separate : whether it is; None: where one spacing is over three times another.
    """

    order: int = Field(ge=0, le=5)
    order_z: int = Field(ge=0, le=5)
    separate: bool | None = None


class NnUNet(Config):
    """What is done as nnU-Net v2 does it and not as medseg does, in the plan of a model of nnU-Net's.

    Images are normalised before they are resampled, windows lie and weigh as there. Of a 2-D plan, the third number
    of `spacing` is for people: slices keep their distance.

    Attributes
    ----------
    image, logits : how an image is resampled, and logits on the way back.
    previous : of the second stage of a cascade: how the mask of the first stage is resampled, whose labels are further
        channels of the network.
    """

    image: Interpolation
    logits: Interpolation
    previous: Interpolation | None = None


class Monai(Config):
    """What is done as a bundle of MONAI's says and not as medseg does, in the plan of such a model.

    Nothing is cropped, and windows have the very size of the patch.

    Attributes
    ----------
    resample : whether voxels are brought to the very `spacing`, the centre of the first one staying where it is
        (Spacingd without scale_extent); else they are taken as they are.
    window : how much the voxels of a window count: all alike, or by a Gaussian.
    softmax : whether probabilities are brought back to the grid of the image, not logits.
    """

    resample: bool
    window: Literal["constant", "gaussian"]
    softmax: bool


class Start(Config):
    """With what weights a training begins, where it does not begin with random ones (fine-tuning).

    Attributes
    ----------
    model : digest of the model whose weights these are.
    kept : labels (or regions) whose output is the model's, found by their names.
    new : those whose output begins with random weights.
    left_out : those of the model that are not learnt any more.
    """

    model: str
    kept: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


class Plan(Config):
    """Everything from voxels to weights; see docs/reference/plan.md.

    Axes are those of the prepared image: K is the slice axis of a 2-D plan. An `orientation` of I, J and K names the
    axes as the image is stored, wherever they point (nnU-Net's way).
    """

    dataset: str
    dimensions: Literal[2, 3]
    orientation: str = Field(pattern="^([RLAPSI]{3}|[IJK]{3})$")
    spacing: Spacing
    normalisation: dict[str, Normalise]
    patch_size: Triple
    batch_size: int = Field(ge=1)
    network: NetworkPlan
    loss: str
    foreground_share: float = Field(ge=0, le=1)
    augmentation: Augmentation
    optimizer: Literal["adamw"] = "adamw"
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    warmup: float = Field(ge=0, lt=1)
    averaging: float = Field(ge=0, lt=1)
    precision: Literal["bf16", "fp32"]
    steps: int = Field(ge=1)
    validations: int = Field(ge=1)
    overlap: float = Field(ge=0, lt=1)
    test_mirroring: bool
    seed: int = Field(ge=0, le=MOST_SEED)
    budget_seconds: float | None = Field(default=None, gt=0)
    measured: Measured | None = None
    fingerprint: Fingerprint
    nnunet: NnUNet | None = None
    monai: Monai | None = None
    start: Start | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if min(self.patch_size) < 1 or (self.dimensions == 2 and self.patch_size[2] != 1):
            problems.append(f"patch_size {self.patch_size}: sizes are positive, and the third is 1 in a 2-D plan")
        if min(self.spacing) <= 0:
            problems.append(f"spacing {self.spacing}: three positive numbers are needed")
        pairs = ("RL", "AP", "SI")
        if not self.stored_axes and {p for p in pairs for c in self.orientation if c in p} != set(pairs):
            problems.append(
                f"orientation {self.orientation}: one letter of each pair R/L, A/P, S/I is needed, or I, J and K"
            )
        if any(axis not in range(self.dimensions) for axis in self.augmentation.mirror_axes):
            problems.append(
                f"augmentation.mirror_axes {self.augmentation.mirror_axes}: axes are below {self.dimensions}"
            )
        for name, row in self.normalisation.items():
            if row.scheme == "ct" and row.low > row.high:  # clipping would leave one grey value
                problems.append(f"normalisation.{name}: low {row.low:g} is above high {row.high:g}")
            if row == Normalise(scheme="ct"):  # so would this
                problems.append(f"normalisation.{name}: the scheme ct needs low, high, mean and deviation, too")
        if not all(SCALES[0] <= scale <= SCALES[1] for scale in self.augmentation.scale):
            problems.append(
                f"augmentation.scale {self.augmentation.scale}: two numbers from {SCALES[0]:g} to {SCALES[1]:g} are "
                "needed"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_serializer(mode="wrap")
    def _without_empty_section(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out sections that say nothing: plans from before there were any keep their digest."""
        late = ("nnunet", "monai", "start")
        return {key: value for key, value in values(self).items() if key not in late or value is not None}

    @property
    def stored_axes(self) -> bool:
        """Whether `orientation` goes by how an image is stored, not by where its axes point."""
        return sorted(self.orientation) == ["I", "J", "K"]

    @property
    def digest(self) -> str:
        """SHA-256 of all values."""
        return digest(self.model_dump(mode="json"))

    @property
    def preparation(self) -> dict[str, Any]:
        """What the deterministic part of the preparation depends on, the order of the channels included."""
        chosen = self.model_dump(mode="json", include={"orientation", "spacing", "normalisation", "nnunet", "monai"})
        return {**chosen, "channels": list(self.normalisation)}


def read_plan(path: Path) -> Plan:
    """Read and check plan.yaml; raise PlanError listing every problem with its line."""
    try:
        return config.load(Plan, path)
    except ConfigError as error:
        raise PlanError(str(error)) from error


def write_plan(path: Path, plan: Plan, reasons: dict[str, str]) -> None:
    """Write a plan with the reason of each value as a comment above it."""
    lines = ["# How medseg prepares, learns and predicts this dataset. Every value may be edited before training."]
    for key, value in plan.model_dump(mode="json").items():
        why = textwrap.wrap(reasons.get(key, ""), WIDTH - 2)
        lines += ["", *(f"# {line}" for line in why)] if why else []
        lines += _yaml_lines(key, value, sections=2)
    write_text(path, "\n".join(lines) + "\n")


def _yaml_lines(key: str, value: Any, *, sections: int) -> list[str]:
    """Return `key: value` as YAML: sections down to this depth with one line a key, what lies deeper in braces."""
    if isinstance(value, dict) and value and sections > 1:
        inner = [line for name, item in value.items() for line in _yaml_lines(name, item, sections=sections - 1)]
        return [f"{yaml.safe_dump(key, width=WIDTH).splitlines()[0]}:", *(f"  {line}" for line in inner)]
    # Style None would put a section with nothing but a plain value in braces.
    style = None if isinstance(value, dict | list) else False
    text: str = yaml.safe_dump({key: value}, sort_keys=False, width=WIDTH - 4, default_flow_style=style)
    return text.splitlines()


def override(plan: Plan, settings: tuple[str, ...]) -> Plan:
    """Return the plan with ``KEY=VALUE`` settings applied (dots go into sections; values are YAML).

    Raises
    ------
    PlanError : a setting without "=", an unknown key (with a suggestion) or a value that does not fit.
    """
    if not settings:
        return plan
    values = plan.model_dump(mode="json")
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise PlanError(f"--set {setting}: write KEY=VALUE, for example --set batch_size=4")
        place = values
        *sections, last = key.strip().split(".")
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise PlanError(f"--set {setting}: {section} is a value, not a section")
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PlanError(f"--set {setting}: {text!r} is not valid YAML") from error
    try:
        return config.parse(Plan, yaml.safe_dump(values, sort_keys=False), name="--set")
    except ConfigError as error:
        # The lines, and the file, are those of a text that nobody has seen.
        raise PlanError(re.sub(r"^--set:\d+: (file: )?", "--set ", str(error), flags=re.MULTILINE)) from error
