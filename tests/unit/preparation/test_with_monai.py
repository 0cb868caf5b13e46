"""Our steps among MONAI's own: dictionaries of MetaTensors, affines kept, randomness from outside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, RandFlipd, ScaleIntensityd, Spacingd, SpatialCropd

from medseg.preparation.cache import CaseCache, prepare_cases
from medseg.preparation.path import after_cache, geometry_and_intensity, read_regions, training_path, up_to_cache
from medseg.preparation.preprocess import CropToContent, LoadStudy, Orient, Resample
from medseg.preparation.sampling import SamplePatch
from medseg.spec import Dataset, load_dataset
from medseg.volume import reorient

Make = Callable[..., Any]
LABELS = (("L", "R"), ("P", "A"), ("I", "S"))
BOTH = ["image", "mask"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Callable[..., Path]) -> Dataset:
    return load_dataset(tiny_dataset(tmp_path_factory.mktemp("tiny"), cases=2, test=0))


def same(first: MetaTensor, second: MetaTensor) -> None:
    assert torch.allclose(first.as_tensor().float(), second.as_tensor().float(), atol=1e-5)
    assert torch.allclose(first.affine, second.affine, atol=1e-9)


def test_orient_is_monai_s_orientation(dataset: Dataset) -> None:
    load = LoadStudy(dataset.spec)
    for codes in ("RAS", "LPI", "SRA", "AIL"):
        ours = Compose([load, Orient(codes)])(dataset.cases[0])
        theirs = Compose([load, Orientationd(BOTH, axcodes=codes, labels=LABELS)])(dataset.cases[0])
        for key in BOTH:
            same(ours[key], theirs[key])


def test_a_study_that_monai_turned_and_cropped_goes_on_in_our_steps(dataset: Dataset) -> None:
    """MONAI's steps move the affine, and ours read it: the same place holds the same value."""
    path = Compose(
        [
            LoadStudy(dataset.spec),
            SpatialCropd(BOTH, roi_start=(3, 2, 1), roi_end=(17, 20, 16)),
            Orientationd(BOTH, axcodes="PLS", labels=LABELS),
            Orient("RAS"),
            CropToContent(),
        ]
    )
    data = path(dataset.cases[0])
    whole = Compose([LoadStudy(dataset.spec), Orient("RAS")])(dataset.cases[0])
    index = np.argwhere(data["mask"][0].numpy() == 1)[0]
    world = data["image"].affine.numpy() @ [*index, 1]
    there = np.rint(np.linalg.inv(whole["image"].affine.numpy()) @ world)[:3].astype(int)
    assert data["image"][(0, *index)] == whole["image"][(0, *there)]
    assert whole["mask"][(0, *there)] == 1


def test_intensities_and_flips_of_monai_after_loading(dataset: Dataset) -> None:
    load = LoadStudy(dataset.spec)
    path = Compose([load, ScaleIntensityd("image"), RandFlipd(BOTH, prob=1.0, spatial_axis=0)])
    plain, data = load(dataset.cases[0]), path(dataset.cases[0])
    assert float(data["image"].min()) == 0
    assert float(data["image"].max()) == 1
    assert torch.equal(data["mask"].as_tensor(), plain["mask"].as_tensor().flip(1))
    spot = np.argwhere(data["mask"][0].numpy() == 2)[0]
    world = data["mask"].affine.numpy() @ [*spot, 1]
    there = np.rint(np.linalg.inv(plain["mask"].affine.numpy()) @ world)[:3].astype(int)
    assert plain["mask"][(0, *there)] == 2


def test_resampling_gives_a_grid_that_monai_keeps(dataset: Dataset) -> None:
    """What we bring to a spacing, MONAI's Spacing at that spacing leaves alone."""
    data = Compose([LoadStudy(dataset.spec), Resample((1.0, 1.1, 2.0))])(dataset.cases[0])
    spacing = np.linalg.norm(data["image"].affine.numpy()[:3, :3], axis=0)
    again = Spacingd("image", pixdim=tuple(spacing))(data)
    same(again["image"], data["image"])


def test_one_visible_path_from_file_to_patch(tmp_path: Path, dataset: Dataset, make_plan: Make) -> None:
    plan = make_plan(dataset.spec, patch_size=(8, 8, 8))
    cache = CaseCache(tmp_path, dataset.spec, plan)
    path = training_path(dataset.spec, plan, cache)
    names = [type(step).__name__ for step in path.transforms]
    deterministic = [type(step).__name__ for step in geometry_and_intensity(plan)]
    assert names == ["LoadStudy", *deterministic, "CaseCache", "SamplePatch"]
    prepare_cases(up_to_cache(path), cache, dataset.cases)
    pick = after_cache(path)

    def regions(seed: int) -> list[torch.Tensor]:
        path.set_random_state(seed=seed)
        return [pick({**cache(case), "foreground": True})["image"].as_tensor() for case in dataset.cases]

    first, again, other = regions(1), regions(1), regions(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("added", [[], [RandFlipd(BOTH, prob=0.5, spatial_axis=0)]])
def test_regions_of_a_batch_are_those_of_the_path(
    tmp_path: Path, dataset: Dataset, make_plan: Make, added: list[Any]
) -> None:
    """Read directly or through whatever follows in the Compose: what a new random state of the same seed gives."""
    plan = make_plan(dataset.spec, patch_size=(8, 8, 8))
    cache = CaseCache(tmp_path, dataset.spec, plan)
    path = Compose([*training_path(dataset.spec, plan, cache).transforms, *added])
    prepare_cases(up_to_cache(path), cache, dataset.cases)
    wanted = [
        (seed, {**cache(dataset.cases[seed % 2]), "foreground": seed % 3 == 0, "margin": (seed % 2, 0, seed)})
        for seed in range(12)
    ]
    for region, (seed, data) in zip(read_regions(path, wanted), wanted, strict=True):
        path.set_random_state(seed=seed)
        expected = after_cache(path)(data)
        assert torch.equal(region.image, expected["image"].as_tensor())
        assert torch.equal(region.mask, expected["mask"].as_tensor())
        assert region.centre == expected["centre"]
        assert type(region.image) is torch.Tensor


def test_patches_are_pieces_of_the_oriented_study(dataset: Dataset, make_plan: Make) -> None:
    """Without normalisation a region holds the very numbers of the file."""
    data = Compose([LoadStudy(dataset.spec), Orient("RAS")])(dataset.cases[1])
    sample = SamplePatch((6, 6, 6))
    sample.set_random_state(seed=0)
    locations = np.array([(0, 7, 7, 7)], np.int32)
    opened = {
        "case": dataset.cases[1],
        "image": data["image"].numpy(),
        "mask": data["mask"].numpy(),
        "locations": locations,
        "foreground": True,
    }
    region = sample(opened)["image"].as_tensor().numpy()
    from medseg.studies import read_study

    source = reorient(read_study(dataset.spec, dataset.cases[1]).image, "RAS").array
    assert np.array_equal(region, source[:, 4:10, 4:10, 4:10])
