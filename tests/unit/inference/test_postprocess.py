"""Post-processing: known answers, slow oracles, and no step that touches a label that is not its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from medseg.bundle import Bundle, BundleInfo, Calibration, PostStep, open_bundle, save_bundle
from medseg.errors import BundleError
from medseg.files import digest
from medseg.inference.chosen import unprocessed
from medseg.inference.postprocess import POSTPROCESS, Grid, grid_of, postprocess, require_steps
from medseg.inference.predict import load_model, predict_logits, predict_soft, predict_volume
from medseg.spec import Spec, spec_digest
from medseg.volume import Volume, reorient

Make = Callable[..., Any]
ANISOTROPIC = (0.7, 1.1, 3.0)
LABELS = {"a": 1, "b": 2, "c": 200}


@pytest.fixture(scope="module")
def spec(make_spec: Make) -> Spec:
    found: Spec = make_spec(labels=LABELS)
    return found


def blobs(seed: int, shape: tuple[int, int, int] = (14, 12, 9), share: float = 0.35) -> NDArray[np.uint8]:
    """Labels that touch, with holes and specks."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(4, *shape)), (0, 1, 1, 1))
    smooth[0] = np.quantile(smooth[1:].max(0), 1 - share)
    return np.array([0, *LABELS.values()], np.uint8)[smooth.argmax(0)]


def volume(array: NDArray[Any], spacing: tuple[float, float, float] = ANISOTROPIC) -> Volume:
    return Volume(array[None], np.diag([*spacing, 1.0]))


def run(spec: Spec, array: NDArray[Any], *steps: PostStep, spacing: tuple[float, float, float] = ANISOTROPIC) -> Any:
    return postprocess(volume(array, spacing), steps, spec).array[0]


def step(kind: str, *labels: str, size: float = 0.0, over: tuple[str, ...] = ()) -> PostStep:
    return PostStep(kind=kind, labels=labels, size=size, over=over)


