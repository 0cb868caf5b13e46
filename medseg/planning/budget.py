"""What a budget of wall time leaves to learn, and whether anything can be learnt in it; pure functions."""

from __future__ import annotations

import math

from medseg.errors import PlanError

LEARNING_SHARE = 0.9
"""Of a budget; the rest is for reading, measuring, preparing, scoring and writing."""
RESERVED_SECONDS = 10.0
"""Of any budget, however small: start, tables, plots and registry take this with the smallest of data."""
LEAST_STEPS = 50
"""With fewer, AdamW has hardly left its start: nothing is learnt (hippocampus: a first label after about 150)."""
GOOD_STEPS = 300
"""From here the first useful models were seen (docs/decisions/0003)."""
VALIDATIONS, MOST_VALIDATIONS = 10, 100
VALIDATION_SECONDS = 900.0
"""Longer trainings are validated this often, so that a curve is seen and a good state kept also within days."""
VALIDATION_SHARE = 0.15
"""Of the time to learn that validations may take; short trainings have fewer, at least two."""
VALIDATION_CASES = 20
"""Of a single split, at most a tenth of the cases (training.folds)."""


def learning_seconds(budget: float, folds: int) -> float:
    """Return the expected seconds of one network's loop; 0 where a budget leaves none."""
    return max(0.0, min(LEARNING_SHARE * budget, budget - RESERVED_SECONDS)) / folds


def enough(step_seconds: float, steps: int, folds: int) -> float:
    """Return the budget in seconds that gives each of `folds` networks so many steps."""
    needed = step_seconds * steps * folds
    return max(needed / LEARNING_SHARE, needed + RESERVED_SECONDS)


def refuse_small_budget(budget: float, folds: int, step_seconds: float) -> None:
    """Raise PlanError (BUDGET_TOO_SMALL) where each network would get fewer than LEAST_STEPS.

    `step_seconds` is that of the fastest candidate, 0 before it is known.
    """
    seconds = learning_seconds(budget, folds)
    if seconds > 0 and seconds >= LEAST_STEPS * step_seconds:
        return
    each = f" for each of {folds} networks" if folds > 1 else ""
    if not step_seconds:
        raise PlanError(
            f"--budget {duration(budget)}: starting and finishing take about {RESERVED_SECONDS:.0f} s of it and "
            "nothing is left to learn; give minutes, for small data at least 1m",
            code="BUDGET_TOO_SMALL",
        )
    raise PlanError(
        f"--budget {duration(budget)} leaves {seconds:.0f} s{each} to learn, {int(seconds / step_seconds)} steps of "
        f"{step_seconds:.2g} s on this machine: too few to learn anything. At least {LEAST_STEPS} steps need "
        f"--budget {duration(enough(step_seconds, LEAST_STEPS, folds))}, a first useful model "
        f"({GOOD_STEPS} steps) --budget {duration(enough(step_seconds, GOOD_STEPS, folds))}",
        code="BUDGET_TOO_SMALL",
    )


def validations(training_seconds: float | None, case_seconds: float, cases: int) -> int:
    """Return how often a training is validated.

    Parameters
    ----------
    training_seconds : of the loop; None for a run by steps.
    case_seconds : expected for the prediction of a case without mirroring.
    cases : of the dataset.
    """
    if training_seconds is None:
        return VALIDATIONS
    wanted = min(MOST_VALIDATIONS, max(VALIDATIONS, math.ceil(training_seconds / VALIDATION_SECONDS)))
    each = case_seconds * max(1, min(VALIDATION_CASES, round(cases / 10)))
    return max(2, min(wanted, int(VALIDATION_SHARE * training_seconds / each)))


def duration(seconds: float) -> str:
    """Return seconds as --budget takes them, rounded up: "45s", "2m", "1.5h", "3d"."""
    for unit, name in ((86400, "d"), (3600, "h")):
        if seconds >= 2 * unit:
            return f"{math.ceil(10 * seconds / unit - 1e-6) / 10:g}{name}"
    return f"{math.ceil(seconds / 60 - 1e-6)}m" if seconds > 90 else f"{max(1, math.ceil(seconds - 1e-6))}s"
