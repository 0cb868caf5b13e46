"""A network as one file that runs without medseg: a program of torch.export, or ONNX.

The file is compared with the network before it gets its name: what does not agree is not left behind.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg.errors import ConfigError, ExportError
from medseg.files import write_atomically
from medseg.networks.classic import ClassicUNet
from medseg.networks.fcn import FCN
from medseg.networks.unet import UNet

TOLERANCE = 1e-4
"""Largest difference of a logit that is allowed, as a share of the largest logit (of 1, where all are smaller)."""
LARGEST = 4096
"""Windows in a batch, and multiples of the total stride along an axis, that a program takes."""
NEEDED = ("onnx", "onnxscript", "onnxruntime")
SAID = "medseg.json"
"""Under this name the file says what its network is given and what it answers."""
Run = Callable[[Tensor], Tensor]


class Mean(nn.Module):
    """The mean of the logits of several networks (folds), as `medseg predict` takes it."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, *S) to logits (B, K, *S)."""
        total: Tensor = self.networks[0](image)
        for network in list(self.networks)[1:]:
            total = total + network(image)
        return total / len(self.networks)


@dataclass(frozen=True)
class Agreement:
    """How a file and its network compare.

    Attributes
    ----------
    difference : largest absolute difference of a logit.
    largest : largest absolute logit.
    same : share of voxels (0 to 1) with the same label.
    """

    difference: float
    largest: float
    same: float

    @property
    def allowed(self) -> float:
        """Difference up to which they are taken to agree."""
        return TOLERANCE * max(1.0, self.largest)


@dataclass(frozen=True)
class Window:
    """What a program takes.

    Attributes
    ----------
    size : of a window, (I, J, K) or (I, J), a multiple of `divisor`.
    divisor : total stride along each axis.
    dynamic : whether other multiples, of two or more, are taken along the axes on which `size` is one; else windows
        have this very size.
    """

    size: tuple[int, ...]
    divisor: tuple[int, ...]
    dynamic: bool

    @property
    def steps(self) -> tuple[int | None, ...]:
        """Along each axis what divides the sizes that are taken; None: no other than `size`."""
        free = (self.dynamic and n > d for n, d in zip(self.size, self.divisor, strict=True))
        return tuple(d if any_size else None for d, any_size in zip(self.divisor, free, strict=True))


def window_of(networks: Sequence[nn.Module], patch: Sequence[int]) -> Window:
    """Return what a program of these networks takes: the patch, enlarged to a multiple of the total stride.

    MONAI's networks, and those without padding, reason about their sizes in ways that only hold for one.
    """
    divisors: list[tuple[int, ...]] = [getattr(n, "divisor", (1,) * len(patch)) for n in networks]
    divisor = divisors[0]
    size = tuple(-(-n // d) * d for n, d in zip(patch, divisor, strict=True))
    dynamic = all(isinstance(n, UNet | FCN) or (isinstance(n, ClassicUNet) and not n.valid) for n in networks)
    return Window(size, divisor, dynamic)


def export_network(
    networks: Sequence[nn.Module], window: Window, *, kind: str, out: Path, patch: Tensor, facts: dict[str, Any]
) -> Agreement:
    """Write one file that holds the mean of the networks, if it agrees with them.

    Parameters
    ----------
    kind : "torch" (.pt2) or "onnx".
    patch : (1, C, *window.size) float32 on which they are compared; a batch of it and its mirror image, too.
    facts : what the file says of itself, plain JSON.

    Raises
    ------
    ConfigError : the extra `onnx` is not installed.
    ExportError : the network cannot be exported, the file does not agree with it, or cannot be written.
    """
    if kind == "onnx":
        _require_onnx()
    network = Mean(networks).eval() if len(networks) > 1 else networks[0].eval()
    program = _captured(network, window, patch)
    found: list[Agreement] = []

    def write(path: Path) -> None:
        run = _WRITERS[kind](program, path, json.dumps(facts))
        found.append(compared(network, run, torch.cat([patch, patch.flip(2)]), facts["regions"]))
        found.append(compared(network, run, patch, facts["regions"]))

    write_atomically(out, write)
    return max(found, key=lambda row: row.difference / row.allowed)


def _captured(network: nn.Module, window: Window, patch: Tensor) -> torch.export.ExportedProgram:
    axes: dict[int, Any] = {0: torch.export.Dim("batch", max=LARGEST)}
    for axis, step in enumerate(window.steps):
        if step is not None:
            count = torch.export.Dim(f"count_{axis}", min=2, max=LARGEST)
            axes[axis + 2] = step * count
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch's own functions, for those who write them
            return torch.export.export(network, (torch.cat([patch, patch]),), dynamic_shapes=(axes,))
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        what = str(error).strip().splitlines()[:1]
        raise ExportError(
            f"this network cannot be exported ({type(error).__name__}: {' '.join(what)})", code="EXPORT_UNSUPPORTED"
        ) from error


def _write_torch(program: torch.export.ExportedProgram, path: Path, said: str) -> Run:
    torch.export.save(program, path, extra_files={SAID: said})
    module = torch.export.load(path).module()

    def run(windows: Tensor) -> Tensor:
        answer: Tensor = module(windows)
        return answer

    return run


def _write_onnx(program: torch.export.ExportedProgram, path: Path, said: str) -> Run:
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(program, dynamo=True, input_names=["image"], output_names=["logits"], verbose=False)
    assert made is not None
    made.model.metadata_props[SAID] = said
    made.save(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(windows: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"image": windows.numpy()})[0])

    return run


_WRITERS: dict[str, Callable[[torch.export.ExportedProgram, Path, str], Run]] = {
    "torch": _write_torch,
    "onnx": _write_onnx,
}


def _require_onnx() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--to onnx needs {', '.join(missing)}: pip install 'medseg[onnx]'")


def compared(network: nn.Module, run: Run, windows: Tensor, regions: bool) -> Agreement:
    """Compare a network with what was made of it, on windows (B, C, *S); raise ExportError where they do not agree."""
    with torch.inference_mode():
        ours = network(windows).float()
    theirs = run(windows.clone()).detach().float()
    if ours.shape != theirs.shape or not torch.isfinite(theirs).all():
        raise ExportError(
            f"the exported file answers {tuple(theirs.shape)} or no numbers, the network {tuple(ours.shape)}; nothing "
            "was left behind",
            code="EXPORT_DIFFERS",
        )
    same = ((ours > 0) == (theirs > 0)) if regions else ours.argmax(1) == theirs.argmax(1)
    found = Agreement(float((ours - theirs).abs().max()), float(ours.abs().max()), float(same.float().mean()))
    if found.difference > found.allowed:
        raise ExportError(
            f"the exported file differs from its network by up to {found.difference:.3g} in a logit, allowed are "
            f"{found.allowed:.3g}; nothing was left behind",
            code="EXPORT_DIFFERS",
        )
    return found
