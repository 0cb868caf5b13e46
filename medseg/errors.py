"""Every error that medseg raises on purpose.

    MedsegError
      ConfigError      a configuration file or an option is wrong
        SpecError      a dataset spec is wrong, or the data do not fit it
      ReadError        a file or series cannot be read            (has a reason code)
      GeometryError    it can be read, but its geometry is unfit  (has a reason code)
      PlanError        no plan fits the data, the machine or the budget
      TrainingError    training cannot start or go on
        Stopped        training was asked to stop, did, and can go on later
      RetrainingError  a retraining tick, a promotion or a rollback cannot be done
      BundleError      a model is damaged, foreign or does not fit
      ExportError      a result cannot be written
      BatchError       a run over many studies cannot start or go on

A message says what is wrong, where (file or case), the value, what is allowed and what to do next.
The library raises; the command line prints the message and exits 1 (2 for wrong usage, 3 for partial success, 75
where the same command goes on later).
"""

from __future__ import annotations


class MedsegError(Exception):
    """Root of the tree; ``code`` is a stable documented word (see docs/reference/reason-codes.md)."""

    code: str = "ERROR"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class ConfigError(MedsegError):
    """A configuration file or an option is wrong; the message lists every problem found."""

    code = "CONFIG"


class SpecError(ConfigError):
    """A dataset spec is wrong, or the files on disk do not fit it."""

    code = "SPEC"


class ReadError(MedsegError):
    """A file or series cannot be read; nothing of it is used."""

    code = "UNREADABLE"


class GeometryError(MedsegError):
    """An image was read, but where its voxels lie is unknown, irregular or not what was expected."""

    code = "GEOMETRY"


class PlanError(MedsegError):
    """No plan fits the data, the machine or the budget; or a plan edited by hand is not valid."""

    code = "PLAN"


class TrainingError(MedsegError):
    """Training cannot start or go on."""

    code = "TRAINING"


class Stopped(TrainingError):  # noqa: N818 - nothing went wrong
    """Training was asked to stop (a scheduler takes the machine away) and did; the same command goes on."""

    code = "STOPPED"


class RetrainingError(MedsegError):
    """A retraining tick, a promotion or a rollback cannot be done; the champion stays what it was."""

    code = "RETRAINING"


class BundleError(MedsegError):
    """A model is damaged, of a foreign format, or does not fit the input."""

    code = "BUNDLE"


class ExportError(MedsegError):
    """A result cannot be written; nothing is left under the final name."""

    code = "EXPORT"


class BatchError(MedsegError):
    """A run over many studies cannot start or go on; what was done stays done."""

    code = "BATCH"
