"""Builders of small specs, plans and bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medseg.planning.fingerprint import ChannelStatistics, Fingerprint
from medseg.planning.plan import Plan
from medseg.spec import Spec

STATISTICS = ChannelStatistics(low=-100, median=40, high=300, mean=50, deviation=80)


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., Spec]:
    """``make_spec(labels={...}, channels=[...], **rest)``."""

    def make(labels: dict[str, int] | None = None, channels: tuple[str, ...] = ("t1",), **rest: Any) -> Spec:
        rows = {name: {"modality": "MR"} for name in channels}
        return Spec.model_validate({"name": "toy", "channels": rows, "labels": labels or {"organ": 1}, **rest})

    return make


@pytest.fixture(scope="session")
def make_fingerprint() -> Callable[..., Fingerprint]:
    """``make_fingerprint(shape=..., spacing=..., cases=..., channels=..., labels=...)``: all cases alike."""

    def make(
        shape: tuple[int, int, int] = (40, 40, 40),
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
        cases: int = 10,
        channels: tuple[str, ...] = ("t1",),
        labels: tuple[str, ...] = ("organ",),
    ) -> Fingerprint:
        return Fingerprint(
            cases=cases,
            patients=cases,
            shapes=(shape,) * 5,
            spacings=(spacing,) * 5,
            voxels=cases * shape[0] * shape[1] * shape[2],
            channels=dict.fromkeys(channels, STATISTICS),
            label_ml=dict.fromkeys(labels, 1.0),
            label_cases=dict.fromkeys(labels, cases),
        )

    return make


@pytest.fixture(scope="session")
def make_plan(make_fingerprint: Callable[..., Fingerprint]) -> Callable[..., Plan]:
    """``make_plan(spec, **changes)``: a plan with a tiny network, RAS, 1 mm, patches of 16³."""

    def make(spec: Spec, **changes: Any) -> Plan:
        dims = changes.get("dimensions", 3)
        options = {"features": [4, 8], "strides": [[2] * dims], "kernels": [[3] * dims] * 2, "convolutions": 1}
        values: dict[str, Any] = {
            "dataset": spec.name,
            "dimensions": dims,
            "orientation": "RAS",
            "spacing": (1.0, 1.0, 1.0),
            "normalisation": {name: {"scheme": "zscore"} for name in spec.channels},
            "patch_size": (16, 16, 16 if dims == 3 else 1),
            "batch_size": 2,
            "network": {"name": "unet", "options": options},
            "loss": "dice_ce",
            "foreground_share": 0.5,
            "augmentation": {"mirror_axes": list(range(dims))},
            "learning_rate": 2e-3,
            "weight_decay": 1e-2,
            "warmup": 0.05,
            "averaging": 0.9,
            "precision": "fp32",
            "steps": 10,
            "validations": 2,
            "overlap": 0.5,
            "test_mirroring": False,
            "seed": 0,
            "fingerprint": make_fingerprint(channels=tuple(spec.channels), labels=tuple(spec.foreground)),
        }
        return Plan.model_validate({**values, **changes})

    return make


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Any]:
    """``make_bundle(folder, spec, plan, folds=1)``: freshly initialised networks, saved."""

    def make(folder: Path, spec: Spec, plan: Plan, folds: int = 1) -> Any:
        import torch

        from medseg.bundle import BUNDLE_FORMAT, BundleInfo, make_network, save_bundle, versions

        weights = {}
        for fold in range(folds):
            torch.manual_seed(fold)
            weights[f"fold_{fold}.safetensors"] = make_network(spec, plan).state_dict()
        info = BundleInfo(
            format=BUNDLE_FORMAT,
            name=spec.name,
            plan=plan,
            spec=spec,
            weights={},
            dataset_digest="0" * 64,
            training={"dice": {}, "steps": 1},
            versions=versions(),
        )
        return save_bundle(folder, info, weights)

    return make
