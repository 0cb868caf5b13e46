"""What prediction prepares in slabs is what training prepares in one go."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import BundleError
from medseg.preparation import prepare as module
from medseg.preparation.path import prediction_path
from medseg.preparation.prepare import content_box, prepare
from medseg.preparation.preprocess import as_meta_tensor
from medseg.volume import Volume

Make = Callable[..., Any]
ORIENTATIONS = [
    "".join(letters) for pairs in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*pairs)
]
CUBIC = {"order": 3, "order_z": 0, "separate": None}
NNUNET = {"image": CUBIC, "logits": {**CUBIC, "order": 1}}
SCHEMES = [
    {"scheme": "ct", "low": -30.0, "high": 60.0, "mean": 5.0, "deviation": 20.0},
    {"scheme": "zscore"},
    {"scheme": "zscore_content"},
    {"scheme": "zscore_nonzero"},
    {"scheme": "range"},
    {"scheme": "none"},
]


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(*[st.integers(1, 17)] * 3),
    spacing=st.tuples(*[st.sampled_from([0.5, 0.8, 1.0, 1.7, 5.0])] * 3),
    orientation=st.sampled_from([*ORIENTATIONS, "IJK", "KJI", "JKI"]),
    schemes=st.lists(st.sampled_from(SCHEMES), min_size=1, max_size=2),
    kind=st.sampled_from([np.int16, np.uint8, np.float32, np.uint16]),
    nnunet=st.sampled_from([None, NNUNET, {**NNUNET, "image": {**CUBIC, "separate": False}}]),
    dimensions=st.sampled_from([2, 3]),
    slab=st.sampled_from([64, module.SLAB]),
    fortran=st.booleans(),
)
def test_it_is_what_training_prepares(
    make_spec: Make,
    make_plan: Make,
    shape: Any,
    spacing: Any,
    orientation: str,
    schemes: Any,
    kind: Any,
    nnunet: Any,
    dimensions: int,
    slab: int,
    fortran: bool,
) -> None:
    names = tuple(f"c{n}" for n in range(len(schemes)))
    plan = make_plan(
        make_spec(channels=names),
        orientation=orientation,
        normalisation=dict(zip(names, schemes, strict=True)),
        nnunet=nnunet,
        spacing=(1.1, 0.9, 1.3),
        dimensions=dimensions,
        patch_size=(8, 8, 1 if dimensions == 2 else 8),
    )
    array = np.random.default_rng(0).integers(0, 99, (len(schemes), *shape)).astype(kind)
    array[:, :2] = 0
    image = Volume(np.asfortranarray(array) if fortran else array, np.diag([*spacing, 1.0]))
    before = array.copy()
    plain = Volume(array.astype(np.float32), image.affine)
    wanted = prediction_path(plan)({"image": as_meta_tensor(plain)})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "SLAB", slab)
        found = prepare(image, plan)
    assert found.steps == wanted["steps"]
    expected = wanted["image"].as_tensor()
    assert found.image.shape == expected.shape
    assert torch.allclose(found.image, expected, atol=2e-5 * max(1.0, float(expected.abs().max())))
    assert np.array_equal(image.array, before)


def test_a_mask_of_a_former_stage_comes_along(make_spec: Make, make_plan: Make) -> None:
    rules = {**NNUNET, "previous": {"order": 1, "order_z": 0}}
    plan = make_plan(make_spec(), nnunet=rules, spacing=(1.5, 0.8, 1.0), orientation="SLP")
    random = np.random.default_rng(1)
    image = Volume(random.normal(size=(1, 9, 12, 7)).astype(np.float32), np.eye(4))
    mask = Volume(random.integers(0, 3, (1, 9, 12, 7)).astype(np.uint8), np.eye(4))
    wanted = prediction_path(plan)({"image": as_meta_tensor(image), "previous": as_meta_tensor(mask)})
    found = prepare(image, plan, mask)
    assert found.previous is not None
    assert torch.equal(found.previous, wanted["previous"].as_tensor()[0])


def test_bytes_are_bytes(make_spec: Make, make_plan: Make) -> None:
    plan = make_plan(make_spec(), normalisation={"t1": {"scheme": "bytes"}})
    with pytest.raises(BundleError, match="values from 0 to 255, the image has -1 to 3"):
        prepare(Volume(np.array([-1, 3], np.int16).reshape(1, 2, 1, 1), np.eye(4)), plan)


def test_box_around_the_content() -> None:
    array = np.zeros((2, 5, 6, 7), np.int16)
    assert content_box(array) == (slice(0, 5), slice(0, 6), slice(0, 7))
    array[1, 2, 3, 4] = array[0, 1, 5, 4] = -1
    assert content_box(array) == (slice(1, 3), slice(3, 6), slice(4, 5))
