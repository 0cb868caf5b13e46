"""How much memory it takes to bring several models back together, or one with its probabilities, before it begins.

    libraries and weights + image + each prepared image + mask + each slab + planes of each + max(window, painting)

As medseg.inference.memory, whose terms these are; no term is classes × volume unless probabilities are asked for in
memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from medseg.inference.joint import VALUES
from medseg.inference.memory import FLOAT, LIBRARIES, Case, Need, cuts, network_bytes, require, terms, weights_bytes
from medseg.inference.way import Box, axis_of, shared_axis
from medseg.inference.way_back import ways_back
from medseg.inference.windows import Layout, layout
from medseg.planning.plan import Plan
from medseg.preparation.prepare import target_size
from medseg.preparation.steps import Oriented, Step, flips_to
from medseg.targets import channel_names, exclusive

PLANES = 7
"""Planes of logits of a model at a time: those that its slices lie between, before and now, and their mixture."""
COPIES = 9
"""Arrays of VALUES at a time: corners, their mixtures, probabilities and sums."""


def forecast_joint(
    cases: Sequence[Case],
    *,
    networks: Sequence[int] = (),
    soft: int = 0,
    in_file: bool = False,
    held: int | None = None,
    limit: int | None = None,
) -> Need:
    """Return what a prediction of several models takes, as `medseg.inference.memory.forecast` does for one mask.

    Parameters
    ----------
    cases : of each model, the same image.
    networks : of each model, where `held` is not told.
    soft : bytes of a probability; 0: these are not asked for.
    in_file : whether they are written to a file as they come, so that they are not held.

    Raises
    ------
    BatchError : MAX_MEMORY.
    """
    if held is None:
        weights = [count * weights_bytes(case) for count, case in zip(networks, cases, strict=True)]
        held = LIBRARIES + sum(weights)
    grids = [_grid(case) for case in cases]
    axis = shared_axis(grids)
    falling = axis_of(grids[0][0], axis)[1]
    layers = [network_bytes(case, where.deep) for case, (_, where) in zip(cases, grids, strict=True)]
    first = cases[0]
    segments = len(channel_names(first.spec)) - exclusive(first.spec)
    best: Need | None = None
    one, two = (n for other, n in enumerate(first.shape) if other != axis)
    for tiles in [(1, 1), *cuts(one, two)]:
        need = replace(_joint(cases, grids, axis, falling, layers, tiles, soft), held=held)
        need = need if in_file else replace(need, mask=need.mask + soft * segments * math.prod(first.shape))
        best = need if best is None or need.total < best.total else best
        if limit is None or need.total <= limit:
            return need
    assert best is not None
    return require(best, first, limit)


def image_key(plan: Plan) -> str:
    """Return what of a plan the image that networks are given depends on: members that agree in it share it.

    Not where there is a first stage, whose mask is part of that image.
    """
    return plan.model_dump_json(include={"dimensions", "orientation", "spacing", "normalisation", "nnunet", "monai"})


def cut_plane(shape: Sequence[int], axis: int, tiles: tuple[int, int]) -> list[Box]:
    """Cut a slice across an axis of an image into parts, as even as they may be."""
    one, two = (n for other, n in enumerate(shape) if other != axis)
    rows, columns = (_parts(n, count) for n, count in ((one, tiles[0]), (two, tiles[1])))
    return [(row, column) for row in rows for column in columns]


def _parts(size: int, count: int) -> list[tuple[int, int]]:
    edges = [round(size * n / count) for n in range(count + 1)]
    return [(first, last) for first, last in itertools.pairwise(edges) if first < last]


def _grid(case: Case) -> tuple[tuple[Step, ...], Layout]:
    size = target_size(case.shape, case.affine, case.plan)
    flips = flips_to(case.affine, case.plan.orientation)
    turn = Oriented(tuple((float(a), float(b)) for a, b in flips))
    return (turn, size.step), layout(size.after, case.plan, case.preset)


def _joint(
    cases: Sequence[Case],
    grids: Sequence[tuple[tuple[Step, ...], Layout]],
    axis: int,
    falling: bool,
    layers: Sequence[int],
    tiles: tuple[int, int],
    soft: int,
) -> Need:
    first = cases[0]
    classes = len(channel_names(first.spec))
    fine = math.prod(math.ceil(n / count) for n, count in zip(_others(first.shape, axis), tiles, strict=True))
    prepared: dict[str, int] = {}
    slab = planes = window = preparing = judging = 0
    for case, (steps, where), network in zip(cases, grids, layers, strict=True):
        own, turned = axis_of(steps, axis)
        # Parts of a slice are counted along its own axes, which may be the other way round here.
        cut = tiles if axis_of(steps, _first_other(axis))[0] == _first_other(own) else tiles[::-1]
        where = replace(where, along=own)
        need = terms(case, where, ways_back(steps, where), cut, network)
        plane = need.slab // ((classes + 1) * where.deep[own] * FLOAT)
        slab, preparing = slab + need.slab, max(preparing, need.preparing)
        planes += PLANES * classes * plane * FLOAT + fine * 8
        window, judging = max(window, need.window), max(judging, need.judging)
        copy = math.prod(where.padded) * FLOAT * len(case.spec.channels) * (turned != falling)
        key = image_key(case.plan)
        prepared[key] = max(prepared.get(key, 0), need.prepared + copy)
    mask = terms(first, grids[0][1], ways_back(*grids[0]), (1, 1), 0).mask
    return Need(
        held=0,
        image=math.prod(first.shape) * first.itemsize * len(first.spec.channels),
        prepared=sum(prepared.values()),
        mask=mask,
        slab=slab,
        planes=planes,
        window=window,
        painting=COPIES * VALUES * FLOAT + fine * (100 + 2 * soft * classes),
        preparing=preparing,
        judging=judging,
        tiles=tiles,
    )


def _others(shape: Sequence[int], axis: int) -> tuple[int, int]:
    one, two = (n for other, n in enumerate(shape) if other != axis)
    return one, two


def _first_other(axis: int) -> int:
    return next(other for other in range(3) if other != axis)