def components(present: NDArray[np.bool_]) -> Any:
    """SimpleITK's, the largest being 1."""
    parts = SimpleITK.ConnectedComponent(SimpleITK.GetImageFromArray(present.astype(np.uint8)), True)
    return SimpleITK.GetArrayFromImage(SimpleITK.RelabelComponent(parts, sortByObjectSize=True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", LABELS)
def test_the_largest_object_is_that_of_simpleitk(spec: Spec, seed: int, name: str) -> None:
    before = blobs(seed)
    after = run(spec, before, step("largest_component", name))
    parts = components(before == LABELS[name])
    sizes = np.bincount(parts.ravel())[1:]
    kept = after == LABELS[name]
    assert kept.sum() == sizes.max()
    assert len(np.unique(parts[kept])) == 1
    if (sizes == sizes.max()).sum() == 1:
        assert np.array_equal(kept, parts == 1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("voxels", [1, 2, 3, 10, 10_000])
def test_small_objects_are_those_of_simpleitk(spec: Spec, seed: int, voxels: int) -> None:
    before = blobs(seed)
    after = run(spec, before, step("min_volume", "b", size=voxels * float(np.prod(ANISOTROPIC))))
    parts = components(before == 2)
    sizes = np.bincount(parts.ravel())
    assert np.array_equal(after == 2, (parts > 0) & (sizes[parts] >= voxels))


def flooded(present: NDArray[np.bool_], limit: float | None, voxel: float) -> Any:
    """Fill by walking from a frame of background, voxel by voxel."""
    padded = np.pad(present, 1)
    seen = np.zeros_like(padded)
    todo = [(0,) * present.ndim]
    seen[todo[0]] = True
    while todo:
        here = todo.pop()
        for axis in range(present.ndim):
            for way in (-1, 1):
                there = tuple(x + way * (n == axis) for n, x in enumerate(here))
                inside = all(0 <= x < n for x, n in zip(there, padded.shape, strict=True))
                if inside and not padded[there] and not seen[there]:
                    seen[there] = True
                    todo.append(there)
    holes = (~padded & ~seen)[(slice(1, -1),) * present.ndim]
    if limit is not None:
        parts, count = ndimage.label(holes)
        for number in range(1, count + 1):
            if (parts == number).sum() * voxel > limit:
                holes &= parts != number
    return holes


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [None, 2.5, 5.0])
def test_cavities_are_what_a_flood_does_not_reach(spec: Spec, seed: int, limit: float | None) -> None:
    before = blobs(seed, share=0.8)
    before[before == 200] = 0
    after = run(spec, before, step("fill_holes", "a", size=limit or 0))
    holes = flooded(before == 1, limit, float(np.prod(ANISOTROPIC)))
    assert np.array_equal(after, np.where(holes & (before == 0), 1, before))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [None, 0.8, 2.0])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_holes_in_slices_are_across_the_widest_spacing(spec: Spec, seed: int, limit: float | None, axis: int) -> None:
    spacing = tuple(np.roll([3.0, 0.7, 1.1], axis).tolist())
    before = blobs(seed, share=0.6)
    after = run(spec, before, step("fill_slices", "a", size=limit or 0), spacing=spacing)
    slices = [flooded(x, limit, 0.7 * 1.1) for x in np.moveaxis(before == 1, axis, 0)]
    holes = np.moveaxis(np.array(slices), 0, axis)
    assert np.array_equal(after, np.where(holes & (before == 0), 1, before))


@pytest.mark.parametrize("codes", ["RAS", "SLP", "AIR", "PSL"])
def test_slices_of_equal_spacing_lie_across_head_foot(codes: str) -> None:
    turned = reorient(Volume(np.zeros((1, 4, 5, 6), np.uint8), np.eye(4)), codes)
    assert codes[grid_of(turned).slices] in "SI"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("radius", [0.5, 1.1, 1.4, 3.0, 5.0])
def test_closing_is_that_of_scipy_with_an_ellipsoid_of_voxels(spec: Spec, seed: int, radius: float) -> None:
    before = blobs(seed, share=0.2)
    after = run(spec, before, step("close", "a", size=radius))
    reach = [int(radius / s + 1e-9) for s in ANISOTROPIC]
    offsets = np.indices([2 * n + 1 for n in reach]) - np.reshape(reach, (3, 1, 1, 1))
    ball = ((offsets * np.reshape(ANISOTROPIC, (3, 1, 1, 1))) ** 2).sum(0) <= (radius * (1 + 1e-9)) ** 2
    padded = np.pad(before == 1, [(n + 1, n + 1) for n in reach])
    closed = ndimage.binary_erosion(ndimage.binary_dilation(padded, ball), ball)
    closed = closed[tuple(slice(n + 1, -n - 1) for n in reach)]
    assert np.array_equal(after, np.where(closed & (before == 0), 1, before))


def test_a_gap_is_closed_in_millimetres_not_in_voxels(spec: Spec) -> None:
    before = np.zeros((20, 20, 9), np.uint8)
    before[:, :, [2, 4]] = 1  # 3 mm of nothing between two plates
    before[:, [5, 7], 7] = 1  # 1.1 mm of nothing between two bars
    after = run(spec, before, step("close", "a", size=2.0))
    assert not after[:, :, 3].any()
    assert after[:, 6, 7].all()


kinds = st.sampled_from([name for name, _ in POSTPROCESS.items()])


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 50), kind=kinds, size=st.floats(0.1, 9), own=st.sampled_from([("a",), ("c",), ("a", "b")]))
def test_no_step_touches_other_labels(seed: int, kind: str, size: float, own: tuple[str, ...]) -> None:
    spec = Spec.model_validate({"name": "toy", "channels": {"t1": {"modality": "MR"}}, "labels": LABELS})
    before = blobs(seed, share=0.7)
    size = size if POSTPROCESS[kind].size else 0.0
    after = run(spec, before, step(kind, *own, size=size))
    values = [LABELS[name] for name in own]
    others = ~np.isin(before, [0, *values])
    assert np.array_equal(after[others], before[others])
    assert set(np.unique(after)) <= set(np.unique(before)) | {0}
    gained = (before == 0) & (after != 0)
    assert np.isin(after[gained], values).all()
    kept = np.isin(before, values) & (after != 0)
    assert np.array_equal(after[kept], before[kept]), "labels of one group are not exchanged"


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 50), kind=kinds)
def test_a_step_done_twice_is_done_once(seed: int, kind: str) -> None:
    spec = Spec.model_validate({"name": "toy", "channels": {"t1": {"modality": "MR"}}, "labels": LABELS})
    size = 4.0 if POSTPROCESS[kind].size else 0.0
    first = run(spec, blobs(seed), step(kind, "a", size=size))
    if kind != "close":  # where another label was in the way, a second closing may close more
        assert np.array_equal(run(spec, first, step(kind, "a", size=size)), first)


