"""Datasets of every kind are learnt, predicted on their own grids and scored; not only run through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from medseg import api
from medseg.errors import MedsegError
from medseg.planning.plan import Measured, read_plan
from medseg.readers import read_labels
from medseg.readers.nifti import read_nifti
from medseg.training import make_plan as planning

Builder = Callable[..., Path]
SETTINGS = (
    "batch_size=4",
    "validations=2",
    "test_mirroring=false",
    "precision=fp32",
    "learning_rate=0.01",
    "averaging=0.8",
    "augmentation.spatial_probability=0",
    "augmentation.gamma=0",
    "network.options.features=[8,16,24]",
)
STEPS = 90
ENOUGH = 0.6
"""Reached by far by what looks at the right voxels; noise and wrong axes stay below 0.3."""


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(device="cpu", threads=1, step_seconds={"narrow fp32": 0.05})
    monkeypatch.setattr(planning, "measure", lambda *args, **options: measured)


def journey(data: Path, root: Path, *settings: str, steps: int = STEPS) -> dict[str, float]:
    """Train, predict and evaluate; returns label -> mean test Dice."""
    api.train(data, out=root / "run", steps=steps, settings=(*SETTINGS, *settings))
    result = api.predict(data, model=root / "run", out=root / "masks")
    assert result.complete, [entry.message for entry in result.entries]
    scores = api.evaluate(root / "masks", data, out=root / "scores")
    return {row.label: row.mean or 0.0 for row in scores.summary if row.metric == "dice"}


def respec(data: Path, **changes: Any) -> None:
    file = data / "dataset.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}, sort_keys=False))


def test_plain(tmp_path: Path, tiny_dataset: Builder) -> None:
    scores = journey(tiny_dataset(tmp_path / "data", cases=8, test=2), tmp_path)
    assert min(scores.values()) > ENOUGH, scores


def test_regions_are_learnt_as_overlapping_targets(tmp_path: Path, tiny_dataset: Builder) -> None:
    regions = {"all": {"labels": ["ball", "box"], "paint": "box"}, "core": {"labels": ["ball"], "paint": "ball"}}
    scores = journey(tiny_dataset(tmp_path / "data", cases=8, test=2, regions=regions), tmp_path)
    assert min(scores.values()) > ENOUGH, scores


def test_ignored_voxels_teach_nothing_and_are_not_scored(
    tmp_path: Path, tiny_dataset: Builder, tiny: SimpleNamespace
) -> None:
    """Half of each training mask is unannotated; the other half is enough to learn the labels everywhere."""
    data = tiny_dataset(tmp_path / "data", cases=10, test=2, ignore=9)
    for number in range(8):
        mask = tiny.case(number)[1]
        hidden = np.zeros(mask.shape, bool)
        hidden[: 10 if number % 2 else 0] = True
        hidden[10 if not number % 2 else 20 :] = True
        tiny.save(data / "masks" / f"c{number}.nii.gz", np.where(hidden, 9, mask).astype(np.uint8))
    scores = journey(data, tmp_path)
    assert min(scores.values()) > ENOUGH, scores
    for file in (tmp_path / "masks").glob("*.nii.gz"):
        assert 9 not in read_nifti(file).array


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_2d_plan_slices_along_the_coarse_axis_whichever_it_is(
    tmp_path: Path, tiny_dataset: Builder, tiny: SimpleNamespace, axis: int
) -> None:
    data = tiny_dataset(tmp_path / "data", cases=8, test=2)
    spacing = [1.0, 1.0, 1.0]
    spacing[axis] = 4.0
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    for number in range(8):
        image, mask = tiny.case(number)
        tiny.save(data / "images" / f"c{number}.nii.gz", image, affine)
        tiny.save(data / "masks" / f"c{number}.nii.gz", mask, affine)
    scores = journey(data, tmp_path, "dimensions=2", "batch_size=12", steps=70)
    plan = read_plan(tmp_path / "run" / "3_plan.yaml")
    assert plan.dimensions == 2
    assert plan.patch_size[2] == 1
    assert plan.orientation[2] == "RAS"[axis]
    assert min(scores.values()) > 0.5, scores


def two_channels(image: np.ndarray[Any, Any], number: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return a channel of noise and the one that shows the labels."""
    noise = np.random.default_rng((9, number)).normal(100, 20, image.shape).astype(np.float32)
    return noise, image


