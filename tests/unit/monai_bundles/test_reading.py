"""What of a MONAI bundle is read, what is refused by its name, and that nothing in it is ever run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medseg
from medseg.bundle import open_bundle
from medseg.errors import BundleError, ExportError, PlanError, TrainingError
from medseg.exchange.export import export_model
from medseg.inference.predict import load_model, predict_logits, predict_soft, predict_volume
from medseg.monai_bundles import read_monai
from medseg.networks.monai_nets import READ
from medseg.planning.plan import write_plan
from medseg.volume import Volume

Change = Callable[[Callable[[dict[str, Any]], Any]], Path]
Write = Callable[..., Path]
NOISE = Volume(np.random.default_rng(0).normal(500, 300, (1, 12, 20, 9)).astype(np.float32), np.diag([1.5, 1, 2, 1]))


def _transform(config: dict[str, Any], **row: Any) -> None:
    config["preprocessing"]["transforms"].insert(-1, {"keys": "image", **row})


def _network(config: dict[str, Any], **changes: Any) -> None:
    config["network_def"].update(changes)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "class": (
        lambda c: _network(c, _target_="os.system", command="touch TRAP"),
        "os.system is not read; allowed are UNet",
    ),
    "class called alike": (lambda c: _network(c, _target_="trap.UNet"), "trap.UNet is not read"),
    "class of MONAI": (
        lambda c: _network(c, _target_="monai.networks.nets.VarAutoEncoder"),
        "VarAutoEncoder is not read",
    ),
    "module of MONAI": (lambda c: _network(c, _target_="monai.networks.nets_trap.UNet"), "nets_trap.UNet is not read"),
    "network is code": (
        lambda c: c.update(network_def="$__import__('os').system('touch TRAP')"),
        "network_def: a class",
    ),
    "argument is code": (
        lambda c: _network(c, channels="$[open('TRAP', 'w'), 8]"),
        r"network_def.channels: .* is code",
    ),
    "argument builds": (
        lambda c: _network(c, norm={"_target_": "os.system", "command": "touch TRAP"}),
        "network_def.norm: it builds os.system",
    ),
    "argument is a file": (lambda c: _network(c, channels="%TRAP"), "is code"),
    "argument refers to code": (
        lambda c: (c.update(trap="$open('TRAP', 'w')"), _network(c, channels="@trap")),
        "network_def.channels: .* is code",
    ),
    "argument unknown": (lambda c: _network(c, trap=1), "UNet of this MONAI has no trap"),
    "argument impossible": (lambda c: _network(c, kernel_size=[3, 3]), "UNet with these arguments"),
    "argument without end": (lambda c: _network(c, num_res_units=10**9), "1000000000 is more than any size"),
    "another network": (lambda c: _network(c, channels=[4, 8, 32]), "size mismatch"),
    "numbers as text": (lambda c: _network(c, out_channels="3"), "numbers are needed for spatial_dims"),
    "transform": (
        lambda c: _transform(c, _target_="os.system", command="touch TRAP"),
        "os.system is not read",
    ),
    "transform called alike": (
        lambda c: _transform(c, _target_="trap.CastToTyped", keys="image"),
        "trap.CastToTyped is not read; classes of MONAI are",
    ),
    "integers": (lambda c: _transform(c, _target_="CastToTyped", dtype="$torch.int16"), "int16' is not read; float32"),
    "integers of one": (
        lambda c: _transform(c, _target_="EnsureTyped", dtype=["torch.float32", "uint8"]),
        "'uint8' is",
    ),
    "integers by code": (
        lambda c: _transform(c, _target_="CastToTyped", dtype="$torch.int16 if True else torch.float32"),
        "is not read; float32",
    ),
    "integers while scaling": (
        lambda c: _transform(c, _target_="ScaleIntensityRanged", a_min=0, a_max=9, b_min=0, b_max=1, dtype="$np.int16"),
        "ScaleIntensityRanged: dtype=",
    ),
    "integers before labels": (
        lambda c: c["postprocessing"]["transforms"].insert(0, {"_target_": "EnsureTyped", "dtype": "uint8"}),
        "EnsureTyped: dtype=",
    ),
    "inferer called alike": (lambda c: c["inferer"].update(_target_="trap.SlidingWindowInferer"), "trap.Sliding"),
    "windows that share all": (lambda c: c["inferer"].update(overlap=1.0), r"overlap 1.0 \(from 0, below 1\)"),
    "transform of MONAI": (
        lambda c: _transform(c, _target_="CropForegroundd"),
        "CropForegroundd is not read; read are",
    ),
    "lambda": (lambda c: _transform(c, _target_="Lambdad", func="$open('TRAP', 'w')"), "Lambdad is not read"),
    "value of a transform": (
        lambda c: _transform(c, _target_="ScaleIntensityRanged", a_min="$open('TRAP', 'w')"),
        r"ScaleIntensityRanged: a_min=.* is not read; plain values are",
    ),
    "disabled by code": (
        lambda c: _transform(c, _target_="EnsureTyped", _disabled_="$bool(open('TRAP', 'w'))"),
        "EnsureTyped has _disabled_",
    ),
    "transforms are code": (lambda c: c.update(preprocessing="$open('TRAP', 'w')"), "preprocessing: a Compose"),
    "two spacings": (
        lambda c: _transform(c, _target_="Spacingd", pixdim=1.0),
        "Spacingd after intensities were changed",
    ),
    "inferer": (lambda c: c["inferer"].update(_target_="SimpleInferer"), "inferer: SimpleInferer in 3-D is not read"),
    "windows are code": (lambda c: c["inferer"].update(roi_size="$open('TRAP', 'w')"), "inferer: roi_size"),
    "window that does not go through": (
        lambda c: c["inferer"].update(roi_size=[15, 16, 16]),
        r"window of \(15, 16, 16\)",
    ),
    "sigmoid": (lambda c: c["postprocessing"]["transforms"][0].update(sigmoid=True), "postprocessing: Activationsd"),
    "labels by nearest": (
        lambda c: c["postprocessing"]["transforms"][1].update(nearest_interp=True),
        "postprocessing: Invertd",
    ),
    "no labels": (lambda c: c["postprocessing"]["transforms"].pop(), r"AsDiscreted \(argmax\) are needed"),
    "missing": (lambda c: c.pop("inferer"), "no 'inferer'; it is needed"),
    "reference into nothing": (lambda c: c.update(inferer="@trap::inner"), "no 'trap::inner'"),
    "loop": (lambda c: c.update(inferer="@a", a=["@b"], b=["@a"]), "form a loop"),
    "bomb": (
        lambda c: c.update({f"a{n}": [f"@a{n + 1}"] * 9 for n in range(12)}, a12=1, inferer="@a0"),
        "or multiply",
    ),
}


@pytest.mark.parametrize(("edit", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name_and_never_run(
    tmp_path: Path, change: Change, monkeypatch: pytest.MonkeyPatch, edit: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = change(edit)
    with pytest.raises(BundleError, match=words) as caught:
        open_bundle(folder)
    assert str(caught.value).startswith("bundle: ")
    assert not (tmp_path / "TRAP").exists()


class Trap:
    """A pickle that makes a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch TRAP",)


