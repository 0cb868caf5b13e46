"""From a fingerprint to a plan: a pure function of fingerprint, budget and measured step times.

In two moves: ``draft`` fixes what the data decide (spacing, patch, strides) and lists the network widths worth
measuring; ``decide`` picks the width and the precision that the budget allows, by the step times measured here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from medseg.errors import PlanError
from medseg.planning.budget import validations
from medseg.planning.fingerprint import Fingerprint, tidy
from medseg.planning.plan import Augmentation, Measured, NetworkPlan, Normalise, Plan, Spacing, Triple
from medseg.planning.reasons import Chosen, reasons_of
from medseg.spec import Channel, Spec

PATCH_VOXELS = {("cpu", 3): 160_000, ("cpu", 2): 256 * 256, ("cuda", 3): 128**3, ("cuda", 2): 512 * 512}
BATCH_VOXELS = {"cpu": 200_000, "cuda": 4_200_000}
MAX_STAGES = 6
MIN_SIZE = 4
FEW_SLICES = 8
"""With fewer voxels along an axis a third dimension tells nothing."""
WIDTHS: dict[str, tuple[int, ...]] = {
    "narrow": (16, 32, 64, 128, 256, 256),
    "wide": (32, 64, 128, 256, 320, 320),
}
"""Channels by stage. With 8 at full resolution a label was sometimes never learnt (hippocampus, seed 0)."""
DEFAULT_NETWORK = "unet"
"""Unless another is asked for."""
ENOUGH_STEPS = {"narrow": 0, "wide": 20_000}
"""Steps that a width must get within the budget to be worth its price."""
SIDES = {"left", "right", "l", "r", "lh", "rh"}
"""Words in the names of labels that tell the sides of the body apart."""
MIRROR_SECONDS = 30.0
"""Longest prediction of a median case that is still mirrored."""


@dataclass(frozen=True)
class Draft:
    """What the data decide, before anything is measured.

    Attributes
    ----------
    strides, kernels : of the network's stages, per axis (two or three axes).
    widths : name -> channels by stage, the candidates to measure.
    reasons : plan key -> why.
    """

    dimensions: Literal[2, 3]
    orientation: str
    spacing: Spacing
    patch_size: Triple
    batch_size: int
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    widths: dict[str, tuple[int, ...]]
    voxels: float
    reasons: dict[str, str]

    def network(self, width: str) -> NetworkPlan:
        """Return the network plan of one candidate."""
        options: dict[str, Any] = {
            "features": list(self.widths[width]),
            "strides": [list(s) for s in self.strides],
            "kernels": [list(k) for k in self.kernels],
        }
        return NetworkPlan(name=DEFAULT_NETWORK, options=options)


def draft(
    spec: Spec,
    fingerprint: Fingerprint,
    *,
    device: str,
    coarser: float = 1.0,
    because: str = "asked for",
    dimensions: Literal[2, 3] | None = None,
) -> Draft:
    """Decide what follows from the data alone.

    Parameters
    ----------
    device : "cpu" or "cuda", for the size of patch and batch.
    coarser : factor on the spacing (see planning.coarsening), and `because`: why, in words.
    dimensions : forces a 2-D or a 3-D plan.
    """
    shape, spacing = fingerprint.median_shape, fingerprint.median_spacing
    dims, why_dims = (dimensions, "asked for") if dimensions else _dimensions(spec, shape)
    axes, why_axes = _slice_last(shape, spacing, dims)
    orientation = "".join("RAS"[a] for a in axes)
    target, why_spacing = _target_spacing(spec, fingerprint, coarser, because)
    target = (target[axes[0]], target[axes[1]], target[axes[2]])
    size = [max(1.0, shape[a] * spacing[a] / t) for a, t in zip(axes, target, strict=True)]
    limit = PATCH_VOXELS[(device, dims)]
    patch = _patch(size, dims, limit)
    strides, kernels = _stages(patch, target, dims)
    multiple = [math.prod(s[a] for s in strides) for a in range(dims)] + [1] * (3 - dims)
    i, j, k = _whole(patch, multiple, limit)
    batch = max(2, min(32, BATCH_VOXELS[device] // (i * j * k)))
    depth = len(strides) + 1
    sizes = "×".join(f"{n:.0f}" for n in size)
    reasons = {
        "dimensions": why_dims,
        "orientation": why_axes,
        "spacing": why_spacing,
        "patch_size": f"The median case has {sizes} voxels at this spacing; a patch covers it up to {limit} voxels "
        f"on a {device}, rounded up to the total stride {multiple}.",
        "batch_size": f"About {BATCH_VOXELS[device]} voxels a step on a {device}, at least two patches.",
    }
    return Draft(
        dimensions=dims,
        orientation=orientation,
        spacing=target,
        patch_size=(i, j, k),
        batch_size=batch,
        strides=tuple(strides),
        kernels=tuple(kernels),
        widths={name: row[:depth] for name, row in WIDTHS.items()},
        voxels=fingerprint.cases * float(np.prod(size)),
        reasons=reasons,
    )


def _dimensions(spec: Spec, shape: Triple) -> tuple[Literal[2, 3], str]:
    if spec.unit == "pixel" or min(shape) < FEW_SLICES:
        return 2, f"The median case has {min(shape)} slice(s): too few for a third dimension."
    return 3, f"The median case has {'×'.join(map(str, shape))} voxels: neighbours along every axis inform."


def _slice_last(shape: Triple, spacing: Spacing, dimensions: int) -> tuple[tuple[int, int, int], str]:
    if dimensions == 3:
        return (0, 1, 2), "Axes of every case are turned to point right, anterior, superior."
    finest = min(spacing)
    slices = max(range(3), key=lambda a: (shape[a] < FEW_SLICES, round(spacing[a] / finest, 3), -shape[a]))
    first, second = [a for a in range(3) if a != slices]
    why = f"The slices, {shape[slices]} at a distance of {spacing[slices]:g} in the median case, come last."
    return (first, second, slices), why


def _target_spacing(spec: Spec, fingerprint: Fingerprint, coarser: float, because: str) -> tuple[Spacing, str]:
    if spec.spacing is not None:
        return spec.spacing, "Set in the dataset spec."
    spacing = list(fingerprint.median_spacing)
    why = "Median of the cases along each axis"
    worst = int(np.argmax(spacing))
    others = [s for a, s in enumerate(spacing) if a != worst]
    if spacing[worst] > 3 * max(others):
        spacing[worst] = max(fingerprint.spacings[1][worst], *others)
        why += f"; axis {'RAS'[worst]} is far coarser, so its finer cases (10th percentile) are kept"
    if coarser > 1:
        spacing = [max(s, min(spacing) * coarser) for s in spacing]
        why += f", made {coarser:.3g} times coarser: {because}"
    return (tidy(spacing[0]), tidy(spacing[1]), tidy(spacing[2])), why + "."


def _patch(size: list[float], dimensions: int, limit: int) -> list[int]:
    """Shrink the longest axis until the patch fits the limit."""
    patch = [max(1, math.ceil(n)) for n in size]
    if dimensions == 2:
        patch[2] = 1
    while math.prod(patch) > limit:
        longest = max(range(3), key=lambda a: patch[a])
        patch[longest] = math.ceil(patch[longest] * 0.95) if patch[longest] > 20 else patch[longest] - 1
    return patch


def _whole(patch: list[int], multiple: list[int], limit: int) -> Triple:
    """Round a patch up to multiples of the total stride, then shorten it to the limit."""
    return shortened([math.ceil(p / m) * m for p, m in zip(patch, multiple, strict=True)], multiple, limit)


def shortened(size: Sequence[int], multiple: Sequence[int], limit: int) -> Triple:
    """Take whole multiples off the longest axes until a patch has at most `limit` voxels; two multiples stay of each.

    What cannot be shortened enough stays larger than the limit.
    """
    patch = list(size)
    while math.prod(patch) > limit:
        spare = [a for a in range(3) if patch[a] > 2 * multiple[a]]
        if not spare:
            break
        longest = max(spare, key=lambda a: patch[a])
        patch[longest] -= multiple[longest]
    return patch[0], patch[1], patch[2]


def _stages(patch: list[int], spacing: Spacing, dimensions: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Halve the axes that are still long and fine enough, as nnU-Net does (Isensee et al. 2021, supplement)."""
    size, step = [float(n) for n in patch[:dimensions]], list(spacing[:dimensions])
    strides: list[tuple[int, ...]] = []
    kernels: list[tuple[int, ...]] = [tuple(3 if s < 2 * min(step) else 1 for s in step)]
    while len(strides) < MAX_STAGES - 1:
        long = [a for a in range(dimensions) if size[a] / 2 >= MIN_SIZE]
        if not long:
            break
        # Compared with the axes that can still be halved: a short fine one must not stop the others.
        finest = min(step[a] for a in long)
        stride = tuple(2 if a in long and step[a] < 2 * finest else 1 for a in range(dimensions))
        size = [n / t for n, t in zip(size, stride, strict=True)]
        step = [s * t for s, t in zip(step, stride, strict=True)]
        strides.append(stride)
        # An axis that is looked along once is looked along at every coarser stage.
        kernels.append(tuple(3 if k == 3 or s < 2 * min(step) else 1 for k, s in zip(kernels[-1], step, strict=True)))
    if not strides:
        raise PlanError(
            f"images of {patch} voxels are too small to learn from; at least {2 * MIN_SIZE} along an axis are needed"
        )
    return strides, kernels


