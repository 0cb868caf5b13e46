"""Predictions of a model whose labels have other values than those of the reference: names decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from medseg.errors import SpecError
from medseg.spec import Spec
from medseg.volume import Volume


@dataclass(frozen=True)
class ByName:
    """How the label values of a model become those of a reference.

    Attributes
    ----------
    values : value of the model -> value of the reference; 0 for a label that the reference does not have.
    told : which labels only one of them has, for the provenance of the scores.
    """

    values: Mapping[int, int]
    told: Mapping[str, str]

    def translate(self, predicted: Volume, case_id: str) -> Volume:
        """Return a label map (1, I, J, K) with the values of the reference.

        Raises
        ------
        SpecError : PREDICTION_VALUES, it holds a value that the model does not have.
        """
        found = np.unique(predicted.array)
        if foreign := [int(value) for value in found if int(value) not in self.values]:
            raise SpecError(
                f"case {case_id}: the prediction holds the value(s) {', '.join(map(str, foreign[:5]))}, which the "
                "labels in predictions.json do not have; is it another model's?",
                code="PREDICTION_VALUES",
            )
        table = np.array([self.values[int(value)] for value in found], np.int32)
        return predicted.with_array(table[np.searchsorted(found, predicted.array)])


def by_name(labels: Any, spec: Spec | None) -> ByName | None:
    """Return how the labels of a model (name -> value) are those of a reference; None where values decide.

    That is so where the model does not tell its labels, where all are the same, and where no name is: then the labels
    were renamed.
    """
    if spec is None or not isinstance(labels, dict):
        return None
    wanted = spec.foreground
    if labels == wanted or not labels.keys() & wanted.keys():
        return None
    values = {0: 0, **{int(value): wanted.get(name, 0) for name, value in labels.items()}}
    lists = {
        "labels_only_predicted": [name for name in labels if name not in wanted],
        "labels_only_in_reference": [name for name in wanted if name not in labels],
    }
    return ByName(values, {key: ", ".join(names) for key, names in lists.items() if names})
