"""Bundles that MONAI itself runs: medseg reads them and makes the same mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg.inference.predict import load_model, predict_volume
from medseg.volume import Volume

AFFINE = np.array([[0, -1.5, 0, 130], [-1.5, 0, 0, 120], [0, 0, 2.0, -205], [0, 0, 0, 1]], np.float64)
UNET = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8, 16],
        "strides": [2, 2], "norm": "batch"}  # fmt: skip
SEGRESNET = {"_target_": "monai.networks.nets.SegResNet", "in_channels": 1, "out_channels": 3, "init_filters": 8}
DYNUNET = {"_target_": "DynUNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "kernel_size": [3, 3, 3],
           "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]}  # fmt: skip


def scene() -> Volume:
    noise = ndimage.gaussian_filter(np.random.default_rng(3).standard_normal((22, 20, 23)), 2)
    return Volume((1000 * noise + 500).astype(np.float32)[None], AFFINE)


def by_monai(folder: Path, image: Volume) -> tuple[Any, Any]:
    """Return MONAI's mask, and by how much its two best values differ in each voxel."""
    from monai.bundle import ConfigParser

    nibabel.save(nibabel.Nifti1Image(image.array[0], image.affine), folder / "one.nii.gz")
    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
    data = parser.get_parsed_content("preprocessing")({"image": str(folder / "one.nii.gz")})
    with torch.inference_mode():
        data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], network)[0]
    post = parser.get_parsed_content("postprocessing")
    soft = post(dict(data), end=len(post.transforms) - 1)["pred"].as_tensor()
    best = soft.topk(2, dim=0).values
    return soft.argmax(0).numpy(), (best[0] - best[1]).numpy() / float(soft.abs().max())


RANGE = {"_target_": "ScaleIntensityRanged", "a_min": 100, "a_max": 900, "b_min": 0.0, "b_max": 1.0, "clip": True}
ZSCORE = {"_target_": "NormalizeIntensityd", "channel_wise": True, "nonzero": True}


@pytest.mark.parametrize(
    ("network", "intensity", "softmax", "mode"),
    [(UNET, RANGE, True, "constant"), (SEGRESNET, ZSCORE, False, "gaussian"), (DYNUNET, RANGE, True, "gaussian")],
    ids=["UNet", "SegResNet", "DynUNet"],
)
def test_masks_are_those_of_monai(
    tmp_path: Path, write_bundle: Callable[..., Path], network: Any, intensity: Any, softmax: bool, mode: str
) -> None:
    write_bundle(tmp_path / "bundle", network, intensity, softmax=softmax, mode=mode)
    theirs, margin = by_monai(tmp_path / "bundle", scene())
    ours = predict_volume(load_model(tmp_path / "bundle"), scene()).array[0]
    foreground = (ours > 0) | (theirs > 0)
    assert foreground.sum() > 500
    assert len(np.unique(theirs)) > 1
    assert (ours == theirs)[foreground].mean() >= 0.999
    assert margin[ours != theirs].max(initial=0) < 1e-4
