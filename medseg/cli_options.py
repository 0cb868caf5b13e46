"""Options that several verbs share, and how verbs write to the terminal."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

# Of the processes that torchrun starts the first one speaks.
console = Console(quiet=os.environ.get("RANK", "0") != "0")
errors = Console(stderr=True)


class Cases(StrEnum):
    """Which cases of a dataset."""

    TEST = "test"
    TRAIN = "train"
    ALL = "all"


class Quality(StrEnum):
    """Rows of medseg.inference.presets.QUALITY, which is too heavy to import for a help text."""

    FAST = "fast"
    BALANCED = "balanced"
    EXACT = "exact"


Dataset = Annotated[Path, typer.Argument(help="Spec file, or folder with dataset.yaml, MSD or nnU-Net v2 layout.")]
Datasets = Annotated[
    list[Path],
    typer.Argument(metavar="DATASET...", help="Spec file or dataset folder; several are learnt together, by names."),
]
Splits = Annotated[Path | None, typer.Option(help="YAML or JSON with lists `train` and `test` of case ids.")]
Budget = Annotated[str | None, typer.Option(help="Wall time of the whole command: 90s, 10m, 1h30m, 2d (default 1h).")]
Steps = Annotated[int | None, typer.Option(min=1, help="Fixed number of training steps instead of a budget.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE: change a value of the plan.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of every random choice.")]
From = Annotated[
    str | None,
    typer.Option("--from", help="Fine-tune: run folder, bundle, nnU-Net v2 model or models:/NAME@ALIAS to begin with."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Store = Annotated[Path, typer.Option(help="Folder of the MLflow store (mlflow.db); MLFLOW_TRACKING_URI comes first.")]
NoTrack = Annotated[bool, typer.Option("--no-track", help="Do not record in MLflow.")]
CaseChoice = Annotated[Cases | None, typer.Option(help="Cases of a dataset (default: test if there are any).")]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        help="nifti; png or tiff for pictures (both by default); for DICOM inputs also seg, seg-labelmap, "
        "seg-fractional, rtstruct, sr, sc; several by commas.",
    ),
]
Send = Annotated[
    list[str] | None,
    typer.Option(help="dicomweb://HOST:PORT/PATH of an archive that gets the results (dicomwebs:// for HTTPS)."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        help="Correct by resampling instead of refusing: tilt (a tilted gantry), irregular (uneven or missing "
        "slices); several by commas."
    ),
]
Channels = Annotated[Path | None, typer.Option(help="YAML with `match` rules that find the channels in DICOM studies.")]


def _show_status(out: Path | None) -> None:
    if out is not None:
        from medseg.batch.status import describe, status

        for line in describe(status(out), out):
            say(line)
        raise typer.Exit


StatusOf = Annotated[
    Path | None,
    typer.Option(
        "--status",
        metavar="OUT",
        callback=_show_status,
        is_eager=True,
        help="Say how the run into OUT stands, running or not, and do nothing else.",
    ),
]
Postprocess = Annotated[
    bool, typer.Option("--postprocess/--no-postprocess", help="Apply the steps that the model brings along.")
]
Preset = Annotated[
    Quality, typer.Option(help="exact: as planned; balanced, fast: less overlap, no windows of air (streaming.md).")
]
Workers = Annotated[
    int, typer.Option(min=1, help="Processes that do studies; one that dies or hangs costs its study only.")
]
Timeout = Annotated[str, typer.Option(help="How long one study may take (without loading the model): 90s, 30m, 2h.")]
MemoryLimit = Annotated[
    str | None,
    typer.Option(help="Memory of one worker with its model: 4GiB, 900MB (default: its share of 90 % of the machine)."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="4GiB: predict in tiles so that a process stays below; same masks (docs/how-to/batch.md)."),
]
Scheduler = Annotated[str, typer.Option(help="HOST:PORT of a running Dask scheduler whose workers do the studies.")]
Cluster = Annotated[
    Path | None, typer.Option(help="YAML of a queue (slurm, pbs, sge, lsf, htcondor) whose jobs do the studies.")
]
Shard = Annotated[
    str, typer.Option(help="i/n: do only the i-th of n parts; other commands do the others into the same --out.")
]


def say(text: str) -> None:
    """Print a line as it is: not coloured, not wrapped, brackets in a path not read as markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def as_json(value: Any) -> str:
    """Return `value` as indented JSON with sorted keys."""
    import json

    return json.dumps(value, indent=1, sort_keys=True, default=str)


def workforce(count: int, timeout: str, memory: str | None, scheduler: str, cluster: Path | None) -> Any:
    """Return who does the studies; with --debug this process, so that an error shows where it comes from."""
    from medseg.batch.cluster import ClusterConfig
    from medseg.batch.engines import Workers
    from medseg.config import load
    from medseg.duration import seconds
    from medseg.errors import ConfigError
    from medseg.sizes import size

    if scheduler and cluster is not None:
        raise ConfigError("--scheduler and --cluster exclude each other: give one of them")
    given = Workers(
        count,
        timeout=seconds(timeout),
        memory=None if memory is None else size(memory),
        scheduler=scheduler,
        cluster=None if cluster is None else load(ClusterConfig, cluster),
    )
    return None if os.environ.get("MEDSEG_DEBUG") else given
