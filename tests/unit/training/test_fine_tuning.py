"""Fine-tuning: what is taken from a model, what is new, what is told, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from medseg import api
from medseg.bundle import load_networks, make_network, open_bundle
from medseg.errors import BundleError, ConfigError, MedsegError, PlanError
from medseg.planning.plan import Measured, read_plan
from medseg.targets import channel_names
from medseg.training import finish, plan_from
from medseg.training.request import Request
from medseg.training.start import StartWeights, begin, choose_weights, class_places, single
from medseg.training.start_told import basis_of
from medseg.training.state import load_state

Builder = Callable[..., Path]
STILL = ("learning_rate=1e-12", "precision=fp32", "batch_size=2", "validations=1", "test_mirroring=false")
"""Steps that change nothing."""
SWAPPED = {"labels": {"box": 5, "lesion": 3, "ball": 4}}


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(device="cpu", threads=1, step_seconds={"given fp32": 0.05})
    monkeypatch.setattr(plan_from, "measure_network", lambda *args: measured)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder) -> Path:
    """The cases that `model` has learnt from."""
    return tiny_dataset(tmp_path_factory.mktemp("known"), cases=4, test=0)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, tiny: Any, tiny_dataset: Builder) -> Path:
    """Other cases, with other labels: box is 5, ball is 4, and a lesion that the model does not know."""
    root = tiny_dataset(tmp_path_factory.mktemp("others"), cases=4, test=0, **SWAPPED)
    for number in range(4):
        image, mask = tiny.case(number + 20)
        tiny.save(root / "images" / f"c{number}.nii.gz", image)
        new = np.select([mask == 1, mask == 2], [4, 5]).astype(np.uint8)
        new[:2, :2, :2] = 3
        tiny.save(root / "masks" / f"c{number}.nii.gz", new)
    return root


def tuned(data: Path, model: Path, out: Path, **options: Any) -> Any:
    return api.train(data, out=out, from_model=model, **{"steps": 1, "settings": STILL, **options})


def first_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "6_model" / "fold_0.safetensors")


def test_same_labels_keep_all_weights_and_predict_the_same(data: Path, model: Path, tmp_path: Path) -> None:
    tuned(data, model, tmp_path / "run")
    before, after = first_weights(model), first_weights(tmp_path / "run")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    old, new = open_bundle(model).info, open_bundle(tmp_path / "run").info
    assert new.plan.start is not None
    assert (new.plan.start.model, new.plan.start.kept, new.plan.start.new) == (old.digest, ("ball", "box"), ())
    for key in ("network", "spacing", "orientation", "normalisation", "dimensions"):
        assert getattr(new.plan, key) == getattr(old.plan, key)
    assert new.training["start"]["model"] == old.digest
    assert new.digest != old.digest, "the plan names its beginning"


def test_output_of_a_label_follows_its_name(data: Path, others: Path, model: Path, tmp_path: Path) -> None:
    tuned(others, model, tmp_path / "run")
    before, after = first_weights(model), first_weights(tmp_path / "run")
    heads = [name for name in before if name.startswith("heads.")]
    assert heads
    for name in heads:  # background, ball, box -> background, box, lesion, ball
        assert after[name].shape[0] == 4
        assert torch.allclose(after[name][[0, 1, 3]], before[name][[0, 2, 1]], atol=1e-6)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before if name not in heads)
    start = read_plan(tmp_path / "run" / "3_plan.yaml").start
    assert start is not None
    assert (start.kept, start.new, start.left_out) == (("box", "ball"), ("lesion",), ())
    text = (tmp_path / "run" / "3_plan.yaml").read_text()
    assert "labels are found by name" in text
    assert "these know most already" in text


def test_a_left_out_label_is_told(others: Path, model: Path, tmp_path: Path, tiny_dataset: Builder) -> None:
    data = tiny_dataset(tmp_path / "data", cases=2, test=0, labels={"box": 1, "rest": 2})
    said: list[str] = []
    display = SpeakingDisplay(said)
    tuned(data, model, tmp_path / "run", display=display)
    assert any("kept: box; new, with random weights: rest; left out: ball" in line for line in said), said


class SpeakingDisplay:
    """A display that keeps what is said."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def __enter__(self) -> SpeakingDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def say(self, text: str) -> None:
        self.said.append(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: None


def test_a_few_steps_are_ahead_of_random_weights(others: Path, model: Path, tmp_path: Path) -> None:
    settings = ("precision=fp32", "batch_size=2", "validations=1", "test_mirroring=false")
    tuned(others, model, tmp_path / "tuned", steps=4, settings=settings)
    plan = yaml.safe_load((tmp_path / "tuned" / "3_plan.yaml").read_text())
    plan.pop("start")
    plan["learning_rate"] = 5e-3
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    api.train(others, out=tmp_path / "fresh", steps=4, plan=tmp_path / "plan.yaml")
    losses = [losses_of(tmp_path / name) for name in ("tuned", "fresh")]
    assert all(known < random for known, random in zip(*losses, strict=True))


def losses_of(run: Path) -> list[float]:
    from safetensors import safe_open

    file = run / "5_folds" / "0" / "checkpoint" / "state.safetensors"
    with safe_open(file, framework="pt") as opened:
        job = json.loads(opened.metadata()["state"])["job"]
    return load_state(file, job=job).losses


# Resumed, repeated, moved


def test_a_run_is_resumed_and_repeated_without_the_model(others: Path, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model / "6_model", copy)
    tuned(others, copy, tmp_path / "run", steps=2)
    expected = (tmp_path / "run" / "6_model" / "fold_0.safetensors").read_bytes()
    for name in ("5_folds", "6_model", "7_report"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "done.json").unlink()
    tuned(others, model, tmp_path / "run", steps=2)  # the same model at another place
    assert (tmp_path / "run" / "6_model" / "fold_0.safetensors").read_bytes() == expected
    shutil.rmtree(copy)
    api.train(others, out=tmp_path / "replay", replay=tmp_path / "run")
    assert (tmp_path / "replay" / "6_model" / "fold_0.safetensors").read_bytes() == expected
    with pytest.raises(BundleError, match="does not exist"):
        tuned(others, copy, tmp_path / "other")


def test_another_model_is_another_request(others: Path, model: Path, tmp_path: Path) -> None:
    tuned(others, model, tmp_path / "run")
    with pytest.raises(MedsegError, match="another from_model") as caught:
        tuned(others, tmp_path / "run", tmp_path / "run")
    assert caught.value.code == "RUN_DIFFERS"
    with pytest.raises(MedsegError, match="another from_model"):
        api.train(others, out=tmp_path / "run", steps=1, settings=STILL)


def test_a_run_from_before_options_were_added_is_resumed(data: Path, model: Path) -> None:
    file = model / "request.json"
    told = json.loads(file.read_text())
    assert told.pop("from_model") is None
    before = file.read_text()
    file.write_text(json.dumps(told))
    try:
        plan = model.parent / "plan.yaml"
        assert api.train(model.parent / "data", out=model, steps=30, plan=plan).steps == 30
    finally:
        file.write_text(before)


def test_a_plan_made_for_a_model_needs_it(data: Path, model: Path, tmp_path: Path) -> None:
    made = api.plan(data, out=tmp_path / "plan.yaml", steps=1, settings=STILL, from_model=model)
    assert made.start is not None
    with pytest.raises(PlanError, match=r"begins with the weights of the model \w{12}; give it with --from"):
        api.train(data, out=tmp_path / "a", steps=1, plan=tmp_path / "plan.yaml")
    assert tuned(data, model, tmp_path / "b", plan=tmp_path / "plan.yaml", settings=()).steps == 1


# What the model has seen


def test_validation_cases_that_the_model_knows_are_told(data: Path, others: Path, model: Path, tmp_path: Path) -> None:
    seen = open_bundle(model).info.seen["fold_0.safetensors"]
    assert len(seen) == 3, "the cases that it learnt from, without its validation case"
    said: list[str] = []
    tuned(data, model, tmp_path / "same", display=SpeakingDisplay(said))
    assert not any("too good" in line for line in said), "the same split: nothing leaks"
    for seed in range(1, 9):
        tuned(data, model, tmp_path / str(seed), seed=seed, display=SpeakingDisplay(said))
        if any("too good" in line for line in said):
            break
    assert any("1 of 1 validation cases" in line and "judge by test cases" in line for line in said)
    info = open_bundle(tmp_path / str(seed)).info
    assert info.training["start"]["validation_cases_seen_before"] == [1]
    assert set(seen) <= set(info.seen["fold_0.safetensors"])
    tuned(others, tmp_path / str(seed), tmp_path / "chain")
    assert (
        len(open_bundle(tmp_path / "chain").info.seen["fold_0.safetensors"]) == len(info.seen["fold_0.safetensors"]) + 3
    )


def test_test_cases_that_the_model_knows_are_told(model: Path, tmp_path: Path, tiny_dataset: Builder) -> None:
    """`model` has learnt from three of c0 to c3; whoever holds one of them out tests nothing."""
    said: list[str] = []
    data = tiny_dataset(tmp_path / "data", cases=6, test=0, splits={"test": ["c0", "c1", "c4"]})
    (data / "masks" / "c4.nii.gz").unlink()
    tuned(data, model, tmp_path / "run", display=SpeakingDisplay(said))
    found = [line for line in said if "no test of what comes of it" in line]
    assert len(found) == 1, said
    assert "c0" in found[0] or "c1" in found[0]
    assert "c4" not in found[0]

    other = tiny_dataset(tmp_path / "other", cases=6, test=2)  # c4 and c5, which it does not know
    tuned(other, model, tmp_path / "honest", display=SpeakingDisplay(said := []))
    assert not any("no test of what comes of it" in line for line in said)


def test_the_quality_estimate_leaves_out_what_the_model_knew(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(finish, "fit_seen", lambda seen, *_, **__: asked.append([one.case.id for one in seen]))
    monkeypatch.setattr(finish, "validation_seen", lambda job: [case.id for case in job.validation][:1])
    said: list[str] = []
    tuned(data, model, tmp_path / "run", folds=2, display=SpeakingDisplay(said))
    assert [len(cases) for cases in asked] == [2], "of four cases, one of each fold was known"
    assert any("2 cases without the 2 that the model knew before are too few" in line for line in said), said


@pytest.mark.parametrize(
    ("seen", "folds", "expected"),
    [
        (None, 2, "out-of-fold cases"),
        (None, 1, "validation cases of a single split"),
        ({"9"}, 2, "out-of-fold cases"),
        ({"1"}, 2, "cases, of which the model knew 1 before"),
        ({"0", "1"}, 1, "validation cases of a single split, of which the model knew 1 before"),
        (set(), 2, "cases, which the model may have known before"),
    ],
)
def test_cases_that_the_model_knew_are_not_called_out_of_fold(seen: set[str] | None, folds: int, expected: str) -> None:
    """Fold n validates case n, whose image has the digest n; `seen`: by the model that the training began with."""
    start = None if seen is None else SimpleNamespace(seen=frozenset(seen))
    jobs: list[Any] = [
        SimpleNamespace(validation=[SimpleNamespace(id=f"c{n}")], images={f"c{n}": str(n)}, start=start)
        for n in range(1, folds + 1)
    ]
    assert basis_of(jobs) == expected


def test_of_an_ensemble_the_best_member_is_fine_tuned(
    make_spec: Any, make_plan: Any, make_bundle: Any, tmp_path: Path
) -> None:
    spec = make_spec()
    bundle = make_bundle(tmp_path / "m", spec, make_plan(spec))
    rows = ({"a": 0.6, "b": 0.7}, {"a": 0.9, "b": 0.5}, {"a": 0.7, "b": 0.7}, {})
    members = [replace(bundle, info=bundle.info.model_copy(update={"training": {"dice": row}})) for row in rows]
    assert single(replace(bundle, members=tuple(members))) is members[1], "the first of equals"
    assert single(bundle) is bundle


def test_other_labels_on_the_same_images_are_the_same_images(
    data: Path, model: Path, tmp_path: Path, tiny_dataset: Builder
) -> None:
    other = tiny_dataset(tmp_path / "data", cases=4, test=0, labels={"ball": 1, "cube": 2})
    tuned(other, model, tmp_path / "run")
    assert open_bundle(tmp_path / "run").info.seen == open_bundle(model).info.seen


def test_a_model_that_does_not_tell_what_it_saw_is_doubted(data: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "6_model", tmp_path / "old")
    file = tmp_path / "old" / "model.json"
    told = json.loads(file.read_text())
    told.pop("seen")
    file.write_text(json.dumps(told))
    said: list[str] = []
    tuned(data, tmp_path / "old", tmp_path / "run", display=SpeakingDisplay(said))
    assert any("does not tell which cases it learnt from" in line for line in said)
    info = open_bundle(tmp_path / "run").info
    assert info.seen == {"fold_0.safetensors": ()}, "half an answer would look like a whole one"
    assert info.training["start"]["validation_cases_seen_before"] == [None]


def test_each_fold_begins_with_the_network_that_knows_least_of_its_validation(
    make_spec: Any, make_plan: Any, make_bundle: Any, tmp_path: Path
) -> None:
    spec = make_spec()
    bundle = make_bundle(tmp_path / "m", spec, make_plan(spec), folds=3)
    names = [choose_weights(bundle, fold, ["a"]).file for fold in range(4)]
    assert names == [f"fold_{n}.safetensors" for n in (0, 1, 2, 0)], "where nothing is known: by number, round"
    seen = {"fold_0.safetensors": ("a", "b"), "fold_1.safetensors": ("b", "c"), "fold_2.safetensors": ("a", "c")}
    knowing = SimpleNamespace(info=bundle.info.model_copy(update={"seen": seen}))
    assert [choose_weights(knowing, 0, [x]).file[5] for x in "abc"] == ["1", "2", "0"]  # type: ignore[arg-type]


# What does not fit


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "channels": ({"channels": {"t1": {"modality": "MR"}, "t2": {"modality": "MR"}}},
                 r"its channels are mr, the dataset has t1, t2"),
    "modality": ({"channels": {"mr": {"modality": "CT"}}}, "channel mr: it learnt from MR, here it is CT"),
    "unit": ({"unit": "pixel"}, "it learnt from images in mm, these are in pixel"),
    "regions": ({"regions": {"all": {"labels": ["ball", "box"], "paint": "ball"}}},
                "it learnt exclusive labels, these data have overlapping regions"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_data_that_do_not_fit_are_refused(what: str, model: Path, tmp_path: Path, tiny_dataset: Builder) -> None:
    changes, words = REFUSED[what]
    data = tiny_dataset(tmp_path / "data", cases=2, test=0, **changes)
    with pytest.raises(MedsegError, match=words) as caught:
        tuned(data, model, tmp_path / "run")
    assert caught.value.code == "START_DIFFERS"
    assert not (tmp_path / "run").exists()


def test_a_single_channel_may_have_another_name(data: Path, model: Path, tmp_path: Path, tiny_dataset: Builder) -> None:
    other = tiny_dataset(tmp_path / "data", cases=2, test=0, channels={"t1": {"modality": "MRI"}})
    tuned(other, model, tmp_path / "run")
    assert list(open_bundle(tmp_path / "run").info.plan.normalisation) == ["t1"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network": "fcn8s"}, "--network fcn8s: the model given by --from is a unet"),
        ({"settings": (*STILL, "dimensions=2", "patch_size=[16,16,1]")}, "the plan's dimensions is not that of"),
        ({"settings": (*STILL, "network.name=resunet")}, "the plan's network is not that of the model"),
    ],
)  # fmt: skip
def test_another_network_is_refused(
    data: Path, model: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        tuned(data, model, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "3_plan.yaml").exists()


def test_a_replay_takes_no_model(data: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="from_model"):
        api.train(data, out=tmp_path / "run", replay=model, from_model=model)


def test_a_budget_too_small_for_a_step_is_refused(make_fingerprint: Any) -> None:
    """Of 10.1 s each of four networks gets 0.025 to learn."""
    with pytest.raises(PlanError, match=r"for each of 4 networks to learn and one step takes 0\.1 s") as caught:
        plan_from._steps(make_fingerprint(), Request(budget=10.1, folds=4), 2, 0.05)
    assert caught.value.code == "BUDGET_TOO_SMALL"
    assert "--budget 20s" in str(caught.value)
    assert plan_from._steps(make_fingerprint(), Request(budget=11.0, folds=2), 2, 0.05) == 10


# Begin


@pytest.mark.parametrize("dimensions", [2, 3])
@torch.no_grad()
def test_channels_and_labels_in_any_order(
    dimensions: int, make_spec: Any, make_plan: Any, make_bundle: Any, tmp_path: Path
) -> None:
    old = make_spec(labels={"a": 1, "b": 2, "c": 3}, channels=("t1", "t2"))
    new = make_spec(labels={"c": 1, "d": 2, "a": 3}, channels=("t2", "t1"))
    bundle = make_bundle(tmp_path / "m", old, make_plan(old, dimensions=dimensions), folds=2)
    plan = make_plan(new, dimensions=dimensions)
    network = make_network(new, plan).eval()
    begin(network, new, plan, StartWeights(bundle, "fold_1.safetensors"))
    image = torch.randn(1, 2, *[16] * dimensions)
    before, after = load_networks(bundle)[1](image), network(image.flip(1))
    assert class_places(old, new) == (0, 3, None, 1)
    assert channel_names(new) == ["background", "c", "d", "a"]
    assert torch.allclose(after[:, [0, 1, 3]], before[:, [0, 3, 1]], atol=1e-4)


def test_regions_are_found_by_name(make_spec: Any, make_plan: Any, make_bundle: Any, tmp_path: Path) -> None:
    labels = {"edema": 1, "core": 2}
    regions = {
        name: {"labels": list(labels)[n:], "paint": list(labels)[n]} for n, name in enumerate(("whole", "inner"))
    }
    old = make_spec(labels=labels, regions=regions)
    new = make_spec(labels=labels, regions={"inner": regions["inner"]})
    bundle = make_bundle(tmp_path / "m", old, make_plan(old))
    network, plan = make_network(new, make_plan(new)), make_plan(new)
    begin(network, new, plan, StartWeights(bundle, "fold_0.safetensors"))
    before, after = first_state(bundle.folder), network.state_dict()
    assert torch.equal(after["heads.0.bias"], before["heads.0.bias"][1:])
    assert torch.equal(after["heads.0.weight"], before["heads.0.weight"][1:])


def first_state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "fold_0.safetensors")


def test_weights_that_are_not_those_of_the_plan_are_refused(
    make_spec: Any, make_plan: Any, make_bundle: Any, tmp_path: Path
) -> None:
    spec = make_spec()
    plan = make_plan(spec)
    bundle = make_bundle(tmp_path / "m", spec, plan)
    wider = {"features": [6, 8], "strides": [[2] * 3], "kernels": [[3] * 3] * 2, "convolutions": 1}
    other = make_plan(spec, network={"name": "unet", "options": wider})
    with pytest.raises(BundleError, match=r"fold_0\.safetensors: does not fit the network"):
        begin(make_network(spec, other), spec, other, StartWeights(bundle, "fold_0.safetensors"))
