"""The command line: one verb a stage, in the order in which data flow.

Exit codes: 0 all done, 1 failed, 2 wrong usage, 3 some studies failed, 130 interrupted. Errors are printed as
one message; ``medseg --debug VERB`` shows where they come from.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from medseg.cli_models import models
from medseg.cli_options import (
    Allow,
    Budget,
    CaseChoice,
    Channels,
    Cluster,
    Datasets,
    Formats,
    From,
    Json,
    MaxMemory,
    MemoryLimit,
    NoTrack,
    Postprocess,
    Preset,
    Quality,
    Scheduler,
    Seed,
    Send,
    Settings,
    Shard,
    Splits,
    StatusOf,
    Steps,
    Store,
    Timeout,
    Workers,
    as_json,
    console,
    errors,
    say,
    workforce,
)
from medseg.cli_output import display, end_batch, print_scores
from medseg.errors import ConfigError, MedsegError, Stopped
from medseg.files import legible

app = typer.Typer(
    help="From a folder of DICOM or NIfTI studies to a segmentation model that is validated and kept up to date.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: stopped on request, the same command goes on later."""
INTERRUPTED = 130


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False) -> None:
    """Keep the options that stand before the verb."""
    if debug:
        os.environ["MEDSEG_DEBUG"] = "1"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("medseg-demo"),
    seed: Seed = 0,
) -> None:
    """Whole journey on synthetic DICOM patients, in under four minutes on two cores.

    Example: medseg demo --out medseg-demo
    """
    from medseg.demo import run_demo

    run_demo(out, seed=seed, console=console)


@app.command()
def check(
    dataset: Annotated[Path, typer.Argument(help="Dataset, or folder of DICOM studies without labels.")],
    out: Annotated[Path | None, typer.Option(help="Folder for check.html and check.json.")] = None,
    splits: Splits = None,
    read: Annotated[bool, typer.Option("--read", help="Of a folder of studies: decode the pixels, too.")] = False,
    json: Json = False,
) -> None:
    """Is this dataset fit to learn from? What is usable in this folder? Findings with reason codes.

    A dataset exits 1 if there are errors. A folder of DICOM studies exits 0 if all series are usable, 3 if some are, 1
    if none is.

    Example: medseg check data_specs/hippocampus.yaml --out check
    """
    from medseg import api
    from medseg.checking.run import CheckResult, render
    from medseg.checking.tree_page import terminal
    from medseg.display import Display

    progress = Display(None if json else errors)
    result = api.check(dataset, splits=splits, out=out, read=read, display=progress)
    if json:
        typer.echo(result.to_json())
    elif isinstance(result, CheckResult):
        console.print(render(result))
    else:
        console.print(terminal(result))
        if not result.series:
            say("A dataset would be a spec file, or a folder with dataset.yaml or dataset.json.")
    if result.page and not json:
        say(f"Page: {result.page}")
    raise typer.Exit(result.exit_code)


@app.command()
def plan(  # noqa: PLR0913 - one parameter an option
    datasets: Datasets,
    out: Annotated[Path, typer.Option(help="File to write; edit it, then train with --plan.")] = Path("plan.yaml"),
    budget: Budget = None,
    steps: Steps = None,
    settings: Settings = None,
    splits: Splits = None,
    seed: Seed = 0,
    from_model: From = None,
    track: Store = Path(),
) -> None:
    """Fingerprint the data, measure this machine, and write a plan that a person can read and edit.

    Example: medseg plan data_specs/hippocampus.yaml --budget 30m --out plan.yaml
    """
    from medseg import api

    made = api.plan(
        datasets,
        out=out,
        budget=budget,
        steps=steps,
        settings=settings or (),
        splits=splits,
        seed=seed,
        from_model=None if from_model is None else api.local_model(from_model, track=track),
        display=display(),
    )
    told = f"{made.steps} steps expected" if budget else f"{made.steps} steps"
    say(f"{out}: {made.dimensions}-D, spacing {made.spacing}, patch {made.patch_size}, {told}; the file says why")


