"""Folders of nnU-Net models: what is read of them, and what is refused, always with a word of what is wrong."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medseg.bundle import import_bundle, load_networks, open_bundle
from medseg.errors import BundleError, ConfigError, MedsegError
from medseg.inference.predict import load_model
from medseg.nnunet import is_nnunet, read_nnunet
from medseg.nnunet.architecture import our_weights
from medseg.nnunet.checkpoint import read_checkpoint
from medseg.planning.plan import Normalise

NAME = "3d_fullres"


@pytest.fixture
def model(peer: SimpleNamespace, tmp_path: Path) -> Path:
    """A model of two folds with one channel."""
    configuration = peer.configuration((8, 16, 16), (2.0, 1.0, 1.5))
    folder, _ = peer.write(tmp_path, {NAME: configuration}, NAME, folds=("0", "1"), mirror=(0, 1, 2))
    return folder


def change(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_networks_under_our_names_give_the_same_logits(
    peer: SimpleNamespace, tmp_path: Path, dims: int, residual: bool
) -> None:
    name = f"{dims}d"
    configuration = peer.configuration((16,) * dims, (1.0,) * dims, residual=residual)
    folder, networks = peer.write(tmp_path, {name: configuration}, name, folds=("0", "2"))
    loaded = load_networks(open_bundle(folder))
    image = torch.randn(1, 1, *[16] * dims)
    with torch.inference_mode():
        for ours, theirs in zip(loaded, networks, strict=True):
            assert torch.allclose(ours(image), theirs(image), atol=1e-5)
            # Every weight counts: one that was left out or confused would not be noticed by its shape alone.
            assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_plan_and_spec_say_what_plans_json_says(peer: SimpleNamespace, tmp_path: Path) -> None:
    schemes = ["CTNormalization", "ZScoreNormalization", "ZScoreNormalization", "NoNormalization"]
    masked = [False, True, False, False]
    configuration = peer.configuration((8, 16, 24), (2.0, 1.0, 1.5), schemes=schemes, masked=masked)
    folder, _ = peer.write(
        tmp_path,
        {NAME: configuration},
        NAME,
        transpose=(2, 0, 1),
        mirror=(0, 2),
        labels={"background": 0, "b": 2, "a": 1},
    )
    found = read_nnunet(folder)
    # Z, Y, X are K, J, I; transposed by (2, 0, 1) they are X, Z, Y.
    assert found.plan.orientation == "IKJ"
    assert found.plan.spacing == (2.0, 1.0, 1.5)
    assert found.plan.patch_size == (8, 16, 24)
    assert found.plan.augmentation.mirror_axes == (0, 2)
    assert found.plan.test_mirroring
    assert found.plan.precision == "fp32"
    rows = list(found.plan.normalisation.values())
    assert [row.scheme for row in rows] == ["ct", "zscore_content", "zscore", "none"]
    assert rows[0] == Normalise(scheme="ct", low=-1.0, high=3.5, mean=1.5, deviation=0.7)
    # The network's channels go by value, whatever the order in dataset.json.
    assert found.spec.foreground == {"a": 1, "b": 2}
    assert list(found.spec.foreground) == ["a", "b"]
    assert found.training["trainer"] == "nnUNetTrainer"


def test_slices_of_a_2d_model_lie_along_the_last_axis(peer: SimpleNamespace, tmp_path: Path) -> None:
    configuration = peer.configuration((16, 24), (1.0, 1.5))
    folder, _ = peer.write(tmp_path, {"2d": configuration}, "2d", transpose=(1, 0, 2))
    plan = read_nnunet(folder).plan
    # Y, Z, X: slices along Y.
    assert (plan.orientation, plan.patch_size, plan.dimensions) == ("KIJ", (16, 24, 1), 2)
    assert plan.spacing[:2] == (1.0, 1.5)
    assert not plan.test_mirroring


def test_numbered_folds_are_the_ensemble_and_all_stands_in_for_none(peer: SimpleNamespace, tmp_path: Path) -> None:
    configuration = peer.configuration((8, 16, 16), (1.0, 1.0, 1.0))
    both, _ = peer.write(tmp_path / "a", {NAME: configuration}, NAME, folds=("all", "0", "10", "2"))
    assert list(read_nnunet(both).weights) == ["fold_0", "fold_2", "fold_10"]
    assert list(read_nnunet(both, folds=["all"]).weights) == ["fold_all"]
    alone, _ = peer.write(tmp_path / "b", {NAME: configuration}, NAME, folds=("all",))
    assert list(read_nnunet(alone).weights) == ["fold_all"]


def test_best_checkpoint_stands_in_for_the_final_one(peer: SimpleNamespace, tmp_path: Path, model: Path) -> None:
    (model / "fold_1" / "checkpoint_final.pth").rename(model / "fold_1" / "checkpoint_best.pth")
    assert read_nnunet(model).training["checkpoints"] == {"0": "checkpoint_final.pth", "1": "checkpoint_best.pth"}


def test_fold_without_a_checkpoint_is_no_smaller_ensemble(model: Path) -> None:
    (model / "fold_1" / "checkpoint_final.pth").rename(model / "fold_1" / "checkpoint_latest.pth")
    with pytest.raises(BundleError, match=r"fold_1: .*its training has not finished"):
        load_model(model)
    assert list(read_nnunet(model, folds=["0"]).weights) == ["fold_0"]
    with pytest.raises(BundleError, match=r"fold_4: .*it does not exist"):
        read_nnunet(model, folds=["4"])


def test_folds_of_different_models_are_refused(peer: SimpleNamespace, model: Path) -> None:
    weights = torch.load(model / "fold_1" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    peer.checkpoint(model / "fold_1" / "checkpoint_final.pth", weights, NAME, mirror=(0,))
    with pytest.raises(BundleError, match="folds of one model belong together"):
        load_model(model)


def test_names_of_compiled_and_distributed_networks(peer: SimpleNamespace, model: Path) -> None:
    file = model / "fold_0" / "checkpoint_final.pth"
    plain = read_checkpoint(file).weights
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        peer.checkpoint(file, {prefix + key: tensor for key, tensor in plain.items()}, NAME)
        assert set(read_checkpoint(file).weights) == set(plain)


class Command:
    """What runs code where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("place", ["network_weights", "logging", "trainer_name"])
