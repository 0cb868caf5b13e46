"""The train command: dataset -> fingerprint -> plan -> cache -> folds -> bundle -> validation table -> tracking.

    RUN/1_dataset.json  2_cases.json  2_fingerprint.json  3_plan.yaml  4_cache/
        5_folds/<k>/{checkpoint,curves,validation}/  6_model/ (the bundle)  7_report/ (tables, overlays)

Each stage is skipped when its artefact is there, so that the same command goes on where a killed one stopped.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from medseg.bundle import MODEL_FILE, Bundle, make_network, open_bundle
from medseg.device import best_device, repeatable
from medseg.display import Display, clock
from medseg.errors import ConfigError, PlanError, TrainingError
from medseg.files import write_json
from medseg.joining import load_datasets
from medseg.losses import LOSSES
from medseg.parallel import added, joined
from medseg.planning.budget import duration
from medseg.planning.fingerprint import CaseFacts, Fingerprint, survey
from medseg.planning.limits import refuse_large_patch
from medseg.planning.plan import Plan, override, read_plan, write_plan
from medseg.preparation.cache import CaseCache, prepare_cases
from medseg.preparation.path import training_path, up_to_cache
from medseg.spec import Case, Dataset
from medseg.tracking import Tracker, start
from medseg.training.choose_schedule import choose_schedule
from medseg.training.copies import one_patient, without_leaks
from medseg.training.finish import finish_run
from medseg.training.folds import Fold, balanced, make_folds, refuse_leaks, the_fold
from medseg.training.loop import Job, fit
from medseg.training.manifest import learning_cases, make_manifest
from medseg.training.plan_from import plan_training
from medseg.training.record import MANIFEST, complete_manifest, note_environment, recorded_threads
from medseg.training.refusals import refuse_empty_training, refuse_too_few, say_absent_labels, say_datasets
from medseg.training.replay import compared, told, warning
from medseg.training.request import Request, complete, open_run, read_json, taken
from medseg.training.reserve import FIXED_SECONDS, Reserve, measure_reserve
from medseg.training.reserve import told as told_reserve
from medseg.training.schedule import Followed
from medseg.training.start import as_started, choose_weights, image_digests, keep_start, kept_start, open_start
from medseg.training.start_told import say_start
from medseg.training.state import LoopState, job_digest, load_state
from medseg.training.watch import Watch

FACTS = "2_cases.json"
"""Of a run folder: case id -> CaseFacts."""


@dataclass(frozen=True)
class TrainResult:
    """How a training ended.

    Attributes
    ----------
    run : the run folder.
    model : the bundle's folder.
    dice : label -> mean validation Dice of the final networks, on the source grids.
    steps : steps done, over all folds.
    seconds : wall time of the command.
    identical : of a replay: whether its weights are those of the run that it repeats, to the bit.
    """

    run: Path
    model: Path
    dice: dict[str, float]
    steps: int
    seconds: float
    identical: bool | None = None


def train(
    datasets: Path | Sequence[Path],
    *,
    out: Path,
    request: Request,
    splits: Path | None = None,
    began: float | None = None,
    track: Path | None = None,
    model_name: str | None = None,
    display: Display | None = None,
) -> TrainResult:
    """Train on the training cases of a dataset (or of several) and write a model that predicts.

    Parameters
    ----------
    datasets : one, or several that are learnt together (see medseg.joining).
    out : run folder; an unfinished run of the same request in it is resumed, a finished one is returned.
    request : budget or steps, folds, seed, ...
    began : time.monotonic() at which the budget began (process start for the command line); now unless told.
    track : folder of the MLflow store; None tracks nothing.
    model_name : name in the model registry, with alias "candidate"; the dataset's name unless told.

    Raises
    ------
    ConfigError : the model name is not one that the registry takes.
    SpecError, TrainingError, PlanError : the data, the request or the run folder do not fit; the message says what.
    """
    request = complete(request)
    paths = (datasets,) if isinstance(datasets, Path) else tuple(datasets)
    with joined() as place, repeatable(request.deterministic, threads=recorded_threads(out, request)):
        if place.rank:
            return _follow(paths, out=out, request=request, splits=splits)
        return _lead(
            paths,
            out=out,
            request=request,
            splits=splits,
            began=time.monotonic() if began is None else began,
            track=track,
            model_name=model_name,
            display=display or Display(None),
        )


def _lead(
    paths: Sequence[Path],
    *,
    out: Path,
    request: Request,
    splits: Path | None,
    began: float,
    track: Path | None,
    model_name: str | None,
    display: Display,
) -> TrainResult:
    """Train as the first (or only) process, which decides and writes everything."""
    if re.search(r"[/:]", model_name or ""):
        raise ConfigError(f"--name {model_name}: the registry allows neither / nor : in the name of a model")
    dataset = load_datasets(paths, splits=splits)
    refuse_leaks(dataset.cases)
    cases = learning_cases(dataset)
    refuse_too_few(cases, request)
    with display, ExitStack() as held:
        say_datasets(display, cases, without_mask=len(dataset.select("train")) - len(cases))
        manifest = make_manifest(dataset)
        cases = without_leaks(dataset, cases, manifest, display)
        origin = open_start(request, dataset.spec)
        open_run(out, manifest, request, None if origin is None else origin.info.digest)
        if (out / "6_model" / MODEL_FILE).exists() and (out / "done.json").exists():
            display.say(f"{out}: this training is complete; nothing to do")
            _call_others(to_work=False)
            return _result(out, began)
        held.enter_context(taken(out))
        keep_start(out, origin)
        work = _Work(dataset, cases, out, request, manifest["digest"], began, display, best_device())
        work.note_environment()
        fingerprint = work.fingerprint()
        say_absent_labels(display, fingerprint)
        plan = work.plan(fingerprint)
        with start(
            track or out,
            experiment=dataset.spec.name,
            run_name=out.resolve().name,
            run_id=_previous_run(out),
            enabled=track is not None,
        ) as tracker:
            write_json(out / "tracking.json", {"run_id": tracker.run_id})
            _track_plan(tracker, plan, manifest, out)
            jobs = work.jobs(plan)
            refuse_empty_training(jobs)
            say_start(jobs, dataset, display)
            _call_others(to_work=True)
            states = work.fit_all(jobs, tracker)
            name, hurry = model_name or dataset.spec.name, request.budget is not None
            bundle = finish_run(out, jobs, states, manifest["digest"], tracker, name, display, hurry=hurry)
            replay = None if request.replay is None else compared(request.replay, jobs, states)
            complete_manifest(out, manifest, request, jobs, states, bundle.info, replay=replay)
            tracker.artifact(out / MANIFEST)
            if replay is not None:
                display.say(told(replay))
        write_json(out / "done.json", {"steps": sum(state.step for state in states)})
        _call_others(to_work=False)
        return _result(out, began)


def _call_others(*, to_work: bool) -> bool:
    """Let the other processes, which wait here until all is prepared, take part or end; they are told which."""
    return added([to_work])[0] > 0


def _follow(paths: Sequence[Path], *, out: Path, request: Request, splits: Path | None) -> TrainResult:
    """Take part in the training of the first process; nothing is decided and nothing written."""
    began = time.monotonic()
    if _call_others(to_work=False):
        dataset = load_datasets(paths, splits=splits)
        manifest = make_manifest(dataset)
        cases = one_patient(dataset, learning_cases(dataset), manifest)
        work = _Work(dataset, cases, out, request, manifest["digest"], began, Display(None), best_device())
        for job in work.jobs(read_plan(out / "3_plan.yaml")):
            if not job.checkpoint.with_name("finished.json").exists():
                fit(job, lambda state: Followed())
        _call_others(to_work=False)  # wait for the model
    return _result(out, began)


def _previous_run(out: Path) -> str | None:
    file = out / "tracking.json"
    return read_json(file).get("run_id") if file.exists() else None


def _track_plan(tracker: Tracker, plan: Plan, manifest: dict[str, Any], out: Path) -> None:
    values = plan.model_dump(mode="json", exclude={"fingerprint"})
    tracker.params({"plan": values})
    tracker.tags({"plan_digest": plan.digest, "dataset_digest": manifest["digest"]})
    tracker.dataset(manifest["name"], manifest["digest"], "training")
    tracker.artifact(out / "3_plan.yaml")
    tracker.artifact(out / "2_fingerprint.json")


def _result(out: Path, began: float) -> TrainResult:
    bundle: Bundle = open_bundle(out)
    facts = bundle.info.training
    replay = read_json(out / MANIFEST).get("replay", {}) if (out / MANIFEST).exists() else {}
    seconds = time.monotonic() - began
    return TrainResult(out, bundle.folder, dict(facts["dice"]), int(facts["steps"]), seconds, replay.get("identical"))


@dataclass(frozen=True)
class _Work:
    """One training in progress."""

    dataset: Dataset
    cases: tuple[Case, ...]
    out: Path
    request: Request
    data_digest: str
    began: float
    display: Display
    device: torch.device

    def note_environment(self) -> None:
        """Note where this run is made, and say what that means for its bits."""
        note_environment(self.out, self.device, self.request)
        if self.request.deterministic and self.request.budget is not None:
            self.display.say("--deterministic: the clock decides the number of steps; --replay repeats them")
        if self.request.replay is not None and (text := warning(self.request.replay, self.device)):
            self.display.say(text)

    def fingerprint(self) -> Fingerprint:
        """Take the fingerprint, or read the one taken before."""
        file = self.out / "2_fingerprint.json"
        if file.exists():
            return Fingerprint.model_validate(read_json(file))
        self.display.stage("reading")
        fingerprint, facts = survey(self.dataset.spec, self.cases, progress=self._counted)
        write_json(self.out / FACTS, {name: row.model_dump(mode="json") for name, row in facts.items()})
        write_json(file, fingerprint.model_dump(mode="json"))
        return fingerprint

    def plan(self, fingerprint: Fingerprint) -> Plan:
        """Make 3_plan.yaml, or read the one made before (or given)."""
        file, origin = self.out / "3_plan.yaml", kept_start(self.out)
        if file.exists():
            plan = as_started(read_plan(file), self.dataset.spec, origin)
            refuse_large_patch(plan, fingerprint)  # it may have been edited
            return plan
        if self.request.plan or self.request.replay:
            given = self.request.plan or (self.request.replay or Path()) / "3_plan.yaml"
            plan = override(read_plan(given), self.request.settings)
            plan, reasons = as_started(plan, self.dataset.spec, origin), dict[str, str]()
        else:
            self.display.stage("measuring step times")
            plan, reasons = plan_training(self.dataset, fingerprint, self.request, self.device, origin)
        if self.request.steps is not None:  # --set steps= may say another number, too
            plan = plan.model_copy(update={"steps": self.request.steps})
        if self.request.epochs is not None:
            plan = plan.model_copy(update={"steps": self._steps_of_epochs(plan, self.request.epochs)})
        if plan.monai is not None or (plan.nnunet is not None and origin is None):
            raise PlanError("this is the plan of an imported model: it predicts, and does not say how to train")
        # Before the plan is kept: a name that no table holds must not become part of the run.
        if list(plan.normalisation) != list(self.dataset.spec.channels):
            raise PlanError(
                f"the plan normalises the channels {', '.join(plan.normalisation)}, the dataset has "
                f"{', '.join(self.dataset.spec.channels)}; name them in this order"
            )
        refuse_large_patch(plan, fingerprint)
        make_network(self.dataset.spec, plan)
        LOSSES[plan.loss]
        write_plan(file, plan, reasons)
        return plan

    def _steps_of_epochs(self, plan: Plan, epochs: int) -> int:
        """Return the steps in which the largest fold's cases have all been seen `epochs` times."""
        largest = max(len(fold.train) for fold in self._folds(plan.seed))
        return math.ceil(epochs * largest / plan.batch_size)

    def _folds(self, seed: int) -> list[Fold]:
        """Return the folds to be trained."""
        made = make_folds(self.cases, folds=self.request.folds, seed=seed, facts=self._facts())
        folds = [balanced(fold) for fold in made]
        return folds if self.request.fold is None else [the_fold(folds, self.request.fold)]

    def _facts(self) -> dict[str, CaseFacts]:
        """Return what is known of each case; nothing in a run that was begun before it was kept: its folds stay."""
        file = self.out / FACTS
        if not file.exists():
            return {}
        try:
            return {name: CaseFacts.model_validate(row) for name, row in read_json(file).items()}
        except ValidationError as error:
            raise TrainingError(f"{file}: damaged ({error}); choose another --out") from error

    def jobs(self, plan: Plan) -> list[Job]:
        """Prepare all cases and describe each network to train."""
        folds = self._folds(plan.seed)
        cache = CaseCache(self.out / "4_cache", self.dataset.spec, plan)
        path = training_path(self.dataset.spec, plan, cache)
        self.display.stage("preparing")
        prepare_cases(up_to_cache(path), cache, self.cases, progress=self._counted)
        origin = kept_start(self.out)
        return [self._job(plan, fold, path, cache, origin) for fold in folds]

    def _job(self, plan: Plan, fold: Fold, path: Any, cache: CaseCache, origin: Bundle | None) -> Job:
        place = self.out / "5_folds" / str(fold.number)
        images = image_digests(self.out)
        validation = [images[case.id] for case in fold.validation if case.id in images]
        return Job(
            spec=self.dataset.spec,
            plan=plan,
            path=path,
            cache=cache,
            train=fold.train,
            validation=fold.validation,
            checkpoint=place / "checkpoint" / "state.safetensors",
            digest=job_digest(plan.digest, self.data_digest, fold.number, [c.id for c in fold.train]),
            device=self.device,
            images=images,
            start=None if origin is None else choose_weights(origin, fold.number, validation),
        )

    def fit_all(self, jobs: list[Job], tracker: Tracker) -> list[LoopState]:
        """Train one network after the other, sharing what is left of the budget."""
        self._refuse_spent_budget()
        reserve = self._reserve(jobs)
        states: list[LoopState] = []
        earlier = 0.0
        for number, job in enumerate(jobs):
            done = job.checkpoint.with_name("finished.json")
            if done.exists():
                states.append(load_state(job.checkpoint, job=job.digest))
                earlier += states[-1].seconds
                continue
            left = len(jobs) - number
            schedule = choose_schedule(
                job, self.request, began=self.began, reserve=reserve, networks_left=left, earlier=earlier
            )
            self.display.stage(f"training fold {number + 1} of {len(jobs)}" if len(jobs) > 1 else "training")
            watch, began = Watch(self.display, tracker, job, number, len(jobs)), time.monotonic()
            states.append(watch.ended(fit(job, schedule, watch=watch)))
            earlier += max(0.0, states[-1].seconds - (time.monotonic() - began))  # before this process took it up
            write_json(done, {"steps": states[-1].step})
        return states

    def _reserve(self, jobs: list[Job]) -> Reserve:
        """Measure, under a budget, what the end will need, and say it."""
        if self.request.budget is None:
            return Reserve()
        reserve = measure_reserve(jobs, self.request.budget)
        left = self.began + self.request.budget - time.monotonic()
        self.display.say(told_reserve(reserve, left, cases=sum(len(job.validation) for job in jobs)))
        return reserve

    def _counted(self, done: int, total: int) -> None:
        """Show how far a stage before the training is; end it when the budget is over."""
        self.display.counted(done, total)
        self._refuse_spent_budget()

    def _refuse_spent_budget(self) -> None:
        """Raise if nothing was learnt yet and the time is over: one step would not make a model."""
        spent = time.monotonic() - self.began
        begun = any((self.out / "5_folds").glob("*/checkpoint/*.safetensors"))
        if self.request.budget and spent >= self.request.budget and not begun:
            raise TrainingError(
                f"the budget of {clock(self.request.budget)} was over before the first step: reading, measuring and "
                f"preparing took {clock(spent)} on this machine so far; give --budget "
                f"{duration(2 * spent + FIXED_SECONDS)} or more, and another --out",
                code="BUDGET_TOO_SMALL",
            )