@app.command()
def train(  # noqa: PLR0913 - one parameter an option
    datasets: Datasets,
    out: Annotated[Path, typer.Option(help="Run folder; the same command resumes an unfinished run in it.")],
    budget: Budget = None,
    steps: Steps = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Fixed number of passes over the cases.")] = None,
    folds: Annotated[int | None, typer.Option(min=2, help="Cross-validation: one network a fold.")] = None,
    fold: Annotated[int | None, typer.Option(min=0, help="Train only this fold.")] = None,
    network: Annotated[str | None, typer.Option(help="Name in the table of networks.")] = None,
    settings: Settings = None,
    splits: Splits = None,
    seed: Seed = 0,
    plan: Annotated[Path | None, typer.Option(help="Plan to follow instead of making one.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Finished run to repeat; exit 1 if it differs.")] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Same seed, same bits.")] = False,
    from_model: From = None,
    track: Store = Path(),
    no_track: NoTrack = False,
    name: Annotated[str | None, typer.Option(help="Name in the model registry (default: the dataset's).")] = None,
) -> None:
    """Train a model within a budget of wall time, or for a number of steps.

    Of several datasets, each label is learnt from those that list it; the others leave it open.

    Example: medseg train data_specs/hippocampus.yaml --budget 10m --out runs/hippocampus
    """
    from medseg import api
    from medseg.duration import process_start

    result = api.train(
        datasets,
        out=out,
        budget=budget,
        steps=steps,
        epochs=epochs,
        folds=folds,
        fold=fold,
        network=network,
        settings=settings or (),
        splits=splits,
        seed=seed,
        plan=plan,
        replay=replay,
        deterministic=deterministic,
        from_model=None if from_model is None else api.local_model(from_model, track=track),
        track=None if no_track else track,
        model_name=name,
        began=process_start(),
        display=display(),
    )
    dice = ", ".join(f"{label} {value:.3f}" for label, value in result.dice.items())
    say(f"{result.steps} steps in {result.seconds:.0f} s; validation Dice: {dice}")
    say(f"Model: {result.model}")
    if result.identical is False:
        raise typer.Exit(1)


@app.command()
def predict(  # noqa: PLR0913 - one parameter an option
    inputs: Annotated[list[str], typer.Argument(help="Files, trees of studies, archives, datasets, dicomweb://.")],
    model: Annotated[str, typer.Option(help="Run folder, bundle, folder of nnU-Net or MONAI, models:/NAME@ALIAS.")],
    out: Annotated[Path, typer.Option(help="Folder for the masks; a repeated command does only what is missing.")],
    mirror: Annotated[bool | None, typer.Option(help="Average over mirrored inputs (default: as planned).")] = None,
    quality: Preset = Quality.EXACT,
    cases: CaseChoice = None,
    splits: Splits = None,
    formats: Formats = None,
    send: Send = None,
    channels: Channels = None,
    allow: Allow = None,
    postprocess: Postprocess = True,
    workers: Workers = 1,
    timeout: Timeout = "2h",
    memory_limit: MemoryLimit = None,
    max_memory: MaxMemory = None,
    scheduler: Scheduler = "",
    cluster: Cluster = None,
    shard: Shard = "",
    status: StatusOf = None,
    track: Store = Path(),
    json: Json = False,
) -> None:
    """Segment studies into OUT/<id>.nii.gz, on their own grids; exit 3 if some could not be done.

    Example: medseg predict archive/ --model runs/hippocampus --out masks --workers 2

    From an archive: medseg predict 'dicomweb://HOST:8042/dicom-web?StudyDate=20260105' --model runs/hippocampus
    --out masks --format seg --send dicomweb://HOST:8042/dicom-web
    """
    from medseg import api

    result = api.predict(
        *inputs,
        model=api.local_model(model, track=track),
        out=out,
        mirror=mirror,
        quality=quality.value,
        cases=None if cases is None else cases.value,
        splits=splits,
        formats=formats or (),
        send=send or (),
        channels=channels,
        allow=allow or (),
        postprocess=postprocess,
        workers=workforce(workers, timeout, memory_limit, scheduler, cluster),
        shard=shard,
        max_memory=max_memory,
        display=display(json),
    )
    end_batch(result, json=json)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Option(help="Folder of masks named by case id.")],
    reference: Annotated[Path, typer.Option(help="Dataset, or folder of masks named by case id.")],
    out: Annotated[Path, typer.Option(help="Folder for cases.csv, summary.csv and summary.json.")],
    cases: CaseChoice = None,
    splits: Splits = None,
    track: Store = Path(),
    no_track: NoTrack = False,
    json: Json = False,
) -> None:
    """Score masks against a reference: per-case table and summary.

    Example: medseg evaluate --predictions masks --reference data_specs/hippocampus.yaml --out scores
    """
    from medseg import api

    result = api.evaluate(
        predictions,
        reference,
        out=out,
        cases=None if cases is None else cases.value,
        splits=splits,
        track=None if no_track else track,
    )
    if json:
        typer.echo((out / "summary.json").read_text(encoding="utf-8"))
    else:
        print_scores(result)
        say(f"Per-case table: {out / 'cases.csv'}")


