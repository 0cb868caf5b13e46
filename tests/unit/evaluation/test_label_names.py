"""Predictions whose label values are not those of the reference are scored by the names of the labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from medseg.errors import SpecError
from medseg.evaluation.evaluate import evaluate
from medseg.evaluation.label_names import by_name
from medseg.spec import Spec
from medseg.volume import Volume

from .conftest import World, bar


def tell(world: World, labels: Any) -> None:
    (world.predictions / "predictions.json").write_text(json.dumps({"model_hash": "abc", "labels": labels}))


def dice(world: World) -> dict[str, float | None]:
    found = evaluate(world.predictions, world.root, out=world.out)
    return {row.label: row.value for row in found.rows if row.metric == "dice"}


def test_names_decide(world: World) -> None:
    world.add("a", bar(4, 2), bar(4, 2))
    by_value = dice(world)
    assert by_value == {"one": 1.0, "two": 1.0}
    tell(world, {"one": 1, "two": 2})
    assert dice(world) == by_value
    tell(world, {"two": 1, "one": 2})
    assert dice(world) == {"one": 0.0, "two": 0.0}


def test_a_label_that_the_reference_does_not_have_counts_as_background_and_is_told(world: World) -> None:
    world.add("a", bar(4, 2), bar(4, 2))
    tell(world, {"one": 1, "extra": 2})
    assert dice(world) == {"one": 1.0, "two": 0.0}
    told = json.loads((world.out / "summary.json").read_text())["provenance"]
    assert (told["labels_only_predicted"], told["labels_only_in_reference"]) == ("extra", "two")


@pytest.mark.parametrize("labels", [None, "one", {"first": 1, "second": 2}])
def test_values_decide_where_names_say_nothing(world: World, labels: Any) -> None:
    world.add("a", bar(4, 2), bar(4, 2))
    tell(world, labels)
    assert dice(world) == {"one": 1.0, "two": 1.0}


def test_a_value_that_the_model_does_not_have_is_refused(make_spec: Callable[..., Spec]) -> None:
    names = by_name({"organ": 3}, make_spec({"organ": 1}))
    assert names is not None
    with pytest.raises(SpecError, match="holds the value") as found:
        names.translate(Volume(np.ones((1, 2, 2, 2), np.int32), np.eye(4)), "c")
    assert found.value.code == "PREDICTION_VALUES"
