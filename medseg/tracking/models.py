"""The model registry: versions, the aliases that name them, and fetching a version's bundle."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medseg.errors import BundleError, ConfigError
from medseg.files import PARTIAL_PREFIX, digest
from medseg.tracking.door import connect, store_exists, tracking_uri, translated
from medseg.tracking.operations import DIGEST_TAG, content_digest

_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str | None
    tags: Mapping[str, str]
    created: datetime


def list_versions(folder: Path, name: str | None = None) -> list[ModelVersion]:
    """Return the versions of one model or of all, by name, then oldest first; empty when there is none.

    Raises
    ------
    ConfigError : the store does not answer (code TRACKING_UNREACHABLE).
    """
    if not store_exists(folder):
        return []
    client = connect(folder)
    with translated():
        models = [m for m in _pages(client.search_registered_models) if name in (None, m.name)]
        return [version for model in sorted(models, key=lambda m: m.name) for version in _versions(client, model)]


def version_by_alias(folder: Path, name: str, alias: str) -> ModelVersion | None:
    """Return the version that `alias` names, or None."""
    return next((v for v in list_versions(folder, name) if alias in v.aliases), None)


def set_alias(folder: Path, name: str, alias: str, version: int) -> None:
    """Let `alias` name `version` (and no other) of the model.

    Raises
    ------
    BundleError : no such model or version (code NO_SUCH_MODEL).
    ConfigError : MLflow does not allow the alias, or does not answer.
    """
    _pick(folder, name, version=version)
    with translated():
        connect(folder).set_registered_model_alias(name, alias, str(version))


def delete_alias(folder: Path, name: str, alias: str) -> None:
    """Let `alias` name no version of the model; nothing happens when it named none.

    Raises
    ------
    BundleError : no such model (code NO_SUCH_MODEL).
    """
    if alias in {a for v in _existing(folder, name) for a in v.aliases}:
        with translated():
            connect(folder).delete_registered_model_alias(name, alias)


def fetch(folder: Path, uri: str, to: Path) -> Path:
    """Download a bundle once into a folder below `to`; return the bundle: that folder, or its file if there is one.

    Parameters
    ----------
    uri : ``models:/name@alias`` or ``models:/name/3``.
    to : cache folder; a version fetched before is not downloaded again.

    Raises
    ------
    ConfigError : `uri` has another form, or the store does not answer.
    BundleError : no such model, version or alias (code NO_SUCH_MODEL), or what arrived is not what was registered
        (code HASH_MISMATCH); nothing is left in `to` then.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise ConfigError(f"{uri}: not a model of the registry; use models:/NAME@ALIAS or models:/NAME/VERSION.")
    number = match["version"]
    version = _pick(folder, match["name"], alias=match["alias"], version=int(number) if number else None)
    # A name and number mean another model on another server.
    identity = digest([tracking_uri(folder), version.name, version.version, version.created.isoformat()])[:8]
    target = to / f"{re.sub(r'[^A-Za-z0-9_-]', '_', version.name)}-{version.version}-{identity}"
    if not target.is_dir():
        _download(folder, version, target)
    entries = list(target.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_file() else target


def _download(folder: Path, version: ModelVersion, target: Path) -> None:
    from mlflow.artifacts import download_artifacts

    client, uri = connect(folder), tracking_uri(folder)
    partial = target.with_name(f"{PARTIAL_PREFIX}{uuid.uuid4().hex[:8]}")
    try:
        with translated():
            source = client.get_model_version_download_uri(version.name, str(version.version))
            partial.mkdir(parents=True)
            local = Path(download_artifacts(source, dst_path=str(partial), tracking_uri=uri, registry_uri=uri))
        _verify(version, local)
        with translated():
            local.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _verify(version: ModelVersion, local: Path) -> None:
    """Compare with the digest taken at registration; versions that others registered have none."""
    expected = version.tags.get(DIGEST_TAG)
    files = [p for p in local.rglob("*") if p.is_file()]
    found = {content_digest(local)} | ({content_digest(files[0])} if len(files) == 1 else set())
    if expected is not None and expected not in found:
        raise BundleError(
            f"Model {version.name} version {version.version}: the downloaded files differ from those registered "
            f"(SHA-256 {expected[:12]}… expected). Register the bundle again, or fetch another version.",
            code="HASH_MISMATCH",
        )


def _existing(folder: Path, name: str) -> list[ModelVersion]:
    versions = list_versions(folder, name)
    if not versions:
        names = sorted({v.name for v in list_versions(folder)})
        raise BundleError(
            f"No model {name!r} is registered. Models: {', '.join(names) or 'none'}.", code="NO_SUCH_MODEL"
        )
    return versions


def _pick(folder: Path, name: str, *, alias: str | None = None, version: int | None = None) -> ModelVersion:
    versions = _existing(folder, name)
    for one in versions:
        if one.version == version or alias in one.aliases:
            return one
    wanted = f"alias {alias!r}" if alias is not None else f"version {version}"
    aliases = ", ".join(f"{a} (version {v.version})" for v in versions for a in v.aliases) or "none"
    numbers = ", ".join(str(v.version) for v in versions)
    raise BundleError(f"Model {name} has no {wanted}. Aliases: {aliases}. Versions: {numbers}.", code="NO_SUCH_MODEL")


def _versions(client: Any, model: Any) -> list[ModelVersion]:
    quote = '"' if "'" in model.name else "'"
    aliases: dict[int, list[str]] = {}
    for alias, number in model.aliases.items():
        aliases.setdefault(int(number), []).append(alias)
    found = [
        ModelVersion(
            name=v.name,
            version=int(v.version),
            aliases=tuple(sorted(aliases.get(int(v.version), []))),
            run_id=v.run_id or None,
            tags=dict(v.tags),
            created=datetime.fromtimestamp(v.creation_timestamp / 1000, UTC),
        )
        for v in _pages(client.search_model_versions, filter_string=f"name = {quote}{model.name}{quote}")
    ]
    return sorted(found, key=lambda v: v.version)


def _pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = search(page_token=token, **arguments)
        yield from page
        token = page.token
        if not token:
            return
