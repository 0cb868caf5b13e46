"""The training loop, readable from top to bottom."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medseg.bundle import make_network
from medseg.device import Stopwatch, autocast, freed, is_out_of_memory
from medseg.errors import Stopped
from medseg.inference.sliding_window import slide
from medseg.losses import LOSSES, deep_supervision
from medseg.parallel import StopRequest, added, stop_request, world
from medseg.planning.plan import Plan
from medseg.preparation.augment import Changes, augment, draw_changes
from medseg.preparation.cache import CaseCache
from medseg.preparation.path import read_regions
from medseg.preparation.sampling import drawn_cases, draws
from medseg.preparation.warp import Region
from medseg.spec import Case, Spec
from medseg.targets import decode, encode, exclusive
from medseg.training.drawn import add_drawn, label_voxels
from medseg.training.health import refuse_explosion, refuse_what_is_no_number, sound
from medseg.training.memory import explained_memory
from medseg.training.pieces import backward
from medseg.training.schedule import Schedule
from medseg.training.start import StartWeights, begin
from medseg.training.state import LoopState, load_state, mean_dice, save_state
from medseg.training.unknown import known_in_batch, only_known

CHECKPOINT_SECONDS = 30.0
SAVING_SECONDS = 1.5
"""A checkpoint that takes longer to write is written more rarely, so that it never takes more than a twentieth."""
GRADIENT_NORM = 12.0
"""Gradients are cut to this norm, as nnU-Net does: one bad batch must not throw the weights away."""


@dataclass(frozen=True)
class Job:
    """One network to train.

    Attributes
    ----------
    path : the training path (see preparation.path); its cache holds all cases.
    train, validation : cases.
    checkpoint : file of the LoopState.
    digest : what the checkpoint belongs to.
    images : case -> first digits of the digest of its images, by which the model will know what it has learnt from.
    start : the weights that the network begins with; random ones unless told.
    """

    spec: Spec
    plan: Plan
    path: Compose
    cache: CaseCache
    train: tuple[Case, ...]
    validation: tuple[Case, ...]
    checkpoint: Path
    digest: str
    device: torch.device
    images: Mapping[str, str] = field(default_factory=dict)
    start: StartWeights | None = None


Watcher = Callable[[LoopState, Schedule, float], None]
"""Told (state, schedule, seconds of a step) after every step and every validation."""


def fit(job: Job, schedule_for: Callable[[LoopState], Schedule], *, watch: Watcher = lambda *_: None) -> LoopState:
    """Train until the schedule ends, from the checkpoint if there is one; return the final state.

    Raises
    ------
    TrainingError : the loss or its gradient is no number any more (LOSS_NOT_FINITE), or the loss exploded (DIVERGED);
        the memory does not hold a single patch (OUT_OF_MEMORY); the checkpoint cannot be used.
    Stopped : the process was asked to stop; the checkpoint is written.
    """
    learner = Learner(job)
    if job.checkpoint.exists():
        learner.restore(load_state(job.checkpoint, job=job.digest))
    learner.join()
    state = learner.state
    schedule = schedule_for(state)
    saved = resumed = time.monotonic()
    pause = CHECKPOINT_SECONDS
    spent = state.seconds
    with (
        ThreadPoolExecutor(1) as reader,
        stop_request() as stop,
        learner.saved_on(Stopped),
        explained_memory(job.plan, job.device),
    ):
        ahead = reader.submit(read_batch, job, state.step)
        while (factor := _next_factor(schedule, state.step, stop)) is not None:
            began = time.monotonic()
            regions, changes = ahead.result()
            state.pace.waiting += time.monotonic() - began
            ahead = reader.submit(read_batch, job, state.step + 1)
            learner.step(regions, changes, factor)
            state.pace.stepping += time.monotonic() - began
            state.seconds = spent + time.monotonic() - resumed
            watch(state, schedule, time.monotonic() - began)
            due = added([schedule.validate_after(state.step - 1)])[0] > 0
            if due:
                began = time.monotonic()
                learner.validate()
                schedule.validated(time.monotonic() - began)
                state.seconds = spent + time.monotonic() - resumed
                watch(state, schedule, 0.0)
            if (due or time.monotonic() - saved > pause) and sound(state.losses):
                began = time.monotonic()
                learner.save()
                saved = time.monotonic()
                pause = CHECKPOINT_SECONDS * max(1.0, (saved - began) / SAVING_SECONDS)
        ahead.cancel()
    if not state.validations or state.validations[-1]["step"] != state.step:
        began = time.monotonic()
        learner.validate()
        schedule.validated(time.monotonic() - began)
        watch(state, schedule, 0.0)
    learner.save()
    return state


def _next_factor(schedule: Schedule, step: int, stop: StopRequest) -> float | None:
    """Return the learning-rate share that the first process decides on; None when the training is over.

    Raises
    ------
    Stopped : any of the processes was asked to.
    """
    factor = schedule.factor(step)
    told, asked = added([math.nan if factor is None else factor, stop.asked])
    if asked:
        raise Stopped(f"stopped on request after step {step}; the checkpoint is written, the same command goes on")
    return None if math.isnan(told) else told


def read_batch(job: Job, step: int) -> tuple[list[Region], Changes]:
    """Return this process's regions of a step and what is to be done with them, a pure function of the plan."""
    plan = job.plan
    rows = draws(
        seed=plan.seed,
        step=step,
        batch_size=plan.batch_size,
        cases=len(job.train),
        foreground_share=plan.foreground_share,
    )
    seed = int(np.random.default_rng((plan.seed, 3, step)).integers(2**62))
    changes = draw_changes(
        plan.augmentation, plan.patch_size, seed=seed, batch=plan.batch_size, dimensions=plan.dimensions
    ).rows(world().share)
    wanted = [
        (row.seed, {**job.cache(job.train[row.case_index]), "foreground": row.foreground, "margin": margin})
        for row, margin in zip(rows[world().share], changes.margins(), strict=True)
    ]
    return read_regions(job.path, wanted), changes