def test_channels_in_files_of_their_own_and_stacked_are_the_same(
    tmp_path: Path, tiny_dataset: Builder, tiny: SimpleNamespace
) -> None:
    channels = {"noise": {"modality": "MR", "file": "0000"}, "mr": {"modality": "MR", "file": "0001"}}
    data = tiny_dataset(tmp_path / "data", cases=8, test=2, channels=channels)
    respec(data, images="images/{case}_{channel}.nii.gz")
    stacked = tmp_path / "stacked"
    for number in range(8):
        pair = two_channels(tiny.case(number)[0], number)
        (data / "images" / f"c{number}.nii.gz").unlink()
        for token, array in zip(("0000", "0001"), pair, strict=True):
            tiny.save(data / "images" / f"c{number}_{token}.nii.gz", array)
        tiny.save(stacked / "images" / f"c{number}.nii.gz", np.stack(pair, axis=-1))
    scores = journey(data, tmp_path, steps=120)
    assert min(scores.values()) > ENOUGH, scores

    # the same images as a folder of files, and as 4-D files
    for folder, name in ((data / "images", "files"), (stacked / "images", "4d")):
        result = api.predict(folder, model=tmp_path / "run", out=tmp_path / name)
        assert result.complete
        assert [entry.id for entry in result.entries] == [f"c{n}" for n in range(8)]
        for case in ("c6", "c7"):
            expected = (tmp_path / "masks" / f"{case}.nii.gz").read_bytes()
            assert (tmp_path / name / f"{case}.nii.gz").read_bytes() == expected

    # a dataset of 4-D files trains to the same model
    shutil.copytree(data / "masks", stacked / "masks")
    shutil.copyfile(data / "dataset.yaml", stacked / "dataset.yaml")
    respec(stacked, images="images/{case}.nii.gz")
    runs = {}
    for place in (data, stacked):
        api.train(place, out=tmp_path / f"short-{place.name}", steps=2, settings=SETTINGS)
        runs[place.name] = (tmp_path / f"short-{place.name}" / "6_model" / "fold_0.safetensors").read_bytes()
    assert runs["data"] == runs["stacked"]

    # one channel missing, one too few
    (data / "images" / "c6_0001.nii.gz").unlink()
    result = api.predict(data / "images", model=tmp_path / "run", out=tmp_path / "missing")
    (refused,) = result.select("refused")
    assert (refused.id, refused.code) == ("c6", "CHANNEL_MISSING")
    assert "c6_0001.nii.gz" in refused.message
    (data / "images" / "c1_0001.nii.gz").unlink()
    with pytest.raises(MedsegError, match=r"case c1: the file of channel 'mr' is missing") as caught:
        api.train(data, out=tmp_path / "broken", steps=1)
    assert caught.value.code == "CHANNEL_MISSING"


def test_nnunet_and_msd_folders_are_read_as_they_are(tmp_path: Path, tiny: SimpleNamespace) -> None:
    nnunet, msd = tmp_path / "Dataset001_Tiny", tmp_path / "Task01_Tiny"
    for number in range(5):
        image, mask = tiny.case(number)
        tiny.save(nnunet / "imagesTr" / f"c{number}_0000.nii.gz", image)
        tiny.save(nnunet / "labelsTr" / f"c{number}.nii.gz", mask)
        tiny.save(msd / "imagesTr" / f"c{number}.nii.gz", image)
        tiny.save(msd / "labelsTr" / f"c{number}.nii.gz", mask)
    labels = {"background": 0, "ball": 1, "box": 2}
    (nnunet / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 5, "file_ending": ".nii.gz"})
    )
    rows = [{"image": f"./imagesTr/c{n}.nii.gz", "label": f"./labelsTr/c{n}.nii.gz"} for n in range(5)]
    names = {str(value): name for name, value in labels.items()}
    (msd / "dataset.json").write_text(
        json.dumps({"name": "Tiny", "modality": {"0": "MRI"}, "labels": names, "training": rows, "test": []})
    )
    models = []
    for folder in (nnunet, msd):
        out = tmp_path / f"run-{folder.name}"
        api.train(folder, out=out, steps=2, settings=SETTINGS)
        models.append((out / "6_model" / "fold_0.safetensors").read_bytes())
        result = api.predict(folder, model=out, out=tmp_path / f"masks-{folder.name}", cases="all")
        assert [entry.id for entry in result.entries] == [f"c{n}" for n in range(5)]
    assert models[0] == models[1]


def test_images_smaller_than_the_patch_and_of_odd_sizes(tmp_path: Path, tiny_dataset: Builder, tiny: Any) -> None:
    data = tiny_dataset(tmp_path / "data", cases=6, test=2)
    for number, shape in ((0, (17, 23, 19)), (4, (15, 17, 15)), (5, (41, 33, 27))):
        image, mask = tiny.case(number, shape)
        tiny.save(data / "images" / f"c{number}.nii.gz", image)
        tiny.save(data / "masks" / f"c{number}.nii.gz", mask)
    journey(data, tmp_path, steps=2)
    for name in ("c4", "c5"):
        image, mask = read_nifti(data / "images" / f"{name}.nii.gz"), read_nifti(tmp_path / "masks" / f"{name}.nii.gz")
        assert mask.shape == image.shape
        assert np.array_equal(mask.affine, image.affine)


def test_cases_without_any_label_do_no_harm(tmp_path: Path, tiny_dataset: Builder, tiny: Any) -> None:
    data = tiny_dataset(tmp_path / "data", cases=8, test=2)
    for number in (1, 7):
        tiny.save(data / "masks" / f"c{number}.nii.gz", np.zeros(tiny.shape, np.uint8))
    journey(data, tmp_path, steps=4)


