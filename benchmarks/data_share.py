"""Which share of a training step is data: waiting for patches and augmenting them, against the whole step.

    python benchmarks/data_share.py --data ../shared/data/hippocampus --steps 50

The plan is the one that `medseg train` makes here (or --plan FILE), the loop is the one that it runs; the first steps,
in which kernels are compiled and files are first read, do not count. On a GPU the augmentation is timed by events in
its queue, so that the measurement does not slow down what it measures. `reading` is the time that the thread which
reads ahead needs for a batch: it runs beside the step, and on a processor without spare cores it slows the step down.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from medseg.device import best_device, device_name
from medseg.planning.fingerprint import take_fingerprint
from medseg.planning.plan import Plan, read_plan
from medseg.preparation.cache import CaseCache, prepare_cases
from medseg.preparation.path import training_path, up_to_cache
from medseg.spec import Dataset, load_dataset
from medseg.training.loop import Job, fit, read_batch
from medseg.training.make_plan import make_plan
from medseg.training.manifest import learning_cases
from medseg.training.request import Request
from medseg.training.schedule import BySteps

WARMUP = 5


def plan_for(dataset: Dataset, options: argparse.Namespace) -> Plan:
    if options.plan is not None:
        return read_plan(options.plan)
    fingerprint = take_fingerprint(dataset.spec, learning_cases(dataset))
    return make_plan(dataset, fingerprint, Request(steps=options.steps), best_device())[0]


def make_job(dataset: Dataset, plan: Plan, work: Path, count: int | None) -> Job:
    cases = learning_cases(dataset)[:count]
    cache = CaseCache(work / "cache", dataset.spec, plan)
    path = training_path(dataset.spec, plan, cache)
    prepare_cases(up_to_cache(path), cache, cases)
    return Job(
        spec=dataset.spec,
        plan=plan,
        path=path,
        cache=cache,
        train=cases,
        validation=cases[:1],  # scored once, when the steps are over
        checkpoint=work / "state.safetensors",
        digest="data share",
        device=best_device(),
    )


def measure(job: Job, steps: int) -> dict[str, object]:
    def until(total: int) -> BySteps:
        return BySteps(total, validations=1, warmup=0.05)

    before = fit(job, lambda _: until(WARMUP)).pace
    began = [before.waiting, before.augmenting, before.stepping]
    state = fit(job, lambda _: until(WARMUP + steps))
    waiting, augmenting, stepping = (
        after - first
        for after, first in zip((state.pace.waiting, state.pace.augmenting, state.pace.stepping), began, strict=True)
    )
    reading = []
    for step in range(min(20, steps)):
        start = time.monotonic()
        read_batch(job, step)
        reading.append(time.monotonic() - start)
    return {
        "device": device_name(job.device),
        "threads": torch.get_num_threads(),
        "precision": job.plan.precision,
        "patch_size": list(job.plan.patch_size),
        "batch_size": job.plan.batch_size,
        "steps": steps,
        "step_ms": round(1000 * stepping / steps, 2),
        "waiting_ms": round(1000 * waiting / steps, 2),
        "augmenting_ms": round(1000 * augmenting / steps, 2),
        "reading_ms": round(1000 * statistics.median(reading), 2),
        "data_share": round((waiting + augmenting) / stepping, 4),
        "samples_per_second": round(steps * job.plan.batch_size / stepping, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/hippocampus"))
    parser.add_argument("--plan", type=Path, help="plan to follow instead of the one made here")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="three steps on eight cases, to try the script")
    options = parser.parse_args()
    steps = 3 if options.quick else options.steps
    dataset = load_dataset(options.data)
    with TemporaryDirectory() as work:
        job = make_job(dataset, plan_for(dataset, options), Path(work), 8 if options.quick else None)
        found = measure(job, steps)
    print(json.dumps(found))
    print(f"data: {found['data_share']:.1%} of a step")


if __name__ == "__main__":
    main()
