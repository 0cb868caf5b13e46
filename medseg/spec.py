"""Dataset specs: what data_specs/*.yaml say, and the cases that they mean on disk.

A dataset is a spec file, a folder that holds ``dataset.yaml`` (a spec), a Medical Segmentation Decathlon folder or
an nnU-Net v2 raw folder; the last two are read in medseg.foreign_specs into the same objects.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from medseg import config
from medseg.config import Config
from medseg.errors import SpecError
from medseg.files import digest
from medseg.readers.allowances import Allowance
from medseg.readers.label_request import Overlap
from medseg.readers.series_rules import ALIASES, MODALITIES, Condition, SeriesRule, condition_problem
from medseg.registry import did_you_mean

BACKGROUND = "background"
Normalisation = Literal["auto", "zscore", "ct", "none"]
Values = Literal["auto", "stored", "suv"]
Split = Literal["train", "test"]


class Channel(Config):
    """One image that a case has: a sequence, a modality, a stain.

    Attributes
    ----------
    modality : what made it ("MR", "CT", ...); "CT" means Hounsfield units.
    normalisation : "auto" chooses "ct" for CT and "zscore" for everything else.
    file : what stands for {channel} in the pattern `images` (the channel's name unless told).
    match : header attribute -> regular expression, number or [lowest, highest]: finds its series in a DICOM study,
        together with `modality`; {} goes by the modality alone.
    values : what the numbers of a DICOM series are brought to: "suv" (PET only), "stored" (the unit that its header
        states), "auto" chooses "suv" for PET, so that Bq/mL of one patient never meet SUV of another. Other files are
        read as they are.
    """

    modality: str = ""
    normalisation: Normalisation = "auto"
    file: str | None = None
    match: dict[str, Condition] | None = None
    values: Values = "auto"

    @field_validator("match", mode="before")
    @classmethod
    def _valid_conditions(cls, value: Any) -> Any:
        if isinstance(value, dict):
            problems = [text for text in (condition_problem(str(w), c) for w, c in value.items()) if text]
            if problems:
                raise ValueError("; ".join(problems))
        return value

    @model_validator(mode="after")
    def _suv_of_pet(self) -> Self:
        if self.values == "suv" and ALIASES.get(self.modality, self.modality) not in ("PT", ""):
            raise ValueError(f"values: suv is for PET, the modality is {self.modality!r}")
        return self

    @property
    def suv(self) -> bool | None:
        """Whether a DICOM series of this channel is read in SUV; None: if it is PET."""
        return {"stored": False, "suv": True, "auto": None}[self.values]


def _expression(value: str | None) -> str | None:
    """Refuse what is no regular expression."""
    if value is not None:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression ({error})") from error
    return value


class Code(Config):
    """A coded concept, SNOMED CT unless told (DICOM PS3.3 section 8)."""

    value: str
    meaning: str
    scheme: str = "SCT"


class Label(Config):
    """One structure: its value in the masks, its colour (#rrggbb) and its code.

    Attributes
    ----------
    dicom : regular expression for the name of its DICOM segments or ROIs (the label's name unless told).
    optional : a DICOM study without such a segment has none of it; else it is refused.
    """

    value: int = Field(ge=0, le=2**24 - 1, strict=True)
    color: str | None = Field(default=None, pattern=r"^#[0-9a-fA-F]{6}$")
    snomed: Code | None = None
    dicom: str | None = None
    optional: bool = False

    @field_validator("dicom")
    @classmethod
    def _valid_expression(cls, value: str | None) -> str | None:
        return _expression(value)


class Region(Config):
    """Labels that are learnt as one overlapping target; `paint` is the label written where the region is found."""

    labels: tuple[str, ...] = Field(min_length=1)
    paint: str


class Splits(Config):
    """Case ids set apart; a case that stands in neither list is for training."""

    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


class Spec(Config):
    """A dataset in words; see docs/reference/dataset-spec.md for an example of every key.

    Attributes
    ----------
    root : folder of the files, relative to the spec file; ``~`` and ``${VARIABLE}`` are expanded.
    images : path pattern below root with {case}, and {channel} where each channel has its own file; a DICOM series
        is a folder. Without {channel} a file must hold all channels (4-D NIfTI).
    studies : instead of `images` and `masks`: folder below root whose DICOM studies, with the SEG and RTSTRUCT objects
        in them, are the cases.
    masks : path pattern of the label maps, or of DICOM SEG or RTSTRUCT files or their folders, with {case}.
    channels : name -> Channel, in the order in which the network sees them.
    labels : name -> Label (or just its value); background is 0 and need not be listed.
    regions : name -> Region, painted in this order; empty means that labels are exclusive classes.
    overlap : DICOM structures of two labels that share voxels are refused, or the later label of the spec wins.
    reference : the channel whose grid the others are brought to and the masks lie on (the first unless told).
    resample : whether a channel on another grid is resampled; unless told, where channels are found by `match`.
    frame_of_reference : channels found by `match` must lie in the "same" one, or in "any".
    allow : "tilt", "irregular": DICOM series with such a fault are corrected by resampling instead of refused.
    ignore : mask value whose voxels are unannotated and teach nothing.
    patient : regular expression on the case id (on the PatientID of `studies`); its first group (or the whole match)
        names the patient.
    case_ids : "name" shows names from the disk, "hash" hashes them; unless told, DICOM is hashed and NIfTI is not.
    spacing : overrides the planner's spacing, (I, J, K) in `unit`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    licence: str = ""
    root: str = "."
    images: str = ""
    masks: str = ""
    studies: str = ""
    channels: dict[str, Channel] = Field(min_length=1)
    labels: dict[str, Label]
    regions: dict[str, Region] = Field(default_factory=dict)
    overlap: Overlap = "refuse"
    reference: str | None = None
    resample: bool | None = None
    frame_of_reference: Literal["same", "any"] = "same"
    allow: tuple[Allowance, ...] = ()
    ignore: int | None = Field(default=None, ge=1, le=2**24 - 1)
    patient: str | None = None
    case_ids: Literal["name", "hash"] | None = None
    splits: Splits = Splits()
    spacing: tuple[float, float, float] | None = None
    unit: Literal["mm", "pixel"] = "mm"

    @field_validator("labels", mode="before")
    @classmethod
    def _short_labels(cls, value: Any) -> Any:
        """Allow ``liver: 1`` for ``liver: {value: 1}``."""
        if not isinstance(value, dict):
            return value
        return {name: {"value": row} if type(row) is int else row for name, row in value.items()}

    @field_validator("patient")
    @classmethod
    def _valid_expression(cls, value: str | None) -> str | None:
        return _expression(value)

    @field_validator("spacing")
    @classmethod
    def _positive_spacing(cls, value: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        if value is not None and min(value) <= 0:
            raise ValueError(f"spacing must be three positive numbers, found {value}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*self._label_problems(), *self._pattern_problems(), *self._channel_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _label_problems(self) -> list[str]:
        problems = []
        values = [label.value for label in self.labels.values()]
        if repeated := sorted({v for v in values if values.count(v) > 1}):
            problems.append(f"labels: value {repeated[0]} is given to two labels")
        if any(label.value == 0 and name != BACKGROUND for name, label in self.labels.items()):
            problems.append(f"labels: value 0 is the background's; call it {BACKGROUND!r} or choose another value")
        if not self.foreground:
            problems.append("labels: at least one label beside the background is needed")
        if self.ignore in values:
            problems.append(f"ignore: value {self.ignore} is also a label's")
        for name, region in self.regions.items():
            for word in (*region.labels, region.paint):
                if word not in self.foreground:
                    hint = did_you_mean(word, list(self.foreground))
                    problems.append(f"regions.{name}: {word!r} is not a label{hint}")
        return problems

    def _pattern_problems(self) -> list[str]:
        problems = [
            f"{key}: the pattern {pattern!r} must hold {{case}} once"
            for key, pattern in (("images", self.images), ("masks", self.masks))
            if pattern and pattern.count("{case}") != 1
        ]
        if self.studies and (self.images or self.masks):
            problems.append("studies: it stands instead of `images` and `masks`")
        if self.studies and self.case_ids == "name":
            problems.append("case_ids: DICOM studies have no names that could be shown; leave it out")
        both = set(self.splits.train) & set(self.splits.test)
        problems += [f"splits: case {case!r} stands in train and in test" for case in sorted(both)]
        return problems

    def _channel_problems(self) -> list[str]:
        problems = []
        if self.reference is not None and self.reference not in self.channels:
            hint = did_you_mean(self.reference, list(self.channels))
            problems.append(f"reference: {self.reference!r} is not a channel{hint}")
        if not self.rules:
            return problems
        for name, channel in self.channels.items():
            if channel.match is None and not self.studies:
                text = "has no `match`, another channel has one; `match: {}` goes by the modality alone"
                problems.append(f"channels.{name}: {text}")
            if channel.modality and channel.modality not in (*MODALITIES, *ALIASES):
                allowed = f"{', '.join(MODALITIES)}{did_you_mean(channel.modality, MODALITIES)}"
                problems.append(f"channels.{name}.modality: with `match` it is one of {allowed}")
        if "{channel}" in self.images:
            problems.append("images: with `match` the pattern leads to the folder of a study, without {channel}")
        return problems

    @property
    def rules(self) -> dict[str, SeriesRule]:
        """Channel -> the rule that finds its series in a DICOM study; empty where patterns find the files."""
        return {
            name: SeriesRule(channel.modality, channel.match or {})
            for name, channel in self.channels.items()
            if channel.match is not None or self.studies
        }

    @property
    def reference_channel(self) -> str:
        """The channel whose grid is that of the case."""
        return self.reference or next(iter(self.channels))

    @property
    def resamples(self) -> bool:
        """Whether channels on other grids are brought to that of the reference."""
        return bool(self.rules) if self.resample is None else self.resample

    @property
    def foreground(self) -> dict[str, int]:
        """Label name -> value, background left out, in the order of the spec."""
        return {name: label.value for name, label in self.labels.items() if label.value != 0}

    @property
    def values(self) -> frozenset[int]:
        """Every value that may stand in a mask."""
        extra = set() if self.ignore is None else {self.ignore}
        return frozenset({0, *self.foreground.values(), *extra})


@dataclass(frozen=True)
class Case:
    """One study of a dataset.

    Attributes
    ----------
    id : its public name, used in every file name, log and table.
    images : one path per channel, or one path for all channels; where rules choose the channels, the folder or the
        files of the study.
    mask : path of its label map, or paths of its DICOM label objects; None where there is none.
    patient : public name of its patient; cases of one patient are never separated.
    split : "train" or "test".
    """

    id: str
    images: tuple[Path, ...]
    mask: Path | tuple[Path, ...] | None
    patient: str
    split: Split = "train"

    @property
    def label_files(self) -> tuple[Path, ...]:
        """Every file or folder of its mask."""
        return () if self.mask is None else (self.mask,) if isinstance(self.mask, Path) else self.mask


@dataclass(frozen=True)
class Dataset:
    """A spec and its cases, ordered by path."""

    spec: Spec
    cases: tuple[Case, ...]

    def select(self, split: Split) -> tuple[Case, ...]:
        """Return the cases of one split."""
        return tuple(case for case in self.cases if case.split == split)


def load_dataset(path: Path, *, splits: Path | Splits | None = None) -> Dataset:
    """Understand `path` as a dataset.

    Parameters
    ----------
    path : spec file (.yaml), or a folder: with dataset.yaml, an MSD task or an nnU-Net v2 raw dataset.
    splits : lists `train` and `test` of case ids, or a YAML or JSON file of them, that replace the spec's own.

    Raises
    ------
    SpecError : not a dataset, no cases, wrong spec (every problem with its line), unknown case in a split.
    """
    from medseg.foreign_specs import load_msd_or_nnunet

    file = path / "dataset.yaml" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        dataset = load_msd_or_nnunet(path)
    elif not path.exists():
        raise SpecError(f"{path}: this dataset does not exist; give a spec from data_specs/ or a dataset folder")
    else:
        dataset = _load_spec(file)
    if not dataset.cases:
        looked = f"the pattern `images` ({dataset.spec.images or 'from dataset.json'}) against the files on disk"
        if dataset.spec.studies:
            looked = "the rules of `channels`: no DICOM study has a series that fits one"
        raise SpecError(f"{path}: no case was found; check `root` and {looked}")
    if isinstance(splits, Splits):
        return split_cases(dataset, splits, name=str(path))
    chosen = dataset.spec.splits if splits is None else config.load(Splits, splits, error=SpecError)
    return split_cases(dataset, chosen, name=str(splits or path))


def _load_spec(file: Path) -> Dataset:
    from medseg.cases import find_cases, find_studies

    spec = config.load(Spec, file, error=SpecError)
    for key in ("images", "masks"):
        if not getattr(spec, key) and not spec.studies:
            raise SpecError(f"{file}:1: {key}: this key is missing")
    root = (file.parent / _expand(spec.root, file)).resolve()
    if not root.is_dir():
        raise SpecError(f"{file}: root: the folder {spec.root} does not exist")
    if spec.studies and not (root / spec.studies).is_dir():
        raise SpecError(f"{file}: studies: the folder {spec.studies} does not exist below root")
    return Dataset(spec, find_studies(spec, root) if spec.studies else find_cases(spec, root))


def _expand(root: str, file: Path) -> Path:
    text = os.path.expandvars(os.path.expanduser(root))
    if unset := re.search(r"\$\{?(\w+)", text):
        raise SpecError(
            f"{file}: root: the environment variable {unset[1]} is not set; set it to the folder that "
            "holds the data, or write the path into the spec"
        )
    return Path(text)


def split_cases(dataset: Dataset, splits: Splits, *, name: str) -> Dataset:
    """Mark the cases of the test list; with a train list only the listed cases are kept. `name` is for the error."""
    known = {case.id for case in dataset.cases}
    for word in (*splits.train, *splits.test):
        if word not in known:
            raise SpecError(f"{name}: splits: there is no case {word!r}{did_you_mean(word, sorted(known))}")
    if both := set(splits.train) & set(splits.test):
        raise SpecError(f"{name}: splits: case {min(both)!r} stands in train and in test")
    kept = [c for c in dataset.cases if not splits.train or c.id in splits.train or c.id in splits.test]
    test = set(splits.test)
    return Dataset(dataset.spec, tuple(replace(c, split="test" if c.id in test else c.split) for c in kept))


def spec_digest(spec: Spec) -> str:
    """Return the SHA-256 of what a spec says (its root left out: the same data elsewhere are the same data).

    The order of channels, labels and regions counts, because it is that of the network's channels.
    """
    order = [list(spec.channels), list(spec.labels), list(spec.regions)]
    return digest([spec.model_dump(mode="json", exclude={"root"}), order])
