"""Learning rate and validation over a training: by steps, by the clock, or as recorded by an earlier run.

The rate rises linearly over the warm-up, then follows half a cosine to zero (Loshchilov 2017, arXiv 1608.03983) at
the end, wherever the end is.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

LEAST_SHARE = 0.2
"""Of the time, what the steps get however long the finishing takes: a model that has learnt something comes first."""


def rate_factor(progress: float, warmup: float) -> float:
    """Return the share of the full learning rate at `progress` (0 to 1) of the training."""
    if progress < warmup:
        return max(progress, 1e-3 * warmup) / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


class Schedule(Protocol):
    """What the loop asks before and after each step (counted from 0)."""

    def factor(self, step: int) -> float | None:
        """Return the share of the full learning rate for `step`; None when the training is over."""
        ...

    def validate_after(self, step: int) -> bool:
        """Tell whether a validation follows `step`."""
        ...

    def progress(self, step: int) -> float:
        """Return the share of the training that is done before `step`, 0 to 1."""
        ...

    def remaining(self, step: int, step_seconds: float) -> float:
        """Return the expected seconds to the end."""
        ...

    def validated(self, seconds: float) -> None:
        """Take note of how long a validation took."""
        ...


class BySteps:
    """A fixed number of steps with evenly spread validations."""

    def __init__(self, steps: int, *, validations: int, warmup: float) -> None:
        self.steps, self.validations, self.warmup = steps, validations, warmup

    def factor(self, step: int) -> float | None:
        """Return the share of the full learning rate for `step`."""
        return rate_factor(step / self.steps, self.warmup) if step < self.steps else None

    def validate_after(self, step: int) -> bool:
        """Tell whether a validation follows `step`."""
        return (step + 1) * self.validations // self.steps > step * self.validations // self.steps

    def progress(self, step: int) -> float:
        """Return the share of steps done."""
        return step / self.steps

    def remaining(self, step: int, step_seconds: float) -> float:
        """Return the expected seconds to the end."""
        return (self.steps - step) * step_seconds

    def validated(self, seconds: float) -> None:
        """Nothing follows from it."""


class ByClock:
    """As many steps as fit into a time.

    Parameters
    ----------
    seconds : time for the loop and for what follows it.
    spent : what earlier processes used of it (resuming).
    validation : seconds expected of one validation; the last one must fit in.
    finishing : seconds that must be left after the loop, where a validation takes what is expected. How long
        validations really take says how much faster or slower the machine is now, and corrects both.
    slowness : how many times longer than expected earlier validations took; those of this loop are added to it.
    """

    def __init__(
        self,
        seconds: float,
        *,
        spent: float,
        validations: int,
        warmup: float,
        validation: float = 0.0,
        finishing: float = 0.0,
        slowness: list[float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.whole, self.warmup, self.validations, self.clock = seconds, warmup, validations, clock
        self.validation, self.finishing = validation, finishing
        self._slowness = [1.0] if slowness is None else slowness
        self.seconds = self._for_steps()
        self._start = clock() - spent
        self._validated = math.floor(self._progress() * validations)

    def validated(self, seconds: float) -> None:
        """Leave at the end what is needed on a machine on which a validation takes `seconds`."""
        if self.validation > 0:
            self._slowness.append(seconds / self.validation)
            self.seconds = self._for_steps()

    def _for_steps(self) -> float:
        # The median of the last three: a moment in which another program was busy must not throw the rate about.
        slowness = statistics.median(self._slowness[-3:] or [1.0])
        return max(LEAST_SHARE * self.whole, self.whole - slowness * (self.validation + self.finishing))

    def _progress(self) -> float:
        return min(1.0, (self.clock() - self._start) / self.seconds) if self.seconds > 0 else 1.0

    def factor(self, step: int) -> float | None:
        """Return the share of the full learning rate now; None when the time is over (never before one step)."""
        progress = self._progress()
        return None if progress >= 1 and step > 0 else rate_factor(progress, self.warmup)

    def validate_after(self, step: int) -> bool:
        """Tell whether the clock has passed the next validation."""
        due = math.floor(self._progress() * self.validations) > self._validated
        self._validated += due
        return due

    def progress(self, step: int) -> float:
        """Return the share of the time used."""
        return self._progress()

    def remaining(self, step: int, step_seconds: float) -> float:
        """Return the seconds left."""
        return (1 - self._progress()) * self.seconds


class Followed:
    """What a process of rank 1 or more adds to the decisions of the first: nothing."""

    def factor(self, step: int) -> float | None:
        """Return 0: shares are added over all processes."""
        return 0.0

    def validate_after(self, step: int) -> bool:
        """Leave it to the first process."""
        return False

    def progress(self, step: int) -> float:
        """Return 0: nobody looks."""
        return 0.0

    def remaining(self, step: int, step_seconds: float) -> float:
        """Return 0: nobody looks."""
        return 0.0

    def validated(self, seconds: float) -> None:
        """Nothing follows from it."""


class ByRecord:
    """What another run did, step for step: its learning-rate shares and the steps after which it validated."""

    def __init__(self, factors: Sequence[float], validated: Sequence[int]) -> None:
        self.factors, self._marks = list(factors), set(validated)

    def factor(self, step: int) -> float | None:
        """Return the recorded share."""
        return self.factors[step] if step < len(self.factors) else None

    def validate_after(self, step: int) -> bool:
        """Tell whether the other run validated here."""
        return step in self._marks

    def progress(self, step: int) -> float:
        """Return the share of steps done."""
        return step / max(1, len(self.factors))

    def remaining(self, step: int, step_seconds: float) -> float:
        """Return the expected seconds to the end."""
        return (len(self.factors) - step) * step_seconds

    def validated(self, seconds: float) -> None:
        """Nothing follows from it."""
