"""All that resuming needs, and its file.

Random numbers are functions of seed and step, so the state holds no generator: step says it all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from medseg.errors import TrainingError
from medseg.files import canonical_json, digest, write_atomically
from medseg.training.pace import Pace

StateDict = dict[str, Tensor]


@dataclass
class LoopState:
    """State between two steps.

    Attributes
    ----------
    step : steps done.
    seconds : time spent in the loop so far, over all processes.
    weights, average, best : network now, its running average, and the average that validated best.
    moments : AdamW's "<parameter>/exp_avg", "<parameter>/exp_avg_sq" and "<parameter>/step".
    best_dice : validation Dice of `best`; -1 before the first validation.
    factors, losses : learning-rate share and loss of every step done.
    validations : {"step", "seconds", "dice": {label: mean Dice}} of every validation done.
    seen : (training cases, labels, 2) int64: patches that held a label, and its voxels in them (see training.drawn);
        empty in a checkpoint from before they were counted.
    pace : where the time of the steps went.
    pieces : parts in which each batch is computed (see training.pieces); more than one where memory is short. Kept, so
        that a resumed training goes on with the same rounding.
    """

    step: int = 0
    seconds: float = 0.0
    weights: StateDict = field(default_factory=dict)
    average: StateDict = field(default_factory=dict)
    best: StateDict = field(default_factory=dict)
    moments: StateDict = field(default_factory=dict)
    best_dice: float = -1.0
    factors: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    seen: Tensor = field(default_factory=lambda: torch.zeros((0, 0, 2), dtype=torch.int64))
    pace: Pace = field(default_factory=Pace)
    pieces: int = 1

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Validations as rows with their mean Dice, for tables and plots."""
        return [{**row, "mean": mean_dice(row["dice"])} for row in self.validations]


def mean_dice(dice: dict[str, float]) -> float:
    """Return the mean over labels; 0 for none."""
    return sum(dice.values()) / len(dice) if dice else 0.0


_GROUPS = ("weights", "average", "best", "moments")


def save_state(path: Path, state: LoopState, *, job: str) -> None:
    """Write a state atomically; `job` is the digest of plan and data that it belongs to."""
    tensors = {
        f"{group}/{key}": value.detach().cpu().contiguous()
        for group in _GROUPS
        for key, value in getattr(state, group).items()
    }
    tensors["record/factors"] = torch.tensor(state.factors, dtype=torch.float64)
    tensors["record/losses"] = torch.tensor(state.losses, dtype=torch.float64)
    tensors["record/seen"] = state.seen
    plain = {
        "job": job,
        "step": state.step,
        "seconds": state.seconds,
        "best_dice": state.best_dice,
        "validations": state.validations,
        "pace": asdict(state.pace),
        "pieces": state.pieces,
    }
    metadata = {"state": json.dumps(plain), "sha256": _checksum(plain, tensors)}
    # Not save_file: where the disk is full it raises no OSError.
    content = safetensors.torch.save(tensors, metadata=metadata)

    def write(file: Path) -> None:
        file.write_bytes(content)

    write_atomically(path, write)


def _checksum(plain: dict[str, Any], tensors: StateDict) -> str:
    """Return a SHA-256 of all content: safetensors itself would take a flipped bit for a weight."""
    total = hashlib.sha256(canonical_json(plain))
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def load_state(path: Path, *, job: str) -> LoopState:
    """Read a state; raise TrainingError if it is damaged or belongs to another plan or other data."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            plain = json.loads(metadata["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        if _checksum(plain, tensors) != metadata["sha256"]:
            raise ValueError("its SHA-256 is not the one that it was written with")
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise TrainingError(
            f"{path}: the checkpoint is damaged ({error}); delete it to start this fold again"
        ) from error
    if plain["job"] != job:
        raise TrainingError(
            f"{path}: the checkpoint belongs to another plan or other data; choose another --out, or delete it"
        )
    state = LoopState(
        step=plain["step"],
        seconds=plain["seconds"],
        best_dice=plain["best_dice"],
        validations=plain["validations"],
        factors=tensors.pop("record/factors").tolist(),
        losses=tensors.pop("record/losses").tolist(),
        seen=tensors.pop("record/seen", LoopState().seen),
        pace=Pace(**plain.get("pace", {})),
        pieces=plain.get("pieces", 1),
    )
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        getattr(state, group)[name] = value
    return state


def job_digest(*parts: Any) -> str:
    """Return the digest that ties a checkpoint to its plan, data and fold."""
    return digest(list(parts))