def test_code_in_a_checkpoint_is_never_run(peer: SimpleNamespace, tmp_path: Path, model: Path, place: str) -> None:
    file, trace = model / "fold_0" / "checkpoint_final.pth", tmp_path / "it-ran"
    weights = dict(read_checkpoint(file).weights)
    further: dict[str, Any] = {} if place == "network_weights" else {place: Command(trace)}
    if place == "network_weights":
        weights["encoder.extra"] = Command(trace)  # type: ignore[assignment]
    peer.checkpoint(file, weights, NAME, **further)
    with pytest.raises(
        BundleError, match=r"fold_0/checkpoint_final\.pth: refused: it holds .*system, which may run code"
    ):
        load_model(model)
    assert not trace.exists()


def test_only_numbers_of_numpy_are_harmless(peer: SimpleNamespace, model: Path) -> None:
    file = model / "fold_0" / "checkpoint_final.pth"
    weights = read_checkpoint(file).weights
    for value in (np.arange(3), collections.deque([1]), Path("x")):
        peer.checkpoint(file, weights, NAME, logging={"x": value})
        with pytest.raises(BundleError, match="refused"):
            read_checkpoint(file)
    for number in (np.float16(1), np.float32(1), np.float64(1), np.int32(1), np.int64(1), np.bool_(True)):
        peer.checkpoint(file, weights, NAME, logging={"x": number})
        assert read_checkpoint(file).trainer == "nnUNetTrainer"


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped"])
def test_damaged_checkpoint_is_refused(model: Path, damage: str) -> None:
    file = model / "fold_0" / "checkpoint_final.pth"
    content = file.read_bytes()
    half = len(content) // 2
    flipped = content[:200] + bytes(255 - b for b in content[200:400]) + content[400:]
    file.write_bytes({"cut": content[:half], "empty": b"", "text": b"not a checkpoint", "flipped": flipped}[damage])
    with pytest.raises(BundleError, match="fold_0"):
        load_model(model)


@pytest.mark.parametrize(
    "content", [[], {}, {"network_weights": {}}, {"network_weights": {"a": 3}, "trainer_name": "x"}]
)
def test_file_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "checkpoint_final.pth")
    with pytest.raises(BundleError, match="not a checkpoint of nnU-Net v2"):
        read_checkpoint(tmp_path / "checkpoint_final.pth")


def test_weights_of_other_shapes_are_refused(peer: SimpleNamespace, model: Path) -> None:
    file = model / "fold_0" / "checkpoint_final.pth"
    weights = dict(read_checkpoint(file).weights)
    name = "decoder.seg_layers.1.weight"
    peer.checkpoint(file, {**weights, name: weights[name][:2]}, NAME, mirror=(0, 1, 2))
    with pytest.raises(BundleError, match="does not fit the network"):
        load_model(model)


def test_missing_weights_are_refused(peer: SimpleNamespace, model: Path) -> None:
    file = model / "fold_0" / "checkpoint_final.pth"
    weights = {k: v for k, v in read_checkpoint(file).weights.items() if "transpconvs.0.bias" not in k}
    peer.checkpoint(file, weights, NAME, mirror=(0, 1, 2))
    with pytest.raises(BundleError, match="does not fit the network"):
        load_model(model)


def test_layers_that_our_network_has_not_are_refused() -> None:
    weights = {
        "encoder.stages.0.0.convs.0.norm.running_mean": torch.zeros(3),
        "encoder.attention.weight": torch.zeros(3),
    }
    with pytest.raises(BundleError, match=r"encoder\.attention\.weight.*no PlainConvUNet or ResidualEncoderUNet"):
        our_weights(weights, fold="fold_0")