def test_weights_with_code_are_not_run(tmp_path: Path, write_bundle: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_bundle(tmp_path / "bundle")
    file = folder / "models" / "model.pt"
    state = torch.load(file, weights_only=True)
    torch.save({"state_dict": state, "trap": Trap()}, file)
    with pytest.raises(BundleError, match=r"bundle: model.pt: refused \(UnpicklingError\).* save the state dict alone"):
        open_bundle(folder)
    assert not (tmp_path / "TRAP").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "TRAP").exists(), "the trap is none"


@pytest.mark.parametrize("name", ["model.pt", "model.ts"])
def test_torchscript_is_a_program(tmp_path: Path, write_bundle: Write, name: str) -> None:
    folder = write_bundle(tmp_path / "bundle")
    (folder / "models" / "model.pt").unlink()
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "models" / name)
    words = {"model.pt": "model.pt: refused .* a program", "model.ts": "is TorchScript, a program, which is not run"}
    with pytest.raises(BundleError, match=words[name]):
        open_bundle(folder)


def test_damaged_files(tmp_path: Path, write_bundle: Write) -> None:
    folder = write_bundle(tmp_path / "bundle")
    weights, config = folder / "models" / "model.pt", folder / "configs" / "inference.json"
    content, text = weights.read_bytes(), config.read_text()
    for part in (b"", b"PK", content[:1000], content[1000:]):
        weights.write_bytes(part)
        with pytest.raises(BundleError, match=r"model.pt: refused"):
            open_bundle(folder)
    weights.unlink()
    with pytest.raises(BundleError, match=r"a state dict is needed: models/model.pt or"):
        open_bundle(folder)
    weights.write_bytes(content)
    for part in ("", "[]", text[:100], "[" * 100_000):
        config.write_text(part)
        with pytest.raises(BundleError, match=r"inference.json: (cannot be read|an object was expected)"):
            open_bundle(folder)


