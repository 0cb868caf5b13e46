"""Models with random weights and images for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.batch.process import ALLOCATOR
from medseg.inference.memory import Case
from medseg.inference.predict import Model
from medseg.volume import Volume

Make = Callable[..., Any]
PROGRAM = Path(__file__).with_name("memory_program.py")
RULES = {"order": 1, "order_z": 0, "separate": None}


class Random(nn.Module):
    """A convolution with random weights; `steps` rounds its logits, so that many are equal."""

    def __init__(self, channels: int, classes: int, *, flat: bool, steps: bool, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        kind = nn.Conv2d if flat else nn.Conv3d
        self.convolution = kind(channels, classes, 3, padding=1)
        for weights in self.convolution.parameters():
            weights.data = torch.randn(weights.shape, generator=random)
        self.steps = steps

    def forward(self, image: Tensor) -> Tensor:
        logits = self.convolution(image)
        return (logits / 3).round() if self.steps else logits


@pytest.fixture(scope="session")
def random_model(make_spec: Make, make_plan: Make) -> Callable[..., Model]:
    def make(
        *,
        classes: int = 5,
        regions: int = 0,
        networks: int = 1,
        channels: int = 1,
        steps: bool = False,
        seed: int = 0,
        previous: Model | None = None,
        high: int = 0,
        **changes: Any,
    ) -> Model:
        labels = {f"l{n}": n + high for n in range(1, (regions or classes - 1) + 1)}
        rows = {f"r{n}": {"labels": [f"l{n}"], "paint": f"l{n}"} for n in range(1, regions + 1)}
        spec = make_spec(labels=labels, regions=rows, channels=tuple(f"c{n}" for n in range(channels)))
        rules = {f"c{n}": {"scheme": "zscore"} for n in range(channels)}
        plan = make_plan(spec, normalisation=rules, **{"patch_size": (8, 8, 8), **changes})
        flat = plan.dimensions == 2
        inputs = channels + (len(labels) if previous else 0)
        nets = [
            Random(inputs, regions or classes, flat=flat, steps=steps, seed=seed + n).eval() for n in range(networks)
        ]
        info = SimpleNamespace(plan=plan, spec=spec, postprocess=(), temperature=1.0)
        return Model(SimpleNamespace(info=info), nets, torch.device("cpu"), previous)

    return make


def make_picture(
    shape: tuple[int, int, int], *, channels: int = 1, seed: int = 0, smooth: bool = True, **rest: Any
) -> Volume:
    """Return an image with empty borders, and for `smooth` few details."""
    random = np.random.default_rng(seed)
    coarse = [max(1, n // 4) for n in shape] if smooth else shape
    values = torch.from_numpy(random.normal(size=(1, channels, *coarse)).astype(np.float32))
    array = F.interpolate(values, shape, mode="trilinear")[0].numpy().copy()
    for axis, n in enumerate(shape):
        if n > 6:
            np.moveaxis(array, axis + 1, 0)[: 1 + axis] = 0
    spacing = rest.pop("spacing", (1.0, 1.0, 1.0))
    return Volume(array, np.diag([*spacing, 1.0]))


@pytest.fixture(scope="session")
def picture() -> Callable[..., Volume]:
    return make_picture


@pytest.fixture
def case(make_spec: Make, make_plan: Make) -> Callable[..., Case]:
    def make(shape: tuple[int, int, int] = (64, 64, 64), classes: int = 20, **changes: Any) -> Case:
        spec = make_spec(labels={f"l{n}": n for n in range(1, classes)})
        options = {"patch_size": (16, 16, 16), "nnunet": {"image": RULES, "logits": RULES}, **changes}
        return Case(shape, np.eye(4), 2, make_plan(spec, **options), spec)

    return make


@pytest.fixture
def measured() -> Callable[..., dict[str, Any]]:
    """Return what a prediction took in a process of its own, and what was foretold (see memory_program)."""

    def run(cases: Sequence[Case], depth: int, **options: Any) -> dict[str, Any]:
        plans = [case.plan.model_dump_json() for case in cases]
        given = {"limit": None, "soft": "", "quality": False, "mirror": False, "networks": 1, "kept": False, **options}
        given |= {"plans": plans, "spec": cases[0].spec.model_dump(mode="json"), "depth": depth}
        command = [sys.executable, str(PROGRAM), json.dumps(given)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ALLOCATOR})
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    return run
