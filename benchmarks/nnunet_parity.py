"""Masks of imported nnU-Net v2 models against those that nnU-Net itself wrote (shared/data/nnunet_models/expected).

    python benchmarks/nnunet_parity.py --data ../shared/data --only hippo

Agreement is over the voxels that are foreground in either mask. nnU-Net adds up logits in half precision, in windows
and in folds; here they are added in single precision. For each case the same windows are also added as nnU-Net adds
them, which tells how far its rounding moves the logits of each voxel. A voxel with another label than nnU-Net's is
explained if its two logits lie no further apart than the two were moved, or if that sum in half precision gives
nnU-Net's label. `half` is how many voxels of that sum differ from nnU-Net's mask.
"""

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from torch import Tensor

from medseg.inference.predict import Model, load_model, predict_logits
from medseg.inference.sliding_window import window_logits
from medseg.inference.windows import layout
from medseg.preparation.path import prediction_path
from medseg.preparation.preprocess import as_meta_tensor
from medseg.preparation.steps import restore
from medseg.readers.nifti import read_nifti
from medseg.targets import background_logits, decode, exclusive
from medseg.volume import Volume

MODELS = {
    "hippocampus_2d": "Dataset004_Hippocampus/nnUNetTrainer__smallPlans__2d",
    "hippocampus_3d_folds01": "Dataset004_Hippocampus/nnUNetTrainer__smallPlans__3d_fullres",
    "hippo_regions": "Dataset006_HippoRegions/nnUNetTrainer__smallPlans__3d_fullres",
    "body_resenc": "Dataset005_Body/nnUNetTrainer__smallResPlans__3d_fullres",
}
IMAGES = {
    "small": "ct_body/ct_3mm.nii.gz",
    "fine": "nnunet_models/inputs/fine_0000.nii.gz",
    "psl": "nnunet_models/inputs/psl_0000.nii.gz",
}


@dataclass(frozen=True)
class Row:
    """One case: voxels of foreground in either mask, how many differ, how many of these rounding does not explain."""

    set_name: str
    case: str
    labels: int
    foreground: int
    different: int
    unexplained: int
    half: int
    seconds: float

    @property
    def agreement(self) -> float:
        return 1 - self.different / self.foreground if self.foreground else float("nan")


@torch.inference_mode()
def compare_case(data: Path, set_name: str, case: str) -> Row:
    """Predict one case in fp32 and compare it with nnU-Net's mask."""
    model = load_model(data / "nnunet_models" / MODELS[set_name.removesuffix("_no_tta")], device=torch.device("cpu"))
    image = read_nifti(data / IMAGES.get(case, f"hippocampus/imagesTr/{case}.nii.gz"))
    mirror = not set_name.endswith("_no_tta")
    expected = np.asarray(nibabel.load(data / "nnunet_models" / "expected" / set_name / f"{case}.nii.gz").dataobj)
    began = time.monotonic()
    logits = predict_logits(model, image, mirror=mirror)
    spec = model.bundle.info.spec
    mask = decode(spec, logits)[0].numpy()
    seconds = time.monotonic() - began
    different = mask != expected
    rounded = half_logits(model, image, mirror)
    half = decode(spec, rounded)[0].numpy()
    unexplained = different & (half != expected)
    if unexplained.any():
        unexplained &= ~within_rounding(logits, rounded, mask, expected, regions=not exclusive(spec))
    foreground = int(((mask > 0) | (expected > 0)).sum())
    counts = [int(x.sum()) for x in (different, unexplained, half != expected)]
    return Row(set_name, case, len(np.unique(expected)), foreground, *counts, seconds)


def within_rounding(logits: Tensor, rounded: Tensor, mask: Any, expected: Any, *, regions: bool) -> Any:
    """Tell of each voxel whether the logits of the two labels are as close as half precision moved them."""
    moved = (logits - rounded).abs()
    if regions:
        return ((logits.abs() <= moved).any(0)).numpy()
    ours, theirs = (torch.from_numpy(x.astype(np.int64))[None] for x in (mask, expected))
    gap = logits.gather(0, ours) - logits.gather(0, theirs)
    return (gap <= moved.gather(0, ours) + moved.gather(0, theirs))[0].numpy()


def half_logits(model: Model, image: Volume, mirror: bool) -> Tensor:
    """Return logits on the grid of the image, added up in half precision as nnU-Net does."""
    plan = model.bundle.info.plan
    data = prediction_path(plan)({"image": as_meta_tensor(image).float()})
    prepared = data["image"].as_tensor()
    folds = [half_sum(prepared, window_logits([n], plan, mirror=mirror), plan) for n in model.networks]
    total = folds[0]
    for fold in folds[1:]:
        total += fold
    total = total / len(folds)
    logits = restore(total.float(), data["steps"], fill=background_logits(model.bundle.info.spec))
    return logits.half().float()


def half_sum(prepared: Tensor, predict: Any, plan: Any) -> Tensor:
    where = layout(prepared.shape[1:], plan)
    padded, weights = where.pad(prepared), where.weights.half()
    starts = (*where.starts[:2], range(padded.shape[3])) if where.flat else where.starts
    place = tuple(slice(b, b + n) for b, n in zip(where.before, where.shape, strict=True))
    total, seen = None, torch.zeros(padded.shape[1:], dtype=torch.float16)
    for corner in itertools.product(*starts):
        box = tuple(slice(c, c + w) for c, w in zip(corner, plan.patch_size, strict=True))
        answer = predict(padded[(slice(None), *box)][None])[0] * weights
        if total is None:
            total = torch.zeros((len(answer), *padded.shape[1:]), dtype=torch.float16)
        total[(slice(None), *box)] += answer
        seen[box] += weights
    assert total is not None
    return (total / seen)[(slice(None), *place)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", default="", help="sets whose name holds this")
    arguments = parser.parse_args()
    print("| set | case | labels | foreground | different | agreement | unexplained | half | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for place in sorted((arguments.data / "nnunet_models" / "expected").glob("*/*.nii.gz")):
        if arguments.only in place.parent.name:
            row = compare_case(arguments.data, place.parent.name, place.name.removesuffix(".nii.gz"))
            numbers = f"{row.labels} | {row.foreground} | {row.different} | {100 * row.agreement:.3f} %"
            print(
                f"| {row.set_name} | {row.case} | {numbers} | {row.unexplained} | {row.half} | {row.seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
