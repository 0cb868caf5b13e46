"""A prediction in a process of its own, which says what it took and what was foretold: `python memory_program.py JSON`.

The networks answer at random, so that every cell of the source is mixed: nothing is skipped.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg.batch.room import on_disk
from medseg.device import resident
from medseg.inference import memory
from medseg.inference.answer import averaged, kept, logits_at, painted
from medseg.inference.joint_memory import forecast_joint
from medseg.inference.memory import Case, Need, forecast
from medseg.inference.predict import Model, answer_of, case_of, in_memory, notes_for, predict_soft, predict_volume
from medseg.planning.plan import Plan
from medseg.spec import Spec
from medseg.volume import Volume

SIZE = 192


class Head(nn.Module):
    """Every voxel by itself, and no layers that take memory beside the answer."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        """Return as many channels as there are classes."""
        return x * self.weights.reshape(1, -1, *[1] * (x.ndim - 2))


def model_of(plans: list[str], spec: Spec, networks: int, quality: bool) -> Model:
    """Return one model, or an ensemble of several."""
    members, classes = [], len(spec.foreground) + 1
    # The formula must speak of this network, not of that of the plan, whose layers would hide what is wrong elsewhere.
    memory._meta_network = lambda case: Head(torch.empty(classes, device="meta"))
    for seed, text in enumerate(plans):
        estimate = SimpleNamespace() if quality else None
        plan = Plan.model_validate_json(text)
        info = SimpleNamespace(plan=plan, spec=spec, postprocess=(), temperature=1.0, quality=estimate)
        seeds = [torch.Generator().manual_seed(seed + n) for n in range(networks)]
        heads = [Head(torch.randn(classes, generator=each)) for each in seeds]
        members.append(Model(SimpleNamespace(info=info), heads, torch.device("cpu")))
    return members[0] if len(members) == 1 else Model(members[0].bundle, [], torch.device("cpu"), None, tuple(members))


def predict(model: Model, image: Volume, given: dict[str, Any], limit: int | None) -> None:
    """Predict as it is asked for."""
    if given["kept"]:
        keep(model, image)
        return
    options: dict[str, Any] = {"mirror": given["mirror"], "max_memory": limit}
    if given["quality"]:
        options["notes"] = notes_for(model, mirror=given["mirror"])
    with tempfile.TemporaryDirectory() as folder:
        room = partial(on_disk, Path(folder)) if given["soft"] == "file" else in_memory
        if given["soft"]:
            mask, _ = predict_soft(model, image, room=room, **options)
        else:
            mask = predict_volume(model, image, **options)
        if given["quality"]:
            options["notes"].signs(mask)


def keep(model: Model, image: Volume) -> None:
    """Do what the end of a training does with a case, or a selection with each of its runs and all of them."""
    voxels = np.arange(0, image.array.size, 97)
    with tempfile.TemporaryDirectory() as folder:
        answers = [kept(answer_of(each, image), Path(folder)) for each in model.members or (model,)]
        for each in answers:
            painted(each)
            logits_at(each, voxels)
        if len(answers) > 1:
            averaged(answers)


def told(cases: list[Case], given: dict[str, Any], **options: Any) -> Need:
    """Return what is foretold."""
    if len(cases) == 1 and not given["soft"]:
        return forecast(cases[0], **options)
    options |= {"networks": [1] * len(cases)}
    soft = {"": 0, "file": 1, "memory": 4}[given["soft"]]
    return forecast_joint(cases, soft=soft, in_file=given["soft"] == "file", **options)


def main(given: dict[str, Any]) -> None:
    """Predict a small image, which loads what is loaded late, then one of `depth` slices."""
    torch.set_num_threads(1)
    model = model_of(given["plans"], Spec.model_validate(given["spec"]), given["networks"], given["quality"])
    random = np.random.default_rng(0)
    predict(model, Volume(random.integers(-9, 9, (1, 16, 16, 16)).astype(np.int16), np.eye(4)), given, None)
    array = np.empty((1, given["depth"], SIZE, SIZE), np.int16)
    for plane in array[0]:
        plane[:] = random.integers(-99, 99, (SIZE, SIZE))
    image = Volume(array, np.eye(4))
    cases = [case_of(each, image, quality=given["quality"]) for each in model.members or (model,)]
    told(cases, given, limit=None)  # loads what a worker has loaded with its networks
    before = resident()
    need = told(cases, given, held=before - array.nbytes, limit=given["limit"])
    predict(model, image, given, given["limit"])
    # Not ru_maxrss: that begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    arrays = need.image + need.prepared + need.mask
    found = {"peak": peak, "need": need.total, "before": before, "tiles": need.tiles, "arrays": arrays}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
