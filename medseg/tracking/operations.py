"""What can be written to a run: one function per operation, the same for a live call and for a replay.

Every operation is idempotent, because a call that failed half way is sent again from the spool.
Arguments are JSON values, so that a call can wait on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.files import file_digest
from medseg.tracking.door import TrackingRefusedError, translated

_log = logging.getLogger("medseg")

RUN_TAG = "medseg.run"
DIGEST_TAG = "medseg.sha256"
TIME_TAG = "medseg.registered"
PENDING = "pending-"

# MLflow allows 100 params or tags, 1000 metrics and 1 MB per request; a character may take six bytes in JSON.
_TEXTS_PER_REQUEST = 20
_METRICS_PER_REQUEST = 500
_PARAM_LENGTH, _TAG_LENGTH, _KEY_LENGTH, _DIGEST_LENGTH = 6000, 8000, 250, 36


def open_run(client: Any, run: Mapping[str, Any]) -> str:
    """Return the MLflow id of the run that `run` describes; create it when it does not exist.

    `run` holds key (unique, made here), run_id (MLflow's, or None), experiment, name, location, at (ms).
    """
    found = _find_run(client, run)
    if found is None:
        experiment = _experiment(client, run["experiment"], run["location"])
        created = client.create_run(experiment, start_time=run["at"], run_name=run["name"], tags={RUN_TAG: run["key"]})
        return str(created.info.run_id)
    if found.info.status not in ("RUNNING", "FINISHED"):
        client.update_run(found.info.run_id, status="RUNNING")
    return str(found.info.run_id)


def _find_run(client: Any, run: Mapping[str, Any]) -> Any | None:
    if run["run_id"] is not None:
        try:
            with translated():
                return client.get_run(run["run_id"])
        except TrackingRefusedError:
            _log.warning("MLflow has no run %s; a new one is made in experiment %r.", run["run_id"], run["experiment"])
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{run['key']}'", max_results=1) if experiments else []
    return runs[0] if runs else None


def _experiment(client: Any, name: str, location: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            with translated():
                return str(client.create_experiment(name, artifact_location=location))
        except TrackingRefusedError:  # another process made it just now
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _params(client: Any, run_id: str, *, values: Mapping[str, str]) -> None:
    """Log what is new; MLflow never changes a parameter, and one changed value would refuse the whole batch."""
    from mlflow.entities import Param

    clean = {clean_key(key): shorten(value, _PARAM_LENGTH) for key, value in values.items()}
    known = client.get_run(run_id).data.params
    changed = [key for key, value in clean.items() if known.get(key, value) != value]
    if changed:
        _log.warning("MLflow keeps the first value of %d parameters that changed: %s", len(changed), ", ".join(changed))
    for part in _parts([Param(k, v) for k, v in clean.items() if k not in known], _TEXTS_PER_REQUEST):
        client.log_batch(run_id, params=part)


def _metrics(client: Any, run_id: str, *, values: Mapping[str, float], step: int, at: int) -> None:
    from mlflow.entities import Metric

    finite = [Metric(clean_key(k), float(v), at, step) for k, v in values.items() if math.isfinite(v)]
    for part in _parts(finite, _METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=part)


def _tags(client: Any, run_id: str, *, values: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    tags = [RunTag(clean_key(key), shorten(value, _TAG_LENGTH)) for key, value in values.items()]
    for part in _parts(tags, _TEXTS_PER_REQUEST):
        client.log_batch(run_id, tags=part)


def _dataset(client: Any, run_id: str, *, name: str, digest: str, context: str) -> None:
    """Log name and digest only: MLflow's own dataset classes record where the files lie."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"sha256": digest})
    dataset = Dataset(name=name, digest=digest[:_DIGEST_LENGTH], source_type="medseg", source=source)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
    _tags(client, run_id, values={f"medseg.dataset.{context}": digest})


def _table(client: Any, run_id: str, *, name: str, columns: Sequence[str], data: Sequence[Sequence[Any]]) -> None:
    """Write what ``MlflowClient.log_table`` writes, but replace: log_table appends, so a repeat would double rows."""
    path = f"{clean_key(name)}.json"
    client.log_text(run_id, json.dumps({"columns": columns, "data": data}, allow_nan=False), path)
    entry = {"path": path, "type": "table"}
    listed = json.loads(client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
    if entry not in listed:
        client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*listed, entry]))