def test_constant_images_stop_no_training_and_are_refused_when_predicting(
    tmp_path: Path, tiny_dataset: Builder, tiny: Any
) -> None:
    data = tiny_dataset(tmp_path / "data", cases=6, test=2)
    for number in (1, 5):
        tiny.save(data / "images" / f"c{number}.nii.gz", np.full(tiny.shape, number - 1, np.float32))
    api.train(data, out=tmp_path / "run", steps=3, settings=SETTINGS)
    result = api.predict(data, model=tmp_path / "run", out=tmp_path / "masks")
    assert {entry.id: entry.code for entry in result.entries} == {"c4": "", "c5": "CONSTANT_IMAGE"}


def picture_dataset(folder: Path, suffix: str, *, cases: int = 8, test: int = 2) -> Path:
    """Noisy discs (255) in the upper left of grey pictures of several sizes; a mask that is turned does not fit."""
    rng = np.random.default_rng(3)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for case in range(cases):
        height, width = 40 + 4 * (case % 3), 56
        rows, columns = np.mgrid[:height, :width]
        centre, radius = rng.uniform((10, 12), (20, 26)), rng.uniform(6, 9)
        inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
        grey = np.clip(60 + 90 * inside + rng.normal(0, 12, inside.shape), 0, 255).astype(np.uint8)
        Image.fromarray(grey).save(folder / "images" / f"p{case}{suffix}")
        Image.fromarray((inside * 255).astype(np.uint8)).save(folder / "labels" / f"p{case}{suffix}")
    spec = {
        "name": "discs",
        "unit": "pixel",
        "images": f"images/{{case}}{suffix}",
        "masks": f"labels/{{case}}{suffix}",
        "channels": {"grey": {}},
        "labels": {"disc": 255},
        "splits": {"test": [f"p{case}" for case in range(cases - test, cases)]},
    }
    (folder / "dataset.yaml").write_text(yaml.safe_dump(spec))
    return folder


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pictures(tmp_path: Path, suffix: str) -> None:
    data = picture_dataset(tmp_path / "data", suffix)
    assert not [row for row in api.check(data, out=tmp_path / "check").findings if row.severity == "error"]
    scores = journey(data, tmp_path, "network.options.features=[8,16,24,32]")
    assert scores["disc"] > ENOUGH, scores
    plan = read_plan(tmp_path / "run" / "3_plan.yaml")
    assert (plan.dimensions, plan.patch_size[2], plan.augmentation.mirror_axes) == (2, 1, (0, 1))
    for case in ("p6", "p7"):
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{case}{suffix}"))
        assert mask.shape == np.asarray(Image.open(data / "images" / f"{case}{suffix}")).shape
        assert set(np.unique(mask)) == {0, 255}
    assert not list((tmp_path / "masks").glob("*.nii.gz"))
    picture_folders(data, tmp_path, suffix)


def picture_folders(data: Path, root: Path, suffix: str) -> None:
    """A folder of pictures, and other formats into the same output."""
    loose = root / "loose"
    shutil.copytree(data / "images", loose / "a")
    shutil.copytree(data / "images", loose / "b")
    (loose / "b" / f"broken{suffix}").write_bytes((data / "images" / f"p1{suffix}").read_bytes()[:300])
    result = api.predict(loose, model=root / "run", out=root / "out", formats=("nifti", "png", "tiff"))
    assert len(result.entries) == 17
    assert [entry.id for entry in result.select("refused")] == ["broken"]
    done = result.select("done")[0].id
    nifti, png, tiff = (read_labels(root / "out" / f"{done}{end}").array for end in (".nii.gz", ".png", ".tif"))
    np.testing.assert_array_equal(nifti, png)
    np.testing.assert_array_equal(nifti, tiff)
    with pytest.raises(MedsegError, match="over it"):
        api.predict(data / "images", model=root / "run", out=data / "images")


def test_pictures_are_no_input_of_a_model_in_mm(tmp_path: Path, tiny_dataset: Builder) -> None:
    data = tiny_dataset(tmp_path / "data", cases=4, test=0)
    api.train(data, out=tmp_path / "run", steps=2, settings=SETTINGS)
    pictures = picture_dataset(tmp_path / "pictures", ".png") / "images"
    (entry,) = api.predict(pictures / "p0.png", model=tmp_path / "run", out=tmp_path / "out").entries
    assert (entry.state, entry.code) == ("refused", "UNIT_DIFFERS")
    with pytest.raises(MedsegError) as caught:
        api.predict(pictures, model=tmp_path / "run", out=tmp_path / "out")
    assert caught.value.code == "EMPTY_INPUT"
    shutil.copy(min(data.rglob("*.nii.gz")), pictures)
    result = api.predict(pictures, model=tmp_path / "run", out=tmp_path / "out")
    assert [entry.state for entry in result.entries] == ["done"]
