"""A small MONAI bundle on disk, of what MONAI itself makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

UNET = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8, 16],
        "strides": [2, 2], "norm": "batch"}  # fmt: skip
RANGE = {"_target_": "ScaleIntensityRanged", "a_min": 100, "a_max": 900, "b_min": 0.0, "b_max": 1.0, "clip": True}


def write_bundle(
    folder: Path,
    network: dict[str, Any] = UNET,
    intensity: dict[str, Any] = RANGE,
    *,
    softmax: bool = True,
    mode: str = "constant",
) -> Path:
    """Write a bundle with random weights, of the layout of MONAI's Model Zoo; return its folder."""
    from monai.bundle import ConfigParser

    post: list[Any] = [{"_target_": "Activationsd", "keys": "pred", "softmax": True}] if softmax else []
    post += [
        {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
         "nearest_interp": False},
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
    ]  # fmt: skip
    config = {
        "imports": ["$import glob"],
        "device": "$torch.device('cpu')",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "size": [16, 16, 16],
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
                {"_target_": "Spacingd", "keys": "image", "pixdim": [1.7, 1.3, 2.6], "mode": "bilinear"},
                {**intensity, "keys": "image"},
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": "@size", "overlap": 0.5, "mode": mode},
        "postprocessing": {"_target_": "Compose", "transforms": post},
    }
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    made = ConfigParser({"network": network}).get_parsed_content("network")
    torch.save(made.state_dict(), folder / "models" / "model.pt")
    return folder


@pytest.fixture(name="write_bundle")
def _write_bundle() -> Callable[..., Path]:
    return write_bundle


@pytest.fixture
def change(tmp_path: Path) -> Callable[..., Path]:
    """Write a bundle, let a function change its config, and return its folder."""

    def changed(edit: Callable[[dict[str, Any]], Any]) -> Path:
        folder = write_bundle(tmp_path / "bundle")
        file = folder / "configs" / "inference.json"
        config = json.loads(file.read_text())
        edit(config)
        file.write_text(json.dumps(config))
        return folder

    return changed
