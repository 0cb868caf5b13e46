"""MONAI bundles that MONAI itself runs: the masks of `medseg predict --no-mirror`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from medseg.errors import ExportError
from medseg.exchange.export import export_model
from medseg.inference.predict import load_model, predict_volume
from medseg.volume import Volume

Make = Callable[..., Any]
AFFINE = np.array([[0, -1.5, 0, 130], [-1.5, 0, 0, 120], [0, 0, 2.0, -205], [0, 0, 0, 1]], np.float64)
STAGES = {"features": [4, 6, 8], "strides": [[2] * 3] * 2, "kernels": [[3] * 3] * 3}


@pytest.fixture
def model(tmp_path: Path, make_spec: Make, make_plan: Make, make_bundle: Make) -> Callable[..., Path]:
    def make(name: str = "unet", options: Any = None, spec: Any = None, folds: int = 1, **changes: Any) -> Path:
        spec = spec or make_spec(labels={"two": 9, "three": 4})
        network = {"name": name, "options": options or STAGES}
        plan = make_plan(spec, **{"network": network, "patch_size": (8, 8, 8), "spacing": (1.5, 1.5, 2.0), **changes})
        return make_bundle(tmp_path / "model", spec, plan, folds=folds).folder

    return make


def scene() -> Volume:
    """Blobs, so that a random network has something to say, in a margin of zeros."""
    noise = ndimage.gaussian_filter(np.random.default_rng(3).standard_normal((18, 17, 20)), 2)
    image = np.zeros((1, 22, 20, 23), np.float32)
    image[0, 2:-2, 1:-2, 3:] = 1000 * noise + 500
    return Volume(image, AFFINE)


def run_by_monai(folder: Path, image: Volume, place: Path) -> Any:
    pytest.importorskip("ignite")
    from monai.bundle import ConfigWorkflow

    (place / "in").mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(image.array[0], image.affine), place / "in" / "one.nii.gz")
    workflow = ConfigWorkflow(
        config_file=str(folder / "configs" / "inference.json"),
        meta_file=str(folder / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(folder),
        dataset_dir=str(place / "in"),
        output_dir=str(place / "out"),
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    (file,) = (place / "out").iterdir()
    mask = nibabel.load(file)
    assert np.allclose(mask.affine, image.affine)
    return np.asarray(mask.dataobj)


def same_share(ours: Any, theirs: Any) -> float:
    foreground = (ours > 0) | (theirs > 0)
    assert foreground.sum() > 500
    return float((ours == theirs)[foreground].mean())


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 2.0), (0.75, 0.75, 2.0)], ids=["same", "whole multiples"])
def test_bundle_has_the_masks_of_its_model_where_spacings_divide(model: Any, tmp_path: Path, spacing: Any) -> None:
    source = model(spacing=spacing)
    found = export_model(source, to="monai", out=tmp_path / "bundle")
    assert found.agreement.same > 0.999
    config = (tmp_path / "bundle" / "configs" / "inference.json").read_text()
    assert "medseg" not in config
    assert json.loads(config)["network_def"]["_target_"] == "monai.networks.nets.DynUNet"
    ours = predict_volume(load_model(source), scene(), mirror=False).array[0]
    assert set(np.unique(ours)) == {0, 4, 9}
    theirs = run_by_monai(tmp_path / "bundle", scene(), tmp_path / "run")
    assert same_share(ours, theirs) >= 0.999


def test_bundle_differs_at_borders_where_spacings_do_not_divide(model: Any, tmp_path: Path) -> None:
    """By how much depends on the network: the logits of this one, which has learnt nothing, are nearly noise."""
    source = model(spacing=(1.7, 1.3, 2.6))
    export_model(source, to="monai", out=tmp_path / "bundle")
    ours = predict_volume(load_model(source), scene(), mirror=False).array[0]
    theirs = run_by_monai(tmp_path / "bundle", scene(), tmp_path / "run")
    assert same_share(ours, theirs) >= 0.8


def test_regions_are_painted_in_their_order(model: Any, make_spec: Make, tmp_path: Path) -> None:
    regions = {"whole": {"labels": ["two", "three"], "paint": "two"}, "core": {"labels": ["three"], "paint": "three"}}
    source = model(spec=make_spec(labels={"two": 9, "three": 4}, regions=regions), normalisation={"t1": CT})
    export_model(source, to="monai", out=tmp_path / "bundle")
    ours = predict_volume(load_model(source), scene(), mirror=False).array[0]
    theirs = run_by_monai(tmp_path / "bundle", scene(), tmp_path / "run")
    assert same_share(ours, theirs) >= 0.999


CT = {"scheme": "ct", "low": 100, "high": 900, "mean": 480, "deviation": 210}


def test_networks_of_monai_and_several_folds(model: Any, tmp_path: Path) -> None:
    source = model("segresnet", {"width": 8}, folds=2, test_mirroring=True, patch_size=(16, 16, 16))
    found = export_model(source, to="monai", out=tmp_path / "bundle")
    assert found.networks == 2
    assert any("not mirrored" in row for row in found.differences)
    for fold in ("fold_0", "fold_1"):
        config = json.loads((tmp_path / "bundle" / fold / "configs" / "inference.json").read_text())
        assert config["network_def"]["_target_"] == "monai.networks.nets.SegResNetDS"
        assert (tmp_path / "bundle" / fold / "models" / "model.pt").is_file()


def test_what_monai_has_no_word_for_is_refused(model: Any, tmp_path: Path) -> None:
    kernels = [[3, 3, 1], [3, 3, 3], [3, 3, 3]]
    for options in ({**STAGES, "kernels": kernels}, {**STAGES, "convolutions": 1}, {**STAGES, "bias": True}):
        with pytest.raises(ExportError, match="cannot say this: a U-Net with two stages") as raised:
            export_model(model(options=options), to="monai", out=tmp_path / "bundle")
        assert raised.value.code == "EXPORT_UNSUPPORTED"
    with pytest.raises(ExportError, match="no multiple of the total stride"):
        export_model(model(patch_size=(8, 10, 8)), to="monai", out=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
