"""A loop as in MONAI's tutorials, ended by the clock. Run by the Python of the peers' environment, which has no medseg.

    python _monai_peer.py train --recipe dynunet --data MSD --cases cases.json --seconds 600 --seed 0 --out FOLDER
    python _monai_peer.py predict --recipe dynunet --data MSD --cases cases.json --out FOLDER

After the DynUNet pipeline (MONAI tutorials, modules/dynunet_pipeline, task 04) and the spleen tutorial
(3d_segmentation/spleen_segmentation_3d): CacheDataset, RandCropByPosNegLabel, a network of MONAI, Dice (and
cross-entropy), sliding windows. Recipes differ as the table says. fp32, the tutorials' default. The tutorials count
epochs; here the rate falls over the time there is. It learns on all cases it is given and validates none.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLASSES = 3
BEGAN = time.monotonic()


@dataclass(frozen=True)
class Recipe:
    """`cases` of a batch, `crops` of each; `factor`: share of the rate at a share of the time; `flips`: in testing."""

    network: Callable[[], Any]
    optimizer: Callable[[Any], Any]
    factor: Callable[[float], float]
    loss: Callable[[], Any]
    patch: tuple[int, int, int]
    cases: int
    crops: int
    flips: bool


def dynunet() -> Any:
    from monai.networks.nets import DynUNet

    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    return DynUNet(
        3, 1, CLASSES, kernel_size=[[3, 3, 3]] * 4, strides=strides, upsample_kernel_size=strides[1:],
        norm_name="instance", deep_supervision=True, deep_supr_num=1,
    )  # fmt: skip


def unet() -> Any:
    from monai.networks.nets import UNet

    return UNet(3, 1, CLASSES, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2, norm="batch")


def sgd(network: Any) -> Any:
    import torch

    return torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.99, weight_decay=3e-5, nesterov=True)


def adamw(network: Any) -> Any:
    import torch

    return torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-5)


def adam(network: Any) -> Any:
    import torch

    return torch.optim.Adam(network.parameters(), lr=1e-4)


def dice_ce() -> Any:
    from monai.losses import DiceCELoss

    return DiceCELoss(to_onehot_y=True, softmax=True)


def dice() -> Any:
    from monai.losses import DiceLoss

    return DiceLoss(to_onehot_y=True, softmax=True)


def polynomial(done: float) -> float:
    return (1 - done) ** 0.9


def cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def constant(done: float) -> float:
    return 1.0


RECIPES = {
    "dynunet": Recipe(dynunet, sgd, polynomial, dice_ce, (40, 56, 40), cases=9, crops=1, flips=True),
    "adamw": Recipe(dynunet, adamw, cosine, dice_ce, (40, 56, 40), cases=9, crops=1, flips=True),
    "unet": Recipe(unet, adam, constant, dice, (48, 64, 48), cases=2, crops=4, flips=False),
}
"""The DynUNet pipeline; the same network with the optimizer of many MONAI examples; the spleen tutorial."""


def transforms(recipe: Recipe) -> Any:
    import monai.transforms as mt

    keys = ["image", "label"]
    return mt.Compose(
        [
            mt.LoadImaged(keys),
            mt.EnsureChannelFirstd(keys),
            mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            mt.SpatialPadd(keys, spatial_size=recipe.patch),
            mt.RandCropByPosNegLabeld(
                keys,
                label_key="label",
                spatial_size=recipe.patch,
                pos=2,
                neg=1,
                num_samples=recipe.crops,
                image_key="image",
            ),
            mt.RandZoomd(
                keys, min_zoom=0.9, max_zoom=1.2, mode=("trilinear", "nearest"), align_corners=(True, None), prob=0.15
            ),
            mt.RandGaussianNoised("image", std=0.01, prob=0.15),
            mt.RandGaussianSmoothd(
                "image", sigma_x=(0.5, 1.15), sigma_y=(0.5, 1.15), sigma_z=(0.5, 1.15), prob=0.15
            ),
            mt.RandScaleIntensityd("image", factors=0.3, prob=0.15),
            *(mt.RandFlipd(keys, spatial_axis=[axis], prob=0.5) for axis in range(3)),
        ]
    )  # fmt: skip


def train(options: argparse.Namespace) -> None:
    import torch
    from monai.data import CacheDataset, DataLoader
    from monai.utils import set_determinism

    recipe = RECIPES[options.recipe]
    set_determinism(options.seed)
    names = json.loads(options.cases.read_text(encoding="utf-8"))
    files = [
        {
            "image": str(options.data / "imagesTr" / f"{name}.nii.gz"),
            "label": str(options.data / "labelsTr" / f"{name}.nii.gz"),
        }
        for name in names
    ]
    cached = CacheDataset(files, transforms(recipe), progress=False)
    loader = DataLoader(cached, batch_size=recipe.cases, shuffle=True, num_workers=1, persistent_workers=True)
    network, loss = recipe.network().train(), recipe.loss()
    optimizer = recipe.optimizer(network)
    rate, steps, first, progress = optimizer.param_groups[0]["lr"], 0, time.monotonic(), 0.0
    while progress < 1:
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = rate * recipe.factor(progress)
            optimizer.zero_grad()
            found = network(batch["image"].as_tensor())
            # DynUNet stacks its levels, all enlarged to full size.
            levels = found.unbind(dim=1) if found.ndim == 6 else [found]
            weights = [0.5**number for number in range(len(levels))]
            total = sum(w * loss(level, batch["label"].as_tensor()) for w, level in zip(weights, levels, strict=True))
            total.backward()
            optimizer.step()
            steps += 1
            now = time.monotonic()
            each = (now - first) / steps
            left = options.seconds - (now - BEGAN)
            progress = 1.0 if left < each else (now - first) / (options.seconds - (first - BEGAN))
            if progress >= 1:
                break
    torch.save(network.state_dict(), options.out / "weights.pt")
    told = {"steps": steps, "step_s": round(each, 3), "first_step_at_s": round(first - BEGAN, 1)}
    (options.out / "told.json").write_text(json.dumps(told), encoding="utf-8")


def predict(options: argparse.Namespace) -> None:
    import nibabel
    import numpy as np
    import torch
    from monai.inferers import sliding_window_inference
    from monai.transforms import NormalizeIntensity

    recipe = RECIPES[options.recipe]
    network = recipe.network().eval()
    network.load_state_dict(torch.load(options.out / "weights.pt", weights_only=True))
    normalise = NormalizeIntensity(nonzero=True, channel_wise=True)
    turns: list[tuple[int, ...]] = [()]
    if recipe.flips:
        turns = [tuple(a + 2 for a in range(3) if number >> a & 1) for number in range(8)]
    masks = options.out / "masks"
    masks.mkdir(exist_ok=True)
    for name in json.loads(options.cases.read_text(encoding="utf-8")):
        source = nibabel.load(options.data / "imagesTr" / f"{name}.nii.gz")
        image = torch.as_tensor(normalise(np.asarray(source.dataobj, dtype=np.float32)[None]))[None]
        with torch.inference_mode():
            parts = [
                sliding_window_inference(image.flip(turn), recipe.patch, 4, network, overlap=0.5, mode="gaussian")
                .softmax(1)
                .flip(turn)
                for turn in turns
            ]
        mask = torch.stack(parts).mean(0).argmax(1)[0].numpy().astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(mask, source.affine), masks / f"{name}.nii.gz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "predict"))
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", type=Path, required=True, help="JSON list of case ids")
    parser.add_argument("--seconds", type=float, help="wall time from the start of this process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.what == "train":
        train(options)
    else:
        predict(options)


if __name__ == "__main__":
    main()
