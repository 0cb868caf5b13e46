"""docs/reference/dataset-spec.md says what medseg/spec.py does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from medseg import config
from medseg.errors import SpecError
from medseg.spec import Channel, Code, Label, Region, Spec, Splits


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "reference" / "dataset-spec.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)


def test_the_examples_are_valid(page: str) -> None:
    smallest, every_key, studies, splits = blocks(page)
    config.parse(Spec, smallest, name="smallest")
    config.parse(Spec, every_key, name="every key")
    assert config.parse(Spec, studies, name="studies").studies
    assert config.parse(Splits, splits, name="splits").train


def test_the_second_example_holds_every_key(page: str) -> None:
    spec = config.parse(Spec, blocks(page)[1], name="every key")
    assert set(Spec.model_fields) == spec.model_fields_set | {"studies"}, "which excludes images, in the third example"
    assert spec.channels["T2"].model_fields_set == set(Channel.model_fields)
    assert spec.labels["liver"].model_fields_set == set(Label.model_fields)
    assert spec.labels["liver"].snomed is not None
    assert spec.labels["liver"].snomed.model_fields_set == set(Code.model_fields)
    assert spec.regions["lesion"].model_fields_set == set(Region.model_fields)


@pytest.mark.parametrize("model", [Spec, Channel, Label])
def test_every_key_has_a_row(model: type[config.Config], page: str) -> None:
    rows = {key for line in page.splitlines() if line.startswith("| `") for key in re.findall(r"`(\w+)`", line)}
    assert set(model.model_fields) <= rows


def test_the_example_of_a_mistake_is_what_is_said(page: str) -> None:
    text = blocks(page)[0].replace("anterior: 1", "liver: {vlaue: 1}")
    with pytest.raises(SpecError) as caught:
        config.parse(Spec, text, name="data_specs/mine.yaml", error=SpecError)
    example = re.search(r"```text\n(.*?)```", page, flags=re.DOTALL)
    assert example is not None
    line = re.search(r":(\d+):", str(caught.value))
    assert line is not None
    said = sorted(str(caught.value).replace(f":{line[1]}:", ":N:").splitlines())
    assert said == sorted(re.sub(r":\d+:", ":N:", example[1]).splitlines())
