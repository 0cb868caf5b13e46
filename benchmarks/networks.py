"""Every network: parameters, multiplications a voxel, and what it learns in equal time (docs/reference/networks.md).

    MEDSEG_DATA=../shared/data python benchmarks/networks.py --budget 50s     # about 40 minutes on two quiet cores
    python benchmarks/networks.py --write                                     # the page from networks.csv, seconds

Every network gets the stages, patch and batch that the planner makes for a U-Net on these data (STAGES below, width
"narrow"), the same cases, loss, rate and augmentation, and the same wall time for its steps; it learns in the faster of
fp32 and bf16, which is measured first, outside of that time. The running average after the last step is what is scored.
3-D: hippocampus, 128 of the 160 cases of hippocampus_split.json to learn from, the other 32 to score; the 40 test cases
are not touched. 2-D: EM of ISBI 2012, slices 06 to 23 to learn from, the block 00 to 05 to score. One seed: differences
of a few thousandths mean nothing, and a minute favours networks that learn fast over those that end higher.

Multiplications: multiply-adds of convolutions and matrix products of one forward pass in evaluation mode, batch 1, as
torch.utils.flop_counter counts them (halved), divided by the voxels of the input patch; padding that a network needs
counts as its work. networks.csv holds a line for each network that has run; those are not run again (`--again` does).
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import HERE, inner_split, limited, markdown, replace_between

if TYPE_CHECKING:
    from torch import nn

    from medseg.spec import Case, Spec
    from medseg.training.loop import Job

TABLE = HERE / "networks.csv"
PAGE = HERE.parent / "docs" / "reference" / "networks.md"
SPECS = {2: "em_isbi2012", 3: "hippocampus"}
CLASSES = {2: 2, 3: 3}
"""Channels of the logits: background and the labels of the spec."""
PATCH = {2: (256, 256), 3: (40, 56, 40)}
BATCH = {2: 3, 3: 2}
STAGES: dict[int, dict[str, Any]] = {
    2: {"features": [16, 32, 64, 128, 256, 256], "strides": [[2, 2]] * 5, "kernels": [[3, 3]] * 6},
    3: {"features": [16, 32, 64, 128], "strides": [[2, 2, 2]] * 3, "kernels": [[3, 3, 3]] * 4},
}
EM_HELD = 6
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Size:
    parameters: int
    macs_per_voxel: float


@dataclass(frozen=True)
class Result:
    """A line of networks.csv; times in seconds, `step_s` the median of the training, `case_s` of a prediction."""

    network: str
    dimensions: int
    budget_s: float
    seed: int
    precision: str
    fp32_s: float
    bf16_s: float
    steps: int
    step_s: float
    train_s: float
    cpu_s: float
    case_s: float
    dice: float
    pixel_error: float | None
    v_rand: float | None
    threads: int
    load: float
    torch: str
    date: str


def variants() -> list[tuple[str, int]]:
    from medseg.networks import NETWORKS

    return [(name, dims) for dims in (3, 2) for name in NETWORKS if dims in NETWORKS[name].spatial_dims]


def options_of(name: str, dims: int) -> dict[str, Any]:
    from medseg.networks import planned_options

    return planned_options(name, STAGES[dims])


def build(name: str, dims: int) -> "nn.Module":
    from medseg.networks import build_network

    return build_network(
        name, spatial_dims=dims, in_channels=1, out_channels=CLASSES[dims], options=options_of(name, dims)
    )


def size_of(name: str, dims: int) -> Size:
    """Count on the meta device: no value is computed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = build(name, dims).eval().to("meta")
    image = torch.empty((1, 1, *PATCH[dims]), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return Size(sum(p.numel() for p in network.parameters()), counter.get_total_flops() / 2 / image.numel())


def cases_of(dims: int, work: Path) -> tuple["Spec", tuple["Case", ...], tuple["Case", ...]]:
    """Return the spec, cases to learn from and cases to score."""
    from medseg.spec import load_dataset

    dataset = load_dataset(HERE.parent / "data_specs" / f"{SPECS[dims]}.yaml")
    names = sorted(case.id for case in dataset.cases)
    if dims == 3:
        split = inner_split(work / "inner_split.json", names)
        groups = (split["train"], split["test"])
    else:
        groups = (names[EM_HELD:], names[:EM_HELD])
    pick = [tuple(case for case in dataset.cases if case.id in group) for group in groups]
    return dataset.spec, pick[0], pick[1]


def make_job(name: str, dims: int, options: argparse.Namespace) -> "Job":
    """Plan as the planner would for a fixed number of steps, with the stages of this file; prepare what is not yet."""
    from medseg.planning.fingerprint import Fingerprint, take_fingerprint
    from medseg.planning.plan import Measured, NetworkPlan
    from medseg.planning.planner import decide, draft
    from medseg.preparation.cache import CaseCache, prepare_cases
    from medseg.preparation.path import training_path, up_to_cache
    from medseg.training.loop import Job, torch

    folder = options.work / SPECS[dims]
    spec, train, held = cases_of(dims, options.work)
    file = folder / "fingerprint.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(take_fingerprint(spec, train).model_dump_json())
    fingerprint = Fingerprint.model_validate_json(file.read_text())
    measured = Measured(device="cpu", threads=torch.get_num_threads(), step_seconds={"narrow fp32": 1.0})
    sketch = draft(spec, fingerprint, device="cpu", dimensions=dims)  # type: ignore[arg-type]
    plan, _ = decide(
        spec, fingerprint, sketch, measured, budget_seconds=None, training_seconds=None, steps=1, seed=options.seed
    )
    patch = PATCH[dims] if dims == 3 else (*PATCH[dims], 1)
    network = NetworkPlan(name=name, options=options_of(name, dims))
    plan = plan.model_copy(
        update={"patch_size": patch, "batch_size": BATCH[dims], "network": network, "validations": 1, "averaging": 0.95}
    )
    cache = CaseCache(folder / "cache", spec, plan)
    path = training_path(spec, plan, cache)
    prepare_cases(up_to_cache(path), cache, (*train, *held))
    checkpoint = folder / f"{name}.safetensors"
    checkpoint.unlink(missing_ok=True)
    return Job(
        spec=spec, plan=plan, path=path, cache=cache, train=train, validation=(), checkpoint=checkpoint,
        digest="benchmark", device=torch.device("cpu"),
    )  # fmt: skip


def measured_step(job: "Job", repeats: int) -> float:
    """Return the median seconds of a training step on real batches, after one that warms up."""
    from medseg.training.loop import Learner, read_batch

    learner, times = Learner(job), []
    for step in range(repeats + 1):
        batch = read_batch(job, step)
        began = time.monotonic()
        learner.step(*batch, 1e-3)
        times.append(time.monotonic() - began)
    return statistics.median(times[1:])


def one_network(name: str, dims: int, options: argparse.Namespace) -> Result:
    """Train and score one network in this process."""
    import torch

    from medseg.duration import seconds
    from medseg.training.loop import fit
    from medseg.training.schedule import ByClock

    budget, load = seconds(options.budget), os.getloadavg()[0]
    job = make_job(name, dims, options)
    repeats = 1 if budget < 10 else 3
    times = {p: measured_step(with_precision(job, p), repeats) for p in PRECISIONS}
    precision = min(times, key=lambda key: times[key])
    job, steps = with_precision(job, precision), []
    began, cpu = time.monotonic(), time.process_time()
    state = fit(
        job,
        lambda _: ByClock(budget, spent=0.0, validations=1, warmup=job.plan.warmup),
        watch=lambda _state, _schedule, took: steps.append(took) if took else None,
    )
    train_s, cpu_s = time.monotonic() - began, time.process_time() - cpu
    scores = score(job, cases_of(dims, options.work)[2], state.average)
    job.checkpoint.unlink(missing_ok=True)
    return Result(
        network=name, dimensions=dims, budget_s=budget, seed=options.seed, precision=precision,
        fp32_s=round(times["fp32"], 4), bf16_s=round(times["bf16"], 4), steps=state.step,
        step_s=round(statistics.median(steps), 4), train_s=round(train_s, 1), cpu_s=round(cpu_s, 1),
        threads=torch.get_num_threads(), load=round(load, 2), torch=torch.__version__,
        date=time.strftime("%Y-%m-%d"), **scores,
    )  # fmt: skip


def with_precision(job: "Job", precision: str) -> "Job":
    return replace(job, plan=job.plan.model_copy(update={"precision": precision}))


def score(job: "Job", cases: Sequence["Case"], weights: dict[str, Any]) -> dict[str, Any]:
    """Return the mean Dice of the labels, each where a reference holds it; for EM also its own scores."""
    import numpy as np
    import torch

    from medseg.bundle import make_network
    from medseg.evaluation.em import stack_scores
    from medseg.inference.sliding_window import slide
    from medseg.preparation.path import up_to_cache
    from medseg.targets import decode, probabilities

    network = make_network(job.spec, job.plan).eval()
    network.load_state_dict(weights)
    dice: dict[str, list[float]] = {label: [] for label in job.spec.foreground}
    soft, cells, times = [], [], []
    for case in cases:
        arrays = up_to_cache(job.path)(case)
        began = time.monotonic()
        with torch.inference_mode():
            logits = slide(torch.from_numpy(np.array(arrays["image"])), [network], job.plan, mirror=False)
        times.append(time.monotonic() - began)
        found, mask = decode(job.spec, logits).numpy(), np.asarray(arrays["mask"])
        for label, value in job.spec.foreground.items():
            reference, predicted = mask == value, found == value
            if reference.any():
                dice[label].append(float(2 * (reference & predicted).sum() / (reference.sum() + predicted.sum())))
        soft.append(probabilities(job.spec, logits)[-1, :, :, 0].numpy())
        cells.append(mask[0, :, :, 0] > 0)
    result = {
        "dice": round(statistics.mean(statistics.mean(rows) for rows in dice.values() if rows), 4),
        "case_s": round(statistics.median(times), 3),
        "pixel_error": None,
        "v_rand": None,
    }
    if job.plan.dimensions == 2:
        half = next(row for row in stack_scores(soft, cells) if row.threshold == 0.5)
        result |= {"pixel_error": round(half.pixel_error, 4), "v_rand": round(half.v_rand, 4)}
    return result


def read_table(file: Path = TABLE) -> dict[tuple[str, int], Result]:
    """Return (network, dimensions) -> its line."""
    if not file.exists():
        return {}
    casts: dict[str, Callable[[str], Any]] = {
        field.name: {int: int, float: float, str: str}.get(field.type, _number) for field in fields(Result)
    }
    with open(file, encoding="utf-8", newline="") as text:
        rows = [Result(**{key: casts[key](value) for key, value in row.items()}) for row in csv.DictReader(text)]
    return {(row.network, row.dimensions): row for row in rows}


def _number(text: str) -> float | None:
    return float(text) if text else None


def write_table(rows: dict[tuple[str, int], Result], file: Path) -> None:
    order = [key for key in variants() if key in rows]
    with open(file, "w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, [field.name for field in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(rows[key]) for key in order)


def page_text(rows: dict[tuple[str, int], Result]) -> str:
    return "\n".join(_section(dims, rows) for dims in (3, 2))


def _section(dims: int, rows: dict[tuple[str, int], Result]) -> str:
    measured = [row for key, row in rows.items() if key[1] == dims]
    head = ["network", "parameters", "MACs a voxel", "s a step", "steps", "Dice", "s a case"]
    head += ["pixel error", "V_rand"] if dims == 2 else []
    lines = [list(_cells(name, dims, rows.get((name, dims)))) for name, d in variants() if d == dims]
    what = {3: "3-D, hippocampus", 2: "2-D, membranes in EM"}[dims]
    patch = "×".join(map(str, PATCH[dims]))
    told = f"### {what}\n\nPatch {patch}, batch {BATCH[dims]}, features {STAGES[dims]['features']}. "
    return told + _how(measured) + "\n\n" + markdown(head, lines)


def _how(measured: Sequence[Result]) -> str:
    if not measured:
        return "Training has not been measured yet."
    loads, dates = [row.load for row in measured], sorted({row.date for row in measured})
    return (
        f"Each learnt for {measured[0].budget_s:g} s (threads: {measured[0].threads}), seed {measured[0].seed}, torch "
        f"{measured[0].torch}, {' and '.join(dict.fromkeys((dates[0], dates[-1])))}; load of the machine "
        f"{min(loads):g} to {max(loads):g}."
    )


def _cells(name: str, dims: int, row: Result | None) -> Iterator[str]:
    size = size_of(name, dims)
    yield f"`{name}`"
    yield f"{size.parameters:,}"
    yield f"{size.macs_per_voxel:,.0f}"
    if row is None:
        yield from ("not measured", *["–"] * (5 if dims == 2 else 3))
        return
    yield f"{row.step_s:.3f} ({row.precision})"
    yield str(row.steps)
    yield f"{row.dice:.3f}"
    yield f"{row.case_s:.2f}"
    if dims == 2:
        yield f"{row.pixel_error:.3f}"
        yield f"{row.v_rand:.3f}"


def write_page(page: Path = PAGE, table: Path = TABLE) -> None:
    replace_between(page, "networks.py", page_text(read_table(table)))


def run_all(options: argparse.Namespace) -> None:
    """Run each network in a process of its own; one that fails is told and left out."""
    from medseg.duration import seconds

    rows = read_table(options.table)
    other = {row.budget_s for row in rows.values()} - {seconds(options.budget)}
    if other and (options.only or not options.again):
        raise SystemExit(f"{options.table} holds a budget of {other} s: give the same one, or --again for all networks")
    failed = []
    for name, dims in variants():
        if options.only and f"{name}:{dims}" not in options.only and name not in options.only:
            continue
        if (name, dims) in rows and not options.again:
            continue
        words = ["--budget", options.budget, "--seed", str(options.seed), "--work", str(options.work)]
        done = subprocess.run(
            [sys.executable, __file__, "--row", f"{name}:{dims}", *words],
            env=limited(), stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            failed.append(f"{name}:{dims}")
            continue
        rows = read_table(options.table)
        rows[name, dims] = Result(**json.loads(done.stdout.splitlines()[-1]))
        write_table(rows, options.table)
        print(json.dumps(asdict(rows[name, dims])), flush=True)
    if failed:
        raise SystemExit(f"failed, and not in the table: {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="50s", help="wall time of the training of each network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="NAME or NAME:DIMENSIONS")
    parser.add_argument("--again", action="store_true", help="run also what the table holds")
    parser.add_argument("--quick", action="store_true", help="3 s a network, into a table beside --work: does it run?")
    parser.add_argument("--write", action="store_true", help="only write the page from the table")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--work", type=Path, default=Path("/tmp/medseg-networks"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        name, _, dims = options.row.rpartition(":")
        print(json.dumps(asdict(one_network(name, int(dims), options))))
        return
    if options.quick:
        options.budget, options.table = "3s", options.work / "quick.csv"
    if not options.write:
        options.work.mkdir(parents=True, exist_ok=True)
        run_all(options)
    if not options.quick:
        write_page(table=options.table)


if __name__ == "__main__":
    main()
