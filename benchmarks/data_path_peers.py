"""The peers of data_path.py; runs in their environment, without medseg. Each maker yields (images, masks) for ever."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Patch = tuple[int, int, int]
Batches = Iterator[tuple[Tensor, Tensor]]
FOREGROUND = 1 / 3
REACH = 1.25
"""The region that TorchIO and MONAI turn is larger than the patch by this factor; nnU-Net chooses its own."""


def cases(folder: Path) -> list[dict[str, Any]]:
    names = ("image", "mask", "locations")
    return [{n: np.load(p / f"{n}.npy") for n in names} for p in sorted(folder.glob("[0-9]*")) if p.is_dir()]


def region(patch: Patch) -> Patch:
    i, j, k = (n + 2 * math.ceil(n * (REACH - 1) / 2) for n in patch)
    return i, j, k


def nnunet_batches(folder: Path, patch: Patch, batch: int, workers: int) -> Batches:
    """nnU-Net's own loader, files and region, with transforms of batchgeneratorsv2."""
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
    from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    stored = folder / "blosc2"
    if not stored.exists():
        stored.mkdir()
        for number, case in enumerate(cases(folder)):
            image, mask = case["image"], case["mask"].astype(np.int8)
            label, places = case["locations"][:, :1], case["locations"][:, 1:]
            rows = np.concatenate([np.zeros_like(label), places], axis=1)
            locations = {n + 1: rows[label[:, 0] == n] for n in range(2)}
            boxes = [comp_blosc2_params(a.shape, patch, a.itemsize) for a in (image, mask)]
            nnUNetDatasetBlosc2.save_case(
                image, mask, {"class_locations": locations}, str(stored / f"case_{number}"),
                blocks=boxes[0][0], chunks=boxes[0][1], blocks_seg=boxes[1][0], chunks_seg=boxes[1][1],
            )  # fmt: skip
    angle = (-math.pi / 6, math.pi / 6)
    initial = get_patch_size(patch, angle, angle, angle, (0.85, 1.25))  # as nnUNetTrainer
    labels = LabelManager({"background": 0, "a": 1, "b": 2}, regions_class_order=None)
    loader = nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(stored)), batch, initial, patch, labels,
        oversample_foreground_percent=FOREGROUND, transforms=_batchgenerators(patch),
    )  # fmt: skip
    source: Any = SingleThreadedAugmenter(loader, None)
    if workers:
        source = NonDetMultiThreadedAugmenter(
            data_loader=loader, transform=None, num_processes=workers, num_cached=6, seeds=None, wait_time=0.002
        )
    for found in source:
        yield found["data"], found["target"]


def _batchgenerators(patch: Patch) -> Any:
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform
    from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform

    class Together(SpatialTransform):  # type: ignore[misc]
        """Rotation and scale at once or not at all."""

        def get_parameters(self, **data: Any) -> dict[str, Any]:
            self.p_rotation = self.p_scaling = float(np.random.uniform() < 0.5)
            found: dict[str, Any] = super().get_parameters(**data)
            return found

    space = Together(
        patch, patch_center_dist_from_border=0, random_crop=False, p_elastic_deform=0,
        rotation=(-math.pi / 6, math.pi / 6), scaling=(0.7, 1.4), p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False, mode_seg="nearest", border_mode_seg="zeros",
    )  # fmt: skip
    every: Any = {"synchronize_channels": True, "p_per_channel": 1}
    low = SimulateLowResolutionTransform((0.5, 1), synchronize_axes=True, ignore_axes=None, **every)
    blur = GaussianBlurTransform((0.5, 1.0), synchronize_axes=True, benchmark=True, **every)
    rows = [
        (GaussianNoiseTransform((0, 0.3), **every), 0.15),
        (blur, 0.15),
        (MultiplicativeBrightnessTransform((0.75, 1.25), **every), 0.2),
        (ContrastTransform((0.75, 1.25), preserve_range=True, **every), 0.2),
        (low, 0.15),
        (GammaTransform((0.7, 1.5), p_invert_image=0.3, p_retain_stats=1, **every), 0.3),
    ]
    chosen = [RandomTransform(transform, apply_probability=p) for transform, p in rows]
    return ComposeTransforms([space, *chosen, MirrorTransform((0, 1, 2)), RemoveLabelTansform(-1, 0)])


