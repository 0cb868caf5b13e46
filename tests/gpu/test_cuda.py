"""What only a GPU can show; `benchmarks/gpu.sh` runs these. They skip where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from medseg import api
from medseg.device import Stopwatch, best_device
from medseg.files import file_digest
from medseg.inference.predict import load_model
from medseg.inference.sliding_window import slide, sparing
from medseg.planning.plan import Augmentation
from medseg.preparation.augment import augment, draw_changes
from medseg.preparation.warp import Region

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: benchmarks/gpu.sh runs these where one is"),
]
Builder = Callable[..., Path]
MODEL = "6_model/fold_0.safetensors"


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Compare fp32 with fp32: no TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Builder, tiny_plan: Builder) -> Path:
    """A folder with data/ and plans for both precisions."""
    root = tmp_path_factory.mktemp("gpu")
    tiny_dataset(root / "data", cases=5, test=1)
    for precision in ("fp32", "bf16"):
        tiny_plan(root / "data", root / f"{precision}.yaml", steps=40, settings=(f"precision={precision}",))
    return root


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_learns_and_predicts(place: Path, tmp_path: Path, precision: str) -> None:
    assert best_device().type == "cuda"
    result = api.train(place / "data", out=tmp_path / "run", steps=40, plan=place / f"{precision}.yaml")
    assert result.steps == 40
    predicted = api.predict(place / "data", model=tmp_path / "run", out=tmp_path / "masks")
    assert predicted.complete


def test_windows_give_the_logits_of_the_processor(model: Path) -> None:
    loaded = load_model(model)
    plan = loaded.bundle.info.plan.model_copy(update={"precision": "fp32"})
    image = torch.randn((1, *(n * 2 + 3 for n in plan.patch_size)), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        networks = [network.to(device) for network in loaded.networks]
        found.append(slide(image.to(device), networks, plan, mirror=True).cpu())
    assert (found[0] - found[1]).abs().max() < 1e-3 * found[0].abs().max()


def test_augmentation_is_that_of_the_processor() -> None:
    """But for noise, whose numbers come from the generator of the device."""
    generator = torch.Generator().manual_seed(1)
    pad = torch.nn.functional.pad  # the outermost voxels of a region are 0 where its patch reaches beyond it
    images = pad(torch.randn((4, 1, 28, 28, 28), generator=generator), (1,) * 6)
    masks = pad(torch.randint(0, 3, (4, 1, 28, 28, 28), generator=generator, dtype=torch.uint8), (1,) * 6)
    plan = Augmentation(mirror_axes=(0,), noise=0.0, spatial_probability=1.0, blur=1.0, gamma=1.0, contrast=1.0)
    found = []
    for device in ("cpu", "cuda"):
        changes = draw_changes(plan, (24, 24, 24), seed=3, batch=4, dimensions=3)
        regions = [Region(image, mask, (14.5, 14.5, 14.5)) for image, mask in zip(images, masks, strict=True)]
        image, mask = augment([region.to(torch.device(device)) for region in regions], changes)
        found.append((image.cpu(), mask.cpu()))
    assert (found[0][0] - found[1][0]).abs().max() < 1e-3
    assert (found[0][1] != found[1][1]).float().mean() < 1e-3, "a point half way between two voxels may go either way"


def test_windows_that_do_not_fit_are_halved() -> None:
    """An allocation of all that is free fails truly; a part of it does not."""
    free, _ = torch.cuda.mem_get_info()
    asked: list[int] = []

    def hungry(windows: torch.Tensor) -> torch.Tensor:
        asked.append(len(windows))
        torch.empty(int(free * 0.4) * len(windows), dtype=torch.uint8, device="cuda")
        return windows

    given = torch.arange(4, device="cuda").reshape(4, 1)
    assert torch.equal(sparing(hungry)(given), given)
    assert asked[0] == 4
    assert 2 in asked or 1 in asked


def test_the_same_bits_twice(place: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        api.train(place / "data", out=tmp_path / name, steps=6, plan=place / "bf16.yaml", deterministic=True)
    assert file_digest(tmp_path / "first" / MODEL) == file_digest(tmp_path / "second" / MODEL)


def test_a_repetition_is_identical(place: Path, tmp_path: Path) -> None:
    api.train(place / "data", out=tmp_path / "run", steps=6, plan=place / "fp32.yaml", deterministic=True)
    assert api.train(place / "data", out=tmp_path / "again", replay=tmp_path / "run").identical is True


@pytest.mark.parametrize("processes", [1, max(1, torch.cuda.device_count())])
def test_torchrun(place: Path, tmp_path: Path, processes: int) -> None:
    """On one GPU one process: NCCL does not let two share one."""
    start = f"-m torch.distributed.run --standalone --nproc-per-node={processes} -m medseg train data --no-track"
    words = f"{start} --steps 4 --set batch_size={max(2, processes)} --plan fp32.yaml --out {tmp_path / 'run'}"
    done = subprocess.run(
        [sys.executable, *words.split()], cwd=place, capture_output=True, text=True, timeout=600, check=False,
        env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / MODEL).exists()


def test_a_block_is_timed_on_the_device() -> None:
    device = best_device()
    with Stopwatch(device) as watch:
        torch.cuda._sleep(50_000_000)  # clock cycles
    torch.cuda.synchronize()
    assert 0.005 < watch.seconds() < 5
