"""RUN/manifest.json: everything that the weights of a run depend on, by digest, and where they were computed.

Written when a training begins (where it runs), and complete when it ends. A resumed run names every environment that
took part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import medseg
from medseg.bundle import MODEL_FILE, BundleInfo, versions
from medseg.device import hardware
from medseg.errors import TrainingError
from medseg.files import digest, file_digest, write_json
from medseg.parallel import world
from medseg.training.loop import Job
from medseg.training.request import Request, read_json
from medseg.training.state import LoopState

MANIFEST = "manifest.json"
FORMAT = 1
LIBRARIES = ("scipy", "safetensors", "einops")
"""Beside those that a bundle names, versions that numbers of a training depend on."""


@cache
def source_code() -> str:
    """Return the SHA-256 of all source files of the installed medseg, names and content."""
    root = Path(medseg.__file__).parent
    return digest({file.relative_to(root).as_posix(): file_digest(file) for file in sorted(root.rglob("*.py"))})


def environment(device: torch.device) -> dict[str, Any]:
    """Return code, versions and hardware of this process, and how many processes train together."""
    libraries = {**versions(), **{name: version(name) for name in LIBRARIES}}
    return {"code": source_code(), "versions": libraries, **hardware(device), "processes": world().size}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what two environments do not share, as "torch 2.10.0 then, 2.11.0 now"."""
    old, new = ({**row, **row["versions"]} for row in (before, now))
    names = [name for name in {**old, **new} if name != "versions" and old.get(name) != new.get(name)]
    said = {name: f"{name} {old.get(name)} then, {new.get(name)} now" for name in names}
    return list({**said, "code": "another source code of medseg"}.values()) if "code" in said else list(said.values())


def environments(run: Path) -> list[dict[str, Any]]:
    """Return the environments that took part in a run so far, the last one last; none where none was noted."""
    file = run / MANIFEST
    return list(read_json(file).get("environments", [])) if file.exists() else []


def recorded_threads(out: Path, request: Request) -> int | None:
    """Return the number of threads to go on with: of the run that is repeated, or resumed with --deterministic."""
    source = request.replay if request.replay is not None else out if request.deterministic else None
    rows = [] if source is None else environments(source)
    return int(rows[-1]["threads"]) if rows else None


def note_environment(out: Path, device: torch.device, request: Request) -> None:
    """Add this process's environment to manifest.json, unless it is the one that the run was in last.

    Raises
    ------
    TrainingError : RUN_DIFFERS, a deterministic run cannot go on in another environment to the same bits.
    """
    rows, now = environments(out), environment(device)
    if rows and rows[-1] == now:
        return
    if rows and request.deterministic:
        raise TrainingError(
            f"{out}: this run was begun with --deterministic in another environment "
            f"({'; '.join(differences(rows[-1], now))}); resume it there, or choose another --out",
            code="RUN_DIFFERS",
        )
    write_json(out / MANIFEST, {"format": FORMAT, "environments": [*rows, now]})


def complete_manifest(
    out: Path,
    data: Mapping[str, Any],
    request: Request,
    jobs: Sequence[Job],
    states: Sequence[LoopState],
    info: BundleInfo,
    *,
    replay: Mapping[str, Any] | None,
) -> None:
    """Write manifest.json of a run whose model is there.

    Parameters
    ----------
    data : content of 1_dataset.json.
    replay : how this run compares with the one that it repeats.
    """
    plan = jobs[0].plan
    rows = {
        job.checkpoint.parent.parent.name: _fold(out, job, state, weights)
        for job, state, weights in zip(jobs, states, info.weights.values(), strict=True)
    }
    cases = {case.id: case for job in jobs for case in (*job.train, *job.validation)}
    splits = {part: [row["id"] for row in data[part]] for part in ("train", "test")}
    names = ["1_dataset.json", "2_cases.json", "2_fingerprint.json", "3_plan.yaml", "request.json"]
    names += [f"6_model/{name}" for name in (MODEL_FILE, *info.weights)]
    content = {
        "format": FORMAT,
        "environments": environments(out),
        "deterministic": request.deterministic,
        "seed": plan.seed,
        "data": {"digest": data["digest"], "spec": data["spec"], "splits": digest(splits)},
        "cases": {row["id"]: row["source"] for row in data["train"]},
        "prepared": {name: jobs[0].cache.content(case) for name, case in sorted(cases.items())},
        "plan": plan.digest,
        "folds": rows,
        "model": info.digest,
        "files": {name: file_digest(out / name) for name in names if (out / name).exists()},
    }
    write_json(out / MANIFEST, content if replay is None else {**content, "replay": dict(replay)})


def _fold(out: Path, job: Job, state: LoopState, weights: str) -> dict[str, Any]:
    place = out / "5_folds" / job.checkpoint.parent.parent.name
    return {
        "train": digest([case.id for case in job.train]),
        "validation": [case.id for case in job.validation],
        "steps": state.step,
        "pieces": state.pieces,
        "losses": digest(state.losses),
        "draws": file_digest(place / "curves" / "draws.csv"),
        "data_share": round(state.pace.data_share, 4),
        "weights": weights,
    }