def test_what_grows_takes_labels_of_lower_priority_only(spec: Spec) -> None:
    before = np.full((7, 7, 7), 1, np.uint8)
    before[2:5, 2:5, 2:5] = 0
    before[3, 3, 3], before[2, 2, 2] = 2, 200
    after = run(spec, before, step("fill_holes", "a", over=("c",)))
    assert after[3, 3, 3] == 2
    assert after[2, 2, 2] == 1
    assert (after != 1).sum() == 1


def test_a_group_is_one_object_and_its_hole_goes_to_the_nearest(spec: Spec) -> None:
    before = np.zeros((12, 6, 6), np.uint8)
    before[1:5, 1:5, 1:5] = 1
    before[5:9, 1:5, 1:5] = 2
    before[4, 3, 3] = before[6, 3, 3] = 0
    before[11, 0, 0] = 2
    after = run(spec, before, step("largest_component", "a", "b"), step("fill_holes", "a", "b"), spacing=(1, 1, 1))
    assert after[11, 0, 0] == 0
    assert [(after == value).sum() for value in (1, 2)] == [64, 64]
    alone = run(spec, before, step("largest_component", "b"))
    assert (alone == 2).sum() == 63, "a label alone is measured alone"


def test_objects_that_touch_at_a_corner_are_one(spec: Spec) -> None:
    before = np.zeros((4, 4, 4), np.uint8)
    before[0, 0, 0] = before[1, 1, 1] = 1
    assert np.array_equal(run(spec, before, step("largest_component", "a")), before)


@pytest.mark.parametrize("kind", [name for name, _ in POSTPROCESS.items()])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_empty_full_and_single_voxels(spec: Spec, kind: str, dtype: Any) -> None:
    size = 0.1 if POSTPROCESS[kind].size else 0.0
    for shape in ((1, 1, 1), (5, 1, 3)):
        for value in (0, 1, 200):
            before = np.full(shape, value, dtype)
            after = run(spec, before, *(step(kind, name, size=size) for name in LABELS))
            assert after.dtype == dtype
            assert np.array_equal(after, before)


def test_the_mask_given_is_left_as_it_was(spec: Spec) -> None:
    mask = volume(blobs(0))
    before = mask.array.copy()
    mask.array.flags.writeable = False
    after = postprocess(mask, [step("largest_component", "a"), step("close", "b", size=3)], spec)
    assert np.array_equal(mask.array, before)
    assert after.affine.tobytes() == mask.affine.tobytes()
    assert postprocess(mask, (), spec) is mask


@pytest.mark.parametrize("codes", ["LPS", "SLP", "AIR"])
@pytest.mark.parametrize("kind", ["min_volume", "fill_holes", "fill_slices", "close"])
def test_the_order_of_the_axes_does_not_matter(spec: Spec, codes: str, kind: str) -> None:
    mask = volume(blobs(3, share=0.6))
    steps = [step(kind, "a", size=4.0), step(kind, "b", size=4.0)]
    turned = reorient(postprocess(reorient(mask, codes), steps, spec), "RAS")
    assert np.array_equal(turned.array, postprocess(mask, steps, spec).array)


def test_a_grid_of_its_own() -> None:
    sheared = np.array([[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1.0]])
    found = grid_of(Volume(np.zeros((1, 3, 3, 3), np.uint8), sheared))
    assert found == Grid((1.0, pytest.approx(1.25**0.5), 2.5), pytest.approx(2.5), 2)