def worth_measuring(width: str, step_seconds: float, training_seconds: float | None) -> bool:
    """Tell whether a width could be chosen: by steps only the narrowest is, by time one that gets ENOUGH_STEPS.

    `step_seconds` is that of a narrower one, which is no slower.
    """
    return training_seconds is not None and training_seconds / step_seconds >= ENOUGH_STEPS[width]


def decide(
    spec: Spec,
    fingerprint: Fingerprint,
    sketch: Draft,
    measured: Measured,
    *,
    budget_seconds: float | None,
    training_seconds: float | None,
    steps: int | None,
    seed: int,
) -> tuple[Plan, dict[str, str]]:
    """Complete a draft to a plan, with the reason of every value.

    Parameters
    ----------
    measured : step times under the names "<width> <precision>".
    budget_seconds : wall time of the whole command; None for a run by steps.
    training_seconds : what of it is left for the loop of one fold.
    steps : fixed number of steps; exactly one of `training_seconds` and `steps` is given.

    Raises
    ------
    PlanError : the budget is too small for a single step, or no step is asked for.
    """
    if steps is not None and steps < 1:
        raise PlanError(f"{steps} steps teach nothing; at least 1 is needed")
    width, precision = _choose(sketch, measured.step_seconds, training_seconds)
    seconds = measured.step_seconds[f"{width} {precision}"]
    expected = steps if steps is not None else int((training_seconds or 0) / seconds)
    if expected < 1:
        raise PlanError(
            f"the budget leaves {training_seconds:.0f} s to learn and one step takes {seconds:.1f} s here; "
            "give a larger --budget"
        )
    mirror, why_mirror = _mirror_axes(spec, sketch)
    alone = _prediction_seconds(sketch, seconds, cases=fingerprint.cases)
    predict = alone * 2 ** len(mirror)
    plan = Plan(
        dataset=spec.name,
        dimensions=sketch.dimensions,
        orientation=sketch.orientation,
        spacing=sketch.spacing,
        normalisation=_normalisation(spec, fingerprint),
        patch_size=sketch.patch_size,
        batch_size=sketch.batch_size,
        network=sketch.network(width),
        loss="dice_ce",
        foreground_share=0.5,
        augmentation=Augmentation(mirror_axes=mirror),
        learning_rate=5e-3,
        weight_decay=1e-2,
        warmup=0.05,
        averaging=round(1 - 1 / max(10.0, 0.03 * expected), 6),
        precision=precision,
        steps=expected,
        validations=validations(training_seconds, alone, fingerprint.cases),
        overlap=0.5,
        test_mirroring=predict <= MIRROR_SECONDS,
        seed=seed,
        budget_seconds=budget_seconds,
        measured=measured,
        fingerprint=fingerprint,
    )
    chosen = Chosen(width, list(sketch.widths), seconds, predict, training_seconds, sketch.voxels)
    return plan, {**sketch.reasons, **reasons_of(plan, chosen), "augmentation": why_mirror}


