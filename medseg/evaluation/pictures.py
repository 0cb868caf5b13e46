"""Pictures of single cases for a report: image, prediction and reference in three planes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import ConfigError
from medseg.evaluation.evaluate import (
    Reference,
    align_prediction,
    find_prediction,
    load_reference,
    read_label_map,
    told_of,
)
from medseg.evaluation.label_names import by_name
from medseg.plots import three_planes_png
from medseg.spec import Case
from medseg.studies import read_study
from medseg.volume import Volume, reorient, shown_axes

Picture = Callable[[str], bytes]
"""Case id -> PNG."""


def case_pictures(predictions: Path, reference: Path, *, splits: Path | None = None) -> Picture:
    """Return a function that draws a case: the prediction painted, the reference outlined in white.

    Parameters
    ----------
    predictions, reference, splits : as for medseg.evaluation.evaluate.evaluate. A folder of masks has no images: there
        the masks are drawn on black.

    Raises
    ------
    MedsegError : as `load_reference`; from the function also when a case cannot be read or is unknown.
    """
    chosen = load_reference(reference, predictions, splits=splits, split="all")
    cases = {case.id: case for case in chosen.cases}
    colours = {target.values[0]: target.color for target in chosen.targets if not target.region}

    def draw(case_id: str) -> bytes:
        if case_id not in cases:
            raise ConfigError(
                f"case {case_id} of the evaluation is not in {reference}; give the reference that it was scored against"
            )
        return _draw(chosen, cases[case_id], predictions, colours)

    return draw


def _draw(chosen: Reference, case: Case, predictions: Path, colours: Mapping[int, str]) -> bytes:
    truth, image = _read(chosen, case)
    axes = shown_axes(truth.unit)
    path = find_prediction(predictions, case.id)
    predicted = None
    if path is not None:
        found = read_label_map(path, case.id)
        names = by_name(told_of(predictions).get("labels"), chosen.spec)
        found = found if names is None else names.translate(found, case.id)
        predicted = _turned(align_prediction(found, truth, case.id), axes)
    shown = reorient(truth, axes)
    return three_planes_png(
        np.zeros(shown.shape) if image is None else _turned(image, axes),
        predicted,
        shown.spacing,
        colours,
        reference=shown.array[0],
        letters=truth.unit == "mm",
    )


def _read(chosen: Reference, case: Case) -> tuple[Volume, Volume | None]:
    """Return the reference mask and, where the dataset has images, the image."""
    if chosen.spec is None or not case.images:
        return chosen.read(case), None
    study = read_study(chosen.spec, case)
    return chosen.read(case) if study.mask is None else study.mask, study.image


def _turned(volume: Volume, axes: str) -> NDArray[Any]:
    """Return the first channel with its axes turned."""
    return np.asarray(reorient(volume, axes).array[0])
