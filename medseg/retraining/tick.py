"""One tick of the retraining job: safe to repeat at any time, after success, refusal or a crash.

The tick is named by the digests of data, gate and settings. Each stage leaves its artefact and is skipped when that is
there: WORK/runs/<run> (training), WORK/gate/<gate>/<model> (predictions and scores), the line in decisions.jsonl.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medseg.batch.run import predict
from medseg.bundle import open_bundle
from medseg.display import Display
from medseg.duration import seconds
from medseg.errors import RetrainingError
from medseg.evaluation.compare import Comparison, compare
from medseg.evaluation.evaluate import evaluate
from medseg.evaluation.report import REPORT, report
from medseg.evaluation.table import Evaluation
from medseg.evaluation.tracked import track_evaluation
from medseg.files import digest
from medseg.retraining.decisions import Decision, locked, read_decisions
from medseg.retraining.job import TickJob, count_new, keep_manifest, open_job, refuse_known_gate, refuse_leaks
from medseg.retraining.promotion import (
    CHALLENGER,
    CHAMPION,
    current_aliases,
    move,
    promoted,
    store_locked,
    unfinished,
)
from medseg.retraining.result import RetrainResult, result_of
from medseg.retraining.rule import Check, judge, judge_first
from medseg.retraining.settings import load_settings
from medseg.tracking import fetch, list_versions, start
from medseg.training.request import Request
from medseg.training.run import train
from medseg.training.start import FOLDER as START
from medseg.training.start import kept_start, single

TICK = "tick"


@dataclass(frozen=True)
class Candidate:
    """A model that stands for promotion or holds the place: its bundle, digest, version and gate scores."""

    model: Path
    digest: str
    version: int
    scores: Path


def retrain(config: Path, *, dry_run: bool = False, display: Display | None = None) -> RetrainResult:
    """Train on new data and promote the model if the declared rule is met.

    Parameters
    ----------
    config : YAML, see medseg.retraining.settings.RetrainConfig.
    dry_run : only say what would be done: nothing is trained, decided or moved.

    Raises
    ------
    ConfigError, SpecError : the settings or the data are wrong.
    RetrainingError : GATE_* (the gate is not sound), LOCKED, LOG_TAMPERED, DATA_CHANGED, CHAMPION_MOVED.
    TrainingError, PlanError, BundleError : the training cannot start or go on; a model is damaged.
    """
    settings = load_settings(config)
    with locked(settings.work / "tick.lock", seconds=0, what="doing a tick of this job"):
        job = open_job(settings)
        before = unfinished(read_decisions(settings.store))
        if not dry_run:
            with store_locked(settings.store):
                pass  # completes what a killed command had decided
        decisions = read_decisions(settings.store)
        for decision in before:
            if decision.content.get("tick") == job.key and not dry_run:
                return result_of(decision, _page(job))
        idle = _nothing_to_do(job, decisions)
        if idle is not None:
            return idle
        refuse_leaks(job)
        if dry_run:
            return _would_train(job, decisions)
        return _tick(job, decisions, display or Display(None))


def _nothing_to_do(job: TickJob, decisions: Sequence[Decision]) -> RetrainResult | None:
    """Return the answer where this tick was decided before or too little is new."""
    settings = job.settings
    ticks = _ticks(job, decisions)
    new = count_new(job, ticks[-1] if ticks else None)
    if any(row.content["tick"] == job.key for row in ticks):
        reason = "these data were decided about with these settings before"
    elif new < settings.min_new_cases and (not ticks or _asks(job) == _asked(ticks[-1])):
        reason = f"{new} new training case(s), {settings.min_new_cases} are needed"
    else:
        return None
    return RetrainResult("no_new_data", settings.name, reason=reason)


def _asks(job: TickJob) -> list[str]:
    return [job.settings.digest, job.gate_digest]


def _asked(decision: Decision) -> list[str]:
    return [decision.content["digests"]["config"], decision.content["digests"]["gate"]]


def _ticks(job: TickJob, decisions: Sequence[Decision]) -> list[Decision]:
    return [row for row in decisions if (row.content["event"], row.content["model"]) == (TICK, job.settings.name)]


def _would_train(job: TickJob, decisions: Sequence[Decision]) -> RetrainResult:
    ticks = _ticks(job, decisions)
    new = count_new(job, ticks[-1] if ticks else None)
    champion = current_aliases(job.settings.store, job.settings.name).get(CHAMPION)
    reason = (
        f"{len(job.sources)} cases, {new} of them new; gate of {len(job.gate.cases)} cases with digest "
        f"{job.gate_digest}; champion: {'none' if champion is None else f'version {champion}'}"
    )
    return RetrainResult("would_train", job.settings.name, former=champion, reason=reason)


def _tick(job: TickJob, decisions: Sequence[Decision], display: Display) -> RetrainResult:
    """Train, score, decide."""
    settings = job.settings
    former = current_aliases(settings.store, settings.name).get(CHAMPION)  # also: is the store alive?
    model = _train(job, _start(job, former, display), display)
    challenger = _candidate(job, model, _register(job, model))
    champion = None if former is None else _fetch(job, former)
    new = _score(job, challenger, display)
    old = None if champion is None else _score(job, champion, display)
    checks, comparison = _judge(job, new, old)
    if champion is not None and new is not None:
        report(challenger.scores, out=_page(job).parent, against=champion.scores)
    content = _content(job, decisions, challenger, champion, checks, comparison)
    keep_manifest(job)
    decision = _decide(job, content, former)
    _note(job, challenger, decision, new)
    return result_of(decision, _page(job))


def _start(job: TickJob, former: int | None, display: Display) -> Path | None:
    """Return the model that the training begins with.

    Of a training that has begun it is the copy in its folder, whoever is the champion now. Of an ensemble of
    configurations, which has no weights of its own, it is the member with the best validation Dice.

    Raises
    ------
    RetrainingError : GATE_LEAK, the champion has learnt from an image of the gate.
    """
    if job.settings.training.start is None:
        return None
    if (job.run / "3_plan.yaml").exists():
        return None if kept_start(job.run) is None else job.run / START
    if former is None:
        return None
    champion = open_bundle(_fetch(job, former).model)
    model = single(champion)
    refuse_known_gate(job, model.info)
    if model is not champion:
        number = champion.members.index(model)
        display.say(
            f"the champion, version {former}, is an ensemble of {len(champion.members)} configurations: the training "
            f"begins with {champion.info.members[number].name}, its member with the best validation Dice"
        )
    return model.folder


def _train(job: TickJob, start: Path | None, display: Display) -> Path:
    """Train in the run folder, or go on there, or find it done; returns the bundle."""
    asked = job.settings.training
    request = Request(
        budget=None if asked.budget is None else seconds(asked.budget),
        steps=asked.steps,
        folds=asked.folds,
        network=asked.network,
        settings=asked.settings,
        seed=job.settings.seed,
        from_model=start,
    )
    result = train(
        job.settings.dataset,
        out=job.run,
        request=request,
        splits=job.settings.splits,
        track=job.settings.store,
        model_name=job.settings.name,
        display=display,
    )
    learnt = json.loads((job.run / "1_dataset.json").read_text(encoding="utf-8"))["digest"]
    if learnt != job.manifest["digest"]:
        raise RetrainingError(
            "the training data changed between the beginning of this tick and its training; run the same command "
            "again: it is another tick",
            code="DATA_CHANGED",
        )
    shutil.rmtree(job.run / "4_cache", ignore_errors=True)  # gigabytes that only training needs
    return result.model


def _register(job: TickJob, model: Path) -> int:
    """Return the version of a trained bundle; it is registered here if the store was dead when training ended."""
    settings, info = job.settings, open_bundle(model).info
    versions = list_versions(settings.store, settings.name)
    known = [row.version for row in versions if row.tags.get("model_digest") == info.digest]
    if known:
        return max(known)
    tags = {"model_digest": info.digest, "dataset_digest": info.dataset_digest}
    with start(settings.store, experiment=info.name, run_name=job.run.name, run_id=info.tracking_run) as tracker:
        version = tracker.register(settings.name, model, tags=tags)
    if version is None:
        raise RetrainingError(
            "the trained model could not be registered in the MLflow store; repair the store, then run the same "
            "command again: it does not train again",
            code="NOT_REGISTERED",
        )
    return version


def _fetch(job: TickJob, version: int) -> Candidate:
    settings = job.settings
    model = fetch(settings.store, f"models:/{settings.name}/{version}", settings.work / "models")
    return _candidate(job, model, version)


def _candidate(job: TickJob, model: Path, version: int) -> Candidate:
    name = open_bundle(model).info.digest
    return Candidate(model, name, version, job.settings.work / "gate" / job.gate_digest[:12] / name[:12] / "scores")


def _score(job: TickJob, candidate: Candidate, display: Display) -> Evaluation | None:
    """Predict the gate and score it; None where not one case could be predicted."""
    gate, out = job.settings.gate, candidate.scores.parent
    with display:
        display.stage(f"gate, version {candidate.version}")
        batch = predict(
            [gate.dataset],
            model=candidate.model,
            out=out,
            choice=gate.cases,
            splits=gate.splits,
            progress=display.counted,
        )
    if not batch.select("done"):
        return None
    return evaluate(out, gate.dataset, out=candidate.scores, splits=gate.splits, split=gate.cases)


def _judge(job: TickJob, new: Evaluation | None, old: Evaluation | None) -> tuple[tuple[Check, ...], Comparison | None]:
    rule = job.settings.rule
    if new is None:
        return (Check("gate cases predicted", 0.0, 1.0, False),), None
    if old is None:
        return judge_first(rule, new), None
    comparison = compare(new, old, metric=rule.metric)
    return judge(rule, comparison), comparison


def _content(
    job: TickJob,
    decisions: Sequence[Decision],
    challenger: Candidate,
    champion: Candidate | None,
    checks: Sequence[Check],
    comparison: Comparison | None,
) -> dict[str, Any]:
    """Return the line of the decision log: numbers and digests, no path, no case."""
    ticks = _ticks(job, decisions)
    rows = [] if comparison is None else [asdict(row) for row in comparison.labels]
    return {
        "event": TICK,
        "model": job.settings.name,
        "tick": job.key,
        "outcome": "promoted" if all(check.passed for check in checks) else "not_promoted",
        "versions": {"challenger": challenger.version, "champion": None if champion is None else champion.version},
        "digests": {
            "dataset": job.manifest["digest"],
            "gate": job.gate_digest,
            "config": job.settings.digest,
            "rule": digest(job.settings.rule.model_dump(mode="json")),
            "challenger": challenger.digest,
            "champion": None if champion is None else champion.digest,
        },
        "counts": {
            "training_cases": len(job.sources),
            "new_cases": count_new(job, ticks[-1] if ticks else None),
            "gate_cases": len(job.gate.cases),
            "gate_patients": len({case.patient for case in job.gate.cases}),
            # the more often one gate has decided, the less it proves
            "gate_used_before": sum(row.content["digests"]["gate"] == job.gate_digest for row in ticks),
        },
        "rule": job.settings.rule.model_dump(mode="json"),
        "checks": [asdict(check) for check in checks],
        "comparison": [{key: value for key, value in row.items() if key != "worst_case"} for row in rows],
    }


def _decide(job: TickJob, content: dict[str, Any], former: int | None) -> Decision:
    """Write the decision and move the aliases, unless somebody else changed the champion meanwhile."""
    settings = job.settings
    with store_locked(settings.store):
        now = current_aliases(settings.store, settings.name)
        if now.get(CHAMPION) != former:
            raise RetrainingError(
                f"model {settings.name}: the champion was version {former} when this tick began and is "
                f"{now.get(CHAMPION)} now; run the same command again to compare with that one",
                code="CHAMPION_MOVED",
            )
        version = content["versions"]["challenger"]
        wanted = promoted(now, version) if content["outcome"] == "promoted" else {CHALLENGER: version}
        return move(settings.store, content, wanted)


def _note(job: TickJob, challenger: Candidate, decision: Decision, evaluation: Evaluation | None) -> None:
    """Add the outcome and the gate scores to the MLflow run that made the challenger."""
    store, info = job.settings.store, open_bundle(challenger.model).info
    if evaluation is not None:
        track_evaluation(evaluation, challenger.scores.parent, challenger.scores, store=store)
    with start(store, experiment=info.name, run_name=job.run.name, run_id=info.tracking_run) as tracker:
        outcome = decision.content["outcome"]
        tracker.tags({"retraining.outcome": outcome, "retraining.decision": decision.sha256})


def _page(job: TickJob) -> Path:
    return job.run / "gate_report" / job.gate_digest[:12] / REPORT