def _artifact(client: Any, run_id: str, *, path: str, folder: str) -> None:
    if Path(path).is_dir():
        client.log_artifacts(run_id, path, clean_key(posixpath.join(folder, Path(path).name)))
    else:
        client.log_artifact(run_id, path, clean_key(folder) if folder else None)


def _text(client: Any, run_id: str, *, text: str, name: str) -> None:
    client.log_text(run_id, text, clean_key(name))


def _register(
    client: Any,
    run_id: str,
    *,
    model: str,
    path: str,
    alias: str | None,
    tags: Mapping[str, str],
    at: int,
    late: bool = False,
) -> int:
    """Make a version of `model` from a file or folder; the same content of the same run is the same version.

    `at` (ms) is when this was asked for; a call sent `late` does not take the alias from a version asked for after it.
    """
    bundle = Path(path)
    digest = content_digest(bundle)
    folder = f"model-{digest[:12]}"  # named by content, so that a second bundle never changes an earlier version
    _ensure_model(client, model)
    upload = client.log_artifacts if bundle.is_dir() else client.log_artifact
    upload(run_id, str(bundle), folder)
    source = f"{client.get_run(run_id).info.artifact_uri}/{folder}"
    known = [v for v in client.search_model_versions(f"run_id = '{run_id}'") if v.name == model and v.source == source]
    version = known[0] if known else client.create_model_version(model, source, run_id, await_creation_for=0)
    for key, value in {**tags, DIGEST_TAG: digest, TIME_TAG: str(at)}.items():
        client.set_model_version_tag(model, str(version.version), key, value)
    if alias is not None and not (late and _younger_holds(client, model, alias, at)):
        client.set_registered_model_alias(model, alias, str(version.version))
    return int(version.version)


def _ensure_model(client: Any, model: str) -> None:
    try:
        with translated():
            client.create_registered_model(model)
    except TrackingRefusedError:
        client.get_registered_model(model)  # it exists; a name that is not allowed is refused here again


def _younger_holds(client: Any, model: str, alias: str, at: int) -> bool:
    number = client.get_registered_model(model).aliases.get(alias)
    if number is None:
        return False
    holder = client.get_model_version(model, str(number))
    # The time asked for, not the time made: calls that waited together are made together.
    if int(holder.tags.get(TIME_TAG, holder.creation_timestamp)) <= at:
        return False
    _log.warning("Model %s: alias %s stays with version %s, younger than the call sent now.", model, alias, number)
    return True


def _finish(client: Any, run_id: str, *, status: str, at: int) -> None:
    """End a running run; one that had ended before (reopened to add results) keeps its status and times."""
    if client.get_run(run_id).info.status == "RUNNING":
        client.set_terminated(run_id, status=status, end_time=at)


OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "params": _params,
    "metrics": _metrics,
    "tags": _tags,
    "dataset": _dataset,
    "table": _table,
    "artifact": _artifact,
    "text": _text,
    "register": _register,
    "finish": _finish,
}


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the sorted (relative name, SHA-256) pairs of a folder; 64 hex digits."""
    if path.is_file():
        return file_digest(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    listing = "".join(f"{p.relative_to(path).as_posix()}\0{file_digest(p)}\n" for p in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def clean_key(key: str) -> str:
    """Return `key` in the characters that MLflow allows (``hd95[max-directed]`` → ``hd95_max-directed_``)."""
    allowed = re.sub(r"[^\w\-. /]", "_", key)
    return posixpath.normpath(allowed).lstrip("./")[:_KEY_LENGTH].rstrip("/") or "_"


def shorten(text: str, length: int) -> str:
    """Return `text`, or its beginning with a mark that says that some is missing."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
