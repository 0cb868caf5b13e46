"""Models of nnU-Net from the command line's functions: a batch, a bundle of it, and what a batch says of a bad one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest

import medseg
from medseg.errors import BundleError, PlanError
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