class Learner:
    """Network, running average and optimizer, and the three things done with them: step, validate, save."""

    def __init__(self, job: Job) -> None:
        self.job = job
        torch.manual_seed(job.plan.seed)
        layout = torch.channels_last_3d if job.plan.dimensions == 3 else torch.channels_last
        network = make_network(job.spec, job.plan)
        if job.start is not None:
            begin(network, job.spec, job.plan, job.start)
        self.network = network.to(job.device).to(memory_format=layout)  # type: ignore[call-overload]
        self.layout = layout
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=job.plan.learning_rate, weight_decay=job.plan.weight_decay
        )
        self.loss = LOSSES[job.plan.loss]
        self.levels: Callable[[Tensor], list[Tensor]] = self.network.forward_levels
        shape = (len(job.train), len(job.spec.foreground), 2)
        self.state = LoopState(seen=torch.zeros(shape, dtype=torch.int64))

    def join(self) -> None:
        """Share the gradients with the other processes, if there are any."""
        if world().size > 1:
            self.levels = DistributedDataParallel(_Levels(self.network))

    def step(self, regions: list[Region], changes: Changes, factor: float) -> None:
        """Augment a batch, learn from it, and move the running average."""
        plan, state = self.job.plan, self.state
        with Stopwatch(self.job.device) as augmenting:
            images, masks = augment([region.to(self.job.device) for region in regions], changes)
        held = label_voxels(masks, self.job.spec.foreground.values())
        if plan.dimensions == 2:
            images, masks = images[..., 0], masks[..., 0]
        target, valid = encode(self.job.spec, masks)
        known = known_in_batch(self.job.spec, plan, self.job.train, state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.learning_rate * factor
        loss = self._gradient(images, target, valid, known)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_NORM)
        value, *voxels = added([float(loss), *self._in_batch(held)])
        value /= world().size
        refuse_what_is_no_number(plan, state.step, value, float(norm))
        self.optimizer.step()
        self._move_average(min(plan.averaging, (1 + state.step) / (10 + state.step)))
        state.step += 1
        state.factors.append(factor)
        state.losses.append(value)
        state.pace.augmenting += augmenting.seconds()
        self._count(np.array(voxels))
        refuse_explosion(plan, state.losses)

    def _gradient(self, images: Tensor, target: Tensor, valid: Tensor, known: Tensor | None) -> Tensor:
        """Set the gradient of the loss and return the loss; in more pieces where the memory does not hold the batch.

        `known` : (whole batch, K), which channels the mask of each patch knows; None: all.
        """
        plan, state = self.job.plan, self.state

        def levels(part: Tensor) -> list[Tensor]:
            with autocast(self.job.device.type, plan.precision):
                return self.levels(part.contiguous(memory_format=self.layout))

        def loss(found: list[Tensor]) -> Tensor:
            alone = exclusive(self.job.spec)
            asked, wanted = (found, target) if known is None else only_known(found, target, known, alone)
            return deep_supervision(self.loss, asked, wanted, valid, alone)

        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return backward(levels, loss, images, min(state.pieces, len(images)))
            except (RuntimeError, MemoryError) as error:
                # Several processes add their gradients up in every pass backward: all would have to take the same.
                if not is_out_of_memory(error) or state.pieces >= len(images) or world().size > 1:
                    raise
            # Outside of `except`, whose error holds on to the activations.
            freed(self.job.device)
            state.pieces = min(2 * state.pieces, len(images))

    def _in_batch(self, held: Tensor) -> list[float]:
        """Return the voxels (own patches, labels) at their places in the whole batch, 0 at those of other processes."""
        whole = np.zeros((self.job.plan.batch_size, held.shape[1]))
        whole[world().share] = held.cpu().numpy()
        flat: list[float] = whole.ravel().tolist()
        return flat

    def _count(self, voxels: NDArray[np.float64]) -> None:
        """Count the labels in the patches of the step that was just done."""
        plan, seen = self.job.plan, self.state.seen
        if not len(seen):
            return
        cases = drawn_cases(
            seed=plan.seed, step=self.state.step - 1, batch_size=plan.batch_size, cases=len(self.job.train)
        )
        add_drawn(seen, cases, voxels.reshape(plan.batch_size, -1))

    @torch.no_grad()
    def _move_average(self, decay: float) -> None:
        pairs = zip(self.average.parameters(), self.network.parameters(), strict=True)
        for average, current in pairs:
            average.lerp_(current, 1 - decay)
        # Running statistics of batch norm are averages already.
        for average, current in zip(self.average.buffers(), self.network.buffers(), strict=True):
            average.copy_(current)

    def validate(self) -> None:
        """Score the running average on the validation cases, on the prepared grid and without mirroring."""
        labels = list(self.job.spec.foreground)
        rows = np.zeros((2, len(self.job.validation), len(labels)))  # Dice; whether there is one
        for number in range(len(self.job.validation))[world().share]:
            for label, value in self.case_dice(self.job.validation[number]).items():
                rows[:, number, labels.index(label)] = value, 1
        scores, scored = np.array(added(rows.ravel().tolist())).reshape(rows.shape)
        known = [at for at in range(len(labels)) if scored[:, at].any()]
        dice = {labels[at]: float(scores[scored[:, at] > 0, at].mean()) for at in known}
        self.state.validations.append({"step": self.state.step, "seconds": self.state.seconds, "dice": dice})
        # Not ">": where nothing can be scored (no label in these cases) the last weights are the best.
        if mean_dice(dice) >= self.state.best_dice:
            self.state.best_dice = mean_dice(dice)
            self.state.best = _copy(self.average)

    def case_dice(self, case: Case) -> dict[str, float]:
        """Return the Dice of each label that the reference of a case holds."""
        arrays = self.job.cache(case)
        image = torch.from_numpy(np.array(arrays["image"])).to(self.job.device)
        labels = partial(decode, self.job.spec)
        found = slide(image, [self.average], self.job.plan, mirror=False, made=labels).cpu().numpy()
        mask = np.asarray(arrays["mask"])
        known = mask != self.job.spec.ignore if self.job.spec.ignore is not None else np.ones(mask.shape, bool)
        dice = {}
        for label, value in self.job.spec.foreground.items():
            reference, predicted = (mask == value) & known, (found == value) & known
            if reference.any():
                dice[label] = float(2 * (reference & predicted).sum() / (reference.sum() + predicted.sum()))
        return dice

    def save(self) -> None:
        """Write the checkpoint (the first process does)."""
        if world().rank:
            return
        state = self.state
        state.weights, state.average = _copy(self.network), _copy(self.average)
        names = [name for name, _ in self.network.named_parameters()]
        moments = self.optimizer.state_dict()["state"]
        state.moments = {f"{names[i]}/{key}": value for i, row in moments.items() for key, value in row.items()}
        save_state(self.job.checkpoint, state, job=self.job.digest)

    @contextmanager
    def saved_on(self, error: type[Exception]) -> Iterator[None]:
        """Write the checkpoint when the block ends with this error."""
        try:
            yield
        except error:
            self.save()
            raise

    def restore(self, state: LoopState) -> None:
        """Go on from a state."""
        self.state = state
        self.network.load_state_dict(state.weights)
        self.average.load_state_dict(state.average)
        numbers = {name: i for i, (name, _) in enumerate(self.network.named_parameters())}
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.moments.items():
            name, _, kind = key.rpartition("/")
            moments.setdefault(numbers[name], {})[kind] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": moments})


class _Levels(nn.Module):
    """A network whose call gives its levels: DistributedDataParallel shares the gradients of calls only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        levels: Any = self.network.forward_levels
        found: list[Tensor] = levels(images)
        return found


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}