def test_yaml_says_the_same_and_builds_nothing(
    tmp_path: Path, write_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_bundle(tmp_path / "bundle")
    expected = open_bundle(folder).info.digest
    file = folder / "configs" / "inference.json"
    yaml = file.rename(file.with_suffix(".yaml"))  # JSON is YAML
    assert open_bundle(folder).info.digest == expected
    yaml.write_text("inferer: !!python/object/apply:os.system ['touch TRAP']")
    with pytest.raises(BundleError, match=r"inference.yaml: cannot be read \(ConstructorError\)"):
        open_bundle(folder)
    assert not (tmp_path / "TRAP").exists()


SMALL: dict[str, dict[str, Any]] = {
    "UNet": {"channels": [4, 8], "strides": [2]},
    "BasicUNet": {"features": [4, 4, 4, 4, 4, 4]},
    "DynUNet": {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]},
    "SegResNet": {"init_filters": 8},
    "SegResNetDS": {"init_filters": 8, "dsdepth": 2},
    "AttentionUnet": {"channels": [4, 8], "strides": [2]},
    "VNet": {},
    "UNETR": {"img_size": [16, 16, 16], "feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
    "SwinUNETR": {"feature_size": 12},
    "MedNeXt": {"init_filters": 4},
}


@pytest.mark.parametrize("name", READ)
def test_networks_that_are_read(tmp_path: Path, write_bundle: Write, name: str) -> None:
    """Each class as MONAI makes it: the logits of a window are the very same."""
    from monai.bundle import ConfigParser

    side = {"SwinUNETR": 64, "BasicUNet": 32, "MedNeXt": 32}.get(name, 16)
    network = {"_target_": name, "spatial_dims": 3, "in_channels": 1, "out_channels": 3, **SMALL[name]}
    folder = write_bundle(tmp_path / "bundle", network)
    file = folder / "configs" / "inference.json"
    file.write_text(
        file.read_text().replace('[16, 16, 16], "preprocessing"', f'[{side}, {side}, {side}], "preprocessing"')
    )
    ours = load_model(folder).networks[0]
    theirs = ConfigParser({"network": network}).get_parsed_content("network").eval()
    theirs.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
    x = torch.randn((1, 1, side, side, side), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        answer = theirs(x)
        assert torch.equal(ours(x), answer[0] if isinstance(answer, list | tuple) else answer)


def test_names_come_from_the_metadata(tmp_path: Path, write_bundle: Write) -> None:
    folder = write_bundle(tmp_path / "bundle")
    plain = open_bundle(folder).info
    assert (list(plain.spec.channels), plain.spec.foreground) == (["channel_0"], {"label_1": 1, "label_2": 2})
    (folder / "configs" / "metadata.json").write_text(
        '{"name": "Spleen CT/x", "network_data_format": {"inputs": {"image": {"channel_def": {"0": "CT"}}}, '
        '"outputs": {"pred": {"channel_def": {"0": "background", "1": "spleen", "2": "liver"}}}}}'
    )
    named = open_bundle(folder).info
    assert (named.name, list(named.spec.channels), named.spec.foreground) == (
        "Spleen_CT_x",
        ["CT"],
        {"spleen": 1, "liver": 2},
    )


def test_imported_it_is_the_same_model(tmp_path: Path, write_bundle: Write) -> None:
    folder = write_bundle(tmp_path / "bundle")
    info = medseg.import_model(folder, out=tmp_path / "kept")
    assert info.digest == open_bundle(folder).info.digest
    assert (info.training["trainer"], info.training["configuration"]) == ("MONAI", "UNet")
    shutil.rmtree(folder)
    assert predict_volume(load_model(tmp_path / "kept"), NOISE).array.any()


@pytest.mark.parametrize("softmax", [True, False])
def test_probabilities_are_those_of_the_mask(tmp_path: Path, write_bundle: Write, softmax: bool) -> None:
    """Where probabilities are brought back they are not made probabilities once more."""
    model = load_model(write_bundle(tmp_path / "bundle", softmax=softmax))
    mask, soft = predict_soft(model, NOISE)
    assert np.array_equal(mask.array, predict_volume(model, NOISE).array)
    assert np.array_equal(mask.array, predict_volume(model, NOISE, max_memory=1 << 40).array)
    everything = np.concatenate([1 - soft.array.sum(0, keepdims=True), soft.array])
    best = np.sort(everything, axis=0)
    sure = best[-1] - best[-2] > 1e-4
    assert sure.mean() > 0.9
    assert np.array_equal(everything.argmax(0)[sure], mask.array[0][sure])
    if softmax:
        assert np.allclose(everything, predict_logits(model, NOISE).exp().numpy(), atol=1e-5)


def test_it_is_not_for_training(tmp_path: Path, write_bundle: Write, tiny_dataset: Callable[..., Path]) -> None:
    folder = write_bundle(tmp_path / "bundle")
    data = tiny_dataset(tmp_path / "data")
    write_plan(tmp_path / "plan.yaml", read_monai(folder).plan, {})
    with pytest.raises(PlanError, match="it predicts, and does not say how to train"):
        medseg.train(data, out=tmp_path / "run", steps=2, plan=tmp_path / "plan.yaml")
    with pytest.raises(TrainingError, match="it was a MONAI bundle, whose preparation is known for prediction only"):
        medseg.train(data, out=tmp_path / "other", steps=2, from_model=folder)


def test_export(tmp_path: Path, write_bundle: Write) -> None:
    """As a program it may go on; as a MONAI bundle it is there already."""
    folder = write_bundle(tmp_path / "bundle")
    with pytest.raises(ExportError, match="what was imported from a MONAI bundle: use that one"):
        export_model(folder, to="monai", out=tmp_path / "again")
    assert export_model(folder, to="torch", out=tmp_path / "model.pt2").agreement.same == 1


def test_neither_of_both_is_said(tmp_path: Path, write_bundle: Write) -> None:
    with pytest.raises(BundleError, match=r"no model of nnU-Net v2 .* and no MONAI bundle"):
        medseg.import_model(tmp_path, out=tmp_path / "out")
    with pytest.raises(BundleError, match="folds are chosen from a model folder of nnU-Net v2"):
        medseg.import_model(write_bundle(tmp_path / "bundle"), out=tmp_path / "out", folds=("0",))
