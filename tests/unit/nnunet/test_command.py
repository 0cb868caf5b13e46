"""Models of nnU-Net from the command line's functions: a batch, a bundle of it, and what a batch says of a bad one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

import medseg
from medseg.bundle import open_bundle, read_weights
from medseg.errors import BundleError, PlanError, TrainingError
from medseg.inference.describe import described
from medseg.nnunet import read_nnunet
from medseg.planning.plan import write_plan

NAME = "3d_fullres"


@pytest.fixture
def model(peer: SimpleNamespace, tmp_path: Path) -> Path:
    configuration = peer.configuration((8, 16, 16), (1.5, 1.5, 1.5))
    folder, _ = peer.write(tmp_path / "results", {NAME: configuration}, NAME, mirror=(0, 1, 2))
    return folder


def test_batch_with_the_folder_goes_on_with_its_bundle(tmp_path: Path, tiny: Any, model: Path) -> None:
    image, _ = tiny.case(1)
    source = tiny.save(tmp_path / "in" / "one.nii.gz", image)
    first = medseg.predict(tmp_path / "in", model=model, out=tmp_path / "out", mirror=False)
    assert first.complete
    info = medseg.import_model(model, out=tmp_path / "bundle")
    assert info.training["configuration"] == NAME
    mask = nibabel.load(tmp_path / "out" / "one.nii.gz")
    assert np.array_equal(mask.affine, nibabel.load(source).affine)
    assert len(np.unique(mask.dataobj)) > 1
    written = (tmp_path / "out" / "one.nii.gz").stat().st_mtime_ns
    again = medseg.predict(tmp_path / "in", model=tmp_path / "bundle", out=tmp_path / "out", mirror=False)
    assert again.entries == first.entries
    assert (tmp_path / "out" / "one.nii.gz").stat().st_mtime_ns == written, "what is done is not done again"


def test_who_guards_workers_never_loads_torch(tmp_path: Path, tiny: Any, model: Path) -> None:
    """Reading checkpoints takes it: that is done by a process that ends."""
    tiny.save(tmp_path / "in" / "one.nii.gz", tiny.case(1)[0])
    code = (
        "import sys; from medseg import api\n"
        f"done = api.predict({str(tmp_path / 'in')!r}, model={str(model)!r}, out={str(tmp_path / 'out')!r}, workers=1,"
        " mirror=False)\n"
        "assert done.complete\n"
        "sys.exit(str({'torch', 'monai'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.stderr.strip() == ""
    assert (tmp_path / "out" / "one.nii.gz").exists()


def test_what_is_told_by_another_process_is_the_bundle_without_weights(model: Path) -> None:
    told, own = described(model), open_bundle(model)
    assert (told.info, told.folder, told.previous, told.states) == (own.info, own.folder, None, None)
    (model / "plans.json").write_text("{")
    with pytest.raises(BundleError) as here:
        open_bundle(model)
    with pytest.raises(BundleError) as there:
        described(model)
    assert (str(there.value), there.value.code) == (str(here.value), here.value.code)


def test_model_that_is_not_supported_stops_a_batch_before_it_begins(tmp_path: Path, tiny: Any, model: Path) -> None:
    tiny.save(tmp_path / "in" / "one.nii.gz", tiny.case(1)[0])
    plans = model / "plans.json"
    plans.write_text(plans.read_text().replace("unet.PlainConvUNet", "unet.OtherUNet"))
    with pytest.raises(BundleError, match="OtherUNet: not read; allowed are PlainConvUNet and ResidualEncoderUNet"):
        medseg.predict(tmp_path / "in", model=model, out=tmp_path / "out")


def test_plan_of_an_imported_model_is_not_for_training(
    tmp_path: Path, tiny_dataset: Callable[..., Path], model: Path
) -> None:
    write_plan(tmp_path / "plan.yaml", read_nnunet(model).plan, {})
    with pytest.raises(PlanError, match="does not say how to train"):
        medseg.train(tiny_dataset(tmp_path / "data"), out=tmp_path / "run", steps=2, plan=tmp_path / "plan.yaml")


@pytest.mark.parametrize("shape", [(8, 16, 16), (16, 16)], ids=["3d", "2d"])
def test_model_learns_on(
    tmp_path: Path, peer: SimpleNamespace, tiny_dataset: Callable[..., Path], shape: tuple[int, ...]
) -> None:
    """Prepared as nnU-Net does it, its weights are the beginning; what comes of it predicts."""
    configuration = peer.configuration(shape, (1.5,) * len(shape))
    folder, _ = peer.write(tmp_path / "results", {NAME: configuration}, NAME)
    data = tiny_dataset(tmp_path / "data", cases=3, test=1, labels={"zebra": 1, "ball": 2})
    settings = ("learning_rate=1e-12", "batch_size=2", "validations=1", "precision=fp32")
    medseg.train(data, out=tmp_path / "run", steps=1, from_model=folder, settings=settings)
    before, after = open_bundle(folder), open_bundle(tmp_path / "run")
    assert after.info.plan.nnunet == before.info.plan.nnunet is not None
    assert after.info.plan.start is not None
    assert (after.info.plan.start.kept, after.info.plan.start.new) == (("zebra",), ("ball",))
    assert (after.info.plan.start.model, after.info.plan.start.left_out) == (before.info.digest, ("ant",))
    old, new = (read_weights(b, "fold_0.safetensors") for b in (before, after))
    assert list(before.info.spec.foreground) == ["ant", "zebra"] or list(before.info.spec.foreground) == [
        "zebra",
        "ant",
    ]
    zebra = 1 + list(before.info.spec.foreground).index("zebra")
    assert torch.allclose(new["heads.0.weight"][:2], old["heads.0.weight"][[0, zebra]], atol=1e-6)
    assert medseg.predict(data, model=tmp_path / "run", out=tmp_path / "out").complete


def test_second_stage_of_a_cascade_does_not_learn_on(
    tmp_path: Path, peer: SimpleNamespace, tiny_dataset: Callable[..., Path]
) -> None:
    low = peer.configuration((8, 16, 16), (3.0, 3.0, 3.0))
    high = peer.configuration((8, 16, 16), (1.5, 1.5, 1.5), previous_stage="3d_lowres")
    both = {"3d_lowres": low, "3d_cascade_fullres": high}
    peer.write(tmp_path / "results", both, "3d_lowres")
    folder, _ = peer.write(tmp_path / "results", both, "3d_cascade_fullres")
    with pytest.raises(TrainingError, match="second stage of a cascade"):
        medseg.train(tiny_dataset(tmp_path / "data"), out=tmp_path / "run", steps=1, from_model=folder)
