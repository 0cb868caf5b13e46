"""Imported models answer as nnU-Net does: random ones as an independent oracle, trained ones as its own files."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from medseg.bundle import import_bundle
from medseg.errors import BundleError, ConfigError
from medseg.inference.predict import load_model, predict_volume
from medseg.volume import Volume, reorient

Array = np.ndarray[Any, Any]
NEAR = 1e-3
"""Two logits that rounding may bring in another order."""


def volume(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], *, channels: int = 1, seed: int = 3
) -> Volume:
    """Smooth noise in a box with empty sides (and a hole), sizes and spacing along Z, Y, X as nnU-Net counts them."""
    rng = np.random.default_rng(seed)
    array = np.zeros((channels, *shape), np.float32)
    inner = tuple(slice(1 + n // 8, n - n // 10) for n in shape)
    for channel in array:
        channel[inner] = ndimage.gaussian_filter(rng.normal(2, 9, shape), 1.5)[inner] + 1
    array[(slice(None), *(slice(n // 2, n // 2 + 2) for n in shape))] = 0
    # An oblique, mirrored affine: where axes point does not matter to nnU-Net.
    turn = np.array([[0, 0.8, 0.6], [0, -0.6, 0.8], [-1.0, 0, 0]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing[::-1])
    affine[:3, 3] = (7, -20, 4)
    return Volume(np.ascontiguousarray(array.transpose(0, 3, 2, 1)), affine)


def compare(mask: Volume, expected: Array, gap: Array) -> None:
    found = mask.array[0].transpose(2, 1, 0)
    assert 200 < np.count_nonzero(expected) < 0.9 * expected.size, "an oracle that answers nothing proves nothing"
    different = found != expected
    assert different[gap > NEAR].sum() == 0
    foreground = (found > 0) | (expected > 0)
    assert different.sum() <= 0.001 * foreground.sum()


ISOTROPIC, THICK, THIN = (1.3, 1.1, 0.9), (4.5, 0.8, 0.9), (2.0, 0.5, 2.0)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "thick slices": {"spacing": THICK, "shape": (9, 26, 22)},
    "two coarse axes": {"spacing": THIN},
    "thick target": {"target": (5.0, 1.0, 1.0), "patch": (8, 16, 16), "shape": (30, 18, 20)},
    "residual": {"residual": True},
    "transposed": {"transpose": (1, 2, 0), "spacing": (1.0, 1.2, 4.4), "shape": (24, 26, 8)},
    "2d": {"target": (1.0, 1.1), "patch": (16, 8)},
    "2d, thick and transposed": {
        "target": (1.0, 1.1),
        "patch": (16, 16),
        "spacing": (1.0, 4.6, 1.2),
        "shape": (22, 9, 25),
        "transpose": (1, 0, 2),
    },
    "smaller than the patch": {"patch": (24, 32, 24), "shape": (11, 33, 14)},
    "content only": {"schemes": ["ZScoreNormalization"] * 2, "masked": [True, False]},
    "other schemes": {"schemes": ["CTNormalization", "NoNormalization", "RescaleTo01Normalization"]},
    "mirrored": {"mirror": (0, 2)},
    "folds": {"folds": ("0", "1", "3")},
    "nothing to resample": {"spacing": (1.0, 1.0, 1.0)},
}


@pytest.mark.parametrize("case", CASES)
def test_random_networks_answer_as_the_oracle(peer: SimpleNamespace, tmp_path: Path, case: str) -> None:
    options = {
        "spacing": ISOTROPIC,
        "target": (1.0, 1.0, 1.0),
        "patch": (8, 16, 16),
        "shape": (15, 24, 21),
        **CASES[case],
    }
    schemes = options.get("schemes", ["ZScoreNormalization"])
    network = {key: options[key] for key in ("residual", "masked") if key in options}
    configuration = peer.configuration(options["patch"], options["target"], schemes=schemes, **network)
    name = "3d_fullres" if len(options["patch"]) == 3 else "2d"
    written = {key: options[key] for key in ("transpose", "folds", "mirror") if key in options}
    folder, networks = peer.write(tmp_path, {name: configuration}, name, **written)
    image = volume(options["shape"], options["spacing"], channels=len(schemes))
    mirror = options.get("mirror", ())
    data = image.array.transpose(0, 3, 2, 1)
    expected, gap = peer.predict(folder, networks, data, options["spacing"], mirror=mirror)
    compare(predict_volume(load_model(folder), image), expected, gap)


def test_plans_of_nnunet_before_2_4(peer: SimpleNamespace, tmp_path: Path) -> None:
    """They name the class and its widths otherwise, and configurations may inherit."""
    configuration = peer.configuration((8, 16, 16), (1.0, 1.0, 1.0), features=(4, 8, 8))
    folder, networks = peer.write(tmp_path, {"3d_fullres": configuration}, "3d_fullres")
    plans = json.loads((folder / "plans.json").read_text())
    row = configuration.pop("architecture")["arch_kwargs"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": row["n_conv_per_stage"],
        "n_conv_per_stage_decoder": row["n_conv_per_stage_decoder"],
        "conv_kernel_sizes": row["kernel_sizes"],
        "pool_op_kernel_sizes": row["strides"],
    }
    own = {key: configuration.pop(key) for key in ("patch_size", "spacing")}
    # peer_predict reads what stands in the file: inheritance is resolved for it.
    plans["configurations"] = {"base": configuration, "3d_fullres": {"inherits_from": "base", **own}}
    (folder / "plans.json").write_text(json.dumps(plans))
    image = volume((15, 24, 21), ISOTROPIC)
    mask = predict_volume(load_model(folder), image)
    plans["configurations"]["3d_fullres"] |= configuration
    (folder / "plans.json").write_text(json.dumps(plans))
    expected, gap = peer.predict(folder, networks, image.array.transpose(0, 3, 2, 1), ISOTROPIC)
    compare(mask, expected, gap)


REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [3, 2], "heart": 3}


def test_regions_are_painted_in_their_order(peer: SimpleNamespace, tmp_path: Path) -> None:
    configuration = peer.configuration((8, 16, 16), (1.0, 1.0, 1.0))
    written = {"labels": REGIONS, "order": [1, 2, 3]}
    folder, networks = peer.write(tmp_path, {"3d_fullres": configuration}, "3d_fullres", **written)
    image = volume((15, 24, 21), ISOTROPIC)
    expected, gap = peer.predict(folder, networks, image.array.transpose(0, 3, 2, 1), ISOTROPIC)
    compare(predict_volume(load_model(folder), image), expected, gap)


@pytest.mark.parametrize("spacing", [ISOTROPIC, THICK])
@pytest.mark.parametrize("regions", [False, True])
def test_cascade_sees_the_mask_of_its_first_stage(
    peer: SimpleNamespace, tmp_path: Path, spacing: Any, regions: bool
) -> None:
    masked = {"masked": [True]}
    configurations = {
        "3d_lowres": peer.configuration((8, 8, 8), (2.1, 1.9, 2.0), **masked),
        "3d_cascade_fullres": peer.configuration((8, 16, 16), (1.0, 1.0, 1.0), previous_stage="3d_lowres", **masked),
    }
    written = {"labels": REGIONS, "order": [1, 2, 3]} if regions else {}
    first, former = peer.write(tmp_path, configurations, "3d_lowres", **written)
    second, networks = peer.write(tmp_path, configurations, "3d_cascade_fullres", **written)
    image = volume((9, 26, 22) if spacing == THICK else (15, 24, 21), spacing)
    data = image.array.transpose(0, 3, 2, 1)
    model = load_model(second)
    assert model.previous is not None
    previous = predict_volume(model.previous, image).array[0].transpose(2, 1, 0)
    expected, gap = peer.predict(first, former, data, spacing)
    assert (previous != expected)[gap > NEAR].sum() == 0
    # The oracle gets our first stage: a voxel that rounding decides there may decide many here.
    expected, gap = peer.predict(second, networks, data, spacing, previous=previous)
    compare(predict_volume(model, image), expected, gap)


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_readers_that_reorient_see_the_patient_upright(peer: SimpleNamespace, tmp_path: Path, reader: str) -> None:
    configuration = peer.configuration((8, 16, 16), (1.0, 1.0, 1.0))
    folder, networks = peer.write(tmp_path, {"3d_fullres": configuration}, "3d_fullres", reader=reader)
    image = volume((15, 24, 21), ISOTROPIC)
    upright = reorient(image, "RAS")
    expected, gap = peer.predict(folder, networks, upright.array.transpose(0, 3, 2, 1), upright.spacing[::-1])
    mask = reorient(predict_volume(load_model(folder), image), "RAS")
    compare(mask, expected, gap)


def test_imported_bundle_is_the_model(peer: SimpleNamespace, tmp_path: Path) -> None:
    """Same digest, so that a batch that was begun with one goes on with the other; same masks; the cascade with it."""
    configurations = {
        "3d_lowres": peer.configuration((8, 8, 8), (2.1, 1.9, 2.0)),
        "3d_cascade_fullres": peer.configuration((8, 16, 16), (1.0, 1.0, 1.0), previous_stage="3d_lowres"),
    }
    peer.write(tmp_path, configurations, "3d_lowres")
    folder, _ = peer.write(tmp_path, configurations, "3d_cascade_fullres", folds=("0", "1"), mirror=(0, 1, 2))
    imported = import_bundle(folder, tmp_path / "bundle")
    here, there = load_model(folder), load_model(tmp_path / "bundle")
    assert here.bundle.info.digest == imported.info.digest == there.bundle.info.digest
    assert there.bundle.info == here.bundle.info
    assert there.previous is not None
    image = volume((15, 24, 21), ISOTROPIC)
    masks = [predict_volume(model, image, mirror=False).array for model in (here, there)]
    assert 200 < np.count_nonzero(masks[0]) < 0.9 * masks[0].size
    assert np.array_equal(*masks)
    with pytest.raises(ConfigError, match="holds a bundle already"):
        import_bundle(folder, tmp_path / "bundle")


def test_first_stage_that_was_exchanged_is_refused(peer: SimpleNamespace, tmp_path: Path) -> None:
    configurations = {
        "3d_lowres": peer.configuration((8, 8, 8), (2.1, 1.9, 2.0)),
        "3d_cascade_fullres": peer.configuration((8, 16, 16), (1.0, 1.0, 1.0), previous_stage="3d_lowres"),
    }
    first, _ = peer.write(tmp_path, configurations, "3d_lowres", folds=("0", "1"))
    folder, _ = peer.write(tmp_path, configurations, "3d_cascade_fullres")
    import_bundle(folder, tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle" / "previous")
    import_bundle(first, tmp_path / "bundle" / "previous", folds=["0"])
    with pytest.raises(BundleError, match="not the first stage"):
        load_model(tmp_path / "bundle")


def benchmark(repository: Path) -> ModuleType:
    source = importlib.util.spec_from_file_location("nnunet_parity", repository / "benchmarks" / "nnunet_parity.py")
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("set_name", "case"),
    [
        ("hippocampus_2d_no_tta", "hippocampus_001"),
        ("hippocampus_3d_folds01_no_tta", "hippocampus_007"),
        ("hippo_regions", "hippocampus_001"),
        ("body_resenc_no_tta", "small"),
    ],
)
def test_trained_models_answer_as_nnunet_did(data: Path, repository: Path, set_name: str, case: str) -> None:
    check_real(data, repository, set_name, case)


@pytest.mark.soak
def test_all_trained_models_answer_as_nnunet_did(data: Path, repository: Path) -> None:
    for place in sorted((data / "nnunet_models" / "expected").glob("*/*.nii.gz")):
        check_real(data, repository, place.parent.name, place.name.removesuffix(".nii.gz"))


def check_real(data: Path, repository: Path, set_name: str, case: str) -> None:
    row = benchmark(repository).compare_case(data, set_name, case)
    assert row.foreground > 1000
    assert row.agreement >= 0.999
    assert row.unexplained == 0