def architecture(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plans: plans["configurations"][NAME]["architecture"]["arch_kwargs"].update(changes)


def configuration(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plans: plans["configurations"][NAME].update(changes)


def plans_with(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plans: plans.update(changes)


def of_class(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda plans: plans["configurations"][NAME]["architecture"].update(network_class_name=name)


RULE = {"order": 1, "order_z": 0, "force_separate_z": None}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (of_class("dynamic_network_architectures.architectures.primus.PrimusM"), "PrimusM: not read"),
        (of_class("dynamic_network_architectures.architectures.unet.ResidualUNet"), "ResidualUNet: not read"),
        (architecture(norm_op="torch.nn.modules.batchnorm.BatchNorm3d"), "norm_op=.*BatchNorm3d"),
        (architecture(nonlin="torch.nn.ReLU"), "nonlin=torch.nn.ReLU"),
        (architecture(nonlin_kwargs={"negative_slope": 0.2}), "nonlin_kwargs"),
        (architecture(norm_op_kwargs={"affine": False}), "norm_op_kwargs"),
        (architecture(squeeze_excitation=True), "squeeze_excitation"),
        (architecture(kernel_sizes=[[2, 2, 2]] * 3), "do not fit"),
        (configuration(preprocessor_name="MyPreprocessor"), "preprocessor_name MyPreprocessor"),
        (configuration(resampling_fn_data="resample_torch_fornnunet"), "resampling_fn_data resample_torch"),
        (configuration(normalization_schemes=["MyNormalization"]), "normalisation MyNormalization"),
        (configuration(resampling_fn_probabilities_kwargs={**RULE, "order": 3}), "probabilities resampled"),
        (configuration(resampling_fn_data_kwargs={**RULE, "device": "cuda"}), "resampling with device"),
        (configuration(inherits_from=NAME), "inherits itself"),
        (configuration(patch_size=[16]), "not nnU-Net v2's"),
        (plans_with(image_reader_writer="NaturalImage2DIO"), "NaturalImage2DIO"),
        (plans_with(label_manager="MyManager"), "label_manager MyManager"),
        (plans_with(configurations={}), "configuration '3d_fullres' is missing"),
        (plans_with(transpose_forward=[0, 1, 5]), "not nnU-Net v2's"),
        (lambda plans: plans.pop("transpose_forward"), "transpose_forward"),
    ],
)
def test_what_is_not_supported_is_named(model: Path, edit: Any, message: str) -> None:
    change(model / "plans.json", edit)
    with pytest.raises(MedsegError, match=message):
        load_model(model)


@pytest.mark.parametrize(
    "labels", [{"background": 0}, {"background": 0, "a": "x"}, {"background": 0, "a": [1, 2], "b": 1}, None]
)
def test_labels_that_make_no_spec_are_refused(model: Path, labels: Any) -> None:
    change(model / "dataset.json", lambda dataset: dataset.update(labels=labels))
    with pytest.raises(BundleError, match="nnUNetTrainer__nnUNetPlans__3d_fullres"):
        load_model(model)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_json_that_is_none_is_refused(model: Path, text: str) -> None:
    (model / "plans.json").write_text(text)
    with pytest.raises(BundleError, match=r"plans\.json"):
        load_model(model)


def test_cascade_without_its_first_stage_is_refused(peer: SimpleNamespace, tmp_path: Path) -> None:
    configurations = {
        "3d_lowres": peer.configuration((8, 8, 8), (2.0, 2.0, 2.0)),
        "3d_cascade_fullres": peer.configuration((8, 16, 16), (1.0, 1.0, 1.0), previous_stage="3d_lowres"),
    }
    folder, _ = peer.write(tmp_path, configurations, "3d_cascade_fullres")
    with pytest.raises(BundleError, match="nnUNetTrainer__nnUNetPlans__3d_lowres, must lie beside it"):
        load_model(folder)


def test_raw_datasets_and_bundles_are_no_models(peer: SimpleNamespace, tmp_path: Path, model: Path) -> None:
    import_bundle(model, tmp_path / "bundle")
    assert is_nnunet(model)
    assert not is_nnunet(tmp_path / "bundle")
    (tmp_path / "raw" / "imagesTr").mkdir(parents=True)
    (tmp_path / "raw" / "dataset.json").write_text("{}")
    assert not is_nnunet(tmp_path / "raw")
    with pytest.raises(BundleError, match=r"plans\.json, dataset\.json and a folder fold_"):
        import_bundle(tmp_path / "bundle", tmp_path / "again")
    with pytest.raises(BundleError, match="folds are chosen"):
        open_bundle(tmp_path / "bundle", folds=["0"])
    with pytest.raises(ConfigError, match="precision fp16"):
        import_bundle(model, tmp_path / "again", precision="fp16")


def test_precision_of_an_import_goes_into_its_plan_and_digest(tmp_path: Path, model: Path) -> None:
    exact, fast = (import_bundle(model, tmp_path / p, precision=p) for p in ("fp32", "bf16"))
    assert load_model(tmp_path / "bf16").bundle.info.plan.precision == "bf16"
    assert exact.info.digest != fast.info.digest
    assert exact.info.weights == fast.info.weights
