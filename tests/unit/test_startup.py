"""MONAI in a process of medseg's own: lighter, and otherwise the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medseg.startup import LARGE_PAGES, quick_start

PROGRAM = """
import json, sys
from medseg.startup import UNUSED, quick_start
quick_start()
quick_start()
assert "monai" not in sys.modules, "asking for it imports nothing"
import medseg.inference.predict, medseg.training.loop
from medseg.batch import study
loaded = [name for name in UNUSED if name in sys.modules]
import matplotlib, mlflow, pandas, scipy.signal
from monai.networks.nets import DynUNet, SwinUNETR
from monai.inferers import SlidingWindowInferer
import monai
print(json.dumps({"loaded": loaded, "where": monai.__file__, "loader": type(monai.__spec__.loader).__name__,
    "finders": [type(finder).__name__ for finder in sys.meta_path if "medseg.startup" in type(finder).__module__]}))
"""


Builder = Callable[..., Path]


@pytest.fixture(scope="module")
def found() -> Any:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_not_used_is_not_loaded_and_can_be_imported_afterwards(found: Any) -> None:
    assert found["loaded"] == []


def test_monai_is_found_where_it_is_and_nothing_stays_in_the_way(found: Any) -> None:
    import monai

    assert found["where"] == monai.__file__
    assert found["finders"] == []


def test_the_program_starts_so(tmp_path: Path, tiny_dataset: Builder, tiny_plan: Builder) -> None:
    data = tiny_dataset(tmp_path / "data")
    plan = tiny_plan(data, tmp_path / "plan.yaml", steps=1)
    words = ["train", data, "--out", tmp_path / "run", "--plan", plan, "--steps", "1", "--no-track"]
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "medseg", *map(str, words)], check=True, capture_output=True
    ).stderr.decode()
    loaded = {line.rpartition("|")[2].strip() for line in told.splitlines() if line.startswith("import time:")}
    assert {"monai", "monai.transforms", "medseg.training.run"} <= loaded
    # What could not be imported is in the list, too; its parts are not.
    assert loaded.isdisjoint({"ignite.engine.engine", "mlflow.utils", "pandas.core", "scipy.signal._filters"})


def test_the_library_does_not_change_monai_for_others() -> None:
    code = "import medseg.inference.predict, monai, sys; assert 'mlflow' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0"), ("1", "1")])
def test_large_pages_are_asked_for_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setenv(LARGE_PAGES, "x")  # so that it is put back
    monkeypatch.delenv(LARGE_PAGES)
    if before is not None:
        monkeypatch.setenv(LARGE_PAGES, before)
    quick_start()
    assert os.environ[LARGE_PAGES] == after


LARGE = """
import sys
from pathlib import Path
from medseg.startup import quick_start
if sys.argv[1] == "program":
    quick_start()
import torch
x = torch.zeros(64 << 20, dtype=torch.uint8)
rows = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if ":" in line]
print(next(int(row[1]) for row in rows if row[0] == "AnonHugePages:"))
"""


def test_tensors_lie_on_large_pages() -> None:
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not offered.exists() or "[madvise]" not in offered.read_text():
        pytest.skip("this kernel gives large pages to all or to nobody")
    kilobytes = {
        who: int(subprocess.run([sys.executable, "-c", LARGE, who], check=True, capture_output=True, text=True).stdout)
        for who in ("program", "library")
    }
    assert kilobytes["library"] < 30 << 10 <= kilobytes["program"]
