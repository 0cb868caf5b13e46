"""Training step of nnU-Net's network on this processor: nnU-Net's own (fp32) against medseg's in fp32 and bf16.

    python benchmarks/step_time.py --peers /work/peers/bin/python                 # about 10 minutes
    python benchmarks/step_time.py --peers /work/peers/bin/python --dice          # about an hour

The network, patch and batch are those of the 3d_fullres plan that nnU-Net makes of the cases; medseg builds the same
network (as it does for imported models) with the same deep supervision. nnU-Net computes in fp32 on a processor: its
autocast is for CUDA alone. All contenders are ready before the clock starts, in a process each, and take steps in
turn, round after round, so that what disturbs the machine disturbs all; the ratio is that of medians, with the smallest
and largest ratio of a round. A step is forward, loss, backward, clipped gradients and update, of a batch that is in
memory: nnU-Net's `train_step`, medseg's `Learner.step` with augmentation switched off (and, a row of its own, on).
Optimizers are those of each (nnU-Net: SGD; medseg: AdamW and a running average of the weights).

--dice: the same network learns for the same number of steps with medseg in bf16 and in fp32, from the same seeds, and
with nnU-Net's trainer (its own optimizer, schedule to the end of the steps). Scored on 32 of the 160 cases to learn
from; the 40 test cases are not touched. Lines of JSON in --work; what is there is not run again.
Without --peers, the network is the one below (which nnU-Net 2.8.1 plans for these data; its batch follows the number of
cases) and nnU-Net's rows are missing.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _common import Lines, case_dice, cases_in, inner_split, interval, limited, machine, medseg, score
from _contenders import NnUNet

PLAN: dict[str, Any] = {
    "patch_size": [40, 56, 40],
    "batch_size": 9,
    "architecture": {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "features_per_stage": [32, 64, 128, 256],
            "kernel_sizes": [[3, 3, 3]] * 4,
            "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
            "n_conv_per_stage": [2, 2, 2, 2],
            "n_conv_per_stage_decoder": [2, 2, 2],
            "conv_bias": True,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        },
    },
}
STILL = ("noise", "blur", "brightness", "contrast", "gamma", "low_resolution", "spatial_probability")
"""Probabilities of the augmentation; at 0 (and without mirroring) a batch is only cut out."""
GOAL_RATIO, GOAL_DICE = 1.8, 0.005
LEARNT = 0.5
"""Below this mean Dice two networks agree because neither has learnt."""


def write_plan_file(file: Path, configuration: dict[str, Any], options: argparse.Namespace) -> None:
    """Let medseg plan for the cases, and put nnU-Net's network, patch and batch into the plan."""
    from medseg import api
    from medseg.nnunet.architecture import network_plan
    from medseg.planning.plan import Triple, write_plan

    plan = api.plan(options.data, steps=options.steps, splits=options.work / "inner_split.json")
    i, j, k = configuration["patch_size"]
    patch: Triple = (i, j, k)
    update = {
        "network": network_plan(configuration),
        "patch_size": patch,
        "batch_size": options.batch or configuration["batch_size"],
        "steps": options.steps,
        "validations": 1,
    }
    write_plan(file, plan.model_copy(update=update), {})


def answer_steps(options: argparse.Namespace) -> None:
    """Be medseg's contender: answer numbers on stdin with the seconds of such steps."""
    import torch

    from medseg.planning.plan import read_plan
    from medseg.preparation.augment import draw_changes
    from medseg.preparation.sampling import read_through
    from medseg.preparation.warp import Region
    from medseg.spec import load_dataset
    from medseg.training.loop import Job, Learner

    precision, _, augmented = options.worker.partition("+")
    plan = read_plan(options.plan).model_copy(update={"precision": precision})
    if not augmented:
        still = {**dict.fromkeys(STILL, 0.0), "mirror_axes": ()}
        plan = plan.model_copy(update={"augmentation": plan.augmentation.model_copy(update=still)})
    spec = load_dataset(options.data).spec
    nothing: Any = None
    job = Job(
        spec=spec, plan=plan, path=nothing, cache=nothing, train=(), validation=(), checkpoint=Path(), digest="",
        device=torch.device("cpu"),
    )  # fmt: skip
    learner, size = Learner(job), plan.patch_size
    image = torch.randn((len(spec.channels), *size)).numpy()
    mask = torch.randint(len(spec.foreground) + 1, (1, *size), dtype=torch.uint8).numpy()
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            changes = draw_changes(
                plan.augmentation, size, seed=learner.state.step, batch=plan.batch_size, dimensions=plan.dimensions
            )
            regions = []
            for margin in changes.margins():
                part, centre = read_through(image, (0, 0, 0), size, margin)
                labels = read_through(mask, (0, 0, 0), size, margin)[0]
                regions.append(Region(torch.from_numpy(part), torch.from_numpy(labels), centre))
            began = time.monotonic()
            learner.step(regions, changes, 1e-3)
            seconds.append(time.monotonic() - began)
        print("RESULT " + json.dumps(seconds), flush=True)


