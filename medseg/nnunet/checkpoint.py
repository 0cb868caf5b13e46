"""What nnU-Net keeps in a checkpoint, read without running code that may hide in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg.errors import BundleError

_SCALAR: Any = np._core.multiarray.scalar  # type: ignore[attr-defined]
HARMLESS: tuple[Any, ...] = (
    # Losses in the log of the training are numpy scalars; numpy 1 wrote the name of the first line.
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(np.dtypes.Float16DType, np.dtypes.Float32DType, np.dtypes.Float64DType),
    *(np.dtypes.Int32DType, np.dtypes.Int64DType, np.dtypes.BoolDType),
)
"""What a checkpoint may hold beside tensors, containers and plain values: numbers of numpy."""


@dataclass(frozen=True)
class Checkpoint:
    """One fold.

    Attributes
    ----------
    weights : names as in nnU-Net -> tensors on the CPU.
    configuration : "2d", "3d_fullres", ...
    trainer : class that made it.
    mirror_axes : that its training mirrored, so that prediction may.
    """

    weights: dict[str, Tensor]
    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...]


def read_checkpoint(file: Path) -> Checkpoint:
    """Read one checkpoint_*.pth.

    Raises
    ------
    BundleError : it is damaged, holds anything but tensors and plain values (also under names that sound harmless), or
        lacks what nnU-Net v2 writes.
    """
    content = _load(file)
    try:
        weights = {_plain(name): tensor for name, tensor in content["network_weights"].items()}
        axes = content.get("inference_allowed_mirroring_axes")
        found = Checkpoint(
            weights,
            configuration=str(content["init_args"]["configuration"]),
            trainer=str(content["trainer_name"]),
            mirror_axes=tuple(sorted(int(axis) for axis in axes or ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            f"{_place(file)}: not a checkpoint of nnU-Net v2 ({type(error).__name__}: {error})"
        ) from error
    if not weights or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise BundleError(f"{_place(file)}: not a checkpoint of nnU-Net v2: network_weights holds no tensors")
    return found


def _load(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(HARMLESS)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no errors: pickle's, zip's, its own and what damaged numbers lead to
        text = str(error)
        found = text.partition("GLOBAL ")[2].split(" ")[0] if "GLOBAL " in text else ""
        why = f"it holds {found}, which may run code" if found else f"it is damaged ({type(error).__name__})"
        raise BundleError(
            f"{_place(file)}: refused: {why}; only tensors and plain values are read. Ask whoever trained it for a "
            "checkpoint that nnU-Net v2 itself wrote"
        ) from error


def _place(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def _plain(name: str) -> str:
    """Return the name of a weight without what compiled and distributed networks put before it."""
    for prefix in ("module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name
