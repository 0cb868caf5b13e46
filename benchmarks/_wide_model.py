"""The body model with a head of more labels: trained for some minutes, or with random weights.

Labels of the trained one: those that the body model itself finds in ct_body/ct_3mm_112.nii.gz, each cut across the body
into two or three of equal numbers of voxels, so that their boundaries run as those of organs do.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

RATE = 2e-3
PARTS = {"conv": "all_modules.0", "norm": "all_modules.1"}
"""nnU-Net's state dict has these tensors under two names."""


def widened(model: Path, place: Path, classes: int, *, image: Path, minutes: float) -> Path:
    """Copy the model with `classes` channels to the folder `place`, unless it is there.

    Trained for `minutes` on `image`; 0: the weights of the head are random.
    """
    if place.exists():
        return place
    new = place.with_name(place.name + ".new")
    shutil.rmtree(new, ignore_errors=True)  # of a command that was interrupted
    shutil.copytree(model, new)
    names = ["background", *(f"label{number}" for number in range(1, classes))]
    dataset = json.loads((new / "dataset.json").read_text())
    dataset["labels"] = {name: number for number, name in enumerate(names)}
    (new / "dataset.json").write_text(json.dumps(dataset))
    if minutes:
        labels, parents = split(labels_of(model, image), classes)
        _write_head(new, classes, parents)
        train(new, image, labels, minutes)
    else:
        _write_head(new, classes, None)
    new.rename(place)
    return place


def labels_of(model: Path, image: Path) -> np.ndarray:
    """Return what the model finds, (I, J, K)."""
    import torch

    from medseg.inference.predict import load_model, predict_volume
    from medseg.readers.nifti import read_nifti

    mask = predict_volume(load_model(model, device=torch.device("cpu")), read_nifti(image), mirror=False)
    return np.asarray(mask.array[0])


def split(labels: np.ndarray, classes: int) -> tuple[np.ndarray, list[int]]:
    """Cut labels along the last axis until there are `classes` with the background; return them and their origins."""
    found = [int(label) for label in np.unique(labels) if label]
    counts = dict.fromkeys(found, 1)
    for number in range(classes - 1 - len(found)):
        counts[found[number % len(found)]] += 1
    result, parents = np.zeros(labels.shape, np.int64), [0]
    for label, count in counts.items():
        inside = labels == label
        positions = np.nonzero(inside)[2]
        limits = np.quantile(positions, np.linspace(0, 1, count + 1)[1:-1])
        result[inside] = len(parents) + np.searchsorted(limits, positions)
        parents += [label] * count
    return result, parents


def _checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    import torch

    from medseg.nnunet.checkpoint import HARMLESS

    file = next(folder.glob("fold_*/checkpoint_final.pth"))
    with torch.serialization.safe_globals(list(HARMLESS)):
        return file, torch.load(file, map_location="cpu", weights_only=True)


def _write_head(folder: Path, classes: int, parents: list[int] | None) -> None:
    """Widen the heads: with the weights of the labels that were cut, or with random ones."""
    import torch

    file, checkpoint = _checkpoint(folder)
    weights, random = checkpoint["network_weights"], torch.Generator().manual_seed(0)
    for name in [name for name in weights if "seg_layers" in name]:
        if parents is None:
            shape = (classes, *weights[name].shape[1:])
            weights[name] = torch.randn(shape, generator=random) * (0.3 if "weight" in name else 0.0)
        else:
            weights[name] = weights[name][parents].clone()
    torch.save(checkpoint, file)


def train(folder: Path, image: Path, labels: np.ndarray, minutes: float) -> None:
    """Let the network learn the labels (I, J, K) from patches of the image; the rate falls to zero with the time."""
    import torch

    from medseg.inference.predict import load_model
    from medseg.nnunet.architecture import our_weights

    model = load_model(folder, device=torch.device("cpu"))
    plan, network = model.bundle.info.plan, model.networks[0].train()
    row = next(iter(plan.normalisation.values()))
    array = np.asarray(nibabel.load(image).dataobj, np.float32)
    x = torch.from_numpy((array.clip(row.low, row.high) - row.mean) / row.deviation).permute(2, 1, 0)
    y = torch.from_numpy(labels).permute(2, 1, 0)
    optimizer, random = torch.optim.AdamW(network.parameters(), lr=RATE), np.random.default_rng(0)
    size = [min(p, n) for p, n in zip(plan.patch_size, x.shape, strict=True)]
    began, steps, loss = time.monotonic(), 0, torch.zeros(())
    while (done := (time.monotonic() - began) / (60 * minutes)) < 1:
        at = tuple(slice(o := int(random.integers(n - p + 1)), o + p) for p, n in zip(size, x.shape, strict=True))
        optimizer.param_groups[0]["lr"] = RATE * (1 - done)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x[at][None, None])
        logits = logits[0] if isinstance(logits, list | tuple) else logits
        loss = torch.nn.functional.cross_entropy(logits.float(), y[at][None])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimizer.step()
        steps += 1
    right = (logits.argmax(1)[0] == y[at])[y[at] > 0].float().mean()
    print(f"{steps} steps, last loss {loss:.3f}, {100 * right:.0f} % of the foreground of the last patch right")
    file, checkpoint = _checkpoint(folder)
    weights, state = checkpoint["network_weights"], network.state_dict()
    for name in list(weights):
        plain = name.removeprefix("decoder.") if name.startswith("decoder.encoder.") else name
        for part, other in PARTS.items():
            plain = plain.replace(other, part)
        (ours,) = our_weights({plain: weights[name]}, fold="wide")
        weights[name] = state[ours].detach().clone()
    torch.save(checkpoint, file)
