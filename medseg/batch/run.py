"""Predict many studies: each on its own, resumable, with one broken study never stopping the others."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.batch.attempt import Outcome
from medseg.batch.disk import require_room
from medseg.batch.dispatch import Dispatch
from medseg.batch.engines import Engine, Workers, started
from medseg.batch.inputs import Choice, opened_inputs
from medseg.batch.job import Settings, recipe
from medseg.batch.ledger import Entry, Ledger
from medseg.batch.locks import alone, present
from medseg.batch.memory import memory_text
from medseg.batch.names import LINKAGE, read_linkage
from medseg.batch.shards import Shard
from medseg.batch.status import Status, Tally, announced, forget_runs
from medseg.batch.study_input import INPUT_AWAY, StudyInput
from medseg.batch.summary import write_summary
from medseg.bundle import Bundle
from medseg.exporters import EXPORTERS, choose_formats
from medseg.files import legible, place_of, sweep, write_json, write_text
from medseg.inference.chosen import usable
from medseg.inference.presets import in_parts
from medseg.readers.allowances import Allowance

if TYPE_CHECKING:
    from medseg.inference.predict import Model

PROVENANCE = "predictions.json"


@dataclass(frozen=True)
class BatchResult:
    """How a batch run ended.

    Attributes
    ----------
    out : the output folder.
    entries : one a study, ordered by id.
    origins : id -> where the study was found; for the terminal only.
    """

    out: Path
    entries: tuple[Entry, ...]
    origins: dict[str, Path]

    def select(self, state: str) -> tuple[Entry, ...]:
        """Return the entries in one state."""
        return tuple(entry for entry in self.entries if entry.state == state)

    @property
    def complete(self) -> bool:
        """Whether every study was done."""
        return all(entry.state == "done" for entry in self.entries)


def predict(  # noqa: PLR0913 - the options of the command are the parameters of the function
    inputs: Sequence[Path],
    *,
    model: Path | Bundle | Model,
    out: Path,
    mirror: bool | None = None,
    choice: Choice | None = None,
    splits: Path | None = None,
    formats: Sequence[str] = (),
    allow: Collection[Allowance] = (),
    workers: Workers | None = None,
    shard: Shard | None = None,
    max_memory: int | None = None,
    tables: bool = True,
    warn: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    watch: Callable[[Status], None] = lambda status: None,
) -> BatchResult:
    """Segment every study below `inputs` into ``OUT/<id>.nii.gz`` (pictures and other `formats`: other endings).

    Also written: OUT/ledger (how each study stands), OUT/summary.csv (states, reasons, volumes), OUT/predictions.json
    (what made them), OUT/private/linkage.csv (id -> path, for the user only). Running it again does only what is not
    done, from the same input and model, with intact outputs.

    Parameters
    ----------
    model : run folder or bundle, or a model in memory; each worker loads it once.
    mirror : average over mirrored inputs; unless told, as the plan says.
    choice, splits : which cases of a dataset.
    allow : what is corrected by resampling instead of refused: "tilt", "irregular"; a dataset may allow more. Studies
        that were refused for it are tried again.
    formats : names of EXPORTERS; unless told, NIfTI, and for pictures their own kind (PNG or TIFF). Formats that an
        earlier run wrote for a study into OUT are kept up to date.
    workers : processes that do the studies, so that one that crashes, hangs or takes too much memory costs itself
        only. None: this process does them; what killed it is then done last by the next run, in a process of its own.
    tables : write summary.csv and journal/summary.html, which list all studies of OUT, at the end.
    warn : is told before the run if the disk may become full.
    progress, watch : are called after each study: how many are over, and how the run stands.
    max_memory : bytes that a process may take for a prediction: images are cut into tiles, with the same masks; `warn`
        is told the estimate for the largest image.
    shard : which part of the studies; other runs do the others into the same OUT.

    Raises
    ------
    ConfigError : a format does not exist.
    BatchError : there is nothing to do, two inputs share a name, no worker can start, or a run with another model or
        other options is at work in OUT (LOCKED).
    BundleError : the model cannot be used.
    ExportError : OUT itself cannot be written (full disk); what is done stays done.
    """
    names = choose_formats(formats) if formats else ()
    with _engine(model, workers) as (bundle, engine):
        spec = bundle.info.spec
        with opened_inputs(inputs, spec, choice=choice, splits=splits, out=out) as studies, _held(out) as stack:
            studies = [replace(study, allow=study.allow | set(allow)) for study in studies]
            info = bundle.info
            made_by = recipe(info, mirror)
            settings = Settings(out, bundle.folder, info.model_dump_json(), made_by, mirror, names, max_memory)
            kept = _of_others(out, studies, made_by)
            chosen = [study for study in studies if shard is None or shard.holds(study.id)]
            stack.enter_context(announced(out, [study.id for study in chosen], made_by))
            write_json(out / PROVENANCE, info.provenance(mirror))
            with alone(out, "tables"):
                _write_linkage(out, studies)
            studies = chosen
            if kept:
                warn(kept)
            if warning := require_room(studies, names, out):
                warn(warning)
            if max_memory is not None:
                models = [member.info for member in in_parts(bundle).members] or [info]
                soft = any(EXPORTERS[name].soft for name in names)
                aside = workers is not None
                warn(memory_text(studies, models, max_memory, soft=soft, mirror=mirror, aside=aside))
            found = _do(studies, settings, engine, progress, watch)
            if unread := _away(found):
                warn(unread)
            if tables:
                write_summary(out, spec)
            return BatchResult(out, found, {study.id: study.origin for study in studies})


@contextmanager
def _engine(model: Path | Bundle | Model, workers: Workers | None) -> Iterator[tuple[Bundle, Engine]]:
    """Open the model, and start who works with it."""
    if workers is None:
        # Only where this process predicts: torch would take 300 MiB from beside the workers.
        from medseg.batch.here import Here
        from medseg.inference.predict import load_model

        loaded = load_model(model) if isinstance(model, Path | Bundle) else model
        with closing(Here(loaded)) as engine:
            yield loaded.bundle, engine
    else:
        with started(workers) as engine:
            yield usable(model if isinstance(model, Path | Bundle) else model.bundle), engine


@contextmanager
def _held(out: Path) -> Iterator[ExitStack]:
    """Hold OUT together with others; whoever is alone in it removes what killed processes left half written.

    What enters the stack that is given leaves before OUT is given back.
    """
    begun = False

    def clean() -> None:
        for folder in (out, out / "ledger", out / "journal", out / "private"):
            sweep(folder, deep=False)
        forget_runs(out, unfinished=not begun)  # one that was killed or stopped still tells what is left

    with present(out, sweep=clean), ExitStack() as stack:
        begun = True
        yield stack


def _of_others(out: Path, studies: Sequence[StudyInput], made_by: str) -> str:
    """Return a warning if OUT keeps masks that other models or options made, of studies that are not given now."""
    ledger, given = Ledger(out), {study.id for study in studies}
    entries = [ledger.read(name) for name in ledger.studies() if name not in given]
    count = sum(entry is not None and entry.state == "done" and entry.model_digest != made_by for entry in entries)
    if not count:
        return ""
    return (
        f"{count} masks in {out.name} were made by another model or other options, of studies that are not among these "
        "inputs: they stay as they are (model_digest in ledger/<id>.json); choose another --out to keep results apart"
    )


def _away(entries: Sequence[Entry]) -> str:
    """Return a warning if the inputs of studies that are done could not be read."""
    count = sum(INPUT_AWAY in (entry.code, *entry.notes) for entry in entries)
    if not count:
        return ""
    return (
        f"{count} studies could not be compared with their inputs, which cannot be read now (rights, or a drive that "
        f"does not answer): what is done of them stays ({INPUT_AWAY}); repeat the command when they can be read"
    )


def _do(
    studies: Sequence[StudyInput],
    settings: Settings,
    engine: Engine,
    progress: Callable[[int, int], None],
    watch: Callable[[Status], None],
) -> tuple[Entry, ...]:
    """Do what is not done yet; return the entries in the order of the studies."""
    count, tally = iter(range(1, len(studies) + 1)), Tally(len(studies))

    def told(outcome: Outcome) -> None:
        progress(next(count), len(studies))
        if outcome.entry is not None:
            watch(tally.add(outcome.entry.state, fresh=outcome.fresh))

    entries = Dispatch(engine, settings, told).run(studies)
    return tuple(entries[study.id] for study in studies)


def _write_linkage(out: Path, studies: Sequence[StudyInput]) -> None:
    """Write id -> path of these studies and of those of earlier runs into the same folder."""
    file = out / LINKAGE
    known = read_linkage(out)
    known |= {study.id: legible(place_of(study.origin)) for study in studies}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "path"])
    writer.writerows(sorted(known.items()))
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_text(file, text.getvalue(), mode=0o600)