# In the bundle


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (step("largest_komponent", "a"), "'largest_komponent' is not one of .* did you mean 'largest_component'"),
        (step("fill_holes", "a", "liver"), "fill_holes is for liver, the model has the labels a, b, c"),
        (step("fill_holes", "a", over=("liver",)), "fill_holes is for liver"),
        (step("largest_component", "a", size=3), "largest_component has no size, 3 is given"),
    ],
)
def test_steps_that_make_no_sense_are_refused(spec: Spec, wrong: PostStep, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        require_steps([wrong], spec)


@pytest.fixture
def bundle(tmp_path: Path, make_spec: Make, make_plan: Make, make_bundle: Make) -> Bundle:
    spec = make_spec(labels=LABELS)
    made: Bundle = make_bundle(tmp_path / "plain", spec, make_plan(spec))
    return made


def with_steps(bundle: Bundle, folder: Path, *steps: PostStep) -> Bundle:
    import safetensors.torch

    weights = {name: safetensors.torch.load_file(bundle.folder / name) for name in bundle.info.weights}
    return save_bundle(folder, bundle.info.model_copy(update={"postprocess": steps}), weights)


def test_bundles_of_before_have_no_steps_and_keep_their_digest(bundle: Bundle) -> None:
    told = bundle.info.model_dump(mode="json")
    del told["postprocess"], told["calibration"]
    assert BundleInfo.model_validate(told) == bundle.info
    assert bundle.info.postprocess == ()
    assert bundle.info.digest == digest([bundle.info.weights, bundle.info.plan.digest, spec_digest(bundle.info.spec)])


def test_a_model_applies_what_its_bundle_says_and_says_so(bundle: Bundle, tmp_path: Path) -> None:
    made = with_steps(bundle, tmp_path / "steps", step("largest_component", "a"), step("min_volume", "b", "c", size=40))
    assert open_bundle(tmp_path / "steps").info.postprocess == made.info.postprocess
    cpu = torch.device("cpu")
    model, plain = load_model(made.folder, device=cpu), load_model(bundle.folder, device=cpu)
    noise = np.random.default_rng(0).normal(size=(1, 18, 17, 16)).astype(np.float32)
    image = Volume(noise, np.diag([1, 1.2, 1, 1]))
    raw = predict_volume(plain, image)
    found, soft = predict_soft(model, image)
    assert np.array_equal(found.array, postprocess(raw, made.info.postprocess, made.info.spec).array)
    assert not np.array_equal(found.array, raw.array)
    assert np.array_equal(found.array, predict_volume(model, image).array)
    assert np.array_equal(soft.array, predict_soft(plain, image)[1].array), "probabilities stay the network's"
    bare = load_model(unprocessed(model.bundle), device=cpu)
    assert np.array_equal(predict_volume(bare, image).array, raw.array)
    assert bare.bundle.info.digest == plain.bundle.info.digest != model.bundle.info.digest
    told = model.bundle.info.provenance(None)
    assert told["postprocess"] == "largest_component of a; min_volume 40 of b, c"
    assert plain.bundle.info.provenance(None)["postprocess"] == ""


def test_a_temperature_changes_probabilities_and_no_mask(bundle: Bundle) -> None:
    model = load_model(bundle.folder, device=torch.device("cpu"))
    found = Calibration(
        temperature=2.0, ece_before=0.2, ece_after=0.1, nll_before=1.0, nll_after=0.5, voxels=10, cases=1
    )
    info = bundle.info.model_copy(update={"calibration": found})
    assert info.digest != bundle.info.digest
    assert BundleInfo.model_validate(info.model_dump(mode="json")) == info
    warm = replace(model, bundle=replace(model.bundle, info=info))
    image = Volume(np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32), np.eye(4))
    (mask, soft), (same, softer) = predict_soft(model, image), predict_soft(warm, image)
    assert np.array_equal(mask.array, same.array)
    logits = predict_logits(model, image)
    assert np.allclose(softer.array, (logits / 2).softmax(0)[1:].numpy(), atol=1e-6)
    assert np.allclose(soft.array, logits.softmax(0)[1:].numpy(), atol=1e-6)
    assert [i.provenance(None)["temperature"] for i in (bundle.info, info)] == [1.0, 2.0]


def test_a_bundle_with_an_unknown_step_is_refused_before_it_predicts(bundle: Bundle, tmp_path: Path) -> None:
    made = with_steps(bundle, tmp_path / "steps", step("magic", "a"))
    with pytest.raises(BundleError, match=r"'magic' is not one of the post-processing steps.*a newer medseg"):
        load_model(made.folder)
