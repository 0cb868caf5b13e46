"""The journey as plain functions; the verbs of the command line are the same words.

Each takes paths and keyword options and returns a small frozen result. Heavy libraries are imported when a function
that needs them is called.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medseg.display import Display
from medseg.duration import training_length
from medseg.errors import ConfigError

if TYPE_CHECKING:
    from threading import Event

    from medseg.batch.engines import Workers
    from medseg.batch.run import BatchResult
    from medseg.bundle import BundleInfo
    from medseg.checking.run import CheckResult
    from medseg.checking.tree import TreeResult
    from medseg.evaluation.table import Evaluation
    from medseg.planning.plan import Plan
    from medseg.retraining import RetrainResult
    from medseg.training.run import TrainResult

PathLike = str | Path
Datasets = PathLike | Sequence[PathLike]
"""One dataset, or several that are learnt together."""


def check(
    dataset: PathLike,
    *,
    splits: PathLike | None = None,
    out: PathLike | None = None,
    read: bool = False,
    display: Display | None = None,
) -> CheckResult | TreeResult:
    """Tell whether a dataset is fit to learn from; with `out`, also as a page and as JSON.

    A folder of DICOM studies that is no dataset is listed instead: what lies in it, and what of it is usable; with
    `read` by decoding the pixels, too.

    Raises
    ------
    SpecError : `dataset` is no dataset.
    ConfigError : `read` for a dataset, whose images are always read; `splits` for a folder of studies.
    """
    from medseg.checking.run import check as run
    from medseg.checking.tree import check_tree, is_tree

    if is_tree(Path(dataset)):
        if splits is not None:
            raise ConfigError(f"splits are for datasets, and {dataset} has no dataset.yaml or dataset.json")
        with display or Display(None) as shown:
            shown.stage("checking")
            return check_tree(Path(dataset), read=read, out=_path(out), progress=shown.counted)
    if read:
        raise ConfigError("read is for folders of studies: the images of a dataset are always read")
    with display or Display(None) as shown:
        shown.stage("checking")
        return run(Path(dataset), splits=_path(splits), out=_path(out), progress=shown.counted)


def plan(  # noqa: PLR0913 - the options of the command are the parameters of the function
    dataset: Datasets,
    *,
    out: PathLike | None = None,
    budget: str | float | None = None,
    steps: int | None = None,
    settings: Sequence[str] = (),
    splits: PathLike | None = None,
    seed: int = 0,
    from_model: PathLike | None = None,
    display: Display | None = None,
) -> Plan:
    """Take the fingerprint of the training cases, measure this machine and plan; with `out`, write the YAML.

    `from_model` as for `train`.

    Raises
    ------
    SpecError, PlanError : the data cannot be used, or no plan fits the budget.
    """
    from medseg.device import best_device
    from medseg.joining import load_datasets
    from medseg.planning.fingerprint import take_fingerprint
    from medseg.planning.plan import write_plan
    from medseg.training.manifest import learning_cases
    from medseg.training.plan_from import plan_training
    from medseg.training.refusals import say_absent_labels
    from medseg.training.request import Request
    from medseg.training.start import open_start

    display = display or Display(None)
    length = training_length(budget=budget, steps=steps)
    request = Request(budget=length, steps=steps, settings=tuple(settings), seed=seed, from_model=_path(from_model))
    found = load_datasets(_paths(dataset), splits=_path(splits))
    start = open_start(request, found.spec)
    with display:
        display.stage("reading")
        fingerprint = take_fingerprint(found.spec, learning_cases(found), progress=display.counted)
        say_absent_labels(display, fingerprint)
        display.stage("measuring step times")
        made, reasons = plan_training(found, fingerprint, request, best_device(), start)
    if out is not None:
        write_plan(Path(out), made, reasons)
    return made


def train(  # noqa: PLR0913 - the options of the command are the parameters of the function
    dataset: Datasets,
    *,
    out: PathLike,
    budget: str | float | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    folds: int | None = None,
    fold: int | None = None,
    network: str | None = None,
    settings: Sequence[str] = (),
    splits: PathLike | None = None,
    seed: int = 0,
    plan: PathLike | None = None,
    replay: PathLike | None = None,
    from_model: PathLike | None = None,
    deterministic: bool = False,
    track: PathLike | None = None,
    model_name: str | None = None,
    began: float | None = None,
    display: Display | None = None,
) -> TrainResult:
    """Train on a dataset within a budget (default 1h), or for a number of steps or epochs.

    Parameters
    ----------
    dataset : one, or a list of several whose labels may differ (docs/how-to/several-datasets.md).
    out : run folder; the same call resumes an unfinished run in it.
    budget : wall time of the whole call, as seconds or "10m".
    folds, fold : cross-validation with one network a fold; or only that fold.
    settings : "KEY=VALUE" changes of the plan.
    splits : file with lists `train` and `test` of case ids.
    plan : a plan.yaml to follow instead of making one.
    replay : a finished run whose steps are repeated one by one; the result tells whether its weights came out again.
    deterministic : the same call gives the same bits, see docs/how-to/reproduce.md.
    from_model : fine-tuning: a run folder, bundle or model of nnU-Net v2 whose weights the training begins with.
    track : folder of the MLflow store (see medseg.tracking); None tracks nothing.
    began : time.monotonic() from which the budget counts; now unless told.

    Raises
    ------
    ConfigError : options that exclude each other.
    SpecError, PlanError, TrainingError : the data, the plan or the run folder do not fit.
    """
    from medseg.training.request import Request
    from medseg.training.run import train as run

    began = time.monotonic() if began is None else began
    length = training_length(budget=budget, steps=steps, epochs=epochs, replay=replay)
    given = {"folds": folds, "fold": fold, "network": network, "settings": settings or None, "plan": plan}
    given["from_model"] = from_model
    if replay is not None and (others := [name for name, value in given.items() if value is not None]):
        raise ConfigError(f"replay repeats a run with its own options; leave out {', '.join(others)}")
    request = Request(
        budget=length,
        steps=steps,
        epochs=epochs,
        folds=folds,
        fold=fold,
        network=network,
        settings=tuple(settings),
        seed=seed,
        plan=_path(plan),
        replay=_path(replay),
        deterministic=deterministic,
        from_model=_path(from_model),
    )
    return run(
        _paths(dataset),
        out=Path(out),
        request=request,
        splits=_path(splits),
        began=began,
        track=_path(track),
        model_name=model_name,
        display=display,
    )


def predict(  # noqa: PLR0913 - the options of the command are the parameters of the function
    *inputs: PathLike,
    model: PathLike,
    out: PathLike,
    mirror: bool | None = None,
    quality: str = "exact",
    cases: Literal["test", "train", "all"] | None = None,
    splits: PathLike | None = None,
    formats: Sequence[str] = (),
    send: Sequence[str] = (),
    channels: PathLike | None = None,
    allow: Sequence[str] = (),
    postprocess: bool = True,
    workers: Workers | int | None = None,
    shard: str = "",
    max_memory: str | int | None = None,
    display: Display | None = None,
) -> BatchResult:
    """Segment files, series folders, trees of studies or the cases of a dataset into ``OUT/<id>.nii.gz``.

    Parameters
    ----------
    inputs : paths, or addresses of archives (``dicomweb://HOST:PORT/PATH?StudyDate=20260101-``).
    quality : "exact" (as planned), "balanced" or "fast", see medseg.inference.presets; `mirror` comes first.
    formats : of the results, names of medseg.exporters.EXPORTERS (NIfTI, and for pictures their own kind, unless told);
        "seg" gives ``OUT/<id>.seg.dcm``.
    send : addresses of archives that get the results as DICOM.
    channels : YAML file with the rules (`match`) that find the model's channels in DICOM studies, instead of its own.
    allow : "tilt", "irregular": DICOM series with such a fault are corrected by resampling instead of refused.
    postprocess : False leaves the masks as the network made them, without the steps that the model brings along.
    workers : how many processes of their own do the studies (or a medseg.batch.engines.Workers with limits), so that
        one that crashes, hangs or takes too much memory costs itself only. None: this process, as for archives.
    max_memory : "4GiB": what one process may take for a prediction; images are cut into tiles for it, with the very
        same masks. Not for archives.
    shard : "2/8": only the second of eight parts of the studies; other commands do the others into the same OUT.

    Raises
    ------
    ConfigError, BatchError, BundleError, ExportError : nothing to do, no usable model, an archive does not answer, or
        OUT cannot be written.
    """
    from medseg.batch.engines import Workers
    from medseg.batch.run import predict as predict_files
    from medseg.batch.shards import Shard, parse_shard
    from medseg.bundle import open_bundle
    from medseg.inference.chosen import ruled, speaking, unprocessed
    from medseg.inference.describe import described
    from medseg.inference.presets import at_quality
    from medseg.pacs.address import is_address
    from medseg.readers.allowances import choose_allowances
    from medseg.sizes import size

    display = display or Display(None)
    options: dict[str, Any] = {"mirror": mirror, "choice": cases, "splits": _path(splits), "formats": formats}
    options["allow"] = choose_allowances(allow)
    with display:
        display.stage("predicting")
        archives = bool(send) or any(is_address(place) for place in inputs)
        bundle = open_bundle(Path(model)) if archives or workers is None else described(Path(model))
        bundle = bundle if channels is None else ruled(bundle, Path(channels))
        chosen = speaking(at_quality(bundle if postprocess else unprocessed(bundle), quality), display.say)
        options |= {"model": chosen, "out": Path(out), "progress": display.counted}
        if archives:
            from medseg.pacs.predict import predict as predict_archives

            return predict_archives(inputs, send=send, **options)
        options["workers"] = Workers(workers) if isinstance(workers, int) else workers
        options.pop("progress")
        options["warn"] = display.say
        options["watch"] = lambda status: display.show(status.share, status.text)
        options["shard"] = parse_shard(shard) if shard else Shard()
        options["max_memory"] = size(max_memory) if isinstance(max_memory, str) else max_memory
        return predict_files([Path(place) for place in inputs], **options)


def import_model(folder: PathLike, *, out: PathLike, folds: Sequence[str] = (), precision: str = "fp32") -> BundleInfo:
    """Make a bundle in `out` of a model folder of nnU-Net v2 (TRAINER__PLANS__CONFIGURATION) or of a MONAI bundle.

    Parameters
    ----------
    folds : of nnU-Net's, "0", "1", ... or "all"; unless told, every numbered fold, or `all` where there is no other.
    precision : arithmetic of the network, "fp32" or "bf16".

    Raises
    ------
    ConfigError : `out` holds a bundle already; another precision.
    BundleError : `folder` is no such model, is damaged, or needs what is not supported.
    """
    from medseg.bundle import import_bundle

    return import_bundle(Path(folder), Path(out), folds=folds, precision=precision).info


def evaluate(
    predictions: PathLike,
    reference: PathLike,
    *,
    out: PathLike,
    cases: Literal["test", "train", "all"] | None = None,
    splits: PathLike | None = None,
    track: PathLike | None = None,
) -> Evaluation:
    """Score predictions against a dataset or a folder of masks; with `track`, log the table to the model's run.

    Raises
    ------
    ConfigError, SpecError, ReadError, GeometryError : see medseg.evaluation.evaluate.
    """
    from medseg.evaluation.evaluate import evaluate as run
    from medseg.evaluation.tracked import track_evaluation

    evaluation = run(Path(predictions), Path(reference), out=Path(out), splits=_path(splits), split=cases)
    if track is not None:
        track_evaluation(evaluation, Path(predictions), Path(out), store=Path(track))
    return evaluation


def report(
    evaluation: PathLike,
    *,
    out: PathLike,
    against: PathLike | None = None,
    predictions: PathLike | None = None,
    reference: PathLike | None = None,
    splits: PathLike | None = None,
) -> Path:
    """Write the study report of an evaluation as one offline page; returns its path.

    Parameters
    ----------
    evaluation, against : output folders of evaluate; with `against` the page compares both case by case.
    predictions, reference, splits : what was scored; given, the page shows pictures of its worst and a typical case.

    Raises
    ------
    ConfigError : `evaluation` (or `against`) is not the output folder of evaluate; only one of `predictions` and
        `reference` is given.
    """
    from medseg.evaluation.pictures import case_pictures
    from medseg.evaluation.report import report as run

    if (predictions is None) != (reference is None):
        raise ConfigError("pictures of cases need both: predictions and the reference that they were scored against")
    picture = None
    if predictions is not None and reference is not None:
        picture = case_pictures(Path(predictions), Path(reference), splits=_path(splits))
    return run(Path(evaluation), out=Path(out), against=_path(against), picture=picture)


def retrain(config: PathLike, *, dry_run: bool = False, display: Display | None = None) -> RetrainResult:
    """Do one tick of the retraining job: train on new data, promote the model only if it is proven better.

    Raises
    ------
    ConfigError, TrainingError, BundleError : the configuration or the data do not fit.
    """
    from medseg.retraining.tick import retrain as run

    return run(Path(config), dry_run=dry_run, display=display)


def listen(config: PathLike, *, stop: Event | None = None) -> None:
    """Receive studies by C-STORE, segment them and send the results, until `stop` is set; see medseg.pacs.listen.

    Raises
    ------
    ConfigError, BatchError, BundleError, ExportError : the configuration, the model or the port cannot be used; another
        receiver has the inbox; a folder cannot be written.
    """
    from threading import Event

    from medseg.bundle import open_bundle
    from medseg.inference.chosen import ruled
    from medseg.inference.predict import load_model
    from medseg.inference.presets import at_quality
    from medseg.pacs import need
    from medseg.pacs.listen import listen as run
    from medseg.pacs.settings import load_settings

    settings = load_settings(Path(config))
    need("pynetdicom")
    bundle = open_bundle(local_model(settings.model, track=settings.track))
    bundle = bundle if settings.channels is None else ruled(bundle, settings.channels)
    run(settings, load_model(at_quality(bundle, settings.quality)), stop or Event())


def local_model(model: PathLike, *, track: PathLike) -> Path:
    """Return the folder of a model; "models:/NAME@ALIAS" is fetched once from the registry of the store in `track`.

    Raises
    ------
    ConfigError, BundleError : the store does not answer; there is no such model.
    """
    if not str(model).startswith("models:/"):
        return Path(model)
    from medseg.tracking import fetch

    return fetch(Path(track), str(model), Path(track) / "models")


def _path(value: PathLike | None) -> Path | None:
    return None if value is None else Path(value)


def _paths(datasets: Datasets) -> tuple[Path, ...]:
    return (Path(datasets),) if isinstance(datasets, str | Path) else tuple(map(Path, datasets))
