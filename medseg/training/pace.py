"""Where the time of training steps goes: waiting for patches, augmenting them, learning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Pace:
    """Seconds of all steps of a training so far, validations not counted.

    Attributes
    ----------
    waiting : for the patches that a thread reads ahead.
    augmenting : bringing them to the device, and augmentation there.
    stepping : the whole steps, these two included.
    """

    waiting: float = 0.0
    augmenting: float = 0.0
    stepping: float = 0.0

    @property
    def data_share(self) -> float:
        """Share of the steps that is data and not learning, 0 to 1; 0 before the first step."""
        return (self.waiting + self.augmenting) / self.stepping if self.stepping else 0.0

    def __str__(self) -> str:
        """Return "data: 3.1 % of a step (waiting 0.2 %, augmentation 2.9 %)"."""
        whole = self.stepping or 1.0
        return (
            f"data: {self.data_share:.1%} of a step (waiting {self.waiting / whole:.1%}, "
            f"augmentation {self.augmenting / whole:.1%})"
        ).replace("%", " %")
