"""nnU-Net's own trainer, told when to end. Run by the Python of the peers' environment, which has no medseg.

    python _nnunet_peer.py train --seconds 600 | --steps 60  --seed 0 --out told.json
    python _nnunet_peer.py steps                              # answers numbers on stdin with the seconds of such steps

All is nnU-Net's: planned network and patch, data loader, augmentation, loss, optimizer and `train_step`. Only its
1000 epochs of 250 steps are replaced: the rate follows the same polynomial (power 0.9) over the time, or the steps,
that there are. It learns on all cases of the dataset (fold "all") and validates none.
"""

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

DATASET, CONFIGURATION, FOLD = "Dataset004_Hippocampus", "3d_fullres", "all"
POWER = 0.9
BEGAN = time.monotonic()


def make_trainer() -> Any:
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    return get_trainer_from_args(DATASET, CONFIGURATION, FOLD, device=torch.device("cpu"))


def train(options: argparse.Namespace) -> None:
    import numpy as np
    import torch

    torch.manual_seed(options.seed)
    np.random.seed(options.seed)
    random.seed(options.seed)
    trainer = make_trainer()
    trainer.on_train_start()
    trainer.network.train()
    taken: list[float] = []
    first = time.monotonic()
    while (progress := _progress(options, taken, first)) < 1:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - progress) ** POWER
        began = time.monotonic()
        trainer.train_step(next(trainer.dataloader_train))
        taken.append(time.monotonic() - began)
    trainer.current_epoch = 1  # one less is what the checkpoint says
    trainer.on_train_end()
    told = {
        "steps": len(taken),
        "step_s": round(statistics.median(taken), 3),
        "first_step_at_s": round(first - BEGAN, 1),
    }
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump(told, file)


def _progress(options: argparse.Namespace, taken: list[float], first: float) -> float:
    """Return the share that is done; 1 also where the next step would not end in time (one is always made)."""
    if options.steps:
        return len(taken) / options.steps
    now = time.monotonic()
    if taken and now - BEGAN + statistics.median(taken) > options.seconds:
        return 1.0
    whole = options.seconds - (first - BEGAN)
    return min(1.0, (now - first) / whole) if whole > 0 and taken else float(bool(taken))


def answer_steps() -> None:
    import torch

    trainer = make_trainer()
    trainer.initialize()
    trainer.network.train()
    patch, batch = trainer.configuration_manager.patch_size, trainer.configuration_manager.batch_size
    scales = trainer._get_deep_supervision_scales()
    sizes = [[round(n * s) for n, s in zip(patch, row, strict=True)] for row in scales]
    data = torch.randn((batch, trainer.num_input_channels, *patch))
    classes = trainer.label_manager.num_segmentation_heads
    target = [torch.randint(classes, (batch, 1, *size)).float() for size in sizes]
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.monotonic()
            trainer.train_step({"data": data, "target": target})
            seconds.append(time.monotonic() - began)
        print("RESULT " + json.dumps(seconds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "steps"))
    parser.add_argument("--seconds", type=float, help="wall time from the start of this process")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.what == "train":
        train(options)
    else:
        answer_steps()


if __name__ == "__main__":
    main()