def _prediction_seconds(sketch: Draft, step_seconds: float, *, cases: int) -> float:
    """Return how long a case takes without mirroring: windows that overlap by half, each a third of a step."""
    windows = max(1.0, sketch.voxels / cases / math.prod(sketch.patch_size) * 2**sketch.dimensions)
    return windows * step_seconds / sketch.batch_size / 3


def _choose(
    sketch: Draft, step_seconds: Mapping[str, float], training_seconds: float | None
) -> tuple[str, Literal["bf16", "fp32"]]:
    """Return the widest candidate that gets enough steps, and its fastest precision."""
    best: tuple[str, Literal["bf16", "fp32"]] | None = None
    for width in sketch.widths:
        rows: dict[Literal["bf16", "fp32"], float] = {}
        for name in ("fp32", "bf16"):
            if f"{width} {name}" in step_seconds:
                rows[name] = step_seconds[f"{width} {name}"]
        if not rows:
            continue
        fastest = min(rows, key=lambda name: rows[name])
        enough = training_seconds is None or training_seconds / rows[fastest] >= ENOUGH_STEPS[width]
        if best is None or (enough and training_seconds is not None):
            best = (width, fastest)
    if best is None:
        raise PlanError("no step time was measured")
    return best


def _normalisation(spec: Spec, fingerprint: Fingerprint) -> dict[str, Normalise]:
    rows = {}
    for name, channel in spec.channels.items():
        scheme = _scheme(channel)
        facts = fingerprint.channels[name]
        if scheme == "ct":
            rows[name] = Normalise(
                scheme="ct", low=facts.low, high=facts.high, mean=facts.mean, deviation=max(facts.deviation, 1e-3)
            )
        else:
            rows[name] = Normalise(scheme=scheme)
    return rows


def _scheme(channel: Channel) -> Literal["zscore", "ct", "none"]:
    if channel.normalisation != "auto":
        return channel.normalisation
    return "ct" if channel.modality.upper() == "CT" else "zscore"


def _mirror_axes(spec: Spec, sketch: Draft) -> tuple[tuple[int, ...], str]:
    """Mirror a picture along every axis, a patient only from left to right, and that only if no label names a side."""
    axes = tuple(range(sketch.dimensions))
    if spec.unit == "pixel":
        return axes, "A picture has no up and down: every axis may be mirrored."
    if names_sides(spec):
        return (), "Labels name left and right, so nothing is mirrored: anatomy has no other symmetry."
    sides = tuple(a for a in axes if sketch.orientation[a] in "RL")
    return sides, "Anatomy is symmetric from left to right only, and no label names a side: that axis is mirrored."


def names_sides(spec: Spec) -> bool:
    """Tell whether a label names a side of the body, so that mirroring would make it wrong."""
    words = (word.lower() for name in spec.foreground for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name))
    return bool(SIDES.intersection(words))