@app.command()
def report(
    evaluation: Annotated[Path, typer.Option(help="Output folder of medseg evaluate.")],
    out: Annotated[Path, typer.Option(help="Folder for the page.")],
    against: Annotated[Path | None, typer.Option(help="Another evaluation of the same cases, to compare with.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Folder of masks that were scored: adds pictures.")] = None,
    reference: Annotated[Path | None, typer.Option(help="What they were scored against: adds pictures.")] = None,
    splits: Splits = None,
) -> None:
    """Write a study report as one offline page.

    Example: medseg report --evaluation scores --predictions masks --reference data_specs/hippocampus.yaml --out report
    """
    from medseg import api

    page = api.report(evaluation, out=out, against=against, predictions=predictions, reference=reference, splits=splits)
    say(f"Page: {page}")


@app.command()
def retrain(
    config: Annotated[Path, typer.Argument(help="YAML of the job, see pipelines/retraining.example.yaml.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    json: Json = False,
) -> None:
    """One tick of scheduled retraining: a new model is promoted only if it is proven better.

    Exit codes: 0 promoted, 10 trained but not promoted, 20 no new data, 1 error.

    Example: medseg retrain retraining.yaml
    """
    from medseg import api

    result = api.retrain(config, dry_run=dry_run, display=display(json))
    typer.echo(as_json(result.to_dict()) if json else result.describe())
    raise typer.Exit(result.exit_code)


@app.command()
def listen(config: Annotated[Path, typer.Argument(help="YAML, see pipelines/listen.example.yaml.")]) -> None:
    """Receive studies by DICOM C-STORE, segment each when it is quiet, send the results; SIGTERM ends it in order.

    Example: medseg listen listen.yaml
    """
    import logging
    import signal
    from threading import Event

    from medseg import api

    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stdout, level=logging.WARNING)
    logging.getLogger("medseg").setLevel(logging.INFO)
    api.listen(config, stop=stop)


app.add_typer(models, name="models")


@app.command()
def info(json: Json = False) -> None:
    """Versions, devices, memory and the tables of kinds (networks, losses, readers, ...).

    Example: medseg info --json
    """
    from medseg.info import gather

    facts = gather()
    if json:
        typer.echo(as_json(facts))
        return
    for key, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        say(f"{key}: {text}")


def main(application: typer.Typer = app) -> None:
    """Run the command line (or a pipeline's); a MedsegError becomes a message and an exit code."""
    try:
        application()
    except MedsegError as error:
        if os.environ.get("MEDSEG_DEBUG"):
            raise
        lines = "\n".join(map(legible, f"Error [{error.code}]: {error}".split("\n")))
        errors.print(lines, highlight=False, markup=False, soft_wrap=True)
        sys.exit(2 if type(error) is ConfigError else TRY_AGAIN if isinstance(error, Stopped) else 1)
    except (KeyboardInterrupt, SystemExit) as end:
        # typer turns Ctrl-C into a silent exit with this code
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        errors.print("Interrupted; the same command goes on from here.", highlight=False)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
