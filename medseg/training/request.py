"""What a training was asked for, and whether a run folder holds the same request on the same data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medseg.errors import ConfigError, TrainingError
from medseg.files import file_digest, sweep, write_json
from medseg.planning.plan import MOST_SEED


@dataclass(frozen=True)
class Request:
    """What was asked for; kept in the run folder so that only the same request resumes it."""

    budget: float | None = None
    steps: int | None = None
    epochs: int | None = None
    folds: int | None = None
    fold: int | None = None
    network: str | None = None
    settings: tuple[str, ...] = ()
    seed: int = 0
    plan: Path | None = None
    replay: Path | None = None
    deterministic: bool = False
    from_model: Path | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for a seed that torch does not take."""
        if not 0 <= self.seed <= MOST_SEED:
            raise ConfigError(f"seed {self.seed}: a whole number from 0 to {MOST_SEED} is needed")


def complete(request: Request) -> Request:
    """Return a replay with the folds of the run that it repeats, deterministic if that was; others as they are.

    Raises
    ------
    TrainingError : there is no run to repeat.
    """
    if request.replay is None:
        return request
    file = request.replay / "request.json"
    if not file.exists():
        raise TrainingError(f"--replay {request.replay}: this is no run of medseg train")
    told = read_json(file)
    deterministic = request.deterministic or bool(told.get("deterministic"))
    return replace(request, folds=told["folds"], fold=told["fold"], deterministic=deterministic)


def open_run(out: Path, manifest: dict[str, Any], request: Request, start: str | None = None) -> None:
    """Write 1_dataset.json and request.json, or compare them with those of the run that is to be resumed.

    `start` is the digest of the model that the weights come from, which stands for its place.

    A folder without a plan holds nothing that could be resumed: there, the new request simply takes the place of one
    that was refused before.

    Raises
    ------
    TrainingError : RUN_DIFFERS; or a file of the folder is damaged.
    """
    if request.replay and read_json(request.replay / "1_dataset.json").get("digest") != manifest["digest"]:
        raise TrainingError(f"--replay {request.replay}: that run learnt from other data", code="RUN_DIFFERS")
    asked = {**_as_json(request), "from_model": start}
    begun = (out / "3_plan.yaml").exists()
    for name, value, what in (("1_dataset.json", manifest, "data"), ("request.json", asked, "options")):
        file = out / name
        before = read_json(file) if file.exists() else None
        if what == "options" and before is not None:
            before = {**_as_json(Request()), **before}  # a run from before there was an option did without it
        # Data by their digest: a run from before there was a column of the manifest has the same.
        same = before is not None and before.get("digest", before) == value.get("digest", value)
        if begun and before is not None and not same:
            raise TrainingError(
                f"{out}: this run was started with other {what} ({_differences(before, value)}); run it with the same "
                f"{what} to resume it, or choose another --out",
                code="RUN_DIFFERS",
            )
        if not same:
            if what == "data" and before is not None:
                (out / "2_fingerprint.json").unlink(missing_ok=True)
            write_json(file, value)


@contextmanager
def taken(out: Path) -> Iterator[None]:
    """Hold a run folder for this command while the block runs, cleared of what a killed one left half written.

    A file system without locks holds nothing.

    Raises
    ------
    TrainingError : LOCKED, another command works in it.
    """
    lock = FileLock(out / "train.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(
            f"{out}: another medseg train works in this folder; wait for it, or choose another --out", code="LOCKED"
        ) from None
    except (OSError, NotImplementedError):  # what is to be written next says what is wrong with the folder
        lock.release()
    try:
        sweep(out)
        shutil.rmtree(out / "6_model", ignore_errors=True)
        yield
    finally:
        lock.release()


def _as_json(request: Request) -> dict[str, Any]:
    values = {key: value for key, value in request.__dict__.items() if key != "from_model"}
    return {**json.loads(json.dumps(values, default=_content)), "from_model": None}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Say in a few words what two requests, or two manifests, do not share."""
    parts = []
    for key in sorted(set(before) | set(now)):
        old, new = before.get(key), now.get(key)
        if old == new or key == "digest":  # follows from the others
            continue
        if isinstance(old, list) and isinstance(new, list) and key in ("train", "test"):
            changed = sorted({row["id"] for row in [*old, *new] if row not in old or row not in new})
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            parts.append(f"{key} cases {', '.join(changed[:3])}{more}")
        elif key in ("spec", "plan", "replay", "from_model"):  # digests, which tell a person nothing
            parts.append(f"another {key}")
        else:
            parts.append(f"{key}: {_shown(old)} then, {_shown(new)} now")
    return "; ".join(parts)


def _shown(value: Any) -> str:
    return "none" if value is None or value == [] else json.dumps(value).strip('"')


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file of a run folder holds; raise TrainingError if it is damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{file}: damaged or missing ({error}); choose another --out") from error


def _content(path: Path) -> str:
    """Return what stands for a plan, or for the run to be repeated, in request.json: its content, not its place."""
    file = path / "3_plan.yaml" if path.is_dir() else path
    if not file.is_file():
        raise TrainingError(f"{file}: this file does not exist")
    return file_digest(file)
