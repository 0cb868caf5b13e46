"""What the prediction of one image takes, as a process of its own may tell it: the formula needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.errors import BatchError
from medseg.inference.aside import answer, ask

if TYPE_CHECKING:
    from medseg.bundle import BundleInfo
    from medseg.volume import Affine

PROGRAM = "medseg.batch.foretell"


@dataclass(frozen=True)
class Asked:
    """What is to be predicted.

    Attributes
    ----------
    shape, affine, itemsize : of the image, as medseg.inference.memory.Case has them.
    models : the members of an ensemble, or the one model.
    limit : bytes that the prediction may take.
    soft : whether probabilities are written, too.
    mirror : whether inputs are mirrored; None: as planned.
    """

    shape: tuple[int, int, int]
    affine: Affine
    itemsize: int
    models: Sequence[BundleInfo]
    limit: int
    soft: bool = False
    mirror: bool | None = None


def foretold(asked: Asked) -> str:
    """Return what it takes, or why that is too much, for a person."""
    from medseg.inference.chosen import judged
    from medseg.inference.joint_memory import forecast_joint
    from medseg.inference.memory import Case, forecast
    from medseg.inference.presets import QUALITY

    one = len(asked.models) == 1
    cases = [
        Case(
            asked.shape,
            asked.affine,
            asked.itemsize,
            info.plan,
            info.spec,
            QUALITY[info.preset],
            quality=one and judged(info, asked.mirror),
        )
        for info in asked.models
    ]
    networks = [len(info.weights) for info in asked.models]
    try:
        if asked.soft or not one:
            need = forecast_joint(cases, networks=networks, soft=int(asked.soft), in_file=True, limit=asked.limit)
        else:
            need = forecast(cases[0], networks=networks[0], limit=asked.limit)
    except BatchError as error:
        return str(error)
    size = "×".join(map(str, asked.shape))
    return f"the largest image ({size}) needs about {need.text}"


def foretold_aside(asked: Asked) -> str:
    """Return `foretold` without torch in this process.

    Raises
    ------
    BundleError : the other process ended without an answer.
    """
    models = [info.model_dump(mode="json") for info in asked.models]
    question = {**vars(asked), "affine": np.asarray(asked.affine).tolist(), "models": models}
    return str(ask(PROGRAM, question, about="the model"))


def _asked(question: dict[str, Any]) -> Asked:
    from medseg.bundle import BundleInfo

    i, j, k = question.pop("shape")
    models = [BundleInfo.model_validate(info) for info in question.pop("models")]
    return Asked(**{**question, "shape": (i, j, k), "affine": np.array(question["affine"]), "models": models})


if __name__ == "__main__":
    answer(lambda question: foretold(_asked(question)))
