"""The formula of memory is held against real processes: ensembles, probabilities, and the estimate of quality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from medseg.inference.memory import Case

Cases = Callable[..., Case]
Measured = Callable[..., dict[str, Any]]
DEPTH, SIZE, LABELS = 72, 192, 39
MIB = 1 << 20


def held(run: dict[str, Any], *, slack: int = 0) -> None:
    """Check that a prediction took what was foretold: no more, and not far less."""
    assert run["peak"] <= run["need"] * 1.02 + slack
    assert run["need"] - run["before"] < 3 * (run["peak"] - run["before"]), "it is no empty promise"


def test_of_an_ensemble(case: Cases, measured: Measured) -> None:
    """Two grids and window sizes, so that nothing is shared, and nothing agrees."""
    members = [
        case(classes=LABELS + 1, spacing=(mm,) * 3, patch_size=patch)
        for mm, patch in ((3.0, (16, 48, 48)), (2.5, (24, 40, 40)))
    ]
    runs = [measured(members, depth) for depth in (DEPTH, 3 * DEPTH)]
    for run in runs:
        held(run)
    voxels = 2 * DEPTH * SIZE * SIZE
    grown = runs[1]["peak"] - runs[0]["peak"]
    assert grown < LABELS * voxels / 2, "no term is classes × volume, not even of bytes"


@pytest.mark.parametrize("soft", ["memory", "file"])
def test_of_probabilities(case: Cases, measured: Measured, soft: str) -> None:
    """Those in a file are in memory only as long as the system has a use for it: its pages are not the formula's."""
    found = case(classes=LABELS + 1, spacing=(3.0, 3.0, 3.0), patch_size=(16, 48, 48))
    file = LABELS * DEPTH * SIZE * SIZE if soft == "file" else 0
    held(measured([found], DEPTH, soft=soft), slack=file)


@pytest.mark.parametrize("more", [{}, {"mirror": True, "networks": 2}, {"soft": "memory"}])
def test_where_quality_is_estimated(case: Cases, measured: Measured, more: dict[str, Any]) -> None:
    """A few large windows: what is held of one is most of all."""
    found = case(classes=LABELS + 1, spacing=(3.0, 3.0, 3.0), patch_size=(64, 64, 64))
    held(measured([found], DEPTH, quality=True, **more))