def torchio_batches(folder: Path, patch: Patch, batch: int, workers: int) -> Batches:
    """Regions from subjects in memory, then TorchIO's transforms; every patch has draws of its own."""
    import torchio as tio

    size = region(patch)
    anywhere, centred = [], []
    for case in cases(folder):
        subject = tio.Subject(image=tio.ScalarImage(tensor=case["image"]), mask=tio.LabelMap(tensor=case["mask"]))
        # TorchIO refuses regions larger than the image, and centres near its border: padded once, before it counts.
        larger = tuple(max(n, s) for n, s in zip(subject.spatial_shape, size, strict=True))
        anywhere.append(tio.CropOrPad(larger)(subject))
        centred.append(tio.Pad(tuple(n // 2 for n in size))(subject))
    augment = _torchio(patch)
    samplers = [(anywhere, tio.UniformSampler(size)), (centred, tio.LabelSampler(size, "mask"))]

    class Patches(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            while True:
                subjects, sampler = samplers[float(torch.rand(())) < FOREGROUND]
                subject = subjects[int(torch.randint(len(subjects), ()))]
                yield augment(next(sampler(subject, 1)))

    loader = tio.SubjectsLoader(Patches(), batch_size=batch, num_workers=workers)
    for found in loader:
        yield found["image"][tio.DATA], found["mask"][tio.DATA]


def _torchio(patch: Patch) -> Any:
    import torchio as tio

    def factor(x: Tensor) -> Tensor:
        return x * (0.75 + 0.5 * float(torch.rand(())))

    def contrast(x: Tensor) -> Tensor:
        mean = x.mean()
        return ((x - mean) * (0.75 + 0.5 * float(torch.rand(()))) + mean).clamp(x.min(), x.max())

    def low_resolution(x: Tensor) -> Tensor:
        scale = 0.5 + 0.5 * float(torch.rand(()))
        small = [max(1, round(n * scale)) for n in x.shape[1:]]
        return F.interpolate(F.interpolate(x[None], small, mode="nearest"), x.shape[1:], mode="trilinear")[0]

    def signed(x: Tensor) -> Tensor:
        return -x

    gamma = tio.RandomGamma(log_gamma=(math.log(0.7), math.log(1.5)))
    turned = tio.Lambda(signed, types_to_apply=[tio.INTENSITY])
    only: Any = {"types_to_apply": [tio.INTENSITY]}
    return tio.Compose([
        tio.RandomAffine((0.7, 1.4), degrees=30, isotropic=True, default_pad_value=0, p=0.5),  # linear, nearest
        tio.CropOrPad(patch),
        tio.RandomNoise(0, (0, 0.3), p=0.15),
        tio.RandomBlur((0.5, 1), p=0.15),
        tio.Lambda(factor, p=0.2, **only),
        tio.Lambda(contrast, p=0.2, **only),
        tio.Lambda(low_resolution, p=0.15, **only),
        tio.OneOf({gamma: 0.7, tio.Compose([turned, gamma, turned]): 0.3}, p=0.3),
        tio.RandomFlip((0, 1, 2), flip_probability=0.5),
    ])  # fmt: skip


def monai_batches(folder: Path, patch: Patch, batch: int, workers: int) -> Batches:
    """Cached dictionaries, crops and dictionary transforms of MONAI; without MetaTensors, which is its faster form."""
    import monai.transforms as mt
    from monai.data import DataLoader, Dataset, set_track_meta

    set_track_meta(False)
    size = region(patch)
    items = []
    for case in cases(folder):
        item = {"image": torch.from_numpy(case["image"]), "mask": torch.from_numpy(case["mask"])}
        item = mt.SpatialPadd(["image", "mask"], size)(item)
        items.append(mt.FgBgToIndicesd("mask")(item))
    both, bilinear = ["image", "mask"], ("bilinear", "nearest")
    rotate = (math.pi / 6,) * 3
    inverted = {"gamma": (0.7, 1.5), "retain_stats": True}
    path = mt.Compose([
        # Positive: a voxel of a label; negative: any other, which stands for anywhere.
        mt.RandCropByPosNegLabeld(
            both, "mask", size, pos=1, neg=2, fg_indices_key="mask_fg_indices", bg_indices_key="mask_bg_indices"
        ),
        mt.SelectItemsd(both),
        mt.RandAffined(both, patch, prob=0.5, rotate_range=rotate, scale_range=((-0.3, 0.4),) * 3, mode=bilinear,
                       padding_mode="zeros"),
        mt.RandGaussianNoised("image", prob=0.15, std=0.3),
        mt.RandGaussianSmoothd("image", (0.5, 1), (0.5, 1), (0.5, 1), prob=0.15),
        mt.RandScaleIntensityd("image", 0.25, prob=0.2),
        mt.RandScaleIntensityFixedMeand("image", 0.25, preserve_range=True, prob=0.2),
        mt.RandSimulateLowResolutiond("image", prob=0.15),
        mt.OneOf([
            mt.RandAdjustContrastd("image", prob=0.3, **inverted),
            mt.RandAdjustContrastd("image", prob=0.3, invert_image=True, **inverted),
        ], weights=(0.7, 0.3)),
        *(mt.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)),
    ])  # fmt: skip
    ones = [0] * 100_000
    endless = Dataset(ones, lambda _: _first(path(items[int(torch.randint(len(items), ()))])))
    while True:
        for found in DataLoader(endless, batch_size=batch, num_workers=workers):
            yield found["image"], found["mask"]


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, list) else found


MAKERS = {"batchgeneratorsv2": nnunet_batches, "torchio": torchio_batches, "monai": monai_batches}
