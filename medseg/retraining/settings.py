"""The YAML of a retraining job: pipelines/retraining.example.yaml explains every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from medseg import config
from medseg.config import Config
from medseg.duration import seconds
from medseg.errors import ConfigError
from medseg.files import digest

Share = float
"""A difference in Dice, 0 to 1."""


class Gate(Config):
    """The frozen labelled cases on which champion and challenger are compared.

    Attributes
    ----------
    dataset, splits, cases : which cases ("test" or "all").
    digest : SHA-256 that the gate must have (`--dry-run` tells it); without it each decision records the one it found.
    """

    dataset: Path
    splits: Path | None = None
    cases: Literal["test", "all"] = "all"
    digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class Training(Config):
    """How long and with what to train: `budget` or `steps`, as for medseg train.

    Attributes
    ----------
    start : "champion": fine-tune the champion that is there when a training begins; the first model begins with random
        weights, as all do unless told.
    """

    budget: str | None = None
    steps: int | None = Field(default=None, ge=1)
    folds: int | None = Field(default=None, ge=2)
    network: str | None = None
    settings: tuple[str, ...] = ()
    start: Literal["champion"] | None = None

    @model_serializer(mode="wrap")
    def _without_start(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a start that is not told: jobs from before there was one keep their digests."""
        return {key: value for key, value in values(self).items() if key != "start" or value is not None}

    @field_validator("budget")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                seconds(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.budget is None) == (self.steps is None):
            raise ValueError("give either budget or steps")
        return self


class Rule(Config):
    """When a challenger becomes the champion; every condition that is given must hold.

    Differences are challenger - champion over the same cases; bounds are the lower ends of their 95 % intervals from a
    paired bootstrap over patients (medseg.evaluation.compare). A challenger may never fail on more cases.

    Attributes
    ----------
    metric : what is compared.
    min_improvement : the bound of the mean over labels must be above it (0: proven better).
    margins : the bound of each label (one number, or label -> number) must be above minus it: proven not worse by more.
    max_drop : the most that any label of any case may lose.
    floor : least mean over labels that the first model needs, when there is no champion to compare with.
    """

    metric: Literal["dice"] = "dice"
    min_improvement: Share | None = Field(default=None, ge=0, lt=1)
    margins: Share | dict[str, Share] | None = None
    max_drop: Share = Field(ge=0, le=1)
    floor: Share = Field(ge=0, le=1)

    @field_validator("margins")
    @classmethod
    def _small(cls, value: Share | dict[str, Share] | None) -> Share | dict[str, Share] | None:
        numbers = value.values() if isinstance(value, dict) else () if value is None else (value,)
        if any(not 0 < number < 1 for number in numbers):
            raise ValueError("a margin lies between 0 and 1")
        return value

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.min_improvement is None and not self.margins:
            raise ValueError("declare min_improvement (proven better) or margins (proven not worse), or both")
        return self


class RetrainConfig(Config):
    """One retraining job.

    Attributes
    ----------
    name : of the model in the registry.
    dataset, splits : what to learn from; new cases arrive there.
    store : folder of the MLflow store and of decisions.jsonl.
    work : folder for runs and gate predictions.
    min_new_cases : fewer new training cases since the last decision are no reason to train.
    """

    name: str = Field(min_length=1, pattern=r"^[^/:@%\"'?]+$")
    dataset: Path
    splits: Path | None = None
    gate: Gate
    training: Training
    rule: Rule
    store: Path
    work: Path
    min_new_cases: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked for; the places of files do not count, their contents have digests of their own."""
        places: Any = {"dataset": True, "splits": True, "store": True, "work": True, "gate": {"dataset", "splits"}}
        return digest(self.model_dump(mode="json", exclude=places))


def load_settings(path: Path) -> RetrainConfig:
    """Read the YAML of a job; its relative paths start at its folder.

    Raises
    ------
    ConfigError : every problem with its line.
    """
    settings = config.load(RetrainConfig, path)

    def placed(value: Path | None) -> Path | None:
        return None if value is None else path.parent / value.expanduser()

    gate = {"dataset": placed(settings.gate.dataset), "splits": placed(settings.gate.splits)}
    places = {key: placed(getattr(settings, key)) for key in ("dataset", "splits", "store", "work")}
    return settings.model_copy(update={**places, "gate": settings.gate.model_copy(update=gate)})
