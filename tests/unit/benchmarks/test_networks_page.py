"""docs/reference/networks.md says of every network what benchmarks/networks.py counts and has measured."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from medseg.networks import NETWORKS


@pytest.fixture(scope="module")
def script(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("networks")


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "reference" / "networks.md").read_text(encoding="utf-8")


def test_every_network_is_explained(page: str) -> None:
    explained = page[: page.index("## Size")]
    assert set(re.findall(r"`([\w+]+)`", explained)) >= set(NETWORKS)


def test_the_page_is_what_the_script_writes(script: ModuleType, page: str, tmp_path: Path) -> None:
    again = tmp_path / "networks.md"
    again.write_text(page, encoding="utf-8")
    script.write_page(again)
    assert again.read_text(encoding="utf-8") == page, "run python benchmarks/networks.py --write"


def test_the_page_lists_every_network_in_each_of_its_dimensions(page: str) -> None:
    for dims in (2, 3):
        section = re.search(rf"### {dims}-D(.*?)(?=###|<!--)", page, flags=re.DOTALL)
        assert section is not None
        listed = re.findall(r"^\| `([\w+]+)`", section[1], flags=re.MULTILINE)
        assert listed == [name for name in NETWORKS if dims in NETWORKS[name].spatial_dims]


@pytest.mark.parametrize("dims", [2, 3])
def test_work_of_a_convolution_is_counted(script: ModuleType, dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    monkeypatch.setattr(script, "build", lambda name, dims: kind(1, 7, 3, padding=1))
    size = script.size_of("any", dims)
    assert size.parameters == 7 * 3**dims + 7
    assert size.macs_per_voxel == 7 * 3**dims


def test_padding_of_a_network_counts_as_its_work(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = nn.Sequential(nn.ConstantPad2d((0, 256, 0, 0), 0.0), nn.Conv2d(1, 1, 1))
    monkeypatch.setattr(script, "build", lambda name, dims: padded)
    assert script.size_of("any", 2).macs_per_voxel == 2


def test_a_table_is_read_as_it_was_written(script: ModuleType, tmp_path: Path) -> None:
    row = script.Result(
        network="unet", dimensions=3, budget_s=60.0, seed=0, precision="bf16", fp32_s=0.5, bf16_s=0.25, steps=200,
        step_s=0.251, train_s=60.2, cpu_s=118.0, case_s=0.1, dice=0.8, pixel_error=None, v_rand=None, threads=2,
        load=0.1, torch="2", date="2026-01-01",
    )  # fmt: skip
    rows = {("unet", 3): row}
    script.write_table(rows, tmp_path / "table.csv")
    assert script.read_table(tmp_path / "table.csv") == rows
    shown = script.page_text(rows)
    assert "| `unet` | 1,401,481 | 53,648 | 0.251 (bf16) | 200 | 0.800 | 0.10 |" in shown
    assert "Each learnt for 60 s (threads: 2), seed 0" in shown


def test_a_page_without_a_place_is_not_written(script: ModuleType, repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    shutil.copy(repository / "README.md", file)
    with pytest.raises(SystemExit, match="no place"):
        script.write_page(file)
