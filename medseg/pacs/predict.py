"""Segment studies that an archive holds, and send the results back: find, fetch one study, segment, send, next."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from medseg.batch.dicom_inputs import wanted_modalities
from medseg.batch.inputs import Choice
from medseg.batch.job import recipe
from medseg.batch.ledger import Entry, Ledger
from medseg.batch.run import BatchResult
from medseg.batch.run import predict as predict_files
from medseg.batch.summary import write_summary
from medseg.bundle import Bundle
from medseg.errors import BatchError, ConfigError, ExportError, MedsegError
from medseg.exporters import EXPORTERS, choose_formats
from medseg.inference.predict import Model, load_model
from medseg.pacs.address import Address, parse_address, split_addresses
from medseg.pacs.archive import RemoteStudy, find_studies, look_up, retrieve
from medseg.pacs.credentials import find_credentials
from medseg.pacs.delivery import Destination, Stow, clean_scratch, try_to_deliver
from medseg.pacs.visits import remember, settled
from medseg.pacs.web import Patience, Web
from medseg.privacy import keyed_id
from medseg.readers.allowances import Allowance
from medseg.spec import Spec

GIVE_UP = 3
"""Studies in a row without an answer: then the archive is down, and waiting for each further one is no use."""


@dataclass(frozen=True)
class Options:
    """How studies are segmented: what medseg.batch.run.predict takes, and where the results go."""

    model: Model
    out: Path
    mirror: bool | None = None
    formats: tuple[str, ...] = ("nifti",)
    allow: frozenset[Allowance] = frozenset()
    destinations: tuple[Destination, ...] = ()

    @property
    def spec(self) -> Spec:
        """The spec of the model."""
        return self.model.bundle.info.spec

    @property
    def recipe(self) -> str:
        """What the results are made by."""
        return recipe(self.model.bundle.info, self.mirror)


@dataclass
class _Run:
    entries: dict[str, Entry] = field(default_factory=dict)
    origins: dict[str, Path] = field(default_factory=dict)


def predict(  # noqa: PLR0913 - the options of the command are the parameters of the function
    inputs: Sequence[str | Path],
    *,
    model: Path | Bundle | Model,
    out: Path,
    mirror: bool | None = None,
    choice: Choice | None = None,
    splits: Path | None = None,
    formats: Sequence[str] = (),
    allow: Collection[Allowance] = (),
    send: Sequence[str] = (),
    patience: Patience | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BatchResult:
    """Segment files and studies of archives like medseg.batch.run.predict, and send the DICOM results.

    Of an archive, one study at a time is fetched into a private folder beside OUT and removed when it is done. A
    repeated run asks the archive what it holds, and fetches only what is not done or has changed since.

    Parameters
    ----------
    inputs : paths, and addresses like ``dicomweb://HOST:PORT/PATH?StudyDate=20260101-``.
    send : addresses of archives that get the results; a study is done when all have confirmed them.

    Raises
    ------
    ConfigError : an address, a format or the credentials are wrong; the extra is not installed.
    BatchError : the archive does not answer the search, or no longer answers; there is nothing to do; LOCKED.
    BundleError, ExportError : as medseg.batch.run.predict.
    """
    paths, addresses = split_addresses(inputs)
    targets = [parse_address(text, whole=True) for text in send]
    names = choose_formats(formats or ("nifti",))
    if targets and not any(EXPORTERS[name].dicom for name in names):
        raise ConfigError("an archive takes DICOM only: add --format seg (or rtstruct, sr) to send results")
    webs = [_web(address, [*addresses, *targets], patience) for address in addresses]
    stows = tuple(Stow(_web(target, [*addresses, *targets], patience)) for target in targets)
    loaded = model if isinstance(model, Model) else load_model(model)
    options = Options(loaded, out, mirror, names, frozenset(allow), stows)
    run = _Run()
    with locked(out / "private"), _scratch(out) as scratch:
        if paths:
            local = predict_files(
                paths,
                model=loaded,
                out=out,
                mirror=mirror,
                choice=choice,
                splits=splits,
                formats=names,
                allow=allow,
                progress=progress,
            )
            run.entries |= {entry.id: try_to_deliver(out, entry, stows) for entry in local.entries}
            run.origins |= local.origins
        for web in webs:
            for entry in _from_archive(web, options, scratch, progress):
                run.entries[entry.id] = entry
    if not run.entries:
        raise BatchError("the archive has no study that the address means; nothing was done", code="EMPTY_INPUT")
    entries = tuple(run.entries[case] for case in sorted(run.entries))
    write_summary(out, options.spec)
    return BatchResult(out, entries, run.origins)


def _web(address: Address, all_of_them: Sequence[Address], patience: Patience | None) -> Web:
    return Web(address, find_credentials(address, all_of_them), patience or Patience())


def _from_archive(web: Web, options: Options, scratch: Path, progress: Callable[[int, int], None]) -> Iterator[Entry]:
    studies = find_studies(web)
    silent = 0
    for number, uid in enumerate(studies):
        entries = list(_study(web, uid, options, scratch))
        yield from entries
        silent = silent + 1 if any(entry.code == "PACS_UNREACHABLE" for entry in entries) else 0
        if silent == GIVE_UP:
            raise BatchError(
                f"{web.address.host}: no answer for {GIVE_UP} studies in a row ({entries[0].message}); what is done "
                "stays done, the same command goes on from here",
                code="PACS_UNREACHABLE",
            )
        progress(number + 1, len(studies))


def _study(web: Web, uid: str, options: Options, scratch: Path) -> Iterator[Entry]:
    """Bring one study to its end, whatever that is; yields what the run tells of each of its series."""
    name = keyed_id("study", uid)
    try:
        study = look_up(web, uid, wanted_modalities(options.spec))
        if not study.series:
            text = f"none of its {study.aside} series has a modality that the model is for"
            yield _entry(name, options, "refused", BatchError(text, code="NO_MATCHING_SERIES"))
            return
        known = settled(options.out, study, recipe=options.recipe, formats=options.formats, allow=options.allow)
        entries = known or _fetch_and_segment(web, study, options, scratch)
        yield from (try_to_deliver(options.out, entry, options.destinations) for entry in entries)
    except MedsegError as error:
        if error.code in ("DISK_FULL", "NOT_WRITABLE"):
            raise
        yield _entry(name, options, "failed", error)


def _fetch_and_segment(web: Web, study: RemoteStudy, options: Options, scratch: Path) -> list[Entry]:
    folder = clean_scratch(scratch / "study")
    try:
        retrieve(web, study, folder)
        result = predict_files(
            [folder],
            model=options.model,
            out=options.out,
            mirror=options.mirror,
            formats=options.formats,
            allow=options.allow,
            tables=False,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    remember(options.out, study, result.entries)
    return list(result.entries)


def _entry(name: str, options: Options, state: str, error: MedsegError) -> Entry:
    """Commit that a study as a whole could not be done."""
    refusal = {"state": state, "code": error.code, "message": str(error)}
    entry = Entry.model_validate({"id": name, "input_digest": "", "model_digest": options.recipe, **refusal})
    Ledger(options.out).write(entry)
    return entry


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one process; raise BatchError(LOCKED) where another one works in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(folder / "archive.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise BatchError(
            "another process works with an archive and the same folder; wait for it, or choose another", code="LOCKED"
        ) from None
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written ({error.strerror})", code="NOT_WRITABLE") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Give a private folder beside OUT, emptied of what a killed run left, and remove it at the end."""
    folder = out.absolute().parent / f".{out.absolute().name}.scratch"
    try:
        yield clean_scratch(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
