"""The bundle: what is loaded is what was saved, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from medseg.bundle import BUNDLE_FORMAT, MODEL_FILE, Bundle, load_networks, make_network, open_bundle
from medseg.errors import BundleError, MedsegError
from medseg.planning.plan import Plan
from medseg.spec import Spec

Make = Callable[..., Any]


@pytest.fixture
def spec(make_spec: Make) -> Spec:
    # Neither labels nor channels stand in the order of the alphabet.
    return make_spec(labels={"zebra": 3, "ant": 7, "mole": 1}, channels=("t2", "adc"))


@pytest.fixture
def plan(spec: Spec, make_plan: Make) -> Plan:
    return make_plan(spec)


@pytest.fixture
def bundle(tmp_path: Path, spec: Spec, plan: Plan, make_bundle: Make) -> Bundle:
    return make_bundle(tmp_path / "model", spec, plan, folds=2)


def change_info(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / MODEL_FILE
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_saved_networks_give_the_same_logits(bundle: Bundle, spec: Spec, plan: Plan) -> None:
    image = torch.randn(1, 2, 16, 16, 16)
    loaded = load_networks(open_bundle(bundle.folder))
    assert len(loaded) == 2
    for fold, network in enumerate(loaded):
        torch.manual_seed(fold)
        original = make_network(spec, plan).eval()
        assert not network.training
        assert torch.equal(network(image), original(image))


def test_order_of_labels_channels_and_regions_survives(
    tmp_path: Path, make_spec: Make, make_plan: Make, make_bundle: Make
) -> None:
    """The order is the meaning of the network's channels: sorted by name, a liver would be called a spleen."""
    regions = {"whole": {"labels": ["zebra", "ant"], "paint": "zebra"}, "core": {"labels": ["ant"], "paint": "ant"}}
    spec = make_spec(labels={"zebra": 3, "ant": 7}, channels=("t2", "adc"), regions=regions)
    rows = {"t2": {"scheme": "zscore"}, "adc": {"scheme": "none"}}
    make_bundle(tmp_path, spec, make_plan(spec, normalisation=rows))
    info = open_bundle(tmp_path).info
    assert list(info.spec.labels) == ["zebra", "ant"]
    assert list(info.spec.channels) == ["t2", "adc"]
    assert list(info.spec.regions) == ["whole", "core"]
    assert list(info.plan.normalisation) == ["t2", "adc"]


def test_what_is_said_survives(bundle: Bundle) -> None:
    opened = open_bundle(bundle.folder)
    assert opened.info == bundle.info
    assert opened.info.digest == bundle.info.digest
    assert opened.info.plan.digest == bundle.info.plan.digest


def test_saving_twice_gives_the_same_bytes(tmp_path: Path, spec: Spec, plan: Plan, make_bundle: Make) -> None:
    first, second = (make_bundle(tmp_path / name, spec, plan) for name in "ab")
    for name in (MODEL_FILE, "fold_0.safetensors"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


@pytest.mark.parametrize("place", [0, 8, 100, -1])
def test_damaged_weights_are_refused_before_they_are_parsed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    file = bundle.folder / "fold_1.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(safetensors.torch, "load_file", lambda *_: pytest.fail("parsed before it was verified"))
    with pytest.raises(BundleError, match=r"fold_1\.safetensors: damaged: .*restore the bundle"):
        open_bundle(bundle.folder)


def test_missing_weights(bundle: Bundle) -> None:
    (bundle.folder / "fold_0.safetensors").unlink()
    with pytest.raises(BundleError, match=r"fold_0\.safetensors: missing"):
        open_bundle(bundle.folder)


def test_format_of_a_later_version(bundle: Bundle) -> None:
    change_info(bundle.folder, lambda info: info.update(format=BUNDLE_FORMAT + 1))
    with pytest.raises(BundleError, match=f"format {BUNDLE_FORMAT + 1}; this medseg reads format {BUNDLE_FORMAT}"):
        open_bundle(bundle.folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', "\x00\x01"])
def test_damaged_model_file(bundle: Bundle, content: str) -> None:
    (bundle.folder / MODEL_FILE).write_text(content)
    with pytest.raises(BundleError, match="damaged or of another version"):
        open_bundle(bundle.folder)


def test_model_without_weights(bundle: Bundle) -> None:
    change_info(bundle.folder, lambda info: info.update(weights={}))
    with pytest.raises(BundleError, match="names no weights"):
        open_bundle(bundle.folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_weights_outside_of_the_bundle(bundle: Bundle, name: str) -> None:
    change_info(bundle.folder, lambda info: info["weights"].update({name: "0" * 64}))
    with pytest.raises(BundleError, match="outside of the bundle"):
        open_bundle(bundle.folder)


def test_weights_of_another_network(bundle: Bundle) -> None:
    change_info(bundle.folder, lambda info: info["plan"]["network"]["options"].update(features=[4, 16]))
    with pytest.raises(BundleError, match="does not fit the network"):
        load_networks(open_bundle(bundle.folder))


def test_network_options_that_make_no_network(bundle: Bundle) -> None:
    change_info(bundle.folder, lambda info: info["plan"]["network"]["options"].update(featurs=[1]))
    with pytest.raises(MedsegError, match=r"unet.*featurs"):
        load_networks(open_bundle(bundle.folder))


def test_a_run_folder_stands_for_its_model(tmp_path: Path, spec: Spec, plan: Plan, make_bundle: Make) -> None:
    made = make_bundle(tmp_path / "run" / "6_model", spec, plan)
    assert open_bundle(tmp_path / "run").folder == made.folder


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist; give a run folder"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="holds no model; give a run folder"):
        open_bundle(tmp_path)


def test_unfinished_run_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "3_plan.yaml").touch()
    with pytest.raises(BundleError, match="training has not finished: run the same medseg train command again"):
        open_bundle(tmp_path)