class Worker:
    """A contender that is ready: asked for steps, it answers with their seconds, and waits otherwise."""

    def __init__(self, command: list[str | Path], log: Path, environment: dict[str, str]) -> None:
        self._log = open(log, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [str(word) for word in command],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def steps(self, count: int) -> list[float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return list(json.loads(line.removeprefix("RESULT ")))
        raise SystemExit(f"a contender ended; its words are in {self._log.name}")


def contenders(peer: NnUNet | None, plan: Path, options: argparse.Namespace) -> dict[str, Worker]:
    own = [sys.executable, __file__, "--data", options.data, "--plan", plan, "--worker"]
    found = {}
    if peer is not None:
        command = [peer.python, Path(__file__).with_name("_nnunet_peer.py"), "steps"]
        found["nnU-Net fp32"] = Worker(command, options.work / "nnunet_steps.log", peer.environment("steps"))
    for name, worker in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16, augmenting", "bf16+augmented")):
        found[f"medseg {name}"] = Worker([*own, worker], options.work / f"{worker}.log", limited())
    return found


def time_steps(peer: NnUNet | None, plan: Path, options: argparse.Namespace) -> None:
    workers = contenders(peer, plan, options)
    print(json.dumps(machine()), flush=True)
    times: dict[str, list[list[float]]] = {name: [] for name in workers}
    try:
        for name, worker in workers.items():
            print(f"{name}: warming up {[round(s, 3) for s in worker.steps(options.warm)]}", flush=True)
        for number in range(options.rounds):
            for name, worker in workers.items():
                times[name].append(worker.steps(options.steps_a_round))
            row = {name: round(statistics.median(rounds[-1]), 3) for name, rounds in times.items()}
            print(json.dumps({"round": number, **row, "load": machine()["load"][0]}), flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    medians = {name: statistics.median(s for row in rounds for s in row) for name, rounds in times.items()}
    base = next(iter(times))
    for name, rounds in times.items():
        ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(times[base], rounds, strict=True)]
        share = f"{medians[base] / medians[name]:.2f} times as fast as {base} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name}: median {medians[name]:.3f} s a step, {share}")
    if peer is not None:
        ratio = medians[base] / medians["medseg bf16"]
        print(f"goal {GOAL_RATIO}: {'reached' if ratio >= GOAL_RATIO else 'missed'} ({ratio:.2f})")
    (options.work / "steps.json").write_text(json.dumps({"machine": machine(), "seconds": times}), encoding="utf-8")


def compare_dice(peer: NnUNet | None, plan: Path, options: argparse.Namespace) -> None:
    lines = Lines(options.work / "dice.jsonl", "contender", "seed", "steps", "batch")
    names = ["medseg bf16", "medseg fp32", *(["nnU-Net fp32"] if peer is not None else [])]
    for seed in options.seeds:
        for name in names:
            key = {"contender": name, "seed": seed, "steps": options.steps, "batch": options.batch}
            if not lines.holds(**key):
                folder = options.work / f"{name.replace(' ', '_')}_{seed}_{options.steps}_{options.batch}"
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
                spent = learn(name, seed, folder, peer, plan, options)
                score(folder / "masks", options.data, options.work / "inner_split.json", folder / "scores")
                dice = interval(case_dice(folder / "scores"))[0]
                lines.add({**key, "dice": round(dice, 5), "train_s": spent, "machine": machine()})
    rows = [row for row in lines.rows() if (row["steps"], row["batch"]) == (options.steps, options.batch)]
    means = {}
    for name in names:
        dice = [row["dice"] for row in rows if row["contender"] == name and row["seed"] in options.seeds]
        means[name] = statistics.mean(dice)
        print(f"{name}: mean Dice {means[name]:.4f} ({min(dice):.4f} to {max(dice):.4f}), {len(dice)} seeds")
    difference = means["medseg bf16"] - means["medseg fp32"]
    reached = "reached" if abs(difference) <= GOAL_DICE else "missed"
    reached = (
        reached if min(means["medseg bf16"], means["medseg fp32"]) > LEARNT else "nothing told, too few steps to learn"
    )
    print(f"bf16 - fp32: {difference:+.4f} after {options.steps} steps; goal {GOAL_DICE}: {reached}")


def learn(name: str, seed: int, folder: Path, peer: NnUNet | None, plan: Path, options: argparse.Namespace) -> float:
    """Train one contender and predict the cases to score; returns the wall time of the training."""
    log = folder / "log.txt"
    if name.startswith("nnU-Net"):
        assert peer is not None
        spent, _ = peer.train(f"dice_{seed}_{options.steps}", log, steps=options.steps, seed=seed)
        peer.predict(f"dice_{seed}_{options.steps}", folder / "masks", log)
        return spent.wall
    common = ("--splits", options.work / "inner_split.json")
    settings = ("--set", f"precision={name.split()[-1]}", "--set", f"seed={seed}")
    words = ("--plan", plan, "--steps", str(options.steps), *settings, "--out", folder / "run", "--no-track")
    spent = medseg("train", options.data, *common, *words, log=log)
    medseg("predict", options.data, *common, "--model", folder / "run", "--out", folder / "masks", log=log)
    return spent.wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/hippocampus"))
    parser.add_argument("--peers", type=Path, help="Python of the environment that scripts/install_peers.sh makes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps-a-round", type=int, default=3)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--dice", action="store_true", help="compare Dice at equal steps instead of times")
    parser.add_argument("--steps", type=int, default=100, help="of --dice")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, help="another batch than nnU-Net's, for medseg's rows (a quick look)")
    parser.add_argument("--work", type=Path, default=Path("/tmp/medseg-steps"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.data, options.work = options.data.resolve(), options.work.resolve()
    if options.worker:
        answer_steps(options)
        return
    split = inner_split(options.work / "inner_split.json", cases_in(options.data))
    peer = None
    configuration = PLAN
    if options.peers is not None:
        peer = NnUNet(options.peers, options.work / "nnunet")
        peer.prepare(options.data, split["train"], split["test"])
        configuration = peer.configuration()
    plan = options.work / f"plan_{options.steps}_{options.batch}.yaml"
    if not plan.exists():
        write_plan_file(plan, configuration, options)
    (compare_dice if options.dice else time_steps)(peer, plan, options)


if __name__ == "__main__":
    main()
