"""What a model says of one image, plane by plane, and what is made of it on the grid of the source.

An answer is asked of the networks each time it is read; one that is kept lies in a file, and is read as often as
wanted. Nothing here holds classes × volume in memory.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.bundle import BundleInfo
from medseg.errors import ExportError
from medseg.files import is_full
from medseg.inference.joint import Member, Wanted, bring_back
from medseg.inference.joint_memory import cut_plane
from medseg.inference.labels import Key, paint
from medseg.inference.memory import Tile, tiles_of
from medseg.inference.way import Box, Way, axis_of, shared_axis, way
from medseg.inference.way_back import first, seen, ways_back
from medseg.inference.windows import Layout
from medseg.preparation.steps import Shape, Step
from medseg.targets import background_logits, label_type

Planes = Callable[[Layout, Tile | None, bool], Iterator[Tensor]]
BLOCK = 8
"""Planes read at once where those of a file lie across another axis: its rows are then of some KiB."""


@dataclass(frozen=True)
class Answer:
    """What one model says of one image.

    Attributes
    ----------
    info : of the model.
    shape : of the image.
    steps : from the image to the prepared grid.
    where : the prepared grid and its windows.
    device : where planes are.
    planes : (layout with the planes' axis, tile, backwards) -> planes (K, A, B) of logits in order, or of
        probabilities if `chances`.
    chances : whether probabilities are brought back to the grid of the image.
    """

    info: BundleInfo
    shape: Shape
    steps: tuple[Step, ...]
    where: Layout
    device: torch.device
    planes: Planes
    chances: bool = False


def painted(answer: Answer, tiles: tuple[int, int] = (1, 1)) -> NDArray[Any]:
    """Return the label values (1, I, J, K) of one model, on the grid of the image; before post-processing."""
    mask = np.zeros((1, *answer.shape), label_type(answer.info.spec))
    view = seen(mask[0], answer.steps, answer.where)
    for tile, lines, (rows, columns) in tiles_of(ways_back(answer.steps, answer.where), tiles):
        found = answer.planes(answer.where, tile, False)
        paint(found, lines, Key.of(answer.info.spec), view[:, rows, columns])
    return mask


def averaged(
    answers: Sequence[Answer],
    *,
    soft: NDArray[Any] | None = None,
    temperature: float = 1.0,
    tiles: tuple[int, int] = (1, 1),
) -> NDArray[Any]:
    """Return the label values (1, I, J, K) of the mean of several models' probabilities; before post-processing.

    Parameters
    ----------
    answers : of models with the same labels for the same image; the logits of each are divided by its temperature.
    soft : is filled with probabilities (see medseg.inference.joint.Wanted).
    temperature : of the mean, for `soft`.
    """
    one = answers[0]
    axis = shared_axis([(each.steps, each.where) for each in answers])
    falling = axis_of(one.steps, axis)[1]
    mask = np.zeros((1, *one.shape), label_type(one.info.spec))
    background = background_logits(one.info.spec).to(one.device)
    wanted = Wanted(mask[0], soft, Key.of(one.info.spec), background, temperature)
    members = [_member(each, axis, falling) for each in answers]
    bring_back(members, wanted, axis, cut_plane(one.shape, axis, tiles), falling=falling)
    return mask


def _member(answer: Answer, axis: int, falling: bool) -> Member:
    """Return how planes lead back, slice by slice across an axis of the source."""
    own, turned = axis_of(answer.steps, axis)
    where, backwards = replace(answer.where, along=own), turned != falling

    def planes_of(tile: Tile) -> Iterator[Tensor]:
        return answer.planes(where, tile, backwards)

    def way_of(part: Box) -> Way | None:
        return way(answer.shape, answer.steps, where, axis, part, backwards=backwards)

    return Member(planes_of, way_of, answer.info.temperature, chances=answer.chances)


def logits_at(answer: Answer, voxels: NDArray[np.int64]) -> Tensor:
    """Return the logits (K, M) of voxels (M,) of the image, on the CPU; the temperature is not applied.

    Parameters
    ----------
    voxels : indices in the flattened image, each once or several times, in any order.
    """
    axis = shared_axis([(answer.steps, answer.where)])
    member = _member(answer, axis, axis_of(answer.steps, axis)[1])
    one, two = (size for other, size in enumerate(answer.shape) if other != axis)
    back = member.way(((0, one), (0, two)))
    found = background_logits(answer.info.spec)[:, None].repeat(1, len(voxels))
    if back is None:
        return found
    index = np.unravel_index(voxels, answer.shape)
    flat = np.ravel_multi_index([row for other, row in enumerate(index) if other != axis], (one, two))
    order = np.argsort(index[axis], kind="stable")
    edges = np.searchsorted(index[axis][order], np.arange(answer.shape[axis] + 1))
    for number, between, weight in back.slices(member.planes(back.tile)):
        here = torch.from_numpy(order[edges[number] : edges[number + 1]])
        places = back.place[torch.from_numpy(flat)[here]]
        there = places >= 0
        if there.any():
            found[:, here[there]] = between.values(weight, places[there].to(answer.device)).cpu()
    return found


@torch.inference_mode()
def kept(answer: Answer, folder: Path) -> Answer:
    """Return an answer whose planes lie in a file without a name in `folder`, which goes with the answer.

    It takes 4 bytes × classes × voxels of the prepared grid of the disk.

    Raises
    ------
    ExportError : DISK_FULL, NOT_WRITABLE.
    BundleError : as the answer.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed when nothing refers to it any more)
        stored = _Stored(file, answer.where, answer.device)
        weakref.finalize(stored, _close, file)
        for plane in answer.planes(answer.where, None, False):
            file.write(plane.float().contiguous().cpu().numpy().data)
        file.flush()
    except OSError as error:
        raise ExportError(
            f"what a network says of a case cannot be kept in the output folder ({error.strerror or error}). "
            "Free space or choose another --out, then run the same command again.",
            code="DISK_FULL" if is_full(error) else "NOT_WRITABLE",
        ) from error
    return replace(answer, planes=stored)


def _close(file: IO[bytes]) -> None:
    """Give a file back; what a full disk hinders once more was told before, and nobody reads it any more."""
    with contextlib.suppress(OSError):
        file.close()


class _Stored:
    """Planes in a file: those of one axis after the other."""

    def __init__(self, file: IO[bytes], where: Layout, device: torch.device) -> None:
        self.file, self.where, self.device = file, where, device

    def __call__(self, where: Layout, tile: Tile | None, backwards: bool) -> Iterator[Tensor]:
        """Yield planes across any axis."""
        axis = where.axis
        count = self.where.shape[axis]
        step = 1 if axis == self.where.axis else BLOCK
        rows, columns = (slice(*edges) for edges in tile or ((0, None), (0, None)))
        starts = range(0, count, step)
        for start in reversed(starts) if backwards else starts:
            # Mapped for each block anew: pages that were read are not this process's for longer than that.
            block = np.array(
                np.moveaxis(self._mapped(), axis + 1, 0)[start : start + step, :, rows, columns], order="C"
            )
            for plane in reversed(block) if backwards else block:
                yield torch.from_numpy(plane).to(self.device)

    def _mapped(self) -> NDArray[np.float32]:
        """Return a view (K, I, J, K') of the file."""
        sizes = [self.where.shape[axis] for axis in first(self.where.axis)]
        stored: NDArray[np.float32] = np.memmap(self.file, np.float32, "r").reshape(sizes[0], -1, *sizes[1:])
        return np.moveaxis(stored, 0, self.where.axis + 1)
